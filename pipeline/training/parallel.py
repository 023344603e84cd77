"""Which samples of a batch, and which networks of a block, a process trains on.

Usually every process takes each so-many-th sample and all weights, and gradients are averaged. The
networks of one block (`velocity.nets`) have nothing to do with each other under the regressions,
where each sees the samples of its own part of the time and no other: where they divide among the
processes, each process trains its own, with optimisers of their own, and nothing is exchanged but
two numbers a step, until the weights are wanted. The outcome is the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flows.block import Block
from flows.networks.piecewise import PiecewiseVelocity
from pipeline.optim.gradients import average_gradients
from pipeline.runtime.distributed import broadcast_tensor, gather_lists, sum_over_ranks

#: from the times of a batch (B,) to the samples that a process takes of it, int64
Rows = Callable[[Tensor], Tensor]


def every(t: Tensor) -> Tensor:
    """The rows of one process alone: all."""
    return torch.arange(len(t))


class Share:
    """This process's part of the work on a block.

    Args:
        block: in training.
        accelerator: the processes.
        objective: of the block.

    Attributes:
        networks: what has an optimiser of its own: the block, or each of its several networks.
        apart: whether each process trains networks of its own.
        mine: the numbers of those that this process trains.
    """

    def __init__(self, block: Block, accelerator: Accelerator, objective: str) -> None:
        self.accelerator = accelerator
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.networks: list[nn.Module] = [block]
        if isinstance(block.velocity, PiecewiseVelocity) and objective != "jko":
            self.networks = list(block.velocity.nets)
        count = len(self.networks)
        self.apart = self.ranks > 1 and count > 1 and count % self.ranks == 0
        each = count // self.ranks if self.apart else count
        self.mine = range(self.rank * each, (self.rank + 1) * each) if self.apart else range(count)
        self.parameters = [p for j in self.mine for p in self.networks[j].parameters()]

    def freeze_others(self) -> None:
        """Let no network have gradients but this process's own."""
        for j, network in enumerate(self.networks):
            network.requires_grad_(j in self.mine)

    def rows(self, t: Tensor) -> Tensor:
        """Which samples of a batch are this process's, by their times (B,); int64."""
        if not self.apart:
            return torch.arange(self.rank, len(t), self.ranks)
        last = len(self.networks) - 1
        part = (t * len(self.networks)).floor().clamp(0, last)
        return ((part >= self.mine[0]) & (part <= self.mine[-1])).nonzero()[:, 0]

    def finish_gradients(self, weight: float, loss: Tensor, limit: float) -> tuple[float, float]:
        """Make the gradients those of the mean over the whole batch, and clip them.

        Args:
            weight: how many times its even share of the batch this process has.
            loss: mean over its samples (1,); NaN on one process makes it so on all.
            limit: largest norm of the gradient of all weights together.

        Returns:
            that norm before clipping, and the loss of the whole batch.
        """
        if not self.apart:
            mean = average_gradients(self.accelerator, self.parameters, weight, loss)
            return float(nn.utils.clip_grad_norm_(self.parameters, limit)), float(mean)
        gradients = [
            p.grad.mul_(weight / self.ranks) for p in self.parameters if p.grad is not None
        ]
        squared = sum((g.square().sum() for g in gradients), loss.new_zeros(()))
        terms = torch.stack([squared, weight / self.ranks * loss[0]])
        sums = sum_over_ranks(self.accelerator, terms)
        norm = float(sums[0].sqrt())
        for gradient in gradients:
            gradient.mul_(min(1.0, limit / (norm + 1e-6)))
        return norm, float(sums[1])

    def gather(self, tensors: dict[str, Tensor]) -> None:
        """Bring tensors up to date on all processes.

        Args:
            tensors: by the names of the block's parameters; right on the process that trains the
                network they are of, and set in place on the others.
        """
        if self.apart:
            each = len(self.mine)
            for j in range(len(self.networks)):
                names = sorted(name for name in tensors if name.startswith(f"velocity.nets.{j}."))
                for name in names:
                    broadcast_tensor(self.accelerator, tensors[name], j // each)

    def states(self, own: Sequence[Any]) -> list[Any]:
        """The states of all networks' optimisers, on all processes.

        Args:
            own: of all networks, right for those that this process trains.
        """
        if not self.apart:
            return list(own)
        return gather_lists(self.accelerator, [own[j] for j in self.mine])
