"""Collectives: sums, broadcasts and errors that all ranks share.

An error on one rank is raised on every rank, and rank 0 takes every decision. So no rank waits in
a collective that another rank has left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor

from flows.errors import SolveError
from pipeline.errors import JkoflowError


def raise_on_all_ranks(accelerator: Accelerator, error: JkoflowError | SolveError | None) -> None:
    """Raise the error of the lowest failing rank on every rank (a collective).

    Args:
        accelerator: the ranks.
        error: the error of this rank; None if it has none.

    Raises:
        JkoflowError: a rank failed with it or with a subclass.
        SolveError: a rank failed with it.
    """
    if accelerator.num_processes > 1:
        errors = gather_object([error])
        first = next((rank for rank, other in enumerate(errors) if other is not None), None)
        if first is not None and first != accelerator.process_index:
            error = errors[first]
    if error is not None:
        raise error


@contextmanager
def errors_on_all_ranks(accelerator: Accelerator) -> Iterator[None]:
    """Raise an error of the block on every rank; the block itself has no collectives.

    Raises:
        JkoflowError: see `raise_on_all_ranks`.
    """
    failure: JkoflowError | SolveError | None = None
    try:
        yield
    except (JkoflowError, SolveError) as error:
        failure = error
    raise_on_all_ranks(accelerator, failure)


def broadcast_decision(accelerator: Accelerator, decision: bool) -> bool:
    """Return the decision of rank 0 on every rank (a collective).

    Args:
        accelerator: the ranks.
        decision: that of this rank; clocks and disks differ between ranks.
    """
    if accelerator.num_processes == 1:
        return decision
    flag = torch.tensor([int(decision)], device=accelerator.device)
    return bool(broadcast(flag).item())


def sum_over_ranks(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Return the sum over ranks of a tensor (…) of any shape, on every rank (a collective)."""
    return accelerator.reduce(values, "sum") if accelerator.num_processes > 1 else values


def broadcast_tensor(accelerator: Accelerator, tensor: Tensor, rank: int) -> None:
    """Overwrite a tensor (…) on every rank by its value on one rank (a collective)."""
    if accelerator.num_processes > 1:
        tensor.data.copy_(broadcast(tensor.data.clone(), from_process=rank))


def gather_lists(accelerator: Accelerator, items: list[Any]) -> list[Any]:
    """Return the concatenated lists of all ranks, in the order of ranks, on every rank."""
    gathered: list[Any] = gather_object(items) if accelerator.num_processes > 1 else items
    return gathered
