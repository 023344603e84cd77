"""Function-preserving transformations of networks: other widths, classes or numbers of networks.

A transformed network starts as the same field v(t, z). Widening copies every hidden feature r
times and divides the weights that read it among the copies. The shares are random: with equal
shares all copies would have the same gradient, and would stay equal for ever.

Reference: the function-preserving widening of Net2Net (Chen, Goodfellow, Shlens, 2016).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from flows.block import Block
from flows.freezing import freeze_classes
from flows.networks.config import VelocityConfig
from flows.networks.convnet import Attention
from flows.networks.layers import reset_classes
from flows.spec import BlockSpec, build_block

#: kinds that `widen` handles: an mlp's class embedding is a weight of its own hidden features, and
#: the positions of a dit depend on its width
WIDENABLE = ("resmlp", "conv", "unet")

#: standard deviation of a copy's share, in units of the even share 1 / r
_SPREAD = 0.5

#: the part of a weight's name that says which of several networks it belongs to
_NET_PREFIX = re.compile(r"nets\.\d+\.")


def widening_factor(narrow: VelocityConfig, wide: VelocityConfig) -> int | None:
    """Return the factor r ≥ 1 by which a network can be widened, or None if it cannot.

    All but the width must be equal, which is not checked. It cannot be widened to a width that is
    no multiple, or if its kind does not allow it. The positions of a dit depend on its width. All
    levels of a unet have the same factor.
    """
    if wide.width == narrow.width:
        return 1
    factor = wide.widths[0] // narrow.widths[0]
    divides = narrow.widened(factor).width == wide.width if factor else False
    # Each group of a group norm must keep its features.
    grouped = wide.kind != "unet" or not any(width % 8 for width in narrow.widths)
    return factor if divides and grouped and wide.kind in WIDENABLE else None


def becomes_several(one: VelocityConfig, several: VelocityConfig) -> bool:
    """Return whether a single network is to become several, which start as copies of it."""
    return one.nets == 1 and several.nets > 1


def transform_block(
    block: Block, before: BlockSpec, after: BlockSpec, generator: torch.Generator
) -> Block:
    """Build the block of another specification with the same map.

    Of the velocity only width, classes and nets may differ; equal velocities give the present
    block. If the classes differ, every new class starts as the null label did, and a network
    without classes does, too. The generator is the source of the random shares of :func:`widen`.
    """
    if before.velocity == after.velocity:
        return block
    if becomes_several(before.velocity, after.velocity):
        single = replace(after, velocity=replace(after.velocity, nets=1))
        weights = transform_block(block, before, single, generator).state_dict()
        several = build_block(after, block.velocity.shape, generator)
        names = several.state_dict()
        several.load_state_dict({name: weights[_NET_PREFIX.sub("", name)] for name in names})
        return several
    transformed = build_block(after, block.velocity.shape, generator)
    state: Mapping[str, Tensor] = block.state_dict()
    if not after.velocity.classes and before.velocity.classes:
        state = freeze_classes(block)
    elif before.velocity.classes != after.velocity.classes:
        state = reset_classes(_with_modulations(state, transformed), transformed)
    if before.velocity.width != after.velocity.width:
        state = widen(state, transformed, generator)
    transformed.load_state_dict(state)
    return transformed


def _with_modulations(state: Mapping[str, Tensor], network: nn.Module) -> Mapping[str, Tensor]:
    """Add the modulations of a network with classes that one without classes and time lacks.

    They start at 0, so the field is the same for every class. The embeddings are those of the new
    network, because modulations and embeddings of 0 would have no gradient.
    """
    own = network.state_dict()
    if not any("modulation" in name for name in own.keys() - state.keys()):
        return state
    constant = re.compile(r"(?<=modulation)\.bias")  # of a dit; that of others is in both networks
    moved = {
        name if name in own else constant.sub(".linear.bias", name): value
        for name, value in state.items()
    }
    return {**{name: own[name] for name in own.keys() - moved.keys()}, **moved}


def widen(
    state: Mapping[str, Tensor], network: nn.Module, generator: torch.Generator
) -> dict[str, Tensor]:
    """Compute the weights of a network of r times the width that is the same field.

    The state dict of the narrow network has weights (outputs, inputs, …) and vectors (features,).
    The wide network is of the same kind and depth; its weights are not read. v(t, z) is unchanged
    up to rounding.
    """
    own = network.state_dict()
    wide = {name: _widen(value, own[name].shape, generator) for name, value in state.items()}
    for name, module in network.named_modules():
        if isinstance(module, Attention):
            factor = len(own[f"{name}.out.bias"]) // len(state[f"{name}.out.bias"])
            _rescale_queries(wide, f"{name}.qkv", factor)
    return wide


def _widen(value: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Widen a weight (outputs, inputs, …), or a vector (features,), to a larger shape."""
    if value.shape == shape:
        return value.clone()
    value = value.repeat_interleave(shape[0] // value.shape[0], dim=0)
    if value.dim() == 1 or value.shape[1] == shape[1]:
        return value
    outputs, inputs = value.shape[:2]
    copies = shape[1] // inputs
    noise = torch.randn(outputs, inputs, copies, generator=generator)
    if copies > 1:  # standard deviation 1, and sum 0 over the copies
        noise = (noise - noise.mean(dim=2, keepdim=True)) * (copies / (copies - 1)) ** 0.5
    shares = ((1 + _SPREAD * noise) / copies).to(value).flatten(1)
    rest = (1,) * (value.dim() - 2)
    return value.repeat_interleave(copies, dim=1) * shares.view(outputs, inputs * copies, *rest)


def _rescale_queries(wide: dict[str, Tensor], name: str, factor: int) -> None:
    """Divide the queries, the first third of the outputs, by √r.

    With r times the features in a head, q·k grows by r and √d by √r, so attention stays the same.
    """
    scale = (1 / factor) ** 0.5
    for part in ("weight", "bias"):
        tensor = wide[f"{name}.{part}"]
        tensor[: len(tensor) // 3] *= scale
