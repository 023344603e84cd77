"""Blocks that began as parts of one network: their mean, and differences from it in two bits.

JKO moves such blocks by a few percent of their weights. A large tensor of block k is stored as
w_k ≈ m + s l(c). Here m is the mean of the blocks, in ten bits, and s is the root mean square of
the differences w_k − m in a row. l(c) is one of four levels, which minimise the mean squared
error of a normal distribution. Small tensors are in ten bits, as by `compact_weights.quantise`.

The differences of NAME are NAME.difference, four codes to a byte, and s is NAME.rms.

Reference: J. Max, Quantizing for minimum distortion, IRE Transactions on Information Theory 6,
1960, table I.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.storage import compact_weights
from pipeline.storage.compact_weights import dequantise, quantise

_SHARED = "int2"
#: values of `jkoflow export --dtype`
DTYPES = (*compact_weights.DTYPES, _SHARED)
_DIFFERENCE, _RMS = ".difference", ".rms"
_LEVELS = torch.tensor([-1.510, -0.4528, 0.4528, 1.510])
_BOUNDARIES = torch.tensor([-0.9816, 0.0, 0.9816])
_SHIFTS = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
#: elements of the smallest tensor that has a mean; parts of a network differ in its first and
#: last layers by more than JKO moves them, and these are smaller
_LEAST = 20_000
#: largest root mean square difference of blocks with one mean, in units of their weights'
_NEAR = 0.1


@dataclass(frozen=True)
class SharedBlocks:
    """Stored tensors of consecutive blocks; those of their mean are empty for a single block."""

    mean: dict[str, Tensor]
    blocks: list[dict[str, Tensor]]


def quantise_blocks(blocks: Sequence[Mapping[str, Tensor]], dtype: str) -> list[SharedBlocks]:
    """Quantise the weights (…) of all blocks for storage; `dtype` is one of `DTYPES`.

    With int2, each group of similar, consecutive blocks has a mean, and a block without a similar
    neighbour is in ten bits. Otherwise every block is a group of its own.
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
        KeyError: a tensor of the mean has no differences in the block.
    """
    tensors = dequantise(stored)
    for name, centre in dequantise(mean).items():
        packed, rms = tensors.pop(name + _DIFFERENCE), tensors.pop(name + _RMS)
        codes = ((packed.unsqueeze(1) >> _SHIFTS) & 3).flatten()[: centre.numel()]
        levels = _LEVELS[codes.int()].view(len(centre), -1) * rms.unsqueeze(1)
        tensors[name] = centre + levels.view_as(centre)
    return tensors


def _quantise_group(group: Sequence[Mapping[str, Tensor]]) -> SharedBlocks:
    """Quantise similar blocks."""
    if len(group) == 1:
        return SharedBlocks({}, [quantise(group[0], "int10")])
    means = {
        name: torch.stack([b[name].float() for b in group]).mean(0) for name in _large(group[0])
    }
    mean = quantise(means, "int10")
    centres = dequantise(mean)
    blocks = []
    for block in group:
        rest = {name: value for name, value in block.items() if name not in centres}
        stored = quantise(rest, "int10")
        for name, centre in centres.items():
            stored |= _difference(name, block[name].float() - centre)
        blocks.append(stored)
    return SharedBlocks(mean, blocks)


def _difference(name: str, difference: Tensor) -> dict[str, Tensor]:
    """Quantise the differences (O, …) of a tensor."""
    rows = difference.flatten(1)
    rms = rows.square().mean(1).sqrt()
    scaled = rows / rms.clamp_min(torch.finfo(rms.dtype).tiny).unsqueeze(1)
    codes = torch.bucketize(scaled, _BOUNDARIES).flatten().to(torch.uint8)
    packed = (F.pad(codes, (0, -codes.numel() % 4)).view(-1, 4) << _SHIFTS).sum(1)
    return {name + _DIFFERENCE: packed.to(torch.uint8), name + _RMS: rms}


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
