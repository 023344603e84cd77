"""Conditions of samples, and the velocity fields that follow from them.

Solvers know v(t, z) alone, so labels y are bound to the field v(t, z, y) for one pass. With
guidance weight w and the null label ∅ the field is

    v(t, z, ∅) + w (v(t, z, y) − v(t, z, ∅)).

Reference: Ho, Salimans, "Classifier-free diffusion guidance" (2022); Zheng et al., "Guided flows
for generative modeling and decision making" (2023) for velocity fields.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flows.errors import FlowError
from flows.networks.base import SmoothPiece, Velocity


@dataclass(frozen=True)
class Condition:
    """The condition of n samples: a label and a guidance weight, an image, or both.

    Attributes:
        labels: int64 (n,), class labels from 0; the label ``velocity.classes`` is the null label.
        guidance: guidance weight w, finite and not negative; 1 is the conditional field.
        image: conditioning images (n, K, H, W).

    Raises:
        FlowError: there is neither label nor image, or the weight is out of range or has no
            labels.
    """

    labels: Tensor | None = None
    guidance: float = 1.0
    image: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that the fields fit together."""
        if self.labels is None and self.guidance != 1:
            raise FlowError(f"guidance is {self.guidance} without labels; give Condition.labels")
        if self.labels is None and self.image is None:
            raise FlowError("a condition needs labels, images, or both")
        if not 0 <= self.guidance < math.inf:
            raise FlowError(
                f"guidance must be finite and not negative, found {self.guidance}; 1 is the "
                "conditional field"
            )

    def rows(self, start: int, stop: int) -> Condition:
        """Return the condition of the samples [start, stop)."""
        labels = None if self.labels is None else self.labels[start:stop]
        image = None if self.image is None else self.image[start:stop]
        return replace(self, labels=labels, image=image)


def check_condition(condition: Condition | None, z: Tensor) -> None:
    """Check that there is one label or image for each of the samples (n, *shape); None passes.

    Raises:
        FlowError: the numbers differ, or the labels are not int64.
    """
    if condition is None:
        return
    if condition.image is not None and len(condition.image) != len(z):
        raise FlowError(
            f"expected one conditioning image for each of {len(z)} samples, found "
            f"{len(condition.image)}"
        )
    labels = condition.labels
    if labels is not None and (labels.dtype != torch.int64 or labels.shape != z.shape[:1]):
        raise FlowError(
            f"expected one int64 label for each sample, ({len(z)},), found {labels.dtype} "
            f"{tuple(labels.shape)}"
        )


def in_chunks(
    z: Tensor, condition: Condition | None, size: int
) -> Iterator[tuple[Tensor, Condition | None]]:
    """Yield samples (n, *shape) and their condition in chunks, which bound the memory of a pass.

    The whole condition is checked before the first chunk: mismatched numbers of samples and labels
    could agree within a chunk.

    Raises:
        FlowError: the condition does not fit the samples.
    """
    check_condition(condition, z)
    for start in range(0, len(z), size):
        stop = start + size
        yield z[start:stop], None if condition is None else condition.rows(start, stop)


def bind(velocity: Velocity, condition: Condition | None, z: Tensor) -> Velocity:
    """Return the field v(t, z) of samples (B, *shape): the velocity given labels and images.

    Raises:
        FlowError: labels or images are missing, are given to a velocity without them, do not match
            the samples in number, or are out of range.
    """
    check_condition(condition, z)
    if condition is not None and condition.image is not None:
        velocity = velocity.with_image(condition.image.to(z.device))
    labels = None if condition is None else condition.labels
    if labels is None:
        if velocity.classes:
            raise FlowError(
                f"the flow was trained with {velocity.classes} classes; give the class of every "
                "sample (a Condition)"
            )
        return velocity
    if not velocity.classes:
        raise FlowError("the flow was trained without classes; leave the labels out")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > velocity.classes:
        raise FlowError(
            f"labels must lie between 0 and {velocity.classes} (no class), found {low} to {high}"
        )
    assert condition is not None
    return ClassConditioned(velocity, labels.to(z.device), condition.guidance)


class ClassConditioned(Velocity):
    """The field v(t, z) of B samples with known labels y, int64 (B,), and guidance weight w."""

    def __init__(self, inner: Velocity, labels: Tensor, guidance: float = 1.0) -> None:
        super().__init__(inner.shape)
        self.inner, self.labels, self.guidance = inner, labels, guidance

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Evaluate the field at z (B, *shape), or at m copies (m·B, *shape) of the batch."""
        labels = self.labels.repeat(len(z) // len(self.labels))
        if self.guidance == 1:
            return self.inner(t, z, labels)
        both = torch.cat([labels, torch.full_like(labels, self.inner.classes)])
        times = t if t.dim() == 0 else torch.cat([t, t])
        v, v_null = self.inner(times, torch.cat([z, z]), both).chunk(2)
        return torch.lerp(v_null, v, self.guidance)

    def directional(
        self, t: Tensor, z: Tensor, tangents: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Extrapolate the derivatives (n, B, *shape) as the field; see :class:`Velocity`."""
        v, derivatives = self.inner.directional(t, z, tangents, self.labels)
        if self.guidance == 1:
            return v, derivatives
        null = torch.full_like(self.labels, self.inner.classes)
        v_null, null_derivatives = self.inner.directional(t, z, tangents, null)
        return (
            torch.lerp(v_null, v, self.guidance),
            torch.lerp(null_derivatives, derivatives, self.guidance),
        )

    def smooth_pieces(self) -> tuple[SmoothPiece, ...]:
        """Return the pieces of the inner field, with the same labels; see :class:`Velocity`."""
        return tuple(
            replace(piece, field=ClassConditioned(piece.field, self.labels, self.guidance))
            for piece in self.inner.smooth_pieces()
        )
