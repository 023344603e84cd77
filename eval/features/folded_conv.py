"""Convolution with its batch norm folded in, which uses oneDNN's own operators on a CPU.

They reorder the weights once and apply the ReLU inside. They are private to torch, so they are
tested before use; `F.conv2d` is the fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CPU_MICRO_BATCH = 10
"""Images per pass on a CPU: more do not fit the cache, fewer leave cores idle."""

#: dtypes of the prepacked operators, with the relative rounding error of a result
PACKED_DTYPES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class FoldedConv(nn.Module):
    """Convolutions of one input, merged into one, with their batch norms folded in.

        y = relu(s·(w ∗ x) + β − s·μ),   s = γ / √(σ² + ε)

    They are `BasicConv2d` (a convolution `conv` without bias and its batch norm `bn`) of one
    kernel size, stride and padding.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, convolutions: Sequence[Any], relu: bool = True) -> None:
        super().__init__()
        folded = [_fold(convolution) for convolution in convolutions]
        weight = torch.cat([w for w, _ in folded]).float()
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", torch.cat([b for _, b in folded]).float())
        self.sizes = [convolution.conv.out_channels for convolution in convolutions]
        self.stride = list(convolutions[0].conv.stride)
        self.padding = list(convolutions[0].conv.padding)
        self.relu = relu
        self.packed: Any = None  # the weights in oneDNN's order, from the first use on

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FoldedConv:
        self.packed = None
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (B, C, H, W), channels-last."""
        if x.device.type == "cpu" and x.dtype in PACKED_DTYPES and prepacked_works(x.dtype):
            if self.packed is None:
                self.packed = _pack(self.weight, self.padding, self.stride, list(x.shape))
            return _packed_conv(x, self.packed, self.bias, self.padding, self.stride, self.relu)
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return F.relu_(y) if self.relu else y

    def split(self, x: Tensor) -> list[Tensor]:
        """Convolve x (B, C, H, W) and return the outputs of the merged convolutions one by one."""
        first, *rest = self(x).split(self.sizes, 1)
        # Only an input of another convolution gains from being contiguous. The first output of
        # a block is concatenated at once, except in the reduction block.
        return [first, *(t.contiguous(memory_format=torch.channels_last) for t in rest)]


def _fold(convolution: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - torchvision is untyped
    """Compute weight and bias, in float64, of a convolution followed by its batch norm."""
    norm = convolution.bn
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = norm.weight.double() / torch.sqrt(variance + norm.eps)
    weight = convolution.conv.weight.double() * scale[:, None, None, None]
    return weight, norm.bias.double() - mean * scale


def _pack(weight: Tensor, padding: list[int], stride: list[int], shape: list[int]) -> Tensor:
    """Reorder a convolution's weights for oneDNN and inputs of a shape (B, C, H, W)."""
    shape = [CPU_MICRO_BATCH, *shape[1:]]
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, [1, 1], 1, shape)


def _packed_conv(
    x: Tensor, packed: Tensor, bias: Tensor, padding: list[int], stride: list[int], relu: bool
) -> Tensor:
    """Convolve x (B, C, H, W) with reordered weights."""
    activation = "relu" if relu else "none"
    return torch.ops.mkldnn._convolution_pointwise(
        x, packed, bias, padding, stride, [1, 1], 1, activation, [], ""
    )


@lru_cache(maxsize=len(PACKED_DTYPES))
def prepacked_works(dtype: torch.dtype) -> bool:
    """Test whether this build's private oneDNN operators exist and agree with `F.conv2d`."""
    generator = torch.Generator().manual_seed(0)
    for kernel, stride, relu in (((3, 3), 2, True), ((1, 7), 1, True), ((1, 1), 1, False)):
        x = torch.randn(3, 5, 9, 9, generator=generator)
        weight = torch.randn(6, 5, *kernel, generator=generator)
        x, weight = (
            tensor.to(dtype, memory_format=torch.channels_last) for tensor in (x, weight)
        )
        bias = torch.randn(6, generator=generator).to(dtype)
        padding = [0, 0] if stride == 2 else [kernel[0] // 2, kernel[1] // 2]
        try:
            with torch.no_grad():
                packed = _pack(weight, padding, [stride] * 2, list(x.shape))
                y = _packed_conv(x, packed, bias, padding, [stride] * 2, relu)
        except Exception:  # noqa: BLE001 - any failure of a private operator selects the fallback
            return False
        x, weight, bias = x.float(), weight.float(), bias.float()
        expected = F.conv2d(x, weight, bias, stride, padding)
        expected = F.relu(expected) if relu else expected
        error = PACKED_DTYPES[dtype]
        if y.shape != expected.shape or not torch.allclose(y.float(), expected, error, error):
            return False
    return True
