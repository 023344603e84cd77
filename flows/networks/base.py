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
    """An interval [start, end] of block time on which a velocity field is smooth.

    The values of `field` at both ends are the limits from inside.
    """

    start: float
    end: float
    field: Velocity


class Velocity(nn.Module, ABC):
    """A velocity field v(t, z) on samples of a fixed shape.

    Samples never interact: row i of v(t, z) depends on row i of z alone. The divergence estimators
    rely on it, so a network must not use batch normalisation. An unconditional field has 0
    classes.
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
        """Return the field v(t, z | image) of samples with conditioning images (B, K, H, W).

        Raises:
            FlowError: the field is not conditioned on images, or the shape does not fit.
        """
        raise FlowError(
            f"a {type(self).__name__} is not conditioned on an image; leave Condition.image out"
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
        """Compute the field (B, *shape) and its derivatives (∂v/∂z) ε along n ≥ 1 directions.

        The directions ε and the derivatives are (n, B, *shape), and t is 0-d. This default uses
        forward-mode differentiation, vectorised over the directions; a network may override it by
        a faster chain rule of its own.
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
