"""The kinds of velocity networks, and how a network is built from its configuration."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flows.errors import FlowError
from flows.networks.base import Velocity
from flows.networks.config import VelocityConfig
from flows.networks.convnet import ConvVelocity, UNetVelocity
from flows.networks.dit import DitVelocity
from flows.networks.image_condition import ImageConditionedNetwork
from flows.networks.mlp import LinearVelocity, MlpVelocity, ResidualMlpVelocity
from flows.networks.piecewise import PiecewiseVelocity
from flows.noise import initial_weights

KINDS: dict[str, Callable[[VelocityConfig, tuple[int, ...]], Velocity]] = {
    "mlp": MlpVelocity,
    "resmlp": ResidualMlpVelocity,
    "conv": ConvVelocity,
    "unet": UNetVelocity,
    "dit": DitVelocity,
    "linear": LinearVelocity,
}
#: the kinds that are not of plug-ins
BUILT_IN = tuple(KINDS)


def make_velocity(
    config: VelocityConfig,
    shape: tuple[int, ...],
    generator: torch.Generator | None = None,
) -> Velocity:
    """Build a freshly initialised velocity network, or ``config.nets`` of them in one block.

    The shape of a sample is (D,) or (C, H, W); conv, unet and dit need the second. With
    ``config.zero_init`` the network is v = 0. Without a generator, weights come from PyTorch's
    own.

    Raises:
        FlowError: the kind is unknown, or cannot have samples of this shape.
    """
    if config.kind not in KINDS:
        raise FlowError(f"unknown velocity {config.kind!r}; choose one of {', '.join(KINDS)}")
    if not shape or min(shape) < 1:
        raise FlowError(f"a sample's shape needs positive sizes, found {tuple(shape)}")
    with initial_weights(generator):
        return _build(config, tuple(shape))


def _build(config: VelocityConfig, shape: tuple[int, ...]) -> Velocity:
    network = KINDS[config.kind]
    if config.image_channels and len(shape) == 3:
        extended = (shape[0] + config.image_channels, *shape[1:])
        return ImageConditionedNetwork(network(config, extended), config.image_channels)
    nets = [network(config, shape) for _ in range(config.nets)]
    return nets[0] if len(nets) == 1 else PiecewiseVelocity(nets)
