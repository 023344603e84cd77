"""Weights in fewer bits, for what is shipped: rounded floats, or whole numbers of eight bits.

In eight bits a tensor of two or more dimensions is W ≈ s_o q_o for each output o (its first
index), q_o whole numbers from −127 to 127 and s_o = max |W_o| / 127 in bfloat16; s lies beside
the tensor as NAME.scale. Vectors are in float16. What was rounded once is rounded to itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: of stored weights, by the name that `jkoflow export --dtype` takes
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}
_SCALE = ".scale"
_LARGEST = 127


def compact(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors as they are stored, on the CPU.

    Args:
        tensors: by name, floats.
        dtype: one of :data:`DTYPES`. A tensor that would overflow, or is not finite, stays as it
            is.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu()
        if dtype == torch.int8 and value.dim() > 1 and bool(value.isfinite().all()):
            stored[name], stored[name + _SCALE] = _whole_numbers(value)
            continue
        rounded = value.to(torch.float16 if dtype == torch.int8 else dtype)
        stored[name] = rounded if bool(rounded.isfinite().all()) else value
    return stored


def restored(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a network takes them; those of eight bits in float32, all others unchanged.

    Args:
        stored: of any type, by name.
    """
    tensors = {}
    for name, value in stored.items():
        whole = stored.get(name.removesuffix(_SCALE)) if name.endswith(_SCALE) else None
        if whole is not None and whole.dtype == torch.int8:
            continue
        scale = stored.get(name + _SCALE)
        if value.dtype == torch.int8 and scale is not None:
            value = value.float() * _along(scale.float(), value)
        tensors[name] = value
    return tensors


def _whole_numbers(value: Tensor) -> tuple[Tensor, Tensor]:
    largest = value.float().flatten(1).abs().amax(1)
    scale = (largest / _LARGEST).to(torch.bfloat16)
    steps = _along(scale.float(), value)
    whole = torch.where(steps > 0, value.float() / steps, 0).round()
    return whole.clamp(-_LARGEST, _LARGEST).to(torch.int8), scale


def _along(scale: Tensor, value: Tensor) -> Tensor:
    """One number for each first index of a tensor, to multiply it by."""
    return scale.view(-1, *[1] * (value.dim() - 1))
