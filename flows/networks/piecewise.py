"""Velocity fields in pieces of time: several networks in one block, and slices of a block.

Where a field jumps in time, a fixed grid of sub-intervals must have a node, so that no solver step
crosses the jump.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flows.errors import FlowError
from flows.networks.base import SmoothPiece, Velocity, optional

#: differences of time that are smaller are rounding errors
ROUNDING = 1e-9

#: sub-intervals beyond the requested number that :func:`aligned_steps` tries
_SEARCH = 1000


class TimeSlice(Velocity):
    """A part [start, start + length] of a block's time, rescaled to [0, 1].

        w(t, z) = length · v(start + length · t, z)

    Raises:
        FlowError: the part does not lie inside [0, 1].

    Reference: the refinement of blocks in JKO-iFlow.
    """

    def __init__(self, inner: Velocity, start: float, length: float) -> None:
        if not (0 <= start and 0 < length and start + length <= 1 + ROUNDING):
            raise FlowError(
                f"a time slice must lie inside [0, 1], found start {start}, length {length}"
            )
        super().__init__(inner.shape, inner.classes)
        self.inner = inner
        self.start = start
        self.length = length

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Evaluate w(t, z) for z (B, *shape); see :class:`Velocity`."""
        return self.length * self.inner(self.start + self.length * t, z, *optional(labels))

    def directional(
        self, t: Tensor, z: Tensor, tangents: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scale the field and derivatives (n, B, *shape) of v; see :class:`Velocity`."""
        time = self.start + self.length * t
        v, derivatives = self.inner.directional(time, z, tangents, *optional(labels))
        return self.length * v, self.length * derivatives

    def smooth_pieces(self) -> tuple[SmoothPiece, ...]:
        """Return the pieces of v that lie in this part; see :class:`Velocity`."""
        inner = self.inner.smooth_pieces()
        if len(inner) == 1 and inner[0].field is self.inner:
            return super().smooth_pieces()
        pieces = []
        for piece in inner:
            start = max(0.0, (piece.start - self.start) / self.length)
            end = min(1.0, (piece.end - self.start) / self.length)
            if end - start > ROUNDING:
                field = TimeSlice(piece.field, self.start, self.length)
                pieces.append(SmoothPiece(start, end, field))
        return tuple(pieces)


class PiecewiseVelocity(Velocity):
    """Several networks w_0 … w_{n−1} in one block, each on an equal part of its time.

        v(t, z) = w_j(t, z)  for t in [j/n, (j+1)/n)

    All networks see the block's time t, so n copies of one network are the field of that network.
    The field jumps at t = j/n, where its value is that of the later network. A slice of a block
    holds only the networks that it needs, of which `first` is the index of the first.
    """

    def __init__(self, nets: Sequence[Velocity], count: int | None = None, first: int = 0) -> None:
        super().__init__(nets[0].shape, nets[0].classes)
        self.nets = nn.ModuleList(nets)
        self.count = count or len(nets)
        self.first = first

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Evaluate each row of z (B, *shape) by the network of its time; see :class:`Velocity`."""
        index = self._index(t)
        if t.dim() == 0:
            return self._net(int(index))(t, z, *optional(labels))
        v = torch.empty_like(z)
        for j in range(self.first, self.first + len(self.nets)):
            rows = (index == j).nonzero()[:, 0]
            chosen = None if labels is None else labels[rows]
            part = self._net(j)(t[rows], z[rows], *optional(chosen))
            v = v.index_copy(0, rows, part.to(v.dtype))  # autocast returns another dtype
        return v

    def directional(
        self, t: Tensor, z: Tensor, tangents: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Differentiate the network of time t, (n, B, *shape); see :class:`Velocity`."""
        return self._net(int(self._index(t))).directional(t, z, tangents, *optional(labels))

    def smooth_pieces(self) -> tuple[SmoothPiece, ...]:
        """Return one piece for each network; see :class:`Velocity`."""
        indices = range(self.first, self.first + len(self.nets))
        return tuple(
            SmoothPiece(j / self.count, (j + 1) / self.count, self._net(j)) for j in indices
        )

    def restrict(self, start: float, length: float) -> PiecewiseVelocity:
        """Return the same field with only the networks that [start, start + length] needs."""
        low = math.floor(start * self.count + ROUNDING)
        high = math.ceil((start + length) * self.count - ROUNDING)
        nets = [self._net(j) for j in range(low, high)]
        return PiecewiseVelocity(nets, self.count, low)

    def network_at(self, time: float) -> Velocity:
        """Return the network of a time in [0, 1]; at a jump, the later one."""
        return self._net(int(self._index(torch.tensor(time, dtype=torch.float64))))

    def covers(self, t: Tensor) -> Tensor:
        """Return which times (B,) in [0, 1] are those of a network that this field holds, bool."""
        index = (t * self.count).floor().clamp(0, self.count - 1)
        return (index >= self.first) & (index < self.first + len(self.nets))

    def _index(self, t: Tensor) -> Tensor:
        """Return the index j of the network at times t, 0-d or (B,)."""
        last = self.first + len(self.nets) - 1
        return (t * self.count).floor().clamp(self.first, last)

    def _net(self, j: int) -> Velocity:
        net = self.nets[j - self.first]
        assert isinstance(net, Velocity)
        return net


def time_slice(velocity: Velocity, start: float, length: float) -> Velocity:
    """Return the part [start, start + length] of a block's time, rescaled to [0, 1].

    The field is not copied; for the whole block it is returned as it is.
    """
    if (start, length) == (0.0, 1.0):
        return velocity
    if isinstance(velocity, PiecewiseVelocity):
        velocity = velocity.restrict(start, length)
    return TimeSlice(velocity, start, length)


def split_steps(pieces: Sequence[SmoothPiece], steps: int) -> tuple[int, ...]:
    """Divide S ≥ 1 equal sub-intervals of [0, 1] among the smooth pieces of a field, in order.

    Raises:
        FlowError: a sub-interval crosses a jump.
    """
    shares = _split(pieces, steps)
    if shares is None:
        raise FlowError(
            f"a grid of {steps} steps has a sub-interval that crosses the switch from one network "
            f"of the block to the next; take {aligned_steps(pieces, steps)}, or an adaptive "
            "solver"
        )
    return shares


def aligned_steps(pieces: Sequence[SmoothPiece], steps: int) -> int:
    """Return the smallest number of sub-intervals ≥ ``steps`` that has a node at every jump.

    Raises:
        FlowError: no number within a thousand of ``steps`` has.
    """
    for count in range(steps, steps + _SEARCH):
        if is_aligned(pieces, count):
            return count
    raise FlowError(
        f"no fixed grid of {steps} to {steps + _SEARCH - 1} sub-intervals has a node at every "
        "switch between the block's networks; use an adaptive solver"
    )


def is_aligned(pieces: Sequence[SmoothPiece], steps: int) -> bool:
    """Return whether a grid of S equal sub-intervals has a node at every jump of a field."""
    return _split(pieces, steps) is not None


def _split(pieces: Sequence[SmoothPiece], steps: int) -> tuple[int, ...] | None:
    lengths = [(piece.end - piece.start) * steps for piece in pieces]
    shares = tuple(round(length) for length in lengths)
    close = all(abs(a - b) < 1e-6 for a, b in zip(lengths, shares, strict=True))
    return shares if close and min(shares) >= 1 else None
