"""Weights that a flow-matching run keeps on its way (train.snapshot_every).

snapshots/step-00001000.safetensors …   averaged weights after so many steps
snapshots/snapshots.json                their sha256, and the samples seen until then
snapshots/pass-01/ …                    the same of later passes
"""

from __future__ import annotations

from pathlib import Path

from pipeline import commit
from pipeline.blocks import BlockTrainer
from pipeline.passes import Row

_LIST = "snapshots.json"


def keep(folder: Path, trainer: BlockTrainer, number: int) -> None:
    """Commit the averaged weights of a block in training; the first process does.

    A training that was killed and resumed comes by here again, with the same weights.

    Args:
        folder: the run directory.
        trainer: of the block.
        number: the pass.
    """
    if not trainer.accelerator.is_main_process:
        return
    place = _place(number)
    name = f"{place}/step-{trainer.done:08d}.safetensors"
    sha256 = commit.write_tensors(folder / name, trainer.weights())
    row = {
        "file": name, "sha256": sha256, "step": trainer.done,
        "seen": trainer.done * trainer.recipe.batch_size, "seconds": round(trainer.seconds, 3),
    }  # fmt: skip
    before = [other for other in snapshots_of(folder, number) if other["step"] < trainer.done]
    commit.write_json(folder / place / _LIST, [*before, row])


def snapshots_of(folder: Path, number: int = 0) -> list[Row]:
    """What a pass kept, in order: file, sha256, step, seen (samples), seconds (of training)."""
    path = folder / _place(number) / _LIST
    if not path.is_file():
        return []
    listed: list[Row] = commit.read_json(path, "list of snapshots")
    return listed


def _place(number: int) -> str:
    return f"snapshots/pass-{number:02d}" if number else "snapshots"
