"""Classes and images: what a conditional flow is given, and the field that it then follows.

A network with classes sees v(t, z, y). Solvers and divergence estimators know v(t, z) alone, so
for one pass through a block the labels are bound to the field. Under guidance w the field is

    v(t, z, null) + w (v(t, z, y) − v(t, z, null)),

where null is the label that stands for no class: w = 1 is the plain conditional field, w > 1
extrapolates. A network that is told an image beside every sample
(`flows.networks.image_condition`) gets it here,
too.

Reference: Ho, Salimans, "Classifier-free diffusion guidance" (2022); Zheng et al., "Guided flows
for generative modeling and decision making" (2023) for velocity fields.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flows.errors import FlowError
from flows.networks.base import Piece, Velocity


@dataclass(frozen=True)
class Condition:
    """The class of every sample, how strongly it is followed, and the image beside it.

    Attributes:
        labels: int64 (n,), from 0; the number of classes itself is the null label. None for a flow
            without classes.
        guidance: w, finite and not negative; 1 is the conditional field.
        beside: (n, K, H, W), images for a flow that is told one beside every sample; or None.
    """

    labels: Tensor | None = None
    guidance: float = 1.0
    beside: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuses a weight out of range, or of nothing, and nothing at all."""
        if self.labels is None and self.guidance != 1:
            raise FlowError(f"guidance {self.guidance} needs labels to be followed more strongly")
        if self.labels is None and self.beside is None:
            raise FlowError("a condition needs labels, images beside the samples, or both")
        if not 0 <= self.guidance < math.inf:
            raise FlowError(
                f"guidance must be finite and not negative, found {self.guidance}; 1 is the "
                "plain conditional field"
            )

    def rows(self, start: int, stop: int) -> Condition:
        """The condition of the samples [start, stop)."""
        labels, beside = (
            None if each is None else each[start:stop] for each in (self.labels, self.beside)
        )
        return replace(self, labels=labels, beside=beside)


def check_labels(condition: Condition | None, z: Tensor) -> None:
    """Refuses another number of labels, or images, than of samples: to be asked before any is cut.

    Raises:
        FlowError: they differ, or the labels are not int64.
    """
    if condition is None:
        return
    if condition.beside is not None and len(condition.beside) != len(z):
        raise FlowError(
            f"expected one image beside every sample, {len(z)}, found {len(condition.beside)}"
        )
    labels = condition.labels
    if labels is None:
        return
    if labels.dtype != torch.int64 or labels.shape != z.shape[:1]:
        raise FlowError(
            f"expected one int64 label a sample, ({len(z)},), found {labels.dtype} "
            f"{tuple(labels.shape)}"
        )


def rows_of(condition: Condition | None, start: int, stop: int) -> Condition | None:
    """The condition of the samples [start, stop), where there is one."""
    return None if condition is None else condition.rows(start, stop)


def bind(velocity: Velocity, condition: Condition | None, z: Tensor) -> Velocity:
    """The field v(t, z) that samples follow: the velocity with their labels and images filled in.

    Args:
        velocity: with or without classes.
        condition: of the samples; None for a velocity without classes, and told no image.
        z: the samples (B, *shape).

    Raises:
        FlowError: labels for a velocity without classes, none for one with them, another number
            of labels or images than of samples, a label out of range, or images for a velocity
            that is told none.
    """
    if condition is not None and condition.beside is not None:
        check_labels(condition, z)
        velocity = velocity.told(condition.beside.to(z.device))
    if condition is None or (condition.labels is None and condition.beside is not None):
        if velocity.classes:
            raise FlowError(
                f"the flow was trained with {velocity.classes} classes; give the class of every "
                "sample (a Condition)"
            )
        return velocity
    labels = condition.labels
    assert labels is not None
    if not velocity.classes:
        raise FlowError("the flow was trained without classes and takes no labels")
    check_labels(condition, z)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > velocity.classes:
        raise FlowError(
            f"labels must lie between 0 and {velocity.classes} (no class), found {low} to {high}"
        )
    return Conditioned(velocity, replace(condition, labels=labels.to(z.device)))


class Conditioned(Velocity):
    """A velocity with classes as a field v(t, z) of B samples whose labels are known."""

    def __init__(self, inner: Velocity, condition: Condition) -> None:
        super().__init__(inner.shape)
        assert condition.labels is not None
        self.inner, self.condition, self._labels = inner, condition, condition.labels

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """See :class:`Velocity`; z may hold the B samples several times, one after another."""
        known = self._labels
        labels = known.repeat(len(z) // len(known))
        w = self.condition.guidance
        if w == 1:
            return self.inner(t, z, labels)
        both = torch.cat([labels, torch.full_like(labels, self.inner.classes)])
        times = t if t.dim() == 0 else torch.cat([t, t])
        v, v_null = self.inner(times, torch.cat([z, z]), both).chunk(2)
        return torch.lerp(v_null, v, w)

    def directional(
        self, t: Tensor, z: Tensor, tangents: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Velocity`; a guided field is linear in its two parts, and so is this."""
        known, w = self._labels, self.condition.guidance
        v, moved = self.inner.directional(t, z, tangents, known)
        if w == 1:
            return v, moved
        null = torch.full_like(known, self.inner.classes)
        v_null, moved_null = self.inner.directional(t, z, tangents, null)
        return torch.lerp(v_null, v, w), torch.lerp(moved_null, moved, w)

    def pieces(self) -> tuple[Piece, ...]:
        """See :class:`Velocity`; those of the inner field, with the same labels."""
        return tuple(
            Piece(piece.start, piece.end, Conditioned(piece.field, self.condition))
            for piece in self.inner.pieces()
        )
