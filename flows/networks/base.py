"""The interface of velocity fields v(t, z)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import jvp, vmap

from flows.errors import FlowError


@dataclass(frozen=True)
class SmoothPiece:
    """An interval of block time on which a velocity field is smooth.

    Attributes:
        start: beginning of the interval, in [0, 1).
        end: end of the interval, in (0, 1].
        field: v(t, z) for t in [start, end]; its values at both ends are the limits from inside.
    """

    start: float
    end: float
    field: Velocity


class Velocity(nn.Module, ABC):
    """A velocity field v(t, z) on samples of a fixed shape.

    Samples never interact: row i of v(t, z) depends on row i of z alone. The divergence
    estimators rely on it, so a network must not use batch normalisation.

    Args:
        shape: shape of one sample.
        classes: number of classes that condition the field; 0 for an unconditional field.
    """

    def __init__(self, shape: tuple[int, ...], classes: int = 0) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.dim = math.prod(shape)
        self.classes = classes

    @abstractmethod
    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Evaluate the field.

        Args:
            t: time in [0, 1]; 0-d if all samples share it (ODE solvers), or (B,) with one time
                for each sample (simulation-free objectives).
            z: samples (B, *shape).
            labels: int64 (B,) in [0, classes], where ``classes`` is the null label; None for a
                field without classes.

        Returns:
            v(t, z), (B, *shape).
        """

    def with_image(self, image: Tensor) -> Velocity:
        """Return the field v(t, z | image) of samples with one conditioning image each.

        Args:
            image: images (B, K, H, W).

        Raises:
            FlowError: the field is not conditioned on images, or the shape does not fit.
        """
        raise FlowError(
            "this velocity network is not conditioned on an image (velocity.image_channels = 0); "
            "leave Condition.image out"
        )

    def smooth_pieces(self) -> tuple[SmoothPiece, ...]:
        """Return the intervals between the jumps of the field in time, in order.

        A field without jumps is a single piece. Solvers integrate piece by piece, so that no step
        crosses a jump.
        """
        return (SmoothPiece(0.0, 1.0, self),)

    def directional(
        self, t: Tensor, z: Tensor, tangents: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the field and its derivatives (∂v/∂z) ε along n directions for each sample.

        This default uses forward-mode differentiation, vectorised over the directions; a network
        may override it by a faster chain rule of its own.

        Args:
            t: 0-d time.
            z: samples (B, *shape).
            tangents: directions ε (n, B, *shape), n ≥ 1.
            labels: int64 (B,), as in :meth:`forward`.

        Returns:
            v(t, z), (B, *shape), and the derivatives (n, B, *shape).
        """

        def push(tangent: Tensor) -> tuple[Tensor, Tensor]:
            value, derivative = jvp(lambda x: self(t, x, *optional(labels)), (z,), (tangent,))[:2]
            return value, derivative

        if len(tangents) == 1:
            v, derivative = push(tangents[0])
            return v, derivative[None]
        # v does not depend on the direction that vmap runs over: keep one copy of it.
        out_dims: Any = (None, 0)
        v, derivatives = vmap(push, out_dims=out_dims)(tangents)
        return v, derivatives


def optional(labels: Tensor | None) -> tuple[Tensor, ...]:
    """Return labels (B,) as positional arguments of a field: none if there are no labels.

    A field without classes may be a plain function of (t, z), which takes no third argument.
    """
    return () if labels is None else (labels,)
