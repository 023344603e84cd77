"""Wider networks, with other classes, or several in place of one, that start as the same field.

Every hidden feature is copied r times and the weights that read it are shared out among the
copies, so that v(t, z) stays what it was. The shares are uneven, drawn at random: equal ones
would give all copies the same gradient, and they would stay copies for ever.

Reference: the function-preserving widening of Net2Net (Chen, Goodfellow, Shlens, 2016).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from flows.block import Block
from flows.networks.base import VelocityConfig, with_classes_anew
from flows.networks.convnet import Attention
from flows.spec import BlockSpec, build_block

#: kinds of network whose hidden features all scale with ``width``
WIDENED = ("resmlp", "conv", "unet")

#: standard deviation of a copy's share, in units of the even one, 1 / r
_SPREAD = 0.5

#: what the name of a weight of one network has more when there are several
_NUMBER = re.compile(r"nets\.\d+\.")


def widening(narrow: VelocityConfig, wide: VelocityConfig) -> int | None:
    """How many times as wide one network is as another, if it can start as its widened copy.

    Args:
        narrow: the network that is there; all but its width must be as in the other.
        wide: the network to be.

    Returns:
        r ≥ 1; None where the width is not a multiple, or the kind has no width.
    """
    if wide.width == narrow.width:
        return 1
    divides = wide.width % narrow.width == 0
    # the groups of a group norm must stay the same sets of features
    grouped = wide.kind != "unet" or narrow.width % 8 == 0
    return wide.width // narrow.width if divides and grouped and wide.kind in WIDENED else None


def multiplying(one: VelocityConfig, several: VelocityConfig) -> bool:
    """Whether a network is to become several that can start as copies of it, on one clock."""
    return one.nets == 1 and several.nets > 1 and several.clock == "block"


def grown(block: Block, before: BlockSpec, after: BlockSpec, generator: torch.Generator) -> Block:
    """A block as another specification has it: wider, or with other classes, or as it is.

    Args:
        block: built from ``before``.
        before: its specification.
        after: what it becomes; only width, classes and networks of the velocity may differ.
        generator: of the shares (:func:`widened`).

    Returns:
        The same map; every class, where they differ, as what stood for no class.
    """
    if before.velocity == after.velocity:
        return block
    if multiplying(before.velocity, after.velocity):
        velocity = replace(after.velocity, nets=1)
        one = grown(block, before, replace(after, velocity=velocity), generator).state_dict()
        several = build_block(after, block.velocity.shape, generator)
        names = several.state_dict()
        several.load_state_dict({name: one[_NUMBER.sub("", name)] for name in names})
        return several
    wide = build_block(after, block.velocity.shape, generator)
    state: Mapping[str, Tensor] = block.state_dict()
    if before.velocity.classes != after.velocity.classes:
        state = with_classes_anew(state, wide)
    if before.velocity.width != after.velocity.width:
        state = widened(state, wide, generator)
    wide.load_state_dict(state)
    return wide


def widened(
    state: Mapping[str, Tensor], network: nn.Module, generator: torch.Generator
) -> dict[str, Tensor]:
    """Weights of a narrow network, for one of r times the width that is the same field.

    Args:
        state: state dict of the narrow network, of the same kind and depth.
        network: the wide one; its own weights are not used.
        generator: of the shares.

    Returns:
        A state dict that the network loads. With it v(t, z) is the narrow network's, but for
        rounding.
    """
    own = network.state_dict()
    wide = {name: _widen(value, own[name].shape, generator) for name, value in state.items()}
    for name, module in network.named_modules():
        if isinstance(module, Attention):
            _temper(wide, f"{name}.qkv", own[f"{name}.out.bias"], state[f"{name}.out.bias"])
    return wide


def _widen(value: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A weight (outputs, inputs, …), or one number a feature, for more outputs and inputs."""
    if value.shape == shape:
        return value.clone()
    value = value.repeat_interleave(shape[0] // value.shape[0], dim=0)
    if value.dim() == 1 or value.shape[1] == shape[1]:
        return value
    outputs, inputs = value.shape[:2]
    copies = shape[1] // inputs
    noise = torch.randn(outputs, inputs, copies, generator=generator)
    if copies > 1:  # of standard deviation 1, and of sum 0 over the copies
        noise = (noise - noise.mean(dim=2, keepdim=True)) * (copies / (copies - 1)) ** 0.5
    shares = ((1 + _SPREAD * noise) / copies).to(value).flatten(1)
    rest = (1,) * (value.dim() - 2)
    return value.repeat_interleave(copies, dim=1) * shares.view(outputs, inputs * copies, *rest)


def _temper(wide: dict[str, Tensor], name: str, ours: Tensor, theirs: Tensor) -> None:
    """Keep the attention's weights: r times the features of a head make q·k / √d √r times as much.

    Queries are the first third of the layer's outputs.
    """
    scale = (len(theirs) / len(ours)) ** 0.5
    for part in ("weight", "bias"):
        tensor = wide[f"{name}.{part}"]
        tensor[: len(tensor) // 3] *= scale
