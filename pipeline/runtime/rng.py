"""Everything random derives from (seed, stage, step): nothing from a saved generator's state.

So a run that was killed and resumed, or that runs on another number of processes, draws the
same batches, the same noise and the same probes as one that was never stopped.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from pipeline.errors import UserError


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator whose stream is a pure function of its parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Batches:
    """Batches of sample indices: every epoch is a fresh permutation, all of it used.

    Args:
        count: samples.
        size: samples a batch.
        parts: what the order derives from, such as a seed and a stage.
    """

    def __init__(self, count: int, size: int, *parts: int | str) -> None:
        self.count, self.size, self.parts = count, size, parts
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def indices(self, step: int, rank: int = 0, ranks: int = 1) -> Tensor:
        """This rank's share of the batch of a step, int64 (size / ranks,), rounded up or down.

        Raises:
            UserError: there are more processes than samples in a batch.
        """
        self.require_a_sample_each(ranks)
        position, wanted, chosen = step * self.size, self.size, []
        while wanted:
            epoch, offset = divmod(position, self.count)
            if epoch != self._epoch:
                self._epoch = epoch
                drawn = generator(*self.parts, "order", epoch)
                self._order = torch.randperm(self.count, generator=drawn)
            part = self._order[offset : offset + wanted]
            chosen.append(part)
            position, wanted = position + len(part), wanted - len(part)
        return torch.cat(chosen)[rank::ranks]

    def require_a_sample_each(self, ranks: int) -> None:
        """Refuse a batch that leaves a process without a sample, whose mean over none is NaN.

        Raises:
            UserError: there are more processes than samples in a batch.
        """
        if ranks > self.size:
            raise UserError(
                f"a batch of {self.size} leaves some of {ranks} processes without a sample; "
                "raise batch_size, or launch fewer processes"
            )
