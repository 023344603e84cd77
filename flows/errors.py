"""Typed failures of the flows: a bad argument, and an ODE that cannot be solved."""

from __future__ import annotations


class FlowError(ValueError):
    """An argument is out of range or does not fit; the message says expected and found."""


class SolveError(RuntimeError):
    """The neural ODE of a block could not be integrated.

    Attributes:
        reason: what happened, in words.
        t: block time in [0, 1] at which it happened.
        block: index of the block inside its flow, when the caller knows it.
        evaluations: evaluations of the right-hand side spent so far.
    """

    def __init__(
        self, reason: str, t: float, evaluations: int = 0, block: int | None = None
    ) -> None:  # all by place, so that an error can be made again from its args
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
        """The same failure with the block's index filled in (an index already known stays)."""
        known = block if self.block is None else self.block
        return SolveError(self.reason, self.t, evaluations=self.evaluations, block=known)
