"""Fields made of others: a stretch of time, a slice of a block, several networks in sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flows.errors import FlowError
from flows.networks.base import Piece, Velocity, given

#: differences of time below it are rounding
ROUNDING = 1e-9


class Stretch(Velocity):
    """Another field on another interval of time, followed at another speed.

    w(t, z) = length · v(start + length · t, z), so that following w over [0, 1] is following v
    over [start, start + length].
    """

    def __init__(self, inner: Velocity, start: float, length: float) -> None:
        super().__init__(inner.shape, inner.classes)
        self.inner = inner
        self.start = start
        self.length = length

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """See :class:`Velocity`."""
        return self.length * self.inner(self.start + self.length * t, z, *given(labels))

    def directional(
        self, t: Tensor, z: Tensor, tangents: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Velocity`."""
        v, moved = self.inner.directional(
            self.start + self.length * t, z, tangents, *given(labels)
        )
        return self.length * v, self.length * moved

    def pieces(self) -> tuple[Piece, ...]:
        """See :class:`Velocity`; those of the inner field that lie in its interval."""
        inside = []
        for piece in self.inner.pieces():
            start = max(0.0, (piece.start - self.start) / self.length)
            end = min(1.0, (piece.end - self.start) / self.length)
            if end - start > ROUNDING:
                inside.append((start, end, piece.field))
        if len(inside) == 1 and inside[0][2] is self.inner:
            return (Piece(0.0, 1.0, self),)
        return tuple(
            Piece(start, end, Stretch(field, self.start, self.length))
            for start, end, field in inside
        )


class TimeSlice(Stretch):
    """Part of a block's time, stretched to [0, 1]: the children of a refined block start from it.

    Reference: the refinement of blocks in JKO-iFlow.
    """

    def __init__(self, inner: Velocity, start: float, length: float) -> None:
        if not (0 <= start and 0 < length and start + length <= 1 + ROUNDING):
            raise FlowError(
                f"a time slice must lie inside [0, 1], found start {start}, length {length}"
            )
        super().__init__(inner, start, length)


class NetSequence(Velocity):
    """Several networks w_0 … w_{n−1} in one block, each over its part of the time.

    v(t, z) = n · w_j(n t − j, z) for t in [j/n, (j+1)/n): each network sees its own time from 0 to
    1, and the block's map is that of n blocks of one network each, T_{n−1} ∘ … ∘ T_0, under one
    objective. With one clock v(t, z) = w_j(t, z) instead: n copies of a network are its field, and
    may part from there. The field jumps at t = j/n; its value there is that of the later network.

    Args:
        nets: the networks at hand, in order.
        count: n; None takes the number of networks.
        first: j of the first network at hand; a slice of a block needs only some of them.
        one_clock: whether all networks see the block's time.
    """

    def __init__(
        self,
        nets: Sequence[Velocity],
        count: int | None = None,
        first: int = 0,
        one_clock: bool = False,
    ) -> None:
        super().__init__(nets[0].shape, nets[0].classes)
        self.nets = nn.ModuleList(nets)
        self.count = count or len(nets)
        self.first = first
        self.one_clock = one_clock

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """See :class:`Velocity`."""
        last = self.first + len(self.nets) - 1
        index = (t * self.count).floor().clamp(self.first, last)
        if t.dim() == 0:
            return self._part(int(index))(t, z, *given(labels))
        v = torch.empty_like(z)
        for j in range(self.first, last + 1):
            rows = (index == j).nonzero()[:, 0]
            chosen = given(None if labels is None else labels[rows])
            part = self._part(j)(t[rows], z[rows], *chosen)
            v = v.index_copy(0, rows, part.to(v.dtype))  # under autocast it is of another
        return v

    def directional(
        self, t: Tensor, z: Tensor, tangents: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Velocity`."""
        last = self.first + len(self.nets) - 1
        index = int((t * self.count).floor().clamp(self.first, last))
        return self._part(index).directional(t, z, tangents, *given(labels))

    def pieces(self) -> tuple[Piece, ...]:
        """See :class:`Velocity`; one a network."""
        numbers = range(self.first, self.first + len(self.nets))
        return tuple(Piece(j / self.count, (j + 1) / self.count, self._part(j)) for j in numbers)

    def within(self, start: float, length: float) -> NetSequence:
        """The same field with only the networks that [start, start + length] needs."""
        low = math.floor(start * self.count + ROUNDING)
        high = math.ceil((start + length) * self.count - ROUNDING)
        nets = list(self.nets)[low - self.first : high - self.first]
        return NetSequence(nets, self.count, low, self.one_clock)  # type: ignore[arg-type]

    def _part(self, j: int) -> Velocity:
        net = self.nets[j - self.first]
        assert isinstance(net, Velocity)
        return net if self.one_clock else Stretch(net, -j, self.count)


def time_slice(velocity: Velocity, start: float, length: float) -> Velocity:
    """The part of a block's time [start, start + length], stretched to [0, 1].

    Args:
        velocity: of the whole block; not copied.
        start: in [0, 1).
        length: in (0, 1]; the whole is returned as it is.
    """
    if (start, length) == (0.0, 1.0):
        return velocity
    if isinstance(velocity, NetSequence):
        velocity = velocity.within(start, length)
    return TimeSlice(velocity, start, length)


def grid(pieces: Sequence[Piece], steps: int) -> tuple[int, ...]:
    """Sub-intervals of each piece of a field, on a grid of S equal ones that meets its jumps.

    Raises:
        FlowError: a sub-interval would straddle a jump.
    """
    shares = _shares(pieces, steps)
    if shares is None:
        raise FlowError(
            f"solver.steps = {steps} sub-intervals do not meet the switch from one network of "
            f"the block to the next (velocity.nets); take {aligned(pieces, steps)}, or an "
            "adaptive solver"
        )
    return shares


def aligned(pieces: Sequence[Piece], steps: int) -> int:
    """The least number of sub-intervals, at least ``steps``, whose grid meets all jumps.

    Raises:
        FlowError: there is none of a reasonable size.
    """
    for count in range(steps, steps + 1000):
        if fits(pieces, count):
            return count
    raise FlowError("no fixed grid meets the switches between the block's networks")


def fits(pieces: Sequence[Piece], steps: int) -> bool:
    """Whether no sub-interval of a grid of S equal ones straddles a jump."""
    return _shares(pieces, steps) is not None


def _shares(pieces: Sequence[Piece], steps: int) -> tuple[int, ...] | None:
    lengths = [(piece.end - piece.start) * steps for piece in pieces]
    shares = tuple(round(length) for length in lengths)
    close = all(abs(a - b) < 1e-6 for a, b in zip(lengths, shares, strict=True))
    return shares if close and min(shares) >= 1 else None
