"""A stand-in for the accelerator of one of several ranks, which records what it averages."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor


class Rank:
    """Stands in for an accelerator.

    Args:
        rank: of the process.
        ranks: number of processes.
        present: sum over ranks that each `reduce(…, "sum")` returns; None returns its input.

    Attributes:
        given: the tensors to average, in order.
    """

    def __init__(self, rank: int, ranks: int, present: list[bool] | None = None) -> None:
        self.present = present
        self.process_index, self.num_processes = rank, ranks
        self.is_main_process, self.device = rank == 0, torch.device("cpu")
        self.state = SimpleNamespace(fsdp_plugin=None)
        self.given: list[Tensor] = []

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        if reduction == "sum":  # a count over ranks
            return tensor if self.present is None else torch.tensor(self.present).to(tensor)
        assert reduction == "mean"
        self.given.append(tensor.detach().clone().flatten())
        return tensor


def mean_of(ranks: list[Rank]) -> Tensor:
    """Compute the averages of all ranks, in one vector."""
    return torch.stack([torch.cat(rank.given) for rank in ranks]).mean(0)
