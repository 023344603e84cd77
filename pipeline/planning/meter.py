"""Meter of a piece of work: seconds, operations, kernels and peak memory on one device.

Operations are counted by torch.utils.flop_counter, which sees matrix products, convolutions and
attention.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from eval.features.folded_conv import FoldedConv
from pipeline.planning.estimate import Rate
from pipeline.runtime.system import peak_memory

#: operations of the fused attention of CPUs, which PyTorch's counter leaves out
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
#: most repetitions of a piece of work
_MOST = 50
#: seconds of a call that is measured with all its samples
LONG = 5.0


@dataclasses.dataclass(frozen=True)
class _Cost:
    """Cost of a call with some samples; memory is the peak of the process."""

    samples: int
    seconds: float = 0.0
    flops: float = 0.0
    memory: float = 0.0
    kernels: float = 0.0

    def extended(self, other: _Cost, samples: int) -> _Cost:
        """Return the cost of more samples, on the line through this cost and a smaller one.

        The kernels are those of this cost, because a larger batch has as many.
        """
        factor = (samples - self.samples) / (self.samples - other.samples)
        seconds, flops, memory = (
            high + factor * max(0.0, high - low)
            for high, low in (
                (self.seconds, other.seconds),
                (self.flops, other.flops),
                (self.memory, other.memory),
            )
        )
        return _Cost(samples, seconds, flops, memory, self.kernels)


class Meter:
    """Meter of seconds, operations and peak memory on one device."""

    def __init__(self, accelerator: Accelerator, seconds: float) -> None:
        self.accelerator, self.seconds = accelerator, seconds
        self.device = accelerator.device

    def rate(
        self, work: Callable[[int], object], most: int, units: float, precision: str = "fp32"
    ) -> Rate:
        """Measure a piece of work of some units: the median of its repetitions.

        The first call is warm-up, in which operations are counted. Work that would take longer
        than `LONG` is measured with fewer samples, and a line is drawn through the results.

        Args:
            work: takes a number of samples.
            most: samples of the whole work.
            units: of the whole work, to which the rate refers.
            precision: of the work.
        """
        base = self.memory()
        first = self._once(work, 1)
        if most > 1 and most * first.seconds > LONG:
            first = self._once(work, 1)
        if most > 1 and most * first.seconds > LONG:
            few = int(LONG / first.seconds)
            low, high = _Cost(0, memory=base), first
            if few > 1:
                low, high = first, self._once(work, few)
            cost = high.extended(low, most)
        else:
            cost = self._once(work, most) if most > 1 else first
            self.reset_peak()
            times: list[float] = []
            while not times or (sum(times) < self.seconds and len(times) < _MOST):
                times.append(self._seconds(lambda: work(most)))
            cost = dataclasses.replace(cost, seconds=statistics.median(times), memory=self.peak())
        return Rate(
            cost.seconds / units, cost.flops / units, precision, cost.memory, cost.kernels / units
        )

    def memory(self) -> float:
        """Return the memory that is in use now, in bytes."""
        self.reset_peak()
        return self.peak()

    def _once(self, work: Callable[[int], object], samples: int) -> _Cost:
        """Measure a call of a piece of work with a number of samples, and count its operations."""
        counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
        self.reset_peak()
        with _Kernels() as kernels, counter:
            seconds = self._seconds(lambda: work(samples))
        flops = float(counter.get_total_flops())
        return _Cost(samples, seconds, flops, self.peak(), kernels.count)

    def _seconds(self, work: Callable[[], object]) -> float:
        """Return the seconds of a call."""
        self._synchronise()
        began, used = time.perf_counter(), time.process_time()
        work()
        self._synchronise()
        elapsed, used = time.perf_counter() - began, time.process_time() - used
        # other programs lengthen the clock's seconds, but not those of one thread
        return min(elapsed, used) if self.device.type == "cpu" else elapsed

    def peak(self) -> float:
        """Return the peak memory since `reset_peak` in bytes, on the GPU or of this process."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        with contextlib.suppress(OSError, StopIteration, ValueError):
            lines = Path("/proc/self/status").read_text().splitlines()
            line = next(line for line in lines if line.startswith("VmHWM"))
            return 1024.0 * int(line.split()[1])
        return float(peak_memory())

    def reset_peak(self) -> None:
        """Forget the peak so far, where the system can; else the peak is that of the process."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Kernels(TorchDispatchMode):
    """Counter of the operators that a device would launch: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(  # noqa: D105
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        self.count += not getattr(func, "is_view", False)
        return func(*args, **(kwargs or {}))


def convolution_flops(network: nn.Module, work: Callable[[], object]) -> float:
    """Count the operations of the folded convolutions of a network in a piece of work.

    On a CPU they are operators of oneDNN, which torch.utils.flop_counter does not know.
    """
    counts: list[float] = []

    def add(module: nn.Module, inputs: Any, outputs: Tensor) -> None:  # noqa: ANN401
        pixels = len(outputs) * math.prod(outputs.shape[2:])
        counts.append(2.0 * pixels * module.get_buffer("weight").numel())

    hooks = [
        module.register_forward_hook(add)
        for module in network.modules()
        if isinstance(module, FoldedConv)
    ]
    work()
    for hook in hooks:
        hook.remove()
    return sum(counts)


def machine_of(device: torch.device) -> str:
    """Return the name of the GPU, or that of the processor with its cores and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name")).partition(":")[2]
    threads = torch.get_num_threads()
    return f"{name.strip()}, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}"
