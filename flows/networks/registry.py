"""The velocity networks v(t, z), by name: an explicit registry and its constructor."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flows.errors import FlowError
from flows.networks.base import Velocity, VelocityConfig
from flows.networks.convnet import ConvVelocity, UNetVelocity
from flows.networks.image_condition import Beside
from flows.networks.mlp import LinearVelocity, MlpVelocity, ResidualMlpVelocity
from flows.networks.piecewise import NetSequence, TimeSlice

__all__ = ["KINDS", "NetSequence", "TimeSlice", "Velocity", "VelocityConfig", "make_velocity"]

KINDS: dict[str, Callable[[VelocityConfig, tuple[int, ...]], Velocity]] = {
    "mlp": MlpVelocity,
    "resmlp": ResidualMlpVelocity,
    "conv": ConvVelocity,
    "unet": UNetVelocity,
    "linear": LinearVelocity,
}


def make_velocity(
    config: VelocityConfig,
    shape: tuple[int, ...],
    generator: torch.Generator | None = None,
) -> Velocity:
    """Builds a freshly initialised velocity network, or ``config.nets`` of them in sequence.

    Args:
        config: kind and sizes.
        shape: of one sample, (D,) or (C, H, W); ``conv`` and ``unet`` need the second.
        generator: source of the initial weights; None takes torch's global state.

    Returns:
        the network; with ``config.zero_init`` it is v = 0.

    Raises:
        FlowError: unknown kind, or a shape that the kind cannot take.
    """
    if config.kind not in KINDS:
        raise FlowError(f"unknown velocity {config.kind!r}; choose one of {', '.join(KINDS)}")
    if not shape or min(shape) < 1:
        raise FlowError(f"a sample's shape needs positive sizes, found {tuple(shape)}")
    if generator is None:
        return _build(config, tuple(shape))
    # torch's initialisers know only the global state: lend it a seed, then put it back.
    draw = torch.randint(2**62, (), generator=generator, device=generator.device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(draw))
        return _build(config, tuple(shape))


def _build(config: VelocityConfig, shape: tuple[int, ...]) -> Velocity:
    if config.beside and len(shape) == 3:
        joined = (shape[0] + config.beside, *shape[1:])
        return Beside(KINDS[config.kind](config, joined), config.beside)
    nets = [KINDS[config.kind](config, shape) for _ in range(config.nets)]
    if len(nets) == 1:
        return nets[0]
    return NetSequence(nets, one_clock=config.clock == "block")
