"""A convolution with its batch norm folded in, on the CPU by oneDNN's own operators.

torch keeps the operators private that reorder a convolution's weights once and apply the
ReLU inside, so they are tried before they are trusted, and `F.conv2d` stands behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.inception_weights import LAYOUT

CPU_MICRO_BATCH = 10
"""Images per pass on a CPU: more fall out of the cache, fewer leave the cores idle."""

_EPS = 1e-3


class FoldedConv(nn.Module):
    """One or several convolutions on the same input, with their batch norms folded in.

    y = relu(s·(w ∗ x) + β − s·μ), s = γ / √(σ² + 1e-3).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, state: Mapping[str, Tensor], names: list[str], relu: bool = True) -> None:
        super().__init__()
        folded = [_fold(state, name) for name in names]
        weight = torch.cat([w for w, _ in folded]).float()
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", torch.cat([b for _, b in folded]).float())
        self.sizes = [LAYOUT[name].outputs for name in names]
        self.stride = [LAYOUT[names[0]].stride] * 2
        self.padding = list(LAYOUT[names[0]].padding)
        self.relu = relu
        self.packed: Any = None  # the weights in oneDNN's own order; made at first use

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FoldedConv:
        self.packed = None
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (B, C, H, W), channels-last."""
        if x.device.type == "cpu" and x.dtype == torch.float32 and prepacked_works():
            if self.packed is None:
                self.packed = _pack(self.weight, self.padding, self.stride, list(x.shape))
            return _packed_conv(x, self.packed, self.bias, self.padding, self.stride, self.relu)
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return F.relu_(y) if self.relu else y

    def split(self, x: Tensor) -> list[Tensor]:
        """Convolve, then return the outputs of the merged convolutions one by one."""
        first, *rest = self(x).split(self.sizes, 1)
        # Only outputs that feed another convolution gain from being contiguous; the first
        # of a block goes straight to the concatenation, except in the reduction block.
        return [first, *(t.contiguous(memory_format=torch.channels_last) for t in rest)]


def _fold(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float64, of one convolution followed by its batch norm."""
    weight = state[f"{name}.conv.weight"].double()
    gamma, beta = (state[f"{name}.bn.{k}"].double() for k in ("weight", "bias"))
    mean, var = (state[f"{name}.bn.running_{k}"].double() for k in ("mean", "var"))
    scale = gamma / torch.sqrt(var + _EPS)
    return weight * scale[:, None, None, None], beta - mean * scale


def _pack(weight: Tensor, padding: list[int], stride: list[int], shape: list[int]) -> Tensor:
    shape = [CPU_MICRO_BATCH, *shape[1:]]
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, [1, 1], 1, shape)


def _packed_conv(
    x: Tensor, packed: Tensor, bias: Tensor, padding: list[int], stride: list[int], relu: bool
) -> Tensor:
    act = "relu" if relu else "none"
    return torch.ops.mkldnn._convolution_pointwise(
        x, packed, bias, padding, stride, [1, 1], 1, act, [], ""
    )


@lru_cache(maxsize=1)
def prepacked_works() -> bool:
    """Whether this build's private oneDNN operators exist and agree with `F.conv2d`.

    They are not part of torch's promises, so they are tried once, on small convolutions of
    the kinds the network has; where anything differs the portable path is taken.
    """
    generator = torch.Generator().manual_seed(0)
    for kernel, stride, relu in (((3, 3), 2, True), ((1, 7), 1, True), ((1, 1), 1, False)):
        x = torch.randn(3, 5, 9, 9, generator=generator)
        x = x.contiguous(memory_format=torch.channels_last)
        w = torch.randn(6, 5, *kernel, generator=generator)
        w = w.contiguous(memory_format=torch.channels_last)
        b = torch.randn(6, generator=generator)
        pad = [0, 0] if stride == 2 else [kernel[0] // 2, kernel[1] // 2]
        try:
            with torch.no_grad():
                packed = _pack(w, pad, [stride] * 2, list(x.shape))
                found = _packed_conv(x, packed, b, pad, [stride] * 2, relu)
        except Exception:  # noqa: BLE001 - whatever a private operator raises, do without it
            return False
        expected = F.conv2d(x, w, b, stride, pad)
        expected = F.relu(expected) if relu else expected
        if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-4):
            return False
    return True
