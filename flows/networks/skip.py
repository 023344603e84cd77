"""A velocity field with a linear skip connection around its network."""

from __future__ import annotations

from torch import Tensor

from flows.networks.base import SmoothPiece, Velocity, optional


class SkipVelocity(Velocity):
    """A velocity field with a constant multiple of its input added.

        w(t, z) = c z + v(t, z)

    The constant c is no weight, and training does not change it.
    """

    def __init__(self, inner: Velocity, skip: float) -> None:
        super().__init__(inner.shape, inner.classes)
        self.inner = inner
        self.skip = skip

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Evaluate w(t, z) for z (B, *shape); see :class:`Velocity`."""
        return self.skip * z + self.inner(t, z, *optional(labels))

    def directional(
        self, t: Tensor, z: Tensor, tangents: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add c z to v, and c ε to its derivatives (n, B, *shape); see :class:`Velocity`."""
        v, derivatives = self.inner.directional(t, z, tangents, *optional(labels))
        return self.skip * z + v, self.skip * tangents + derivatives

    def smooth_pieces(self) -> tuple[SmoothPiece, ...]:
        """Return the pieces of v, with the skip connection around each; see :class:`Velocity`."""
        inner = self.inner.smooth_pieces()
        if len(inner) == 1 and inner[0].field is self.inner:
            return super().smooth_pieces()
        return tuple(
            SmoothPiece(piece.start, piece.end, SkipVelocity(piece.field, self.skip))
            for piece in inner
        )
