"""Quantised weights of exported runs: 16-bit floats or 10-bit integers.

In ten bits, groups of 64 weights of one output share a scale: w ≈ s q with an integer q from
−511 to 511 and s = max |w| / 511. The upper eight bits of q have the name of the tensor, the
lower two are NAME.rest, four to a byte, and s is NAME.scale. Vectors are in float16.
Quantisation is idempotent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

#: name of a dtype → dtype of rounded floats; None for 10-bit integers
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int10": None,
}
_SCALE, _REST = ".scale", ".rest"
_LARGEST = 511
_GROUP = 64
#: cleared bits of a scale's mantissa, so that 511 s has no rounding error
_CLEARED_BITS = 2**9 - 1


def quantise(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Quantise floating-point tensors (…) for storage, on the CPU; `dtype` is a key of `DTYPES`.

    A tensor that would overflow or is not finite is unchanged.
    """
    kind = DTYPES[dtype]
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu()
        if kind is None and value.dim() > 1 and value.numel() and bool(value.isfinite().all()):
            stored |= _to_int10(name, value.float())
            continue
        rounded = value.to(kind or torch.float16)
        stored[name] = rounded if bool(rounded.isfinite().all()) else value
    return stored


def dequantise(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the 10-bit tensors of `quantise` to float32 (…); all other tensors are unchanged."""
    quantised = {name for name, value in stored.items() if value.dtype == torch.int8}
    parts = {name + part for name in quantised for part in (_SCALE, _REST)}
    return {
        name: _from_int10(value, stored[name + _SCALE], stored[name + _REST])
        if name in quantised
        else value
        for name, value in stored.items()
        if name not in parts
    }


def _to_int10(name: str, value: Tensor) -> dict[str, Tensor]:
    """Quantise a tensor (O, …) to its upper bits, lower bits and scales."""
    groups = grouped(value)
    scale = scales(groups, _LARGEST)
    steps = scale.unsqueeze(2)
    q = torch.where(steps > 0, groups / steps, 0).round()
    q = q.flatten(1)[:, : value[0].numel()].to(torch.int16)
    rest = F.pad(q.flatten() & 3, (0, -q.numel() % 4)).view(-1, 4)
    packed = (rest << torch.tensor([0, 2, 4, 6])).sum(1).to(torch.uint8)
    upper = (q >> 2).to(torch.int8).view_as(value)
    return {name: upper, name + _SCALE: scale, name + _REST: packed}


def _from_int10(upper: Tensor, scale: Tensor, packed: Tensor) -> Tensor:
    """Return the float32 weights (O, …) of upper bits, scales and lower bits.

    Raises:
        RuntimeError: they do not fit.
    """
    if scale.shape != (len(upper), group_count(upper[0].numel())):
        raise RuntimeError(f"scales do not fit a tensor of shape {tuple(upper.shape)}")
    rest = ((packed.to(torch.int16).unsqueeze(1) >> torch.tensor([0, 2, 4, 6])) & 3).flatten()
    q = (upper.to(torch.int16) << 2) + rest[: upper.numel()].view_as(upper)
    weights = grouped(q.float()) * scale.unsqueeze(2)
    return weights.flatten(1)[:, : upper[0].numel()].view_as(upper)


def group_count(size: int) -> int:
    """Return how many groups of 64 a row of `size` weights has."""
    return math.ceil(size / _GROUP)


def scales(groups: Tensor, largest: int) -> Tensor:
    """Return the scales (O, G) of groups (O, G, 64) whose integers reach `largest`, at most 511.

    A scale s is max |w| / largest, rounded up such that `largest` · s is exact in float32.
    """
    scale = groups.abs().amax(2) / largest
    bits = scale.view(torch.int32) + _CLEARED_BITS  # rounded up, so that no q exceeds the largest
    return (bits - bits.remainder(_CLEARED_BITS + 1)).view(torch.float32)


def grouped(value: Tensor) -> Tensor:
    """Return the weights (O, …) in G groups of 64 per output, (O, G, 64), padded by zeros."""
    rows = value.flatten(1)
    groups = group_count(rows.shape[1])
    return F.pad(rows, (0, groups * _GROUP - rows.shape[1])).view(len(rows), groups, _GROUP)
