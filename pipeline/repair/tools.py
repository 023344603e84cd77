"""What all repairs share: device, progress bars, and a store without its manifest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from accelerate import Accelerator

from pipeline.errors import UserError
from pipeline.runtime.console import Progress
from pipeline.storage import atomic
from pipeline.storage.shards.manifest import MANIFEST


@dataclass(frozen=True)
class Tools:
    """Tools of a repair.

    Attributes:
        open: opens the accelerator, which only repairs that compute need.
        progress: wraps loops.
        paths: that are repaired; their runs know how caches were made.
    """

    open: Callable[[], Accelerator]
    progress: Progress
    paths: Sequence[Path] = ()

    @cached_property
    def accelerator(self) -> Accelerator:
        """The device of the repairs; a single process.

        Raises:
            UserError: there are several processes.
        """
        accelerator = self.open()
        if accelerator.num_processes > 1:
            raise UserError(
                f"verify --repair has {accelerator.num_processes} processes; expected 1; start it "
                "without a launcher"
            )
        return accelerator


@contextlib.contextmanager
def removed(path: Path) -> Iterator[None]:
    """Remove a broken file for a block that writes it again.

    If the block fails, or writes no such file, the file is back.
    """
    data = path.read_bytes() if path.is_file() else None
    path.unlink(missing_ok=True)
    try:
        yield
    finally:
        if data is not None and not path.is_file():
            atomic.write_bytes(path, data, sealed=False)


def reopened(store: Path) -> contextlib.AbstractContextManager[None]:
    """Make a complete store unfinished for a block that completes it.

    The writer of a store keeps every shard that is as its seal says, and makes the others.
    """
    return removed(store / MANIFEST)
