"""Unfinished runs, opened with the averaged weights of the block in training.

A checkpoint holds the manifest and the specification of its block. So a run can be sampled before
its first block is finished, and while another process trains it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from flows.flow import Flow
from flows.spec import BlockSpec
from pipeline.errors import UserError
from pipeline.runs.directory import RunDirectory, checkpoint_file
from pipeline.runs.manifest import FILE, Manifest
from pipeline.runs.passes import BlockRow
from pipeline.runs.run import BlockInTraining, Run, build_stored, load_block, open_run
from pipeline.runs.zoo import locate
from pipeline.storage.checkpoints import load_checkpoint


def open_latest(folder: Path, blocks: int | None = None, images: bool = False) -> Run:
    """Open a run as it is now: an unfinished one has the block in training as its last block.

    The arguments are those of `open_run`, which opens a finished run, and one with `blocks`. The
    manifest of an unfinished run has a row for the block in training. The row's sha256 is the one
    that its file would have if the block were finished now.

    Raises:
        UserError: the run is absent or damaged, or it has neither a finished pass nor a
            checkpoint.
    """
    directory = RunDirectory(locate(folder))
    checkpoint = None if blocks is not None else _checkpoint(directory)
    if checkpoint is None:
        return open_run(folder, blocks, images=images)
    state = load_checkpoint(checkpoint)
    if "manifest" not in state:
        raise UserError(
            f"the checkpoint {checkpoint} has no manifest; expected one of this version; continue "
            f"the training with `{directory.resume_command}`"
        )
    manifest = Manifest.from_json(state["manifest"], str(checkpoint))
    if images:
        manifest.require_autoencoder()
    spec, weights = BlockSpec.from_dict(state["spec"]), averaged_weights(state)
    blocks_so_far = [load_block(directory.folder, row, manifest.shape) for row in manifest.blocks]
    last = build_stored(spec, manifest.shape, weights, checkpoint)
    flow = Flow.from_blocks(manifest.shape, [*blocks_so_far, (spec, last)])
    index = len(manifest.blocks)
    planned = manifest.current.iterations[index]
    row = BlockRow(
        checkpoint.relative_to(directory.folder).as_posix(),
        hashlib.sha256(save({name: weights[name].contiguous() for name in weights})).hexdigest(),
        spec.h,
        spec.gamma,
        spec.objective,
        spec,
        iterations=state["step"],
        lr=manifest.current.lr[index],
        movement=None,
        ter=None,
        terms=None,
        seconds=round(state["seconds"], 3),
        parameters=sum(p.numel() for p in last.parameters()),
        stage="stages",
    )
    return Run(
        directory.folder,
        directory.config,
        manifest.with_blocks([*manifest.blocks, row]),
        flow.eval().requires_grad_(False),
        BlockInTraining(index, state["step"], planned),
    )


def averaged_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights that the block of a checkpoint's state would have if it ended now."""
    if state["stopped"] and state["sound"] is not None:
        return dict(state["sound"])
    prefix, average = "average.", state["average"] or {}
    averages = {
        name.removeprefix(prefix): value
        for name, value in average.items()
        if name.startswith(prefix)
    }
    return {**state["block"], **averages}


def _checkpoint(directory: RunDirectory) -> Path | None:
    """Return the checkpoint of the block in training; None for a run that needs none."""
    index = number = 0
    if not directory.exists:
        return None
    if (directory.folder / FILE).is_file():
        manifest = directory.manifest
        if manifest.complete:
            return None
        index, number = len(manifest.blocks), manifest.number
    path = directory.folder / checkpoint_file(index, number)
    return path if path.is_file() else None
