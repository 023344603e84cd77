"""Random generators that are pure functions of (seed, stage, step).

No generator state is saved. A resumed run, or a run on another number of processes, therefore
samples the same batches, noise and probes as an uninterrupted run.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from pipeline.errors import UserError


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator that is a pure function of its parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Batches:
    """Batches of `size` of `count` indices; every epoch is a new permutation of all samples.

    The parts are those of the generator's key, such as a seed and a stage.
    """

    def __init__(self, count: int, size: int, *parts: int | str) -> None:
        self.count, self.size, self.parts = count, size, parts
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def indices(self, step: int, rank: int = 0, ranks: int = 1) -> Tensor:
        """Return the indices of this rank in the batch of a step, int64 (size / ranks,).

        The length is rounded up or down, so that the ranks together have `size` indices.

        Raises:
            UserError: there are more ranks than samples in a batch.
        """
        self.require_samples_for_all(ranks)
        position, remaining, chosen = step * self.size, self.size, []
        while remaining:
            epoch, offset = divmod(position, self.count)
            if epoch != self._epoch:
                self._epoch = epoch
                epoch_generator = generator(*self.parts, "order", epoch)
                self._order = torch.randperm(self.count, generator=epoch_generator)
            part = self._order[offset : offset + remaining]
            chosen.append(part)
            position, remaining = position + len(part), remaining - len(part)
        return torch.cat(chosen)[rank::ranks]

    def require_samples_for_all(self, ranks: int) -> None:
        """Raise UserError if a rank gets no sample of a batch; a mean over no sample is NaN."""
        if ranks > self.size:
            raise UserError(
                f"batch_size is {self.size}; expected at least the number of processes ({ranks}); "
                "raise it, or launch fewer processes"
            )
