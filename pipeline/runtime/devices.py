"""Devices: the accelerator of a command, and settings of accelerate that jkoflow cannot honour."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor

from pipeline.errors import UserError
from pipeline.runtime.console import say
from pipeline.runtime.sharding import enable_sharding, refuse_sharding_settings

#: variables that `accelerate launch` sets, the values without effect, and what to do instead
_REFUSED: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("ACCELERATE_MIXED_PRECISION", ("no", "fp32"), "set train.precision=bf16 instead"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1",), "set train.micro_batch instead"),
    ("ACCELERATE_USE_DEEPSPEED", ("false", "0"), "launch without DeepSpeed"),
    ("ACCELERATE_USE_MEGATRON_LM", ("false", "0"), "launch without Megatron-LM"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", ("false", "0"), "launch without that section"),
    ("ACCELERATE_DYNAMO_BACKEND", ("no",), "launch with dynamo_backend: 'NO'"),
)
#: that a rank waits for work of another one alone; `pipeline.runtime.heartbeat` finds dead ranks
_PATIENCE = timedelta(hours=2)
#: bfloat16 that takes this many times as long as float32 is a warning
_SLOW = 2.0
_SIDE, _REPEATS = 96, 3


def make_accelerator(device: str | None = None, shards: bool = False) -> Accelerator:
    """Return the accelerator: the device and the ranks of this process.

    `accelerate launch` starts several processes on GPUs, but only one on a CPU. On CPUs,
    `torchrun` starts them, and `cpu=True` makes accelerate join their process group.

    Args:
        device: cpu, cuda, cuda:N or mps; None is the best one of this machine.
        shards: whether the command trains a network that the ranks may share by FSDP.

    Raises:
        UserError: the device is not there, or a setting of accelerate has no effect here.
    """
    refuse_settings(os.environ, shards)
    accelerator = _accelerator(device)
    enable_sharding(accelerator, os.environ)
    return accelerator


def _accelerator(device: str | None) -> Accelerator:
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    handlers = [InitProcessGroupKwargs(timeout=_PATIENCE)] if several else None
    if device is None:
        return Accelerator(
            cpu=several and not torch.cuda.is_available(), kwargs_handlers=handlers
        )
    wanted = require_device(device)
    if wanted.index is not None and wanted.type != "cpu":
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    return Accelerator(cpu=wanted.type == "cpu", kwargs_handlers=handlers)


def require_device(name: str) -> torch.device:
    """Return the device of a name.

    Raises:
        UserError: there is no such device on this machine.
    """
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    known = {*there, *(place.partition(":")[0] for place in there)}
    if name not in known:
        raise UserError(
            f"--device is {name}; expected one of this machine: {', '.join(there)}; leave it out "
            "for the best one"
        )
    return torch.device(name)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor (…) of the host to a device.

    A copy to CUDA comes from pinned memory and does not wait: the kernels that are queued before
    it compute meanwhile. PyTorch keeps the pinned memory until the copy is done.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def refuse_settings(environ: Mapping[str, str], shards: bool = False) -> None:
    """Refuse settings of `accelerate config` that jkoflow does not honour, by name.

    Args:
        environ: the environment.
        shards: see `make_accelerator`.

    Raises:
        UserError: one is set.
    """
    for name, idle, advice in _REFUSED:
        value = environ.get(name, "").lower()
        if value and value not in idle:
            raise UserError(f"{name} is {value}; expected {idle[0]} or none; {advice}")
    refuse_sharding_settings(environ, shards)


def warn_of_slow_bf16(precision: str, accelerator: Accelerator) -> None:
    """Warn on the main process where bfloat16 is slower than float32 on this device."""
    if precision != "bf16" or not accelerator.is_main_process:
        return
    factor = bf16_slowness(accelerator.device)
    if factor > _SLOW:
        say(
            f"warning: bf16 takes {factor:.0f} times as long as fp32 on this processor, which has "
            "no bf16 instructions; set the precision to fp32"
        )


def bf16_slowness(device: torch.device) -> float:
    """Return the time of a small bfloat16 matrix product over that in float32, on a CPU.

    Other devices are taken to be fast: the result is 1.
    """
    if device.type != "cpu":
        return 1.0
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(_SIDE, _SIDE, dtype=dtype)
        a @ a
        best = float("inf")
        for _ in range(_REPEATS):
            began = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - began)
        times[dtype] = best
    return times[torch.bfloat16] / max(times[torch.float32], 1e-9)
