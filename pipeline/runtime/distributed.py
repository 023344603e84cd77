"""What several processes have in common: a batch's mean, a decision, what one failed at.

What one meets, all raise, and where one stops, all stop: none waits for one that is gone.
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


def raise_together(accelerator: Accelerator, error: JkoflowError | SolveError | None) -> None:
    """Raise, on every process, the error that the first of them met; all processes call it.

    Args:
        accelerator: the processes.
        error: what this process met; None if nothing.

    Raises:
        JkoflowError: a process met it; likewise its subclasses, and SolveError.
    """
    if accelerator.num_processes > 1:
        met = gather_object([error])
        first = next((rank for rank, other in enumerate(met) if other is not None), None)
        if first is not None and first != accelerator.process_index:
            error = met[first]
    if error is not None:
        raise error


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Work without collectives; what a process raises in it, all raise at its end.

    Raises:
        JkoflowError: see `raise_together`.
    """
    failure: JkoflowError | SolveError | None = None
    try:
        yield
    except (JkoflowError, SolveError) as error:
        failure = error
    raise_together(accelerator, failure)


def first_says(accelerator: Accelerator, decision: bool) -> bool:
    """What the first process decides, on all of them; all processes call it.

    Args:
        accelerator: the processes.
        decision: of this one; clocks and disks differ, so others may decide otherwise.
    """
    if accelerator.num_processes == 1:
        return decision
    flag = torch.tensor([int(decision)], device=accelerator.device)
    return bool(broadcast(flag).item())


def total(accelerator: Accelerator, numbers: Tensor) -> Tensor:
    """The sum over processes of numbers that each has; on all of them."""
    return accelerator.reduce(numbers, "sum") if accelerator.num_processes > 1 else numbers


def owner_says(accelerator: Accelerator, tensor: Tensor, owner: int) -> None:
    """Set a tensor to what it is on one of the processes; all processes call it."""
    if accelerator.num_processes > 1:
        tensor.data.copy_(broadcast(tensor.data.clone(), from_process=owner))


def all_told(accelerator: Accelerator, known: list[Any]) -> list[Any]:
    """The lists of all processes, one after the other, on all of them."""
    told: list[Any] = gather_object(known) if accelerator.num_processes > 1 else known
    return told
