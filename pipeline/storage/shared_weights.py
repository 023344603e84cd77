"""Blocks that began as parts of one network share the mean of their large weights.

JKO moves such blocks by a few percent of their weights. A large tensor w_k of block k is stored
as w_k ≈ m + l sign(w_k − m). Here m is the mean of the blocks, in six bits, and l is the mean of
|w_k − m| in a row. In m, groups of 64 weights of one output share a scale: m ≈ s q with an integer
q from −31 to 31 and s = max |m| / 31. The largest tensors are their mean, without differences:
theirs change images least. Small tensors are in ten bits, as by `compact_weights.quantise`.

In the file of a mean, NAME has four codes q + 32 in three bytes, NAME.scale has s, and NAME.shape
has the shape of the tensor. In the file of a block, NAME.sign has eight signs to a byte, and
NAME.level has l.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.storage import compact_weights
from pipeline.storage.compact_weights import (
    dequantise,
    group_count,
    grouped,
    quantise,
    scales,
)

_SHARED = "shared"
#: values of `jkoflow export --dtype`
DTYPES = (*compact_weights.DTYPES, _SHARED)
_SCALE, _SHAPE, _SIGN, _LEVEL = ".scale", ".shape", ".sign", ".level"
_LARGEST = 31
_OFFSET = 32
#: most dimensions of a tensor
_DIMENSIONS = 8
_SHIFTS = torch.tensor([0, 6, 12, 18])
_BYTES = torch.tensor([0, 8, 16])
_BITS = torch.arange(8)
#: elements of the smallest tensor that has a mean; parts of a network differ in its first and
#: last layers by more than JKO moves them, and these are smaller
_LEAST = 20_000
#: elements of the smallest tensor without differences
_MEAN_ALONE = 300_000
#: largest root mean square difference of blocks with one mean, in units of their weights'
_NEAR = 0.1


@dataclass(frozen=True)
class SharedBlocks:
    """Stored tensors of consecutive blocks; those of their mean are empty for a single block."""

    mean: dict[str, Tensor]
    blocks: list[dict[str, Tensor]]


def quantise_blocks(blocks: Sequence[Mapping[str, Tensor]], dtype: str) -> list[SharedBlocks]:
    """Quantise the weights (…) of all blocks for storage; `dtype` is one of `DTYPES`.

    With shared, each group of similar, consecutive blocks has a mean, and a block without a
    similar neighbour is in ten bits. Otherwise every block is a group of its own.
    """
    if dtype != _SHARED:
        return [SharedBlocks({}, [quantise(block, dtype)]) for block in blocks]
    groups: list[list[Mapping[str, Tensor]]] = []
    for given in blocks:
        block = {name: value.detach().cpu() for name, value in given.items()}
        if groups and _are_similar(groups[-1][0], block):
            groups[-1].append(block)
        else:
            groups.append([block])
    return [_quantise_group(group) for group in groups]


def dequantise_block(
    stored: Mapping[str, Tensor], mean: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Restore the weights (…) of one block from its stored tensors and those of its mean.

    Raises:
        KeyError: a tensor of the mean has no scales, or signs have no levels.
        RuntimeError: the stored parts of a tensor do not fit each other.
    """
    tensors = dequantise(stored)
    names = (name.removesuffix(_SHAPE) for name in mean if name.endswith(_SHAPE))
    for name in names:
        centre = _from_int6(mean[name], mean[name + _SCALE], mean[name + _SHAPE])
        if name + _SIGN in tensors:  # the largest tensors have none
            centre += _from_signs(tensors.pop(name + _SIGN), tensors.pop(name + _LEVEL), centre)
        tensors[name] = centre
    return tensors


def _quantise_group(group: Sequence[Mapping[str, Tensor]]) -> SharedBlocks:
    """Quantise similar blocks."""
    if len(group) == 1:
        return SharedBlocks({}, [quantise(group[0], "int10")])
    large = _large(group[0])
    own = [{name: block[name] for name in block if name not in large} for block in group]
    shared = SharedBlocks({}, [quantise(block, "int10") for block in own])
    for name in large:
        weights = [block[name].float() for block in group]
        packed, scale, shape = _to_int6(torch.stack(weights).mean(0))
        shared.mean.update({name: packed, name + _SCALE: scale, name + _SHAPE: shape})
        if weights[0].numel() < _MEAN_ALONE:
            centre = _from_int6(packed, scale, shape)
            for stored, own_weights in zip(shared.blocks, weights, strict=True):
                stored[name + _SIGN], stored[name + _LEVEL] = _to_signs(own_weights - centre)
    return shared


def _to_int6(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a tensor (O, …) to codes (W, 3), scales (O, G) and its shape."""
    groups = grouped(value)
    scale = scales(groups, _LARGEST)
    steps = scale.unsqueeze(2)
    q = torch.where(steps > 0, groups / steps, 0).round().to(torch.int32) + _OFFSET
    codes = q.flatten(1)[:, : value[0].numel()].flatten()
    words = (F.pad(codes, (0, -codes.numel() % 4)).view(-1, 4) << _SHIFTS).sum(1)
    packed = ((words.unsqueeze(1) >> _BYTES) & 255).to(torch.uint8)
    return packed, scale, torch.tensor(value.shape)


def _from_int6(packed: Tensor, scale: Tensor, shape: Tensor) -> Tensor:
    """Return the float32 weights (O, …) of codes (W, 3), scales (O, G) and shape.

    Raises:
        RuntimeError: they do not fit; nothing is allocated that is larger than they are.
    """
    size = shape.flatten()[:_DIMENSIONS].to(torch.int64).tolist()
    if shape.numel() != len(size) or len(size) < 2 or min(size) < 1:
        raise RuntimeError(f"a shape has {shape.numel()} entries that start with {size}")
    codes = (math.ceil(math.prod(size) / 4), 3)
    groups = (size[0], group_count(math.prod(size[1:])))
    if packed.shape != codes or scale.shape != groups:
        raise RuntimeError(f"codes or scales do not fit a tensor of shape {size}")
    words = (packed.to(torch.int32) << _BYTES).sum(1, keepdim=True)
    q = ((words >> _SHIFTS) & 63).flatten()[: math.prod(size)].view(size) - _OFFSET
    weights = grouped(q.float()) * scale.unsqueeze(2)
    return weights.flatten(1)[:, : q[0].numel()].reshape(size)


def _to_signs(difference: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise differences (O, …) to packed signs and the levels (O,) of the rows."""
    signs = (difference > 0).flatten().to(torch.uint8)
    packed = (F.pad(signs, (0, -signs.numel() % 8)).view(-1, 8) << _BITS).sum(1)
    return packed.to(torch.uint8), difference.flatten(1).abs().mean(1)


def _from_signs(packed: Tensor, level: Tensor, like: Tensor) -> Tensor:
    """Return the differences of packed signs and levels (O,), in the shape (O, …) of `like`.

    Raises:
        RuntimeError: they do not fit.
    """
    if packed.shape != (math.ceil(like.numel() / 8),) or level.shape != (len(like),):
        raise RuntimeError(f"signs or levels do not fit a tensor of shape {tuple(like.shape)}")
    signs = ((packed.unsqueeze(1) >> _BITS) & 1).flatten()[: like.numel()].view(len(like), -1)
    return ((2.0 * signs - 1) * level.unsqueeze(1)).view_as(like)


def _are_similar(first: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether two blocks have the same shapes, and large tensors close to each other."""
    if {n: v.shape for n, v in first.items()} != {n: v.shape for n, v in other.items()}:
        return False
    large = _large(first)
    size = sum(float(first[name].float().square().sum()) for name in large)
    apart = sum(float((first[n].float() - other[n].float()).square().sum()) for n in large)
    return apart < _NEAR**2 * size  # false where a weight is not finite, or none is large


def _large(block: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that have a mean."""
    return [name for name, value in block.items() if value.dim() > 1 and value.numel() >= _LEAST]
