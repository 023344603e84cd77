"""Weights that a flow-matching run keeps on its way (train.snapshot_every).

snapshots/step-00001000.safetensors …   averaged weights after so many steps
snapshots/snapshots.json                their sha256, and the samples seen until then
snapshots/pass-01/ …                    the same of later passes
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pipeline.errors import UserError
from pipeline.runs.passes import Row
from pipeline.runs.run import Run, load_blocks, open_run
from pipeline.storage import atomic

_LIST = "snapshots.json"


def snapshots_of(folder: Path, number: int = 0) -> list[Row]:
    """What a pass kept, in order: file, sha256, step, seen (samples), seconds (of training)."""
    path = folder / _place(number) / _LIST
    if not path.is_file():
        return []
    listed: list[Row] = atomic.read_json(path, "list of snapshots")
    return listed


def at_snapshot(run: Run, snapshot: Row) -> Run:
    """A run as it was at a snapshot: its one block with the weights of then.

    Args:
        run: an open run of one block.
        snapshot: of its pass, from `snapshots_of`.

    Raises:
        UserError: the file is missing or damaged.
    """
    (row,) = run.manifest["blocks"]
    kept = {key: snapshot[key] for key in ("file", "sha256", "seconds")}
    measured = dict.fromkeys(("movement", "ter", "terms"))  # of the finished block, not of this
    then = {**row, **measured, **kept, "iterations": snapshot["step"]}
    manifest = {**run.manifest, "blocks": [then]}
    return dataclasses.replace(run, manifest=manifest, flow=load_blocks(run.folder, manifest))


def open_snapshot(folder: Path, step: int) -> Run:
    """Open a run as it was after so many steps.

    Raises:
        UserError: no finished run, or it did not keep that step.
    """
    run = open_run(folder)
    if len(run.flow) != 1:
        raise UserError(
            f"only flows of one block keep weights on their way, and the run at {folder} has "
            f"{len(run.flow)}; leave out @{step}"
        )
    listed = {row["step"]: row for row in snapshots_of(run.folder, run.manifest["pass"])}
    if step not in listed:
        kept = ", ".join(map(str, listed)) or "none (train.snapshot_every keeps some)"
        raise UserError(f"the run at {folder} kept no weights of step {step}; it kept {kept}")
    then = at_snapshot(run, listed[step])
    config = dataclasses.replace(then.config, name=f"{then.config.name}@{step}")
    return dataclasses.replace(then, config=config)


def _place(number: int) -> str:
    return f"snapshots/pass-{number:02d}" if number else "snapshots"
