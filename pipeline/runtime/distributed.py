"""Collectives: sums, broadcasts and errors that all ranks share.

An error on one rank is raised on every rank, and rank 0 takes every decision. So no rank waits in
a collective that another rank has left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor

from flows.errors import SolveError
from pipeline.errors import JkoflowError, UserError


def raise_on_all_ranks(accelerator: Accelerator, error: JkoflowError | SolveError | None) -> None:
    """Raise the error of the lowest failing rank on every rank (a collective), if there is one."""
    if accelerator.num_processes > 1:
        errors = gather_object([error])
        first = next((rank for rank, other in enumerate(errors) if other is not None), None)
        if first is not None and first != accelerator.process_index:
            error = errors[first]
    if error is not None:
        raise error


@contextmanager
def errors_on_all_ranks(accelerator: Accelerator) -> Iterator[None]:
    """Raise an error of the block on every rank; the block itself has no collectives."""
    failure: JkoflowError | SolveError | None = None
    try:
        yield
    except (JkoflowError, SolveError) as error:
        failure = error
    raise_on_all_ranks(accelerator, failure)


def require_same(accelerator: Accelerator, value: str, what: str) -> None:
    """Check that a value is the same on all ranks (a collective).

    Args:
        accelerator: device and ranks.
        value: of this rank, such as the key of a cache.
        what: names the value in the message, a singular.

    Raises:
        UserError: another rank has another value, on every rank.
    """
    if accelerator.num_processes == 1:
        return
    values = gather_object([value])
    for rank, other in enumerate(values):
        if other != values[0]:
            raise UserError(
                f"{what} of rank {rank} is {other}; expected {values[0]}, as of rank 0; start all "
                "processes with the same data, files and settings"
            )


def broadcast_decision(accelerator: Accelerator, decision: bool) -> bool:
    """Return the decision of rank 0 on every rank (a collective); clocks and disks differ."""
    if accelerator.num_processes == 1:
        return decision
    flag = torch.tensor([int(decision)], device=accelerator.device)
    return bool(broadcast(flag).item())


def sum_over_ranks(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Return the sum over ranks of a tensor (…) of any shape, on every rank (a collective)."""
    return accelerator.reduce(values, "sum") if accelerator.num_processes > 1 else values
