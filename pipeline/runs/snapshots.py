"""Snapshots: averaged weights of a flow-matching run at regular steps (fm.snapshot_every).

snapshots/snapshots.json lists the files snapshots/step-00001000.safetensors, ….
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.runs.passes import require_inside
from pipeline.runs.run import Run, load_blocks, open_run
from pipeline.storage import atomic
from pipeline.storage.records import from_json, to_json

_FOLDER, _LIST = "snapshots", "snapshots.json"


@dataclass(frozen=True)
class Snapshot:
    """Weights of a block in training, after `step` optimiser steps on `seen` samples."""

    file: str
    sha256: str
    step: int
    seen: int
    seconds: float

    def __post_init__(self) -> None:
        require_inside(self.file)


def snapshot_file(step: int) -> str:
    """Return the path of the snapshot at an optimiser step inside the run directory."""
    return f"{_FOLDER}/step-{step:08d}.safetensors"


def snapshots_of(folder: Path) -> list[Snapshot]:
    """Return the snapshots of a run, in order."""
    path = folder / _FOLDER / _LIST
    if not path.is_file():
        return []
    rows = atomic.read_json(path, "list of snapshots")
    return from_json(list[Snapshot], rows, str(path))


def add_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Commit the list of snapshots with one more; later ones of a killed training are dropped."""
    earlier = [other for other in snapshots_of(folder) if other.step < snapshot.step]
    atomic.write_json(folder / _FOLDER / _LIST, to_json([*earlier, snapshot]))


def at_snapshot(run: Run, snapshot: Snapshot) -> Run:
    """Return a run of one block as it was at a snapshot of it; UserError for a damaged file."""
    (row,) = run.manifest.blocks
    row = dataclasses.replace(
        row, file=snapshot.file, sha256=snapshot.sha256, seconds=snapshot.seconds,
        iterations=snapshot.step, movement=None, ter=None, terms=None,
    )  # fmt: skip
    manifest = run.manifest.with_blocks([row])
    return dataclasses.replace(run, manifest=manifest, flow=load_blocks(run.folder, manifest))


def open_snapshot(folder: Path, step: int) -> Run:
    """Open a run as it was after a number of steps.

    Raises:
        UserError: no finished run of one block, or it has no snapshot of that step.
    """
    run = open_run(folder)
    if len(run.flow) != 1:
        raise UserError(
            f"the run at {folder} has {len(run.flow)} blocks; expected a run of one block, which "
            f"alone has snapshots; leave out @{step}"
        )
    snapshots = snapshots_of(run.folder)
    listed = {snapshot.step: snapshot for snapshot in snapshots}
    if step not in listed:
        steps = f"expected one of {', '.join(map(str, listed))}; choose one of them"
        none = f"expected a run with snapshots; train with fm.snapshot_every, or leave out @{step}"
        raise UserError(
            f"the run at {folder} has no snapshot of step {step}; {steps if listed else none}"
        )
    opened = at_snapshot(run, listed[step])
    config = dataclasses.replace(opened.config, name=f"{opened.config.name}@{step}")
    return dataclasses.replace(opened, config=config)
