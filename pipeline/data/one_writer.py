"""One writer of a folder among all processes, where the ranks of one training count as one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator

from pipeline.runtime.console import say
from pipeline.runtime.distributed import errors_on_all_ranks
from pipeline.storage.lock import locked


@contextlib.contextmanager
def one_writer(
    folder: Path, what: str, accelerator: Accelerator, wait: bool = False
) -> Iterator[None]:
    """Hold the lock of a folder on rank 0 (a collective); see `pipeline.storage.lock.locked`.

    Raises:
        JkoflowError: another process writes the folder, on every rank.
    """
    with contextlib.ExitStack() as stack:
        with errors_on_all_ranks(accelerator):
            if accelerator.is_main_process:
                stack.enter_context(locked(folder, what, say if wait else None))
        yield
