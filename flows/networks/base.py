"""What every velocity network shares: its configuration, its interface, its time features."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.nn import functional as F

from flows.errors import FlowError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus20": partial(F.softplus, beta=20),
    "softplus": F.softplus,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}

CLOCKS = ("own", "block")


@dataclass(frozen=True)
class VelocityConfig:
    """Which network a block uses, and how large it is.

    Attributes:
        kind: ``mlp`` | ``resmlp`` | ``conv`` | ``unet`` | ``linear``.
        width: hidden features (resmlp) or channels (conv, unet).
        depth: residual blocks (resmlp), hidden layers (conv), residual blocks a level (unet).
        hidden: layer widths of ``mlp``; the paper's two-dimensional flows use 128-128-128.
        activation: a key of ``ACTIVATIONS``, or ``default``: softplus20 for mlp and conv (smooth,
            as in the paper), silu for resmlp and unet.
        time_features: sines and cosines of t seen by the time-conditioned networks; even.
        heads: attention heads of the unet, at its lowest resolution and on grids of at most 8x8;
            0 leaves attention out.
        patch: p x p positions of the grid that the unet folds into channels, and out again; what
            it calls a grid is then the folded one.
        nets: networks a block: each covers an equal part of the block's time, one after the other.
        clock: the time that several networks see: ``own``, from 0 to 1 in each, as if it were a
            block; or ``block``, the block's, so that n copies of one network are its field.
        beside: conv, unet: channels K of an image (K, H, W) that the network is told beside every
            sample; 0 for none.
        classes: classes that the network is told apart by a label; 0 for a network without.
        class_dropout: lfm, fm: probability that a sample in training goes without its class, in
            [0, 1), which guidance needs; jko never drops a class, for the step of all data
            together is another map than the steps of the classes, and ends elsewhere.
        zero_init: start with v = 0, so that a new block is the identity map.
    """

    kind: str = "resmlp"
    width: int = 256
    depth: int = 4
    hidden: tuple[int, ...] = (128, 128, 128)
    activation: str = "default"
    time_features: int = 32
    heads: int = 4
    patch: int = 1
    nets: int = 1
    clock: str = "own"
    beside: int = 0
    classes: int = 0
    class_dropout: float = field(default=0.1, compare=False)  # not of the network: of its training
    zero_init: bool = True

    def __post_init__(self) -> None:
        """Refuses sizes and names that no network could be built from."""
        object.__setattr__(self, "hidden", tuple(int(width) for width in self.hidden))
        for name in ("width", "depth", "patch", "nets"):
            if getattr(self, name) < 1:
                raise FlowError(f"velocity.{name} must be at least 1, not {getattr(self, name)}")
        if self.kind == "mlp" and (not self.hidden or min(self.hidden) < 1):
            raise FlowError(f"velocity.hidden needs widths of at least 1, not {self.hidden}")
        if self.activation != "default" and self.activation not in ACTIVATIONS:
            known = ", ".join(["default", *ACTIVATIONS])
            raise FlowError(f"unknown activation {self.activation!r}; choose one of {known}")
        if self.clock not in CLOCKS:
            known = ", ".join(CLOCKS)
            raise FlowError(f"unknown velocity.clock {self.clock!r}; choose one of {known}")
        if self.nets == 1:  # whose part of the block's time is the whole
            object.__setattr__(self, "clock", "own")
        if self.time_features < 2 or self.time_features % 2:
            raise FlowError(
                f"velocity.time_features must be even and at least 2, not {self.time_features}"
            )
        if self.beside and (self.nets > 1 or self.kind not in ("conv", "unet")):
            raise FlowError(
                f"velocity.beside = {self.beside} needs one network for grids, conv or unet, not "
                f"{self.nets} of kind {self.kind}"
            )
        for name in ("heads", "classes", "beside"):
            value = getattr(self, name)
            if value < 0:
                raise FlowError(f"velocity.{name} must not be negative, found {value}")
        if not 0 <= self.class_dropout < 1:
            raise FlowError(f"velocity.class_dropout must lie in [0, 1), not {self.class_dropout}")

    def activation_or(self, default: str) -> Callable[[Tensor], Tensor]:
        """The chosen activation, or the network's own default."""
        return ACTIVATIONS[default if self.activation == "default" else self.activation]


@dataclass(frozen=True)
class Piece:
    """A field on an interval of a block's time within which it is smooth.

    Attributes:
        start: of the interval, in [0, 1).
        end: of the interval, in (0, 1].
        field: v(t, z) for t in [start, end], the limits from inside at both ends.
    """

    start: float
    end: float
    field: Velocity


class Velocity(nn.Module, ABC):
    """A velocity field v(t, z) on samples of a fixed shape.

    Samples never interact: row i of v(t, z) depends on row i of z alone, which the divergence
    estimators rely on (so no batch normalisation).

    Args:
        shape: of one sample.
        classes: that it takes labels of; 0 for a field without.
    """

    def __init__(self, shape: tuple[int, ...], classes: int = 0) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.dim = math.prod(shape)
        self.classes = classes

    @abstractmethod
    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Evaluates the field.

        Args:
            t: time in [0, 1]; 0-d, the same for all samples (ODE solvers), or (B,), one a sample
                (simulation-free objectives).
            z: samples (B, *shape).
            labels: int64 (B,), in [0, classes], where the last is no class; None for a field
                without classes.

        Returns:
            v(t, z), (B, *shape).
        """

    def told(self, beside: Tensor) -> Velocity:
        """The field of samples that have an image beside them.

        Args:
            beside: (B, K, H, W).

        Raises:
            FlowError: this field takes none, or one of another shape.
        """
        raise FlowError("this velocity is told no image beside its samples (velocity.beside = 0)")

    def pieces(self) -> tuple[Piece, ...]:
        """The intervals between the times at which the field jumps; one if it never does.

        A solver goes through them one by one: no step may straddle a jump.
        """
        return (Piece(0.0, 1.0, self),)

    def directional(
        self, t: Tensor, z: Tensor, tangents: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The field and its derivatives along n directions a sample, (∂v/∂z) ε.

        Forward mode over all directions at once; a network that knows its own chain rule
        overrides it with something faster.

        Args:
            t: 0-d time.
            z: samples (B, *shape).
            tangents: directions (n, B, *shape), n ≥ 1.
            labels: (B,), as for the field.

        Returns:
            v(t, z), (B, *shape), and the derivatives (n, B, *shape).
        """

        def push(tangent: Tensor) -> tuple[Tensor, Tensor]:
            value, moved = jvp(lambda x: self(t, x, *given(labels)), (z,), (tangent,))[:2]
            return value, moved

        if len(tangents) == 1:
            v, moved = push(tangents[0])
            return v, moved[None]
        # v does not depend on the direction that vmap runs over: keep one copy of it.
        out_dims: Any = (None, 0)
        v, moved = vmap(push, out_dims=out_dims)(tangents)
        return v, moved


def given(labels: Tensor | None) -> tuple[Tensor, ...]:
    """The labels as further arguments of a field: none for a field without classes."""
    return () if labels is None else (labels,)


class LabelShift(nn.Module):
    """x + e(y): how every network sees the class, one learned vector a class and one for none.

    Args:
        classes: labels 0 … classes − 1, and the null label ``classes``; 0 changes nothing.
        features: of x.
        zero: start with e = 0.
    """

    def __init__(self, classes: int, features: int, zero: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes + 1, features) if classes else None
        if self.embedding is not None and zero:
            nn.init.zeros_(self.embedding.weight)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Maps x (features), or (1 or B, features), with labels (B,) to (B, features).

        Raises:
            FlowError: labels for a network without classes, or none for one with them.
        """
        if (self.embedding is None) != (labels is None):
            need = "no labels, for it has no classes" if self.embedding is None else "labels"
            raise FlowError(f"this velocity network needs {need}")
        return x if self.embedding is None else x + self.embedding(labels)


def with_classes_anew(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Weights for a network whose classes are others than those that the weights know.

    Every class of the network starts as what stands for no class: the null label's vector in the
    weights, zero where they know none.

    Args:
        state: a state dict, but for its classes one of the network's architecture.
        network: to be told classes apart.

    Returns:
        A state dict that the network loads.
    """
    adopted = dict(state)
    for name, module in network.named_modules():
        if isinstance(module, LabelShift) and module.embedding is not None:
            key = f"{name}.embedding.weight"
            table = module.embedding.weight
            adopted[key] = torch.zeros_like(table)
            if key in state:
                adopted[key] += state[key][-1]
    return adopted


class TimeFeatures(nn.Module):
    """Sines and cosines of t at geometrically spaced frequencies, π/2 … 2π; shifted by the class.

    The fastest makes one period over the block: a training grid has only a few sub-intervals, and
    a field that wiggled between its knots would be integrated wrongly.
    """

    omega: Tensor

    def __init__(self, features: int, classes: int = 0) -> None:
        super().__init__()
        self.label = LabelShift(classes, features)
        half = features // 2
        exponents = torch.linspace(0, 1, half, dtype=torch.float64)
        omega = (math.pi / 2) * 4.0**exponents
        self.register_buffer("omega", omega.to(torch.get_default_dtype()), persistent=False)

    def forward(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Maps t, 0-d or (B,), to (1, features) or (B, features); with labels to (B, features)."""
        phase = t.reshape(-1, 1).to(self.omega.dtype) * self.omega
        return self.label(torch.cat([phase.sin(), phase.cos()], dim=1), labels)


def zero_(layer: nn.Linear | nn.Conv2d) -> None:
    """Sets weight and bias to zero, so that the layer contributes nothing at first."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
