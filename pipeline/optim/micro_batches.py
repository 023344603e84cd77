"""Micro-batches: the gradient of a batch, computed part by part when the whole does not fit.

Every sample keeps its draws, because they are made for the whole batch and then sliced. So the
gradient is that of the whole batch up to rounding.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.errors import JkoflowError
from pipeline.runtime.console import say

#: words of the errors by which PyTorch says that memory is used up, on CUDA, MPS and CPU
_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of a device is used up."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


class MicroBatches:
    """Parts in which a process takes the samples of its batches.

    Args:
        size: samples of a part; None takes all, and halves the part when memory runs out.

    Attributes:
        size: the present size; None is without limit.
    """

    def __init__(self, size: int | None) -> None:
        self.size, self._fixed = size, size is not None

    def run(self, rows: Tensor, work: Callable[[tuple[Tensor, ...]], None]) -> None:
        """Call a function with the parts of a batch, again with smaller ones if they do not fit.

        Args:
            rows: int64 (n,), what is divided.
            work: takes all parts; it starts from nothing at every call.

        Raises:
            JkoflowError: a part of a given size, or a single sample, does not fit.
        """
        while True:
            try:
                return work(rows.split(self.size or max(1, len(rows))))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            self._shrink(len(rows), reason)  # outside the handler, which keeps tensors alive

    def _shrink(self, count: int, reason: str) -> None:
        size = min(self.size or count, count)
        if self._fixed or size <= 1:
            remedy = "lower train.micro_batch, or take" if size > 1 else "take"
            raise JkoflowError(
                f"a micro-batch of {size} samples does not fit the memory ({reason}); expected "
                f"room for one; {remedy} a smaller network"
            )
        self.size = (size + 1) // 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say(f"memory has run out; batches are taken in parts of {self.size} samples")
