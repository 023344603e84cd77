"""Freezing: a network that equals another one at a fixed time, or at the null label.

A network sees a fixed time as a constant, which its biases and scales can hold. So v(t*, ·) is
exactly a time-independent network of the same kind. K frozen blocks

    v_k(z) = (t_{k+1} − t_k) v(t*_k, z),   t*_k = (t_k + t_{k+1}) / 2,

approximate the flow of v with an error O(K⁻²). The same holds for a fixed label. Of several
networks in a block the frozen one is that of the time t*.

The samples x_t = (1 − t) z + t z' of the linear interpolant have less variance than z and z'.
The JKO scheme keeps the variance, as the trigonometric interpolant does. Its samples at the angle
θ are those of the linear interpolant, scaled:

    z_θ = r x_t,   r = cos θ + sin θ,   t = sin θ / r,
    dz_θ / dθ = (r' / r) z_θ + (1 / r) v(t, z_θ / r),   r' = cos θ − sin θ.

So a field that learnt the linear interpolant gives that of the trigonometric one without training.
The map of both is the same, because r = 1 at both ends.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from flows.block import Block
from flows.errors import FlowError
from flows.flow import Flow
from flows.networks.base import Velocity
from flows.networks.config import VelocityConfig
from flows.networks.convnet import ConvVelocity, ResidualBlock, UNetVelocity
from flows.networks.dit import DitVelocity, Modulation
from flows.networks.layers import ContextFeatures
from flows.networks.mlp import LinearVelocity, MlpVelocity, ResidualLayer, ResidualMlpVelocity
from flows.networks.piecewise import PiecewiseVelocity, TimeSlice
from flows.networks.registry import BUILT_IN
from flows.networks.skip import SkipVelocity
from flows.spec import BlockSpec, build_block

#: the weight of each kind that reads the sample
_INPUT = {
    UNetVelocity: "input.weight",
    DitVelocity: "input.weight",
    ConvVelocity: "convs.0.weight",
    ResidualMlpVelocity: "input.weight",
    MlpVelocity: "first.weight",
    LinearVelocity: "affine.weight",
}

#: layers of each kind that scale the field
_OUTPUTS = {
    UNetVelocity: ("output",),
    DitVelocity: ("output",),
    ConvVelocity: ("output",),
    ResidualMlpVelocity: ("output",),
    MlpVelocity: ("last",),
    LinearVelocity: ("affine", "label"),
}


def freeze_block(
    block: Block,
    spec: BlockSpec,
    start: float = 0.0,
    end: float = 1.0,
    *,
    from_linear: bool = False,
) -> tuple[Block, BlockSpec]:
    """Freeze a block at the middle of an interval of its time.

    Args:
        block: the time-dependent block; it does not change.
        spec: its specification.
        start: beginning of the interval, in [0, 1).
        end: end of the interval, in (start, 1].
        from_linear: whether the block is the whole flow, learnt by the linear interpolant. The
            interval is then one of the time 2 θ / π of the trigonometric interpolant, and the
            field v is converted to it, as the module says.

    Returns:
        the autonomous block and its specification. Its field is (end − start) v(t*, z) with
        t* = (start + end) / 2. With ``from_linear`` it is Δθ ((r' / r) z + (1 / r) v(t, z / r)) at
        θ = t* π / 2, where Δθ = (end − start) π / 2.

    Raises:
        FlowError: the interval is empty or leaves [0, 1], or the block is conditioned on images.
    """
    if not 0 <= start < end <= 1:
        raise FlowError(
            f"the interval to freeze is [{start}, {end}]; expected 0 ≤ start < end ≤ 1"
        )
    if spec.velocity.image_channels:
        raise FlowError(
            f"the block has {spec.velocity.image_channels} image channels; only a network without "
            "images can be frozen"
        )
    velocity = block.velocity.inner if isinstance(block.velocity, TimeSlice) else block.velocity
    time, length, skip, radius = (start + end) / 2, end - start, 0.0, 1.0  # of the block
    if from_linear:
        angle = time * math.pi / 2
        cosine, sine = math.cos(angle), math.sin(angle)
        radius = cosine + sine
        speed = length * math.pi / 2  # dθ over the interval
        time, skip, length = sine / radius, speed * (cosine - sine) / radius, speed / radius
    time, length = spec.start + spec.length * time, spec.length * length  # of the networks
    if isinstance(velocity, PiecewiseVelocity):
        velocity = velocity.network_at(time)
    frozen = replace(
        spec,
        velocity=replace(spec.velocity, autonomous=True, nets=1),
        start=0.0,
        length=1.0,
        skip=skip,
    )
    result = build_block(frozen, velocity.shape)
    network = result.velocity
    if isinstance(network, SkipVelocity):
        network = network.inner
    network.load_state_dict(freeze(velocity, time, length, radius))
    return result, frozen


def can_freeze(config: VelocityConfig) -> bool:
    """Return whether a network of a built-in kind depends on time and sees no image."""
    return config.kind in BUILT_IN and not config.autonomous and not config.image_channels


def freeze_flow(flow: Flow, count: int, *, from_linear: bool = False) -> Flow:
    """Freeze a flow of one block into K = `count` autonomous blocks of equal parts of its time.

    Args:
        flow: one time-dependent block.
        count: K ≥ 1.
        from_linear: see `freeze_block`.

    Raises:
        FlowError: the flow has several blocks, or its block cannot be frozen.
    """
    if len(flow) != 1:
        raise FlowError(f"the flow to freeze has {len(flow)} blocks; expected one")
    parts = [
        freeze_block(flow[0], flow.specs[0], k / count, (k + 1) / count, from_linear=from_linear)
        for k in range(count)
    ]
    return Flow.from_blocks(flow.shape, [(spec, block) for block, spec in parts])


@torch.no_grad()
def freeze(
    velocity: Velocity, time: float, length: float = 1.0, radius: float = 1.0
) -> dict[str, Tensor]:
    """Compute the weights of the autonomous network with the field length · v(time, z / radius).

    Args:
        velocity: a time-dependent network of any kind.
        time: t*, in [0, 1].
        length: factor of the field.
        radius: divisor of the sample.

    Returns:
        a state dict that the network with ``autonomous`` loads.
    """
    state = {name: value.clone() for name, value in velocity.state_dict().items()}
    features = getattr(velocity, "features", None)
    if isinstance(features, ContextFeatures) and features.omega is not None:
        phase = features.omega * time
        context = torch.cat([phase.sin(), phase.cos()])
        if isinstance(velocity, DitVelocity):
            state = _freeze_dit(velocity, state, velocity.time(context[None]))
        elif velocity.classes:  # the class embedding is added to the features of the time
            _add_context(velocity, state, context)
        else:
            state = _absorb(velocity, state, context[None])
    if isinstance(velocity, MlpVelocity):
        weight = state["first.weight"]
        state["first.weight"] = weight[:, : velocity.dim].clone()
        state["first.bias"] += time * weight[:, velocity.dim]
    state[_INPUT[type(velocity)]] /= radius
    for name, value in state.items():
        if name.split(".")[0] in _OUTPUTS[type(velocity)]:
            value *= length
    return state


@torch.no_grad()
def freeze_classes(module: nn.Module) -> dict[str, Tensor]:
    """Compute the weights without classes with the field v(t, z, ∅), where ∅ is the null label.

    Args:
        module: a network with classes, or a block or a sequence of such networks.

    Returns:
        a state dict that the same module with ``classes`` = 0 loads.
    """
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for name, network in module.named_modules():
        if isinstance(network, Velocity) and type(network) in _OUTPUTS:
            prefix = f"{name}." if name else ""
            inner = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
            inner = {key.removeprefix(prefix): value for key, value in inner.items()}
            frozen = _freeze_label(network, inner)
            state |= {prefix + key: value for key, value in frozen.items()}
    return state


def _freeze_label(velocity: Velocity, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move the embedding of the null label into the biases that it is added to."""
    name = next(key for key in state if key.endswith("label.embedding.weight"))
    null = state.pop(name)[-1]
    features = getattr(velocity, "features", None)
    autonomous = isinstance(features, ContextFeatures) and features.omega is None
    if isinstance(velocity, DitVelocity) and autonomous:
        state = _constant_modulations(velocity, state, null[None])
    elif isinstance(velocity, DitVelocity):
        state["time.2.bias"] += null
    elif isinstance(velocity, LinearVelocity):
        state["affine.bias"] += null
    elif isinstance(velocity, MlpVelocity):
        state["first.bias"] += null
    elif autonomous:
        state = _absorb(velocity, state, null[None])
    else:
        _add_context(velocity, state, null)
    return state


def _add_context(velocity: Velocity, state: dict[str, Tensor], context: Tensor) -> None:
    """Add a constant (F,) to the features of time and class that a network sees."""
    first = "modulation" if isinstance(velocity, ConvVelocity) else "time"
    state[f"{first}.bias"] += state[f"{first}.weight"] @ context


def _freeze_dit(
    velocity: DitVelocity, state: dict[str, Tensor], embedding: Tensor
) -> dict[str, Tensor]:
    """Move the embedding (1, W) of a time into the classes, or into constant modulations."""
    state = {name: value for name, value in state.items() if not name.startswith("time.")}
    if velocity.classes:
        state["label.embedding.weight"] += embedding
        return state
    return _constant_modulations(velocity, state, embedding)


def _constant_modulations(
    velocity: DitVelocity, state: dict[str, Tensor], embedding: Tensor
) -> dict[str, Tensor]:
    """Replace the modulations of a condition by their values at a constant one (1, W)."""
    for name, module in velocity.named_modules():
        if isinstance(module, Modulation):
            state[f"{name}.bias"] = module(embedding)[0, 0].clone()
            del state[f"{name}.linear.weight"], state[f"{name}.linear.bias"]
    return state


def _absorb(
    velocity: Velocity, state: dict[str, Tensor], context: Tensor
) -> dict[str, Tensor]:
    """Move the scales and shifts of a context (1, F) into the weights that follow them."""
    names: dict[nn.Module, str] = {module: name for name, module in velocity.named_modules()}
    if isinstance(velocity, UNetVelocity):
        embedding = velocity.activation(velocity.time(context))
        for module, name in names.items():
            if isinstance(module, ResidualBlock) and module.modulation is not None:
                scale, shift = module.modulation(embedding)[0].chunk(2)
                weight, bias = f"{name}.norm_out.weight", f"{name}.norm_out.bias"
                state[weight] = state[weight] * (1 + scale)
                state[bias] = state[bias] * (1 + scale) + shift
    elif isinstance(velocity, ResidualMlpVelocity):
        embedding = velocity.activation(velocity.time(context))
        pairs = velocity.modulation(embedding)[0].chunk(len(velocity.layers))
        for layer, pair in zip(velocity.layers, pairs, strict=True):
            assert isinstance(layer, ResidualLayer)
            name, (scale, shift) = names[layer], pair.chunk(2)
            up, bias = f"{name}.up.weight", f"{name}.up.bias"
            state[bias] = state[bias] + state[up] @ shift
            state[up] = state[up] * (1 + scale)
    elif isinstance(velocity, ConvVelocity):
        pairs = velocity.modulation(context)[0].chunk(len(velocity.convs))
        for index, pair in enumerate(pairs):
            scale, shift = pair.chunk(2)
            weight, bias = f"convs.{index}.weight", f"convs.{index}.bias"
            state[weight] = state[weight] * (1 + scale)[:, None, None, None]
            state[bias] = state[bias] * (1 + scale) + shift
    return {k: v for k, v in state.items() if "modulation" not in k and k[:5] != "time."}
