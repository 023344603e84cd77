"""Weights in fewer bits, for what is shipped: rounded floats, or whole numbers of ten bits.

In ten bits the numbers of a tensor of two or more dimensions share a scale with 64 neighbours that
belong to one output: w ≈ s q, q whole from −511 to 511 and s = max |w| / 511. The upper eight bits
of q lie under the tensor's name, the lower two beside it as NAME.rest, four to a byte, and s as
NAME.scale. Vectors are in float16. What was rounded once is rounded to itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

#: name, as `jkoflow export --dtype` takes it, → type of rounded floats; None for whole numbers
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int10": None,
}
_SCALE, _REST = ".scale", ".rest"
_LARGEST = 511
_GROUP = 64
#: bits of a scale's mantissa that are left out, so that 511 s has no rounding error
_LEFT_OUT = 2**9 - 1


def compact(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Tensors as they are stored, on the CPU.

    Args:
        tensors: by name, floats.
        dtype: one of :data:`DTYPES`. A tensor that would overflow, or is not finite, stays as it
            is.
    """
    kind = DTYPES[dtype]
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu()
        if kind is None and value.dim() > 1 and bool(value.isfinite().all()):
            stored |= _whole_numbers(name, value.float())
            continue
        rounded = value.to(kind or torch.float16)
        stored[name] = rounded if bool(rounded.isfinite().all()) else value
    return stored


def restored(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a network takes them; those of ten bits in float32, all others unchanged.

    Args:
        stored: of any type, by name.
    """
    whole = {name for name, value in stored.items() if value.dtype == torch.int8}
    parts = {name + part for name in whole for part in (_SCALE, _REST)}
    return {
        name: _weights(value, stored[name + _SCALE], stored[name + _REST])
        if name in whole
        else value
        for name, value in stored.items()
        if name not in parts
    }


def _whole_numbers(name: str, value: Tensor) -> dict[str, Tensor]:
    grouped = _grouped(value)
    scale = grouped.abs().amax(2) / _LARGEST
    bits = scale.view(torch.int32) + _LEFT_OUT  # up, so that no number is beyond 511
    scale = (bits - bits.remainder(_LEFT_OUT + 1)).view(torch.float32)
    steps = scale.unsqueeze(2)
    whole = torch.where(steps > 0, grouped / steps, 0).round()
    whole = whole.flatten(1)[:, : value[0].numel()].to(torch.int16)
    rest = F.pad(whole.flatten() & 3, (0, -whole.numel() % 4)).view(-1, 4)
    packed = (rest << torch.tensor([0, 2, 4, 6])).sum(1).to(torch.uint8)
    upper = (whole >> 2).to(torch.int8).view_as(value)
    return {name: upper, name + _SCALE: scale, name + _REST: packed}


def _weights(upper: Tensor, scale: Tensor, packed: Tensor) -> Tensor:
    rest = ((packed.to(torch.int16).unsqueeze(1) >> torch.tensor([0, 2, 4, 6])) & 3).flatten()
    whole = (upper.to(torch.int16) << 2) + rest[: upper.numel()].view_as(upper)
    weights = _grouped(whole.float()) * scale.unsqueeze(2)
    return weights.flatten(1)[:, : upper[0].numel()].view_as(upper)


def _grouped(value: Tensor) -> Tensor:
    """The numbers of each output (O, …), 64 together: (O, groups, 64), filled up with zeros."""
    rows = value.flatten(1)
    groups = math.ceil(rows.shape[1] / _GROUP)
    return F.pad(rows, (0, groups * _GROUP - rows.shape[1])).view(len(rows), groups, _GROUP)
