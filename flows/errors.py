"""Errors of the flows: a bad argument, and an ODE that cannot be solved."""

from __future__ import annotations


class FlowError(ValueError):
    """An argument that is out of range or does not fit; the message says expected and found."""


class SolveError(RuntimeError):
    """A failed solve of a block's neural ODE, after some evaluations, at block time t in [0, 1].

    All arguments are positional, so that the error can be rebuilt from its ``args`` (pickle). The
    reason is a clause, and the block None if it is unknown.
    """

    def __init__(
        self, reason: str, t: float, evaluations: int = 0, block: int | None = None
    ) -> None:
        self.reason = reason
        self.t = t
        self.evaluations = evaluations
        self.block = block
        super().__init__(reason, t, evaluations, block)

    def __str__(self) -> str:
        where = f"at t = {self.t:.4g}"
        if self.block is not None:
            where = f"in block {self.block} {where}"
        return f"the flow could not be solved {where}: {self.reason}"

    def in_block(self, block: int) -> SolveError:
        """Return the same failure with the block's index, unless it has one already."""
        known = block if self.block is None else self.block
        return SolveError(self.reason, self.t, evaluations=self.evaluations, block=known)
