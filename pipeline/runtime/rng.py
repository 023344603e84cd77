"""Random generators that are pure functions of (seed, stage, step).

No generator state is saved. A resumed run, or a run on another number of processes, therefore
samples the same batches, noise and probes as an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError

#: most samples of which a table of a permutation is kept in memory
TABLE = 1 << 24
_ROUNDS = 8


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator that is a pure function of its parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def normals(rows: Tensor, shape: tuple[int, ...], *parts: int | str) -> Tensor:
    """Return standard normal noise float32 (n, *shape), row by row from counters.

    Noise i is a pure function of the parts and of rows[i], int64 (n,), so any rows can be drawn
    without those before them.

    Reference: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), Philox.
    """
    key = torch.randint(2**62, (2,), generator=generator(*parts)).tolist()
    bits = np.random.Philox(key=np.array(key, dtype=np.uint64))
    source, state = np.random.Generator(bits), bits.state
    noise = np.empty((len(rows), math.prod(shape)), np.float32)
    for out, row in zip(noise, rows.tolist(), strict=True):
        state["state"]["counter"][1] = row  # the first word counts the noise of one row
        bits.state = state
        source.standard_normal(out=out, dtype=np.float32)
    return torch.from_numpy(noise).view(len(rows), *shape)


class Permutation:
    """Permutation of 0 … count − 1 that is computed element by element, without a table.

    A Feistel network of `_ROUNDS` rounds permutes [0, 4ᵏ), the least such range that holds all.
    A result that is too large goes through the network again (cycle walking).

    Reference: Black and Rogaway, "Ciphers with arbitrary finite domains" (2002).
    """

    def __init__(self, count: int, source: torch.Generator) -> None:
        self.count = count
        self._bits = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
        keys = torch.randint(2**62, (_ROUNDS,), generator=source).tolist()
        self._keys = np.array(keys, dtype=np.uint64)

    def __call__(self, positions: Tensor) -> Tensor:
        """Return the elements at positions int64 (n,)."""
        x = positions.numpy().astype(np.uint64)
        outside = np.ones(len(x), dtype=bool)
        while outside.any():
            x[outside] = self._network(x[outside])
            outside = x >= self.count
        return torch.from_numpy(x.astype(np.int64))

    def _network(self, x: np.ndarray) -> np.ndarray:
        bits, mask = np.uint64(self._bits), np.uint64((1 << self._bits) - 1)
        left, right = x >> bits, x & mask
        for key in self._keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)  # modulo 2⁶⁴
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return (left << bits) | right


def order(count: int, source: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Return a random permutation of 0 … count − 1 as a function of positions int64 (n,).

    Up to `TABLE` elements it is a table.
    """
    if count > TABLE:
        return Permutation(count, source)
    return torch.randperm(count, generator=source).__getitem__


class Batches:
    """Batches of `size` of `count` indices; every epoch is a new permutation of all samples.

    The parts are those of the generator's key, such as a seed and a stage. Beyond `TABLE` samples
    no table of the permutation is in memory.
    """

    def __init__(self, count: int, size: int, *parts: int | str) -> None:
        self.count, self.size, self.parts = count, size, parts
        self._epoch = -1
        self._order: Callable[[Tensor], Tensor] = torch.arange(0).__getitem__

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
                self._order = order(self.count, generator(*self.parts, "order", epoch))
            part = self._order(torch.arange(offset, min(offset + remaining, self.count)))
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
