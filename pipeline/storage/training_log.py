"""Log of a training: log.jsonl and experiment trackers, written by the main process."""

from __future__ import annotations

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.integrity.limits import LIST, read_regular
from pipeline.storage import atomic
from pipeline.storage.trackers import Trackers


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a log in order, without the lines that a killed process tore."""
    for line in read_regular(path, LIST).decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row


class TrainingLog:
    """Log of a run; a resumed run first drops the rows that it writes again.

    Rows belong to the pass `number`. Only the main process is `active` and writes. The trackers
    do not get a row again that was in log.jsonl before the run was resumed.
    """

    def __init__(
        self, folder: Path, active: bool = True, trackers: Trackers | None = None
    ) -> None:
        self.path = Path(folder) / "log.jsonl"
        self.active, self.number = active, 0
        self._sums: dict[str, float] = defaultdict(float)
        self._count = 0
        self._rows = sum(1 for _ in rows_of(self.path)) if self.path.is_file() else 0
        self._trackers = trackers if active else None
        self._tracked = (0, -1, 0)  # the last row that trackers have

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._trackers is not None:
            self._trackers.close()

    def rewind(self, block: int, step: int) -> None:
        """Drop the rows of a block after a step, all that follow in its pass, and torn lines."""
        if not self.active or not self.path.is_file():
            return
        kept = []
        for row in rows_of(self.path):
            line = json.dumps(row)
            at = (row.get("pass", 0), row.get("block", -1), row.get("step", 0))
            if not all(type(number) is int for number in at):
                continue
            self._tracked = max(self._tracked, at)
            if at <= (self.number, block, step):
                kept.append(line)
        self._keep(kept)

    def _keep(self, lines: list[str]) -> None:
        """Leave some lines of the file alone."""
        self._rows = len(lines)
        atomic.write_bytes(
            self.path, "".join(f"{line}\n" for line in lines).encode(), sealed=False
        )

    def add(self, terms: dict[str, float]) -> None:
        """Add the terms of one step to the running means of the next row."""
        self._count += 1
        for name, value in terms.items():
            self._sums[name] += value

    def state(self) -> dict[str, Any]:
        """Return the rows so far and the sums since the last one, which belong to a checkpoint.

        The rows are on the disk before the checkpoint is.
        """
        self.sync()
        return {"sums": dict(self._sums), "count": self._count, "rows": self._rows}

    def sync(self) -> None:
        """Flush the rows to the disk, before a file that counts them as written."""
        if self.active and self.path.is_file():
            atomic.sync(self.path)
            atomic.sync(self.path.parent)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the rows and sums of a checkpoint, so that the next row is the same."""
        self._sums = defaultdict(float, state["sums"])
        self._count = state["count"]
        if self.active and self._rows > state["rows"]:
            self._keep([json.dumps(row) for row in rows_of(self.path)][: state["rows"]])

    def mean(self) -> dict[str, float]:
        """Return the running means since the last row."""
        return {name: total / max(self._count, 1) for name, total in self._sums.items()}

    def flush(self, block: int, step: int, total_step: int, **extra: float) -> None:
        """Write the running means as one row, and reset them."""
        self.measure(block, step, total_step, **self.mean(), **extra)
        self._sums.clear()
        self._count = 0

    def measure(self, block: int, step: int, total_step: int, **values: float) -> None:
        """Write values as one row; `total_step` counts the steps of all blocks and passes."""
        self.write({"block": block, "step": step, **values})
        if self._sends(block, step):
            assert self._trackers is not None
            scalars = {f"{self._prefix(block)}/{name}": value for name, value in values.items()}
            if "total" in values:
                scalars["all/total"] = values["total"]
            self._trackers.log(scalars, total_step)

    def show(self, block: int, step: int, total_step: int, path: Path) -> None:
        """Send a PNG file of samples to the trackers."""
        if self._sends(block, step):
            assert self._trackers is not None
            self._trackers.log_picture(f"{self._prefix(block)}/samples", path, total_step)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row with its pass and the time of day."""
        if self.active:
            with open(self.path, "a") as file:
                stamped = {"pass": self.number, **row, "time": round(time.time(), 3)}
                file.write(json.dumps(stamped) + "\n")
            self._rows += 1

    def _prefix(self, block: int) -> str:
        """Return the name of a block in the trackers."""
        prefix = f"pass-{self.number:02d}/" if self.number else ""
        return f"{prefix}block-{block:02d}"

    def _sends(self, block: int, step: int) -> bool:
        """Whether there are trackers, and they lack what belongs to a step."""
        return self._trackers is not None and (self.number, block, step) > self._tracked
