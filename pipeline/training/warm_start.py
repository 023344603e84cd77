"""Warm start: blocks start from the weights of another run (`jkoflow train --init-from RUN`).

Block k starts from block k of the other run, and the free block from its free block. A block
without a counterpart starts as it would without the other run. A network may start from one with
other classes, or without classes: every class then starts as the null label. A network without
classes starts as the null label of one with classes. A network r times as wide starts as the same
velocity (Net2Net). Several networks in one block (`velocity.nets`) start as copies of one. An
autonomous network starts as the time-dependent one, frozen at the middle of its time
(`flows.freezing`). If the block has several networks, the one of that time is frozen. K autonomous
blocks share the time of a run of one block in equal parts. If that run is flow matching of the
linear interpolant, its field is first converted to the trigonometric one.

The manifest records the sha256 of the weights, and a resumed training checks them.
"""

from __future__ import annotations

import dataclasses

from flows.freezing import can_freeze
from flows.net2net import becomes_several, widening_factor
from flows.networks.config import VelocityConfig
from flows.networks.registry import BUILT_IN
from pipeline.errors import UserError
from pipeline.runs.directory import read_config, read_manifest
from pipeline.runs.manifest import WarmStartRecord
from pipeline.runs.passes import StoredBlock
from pipeline.runs.zoo import locate


def open_warm_start(
    run: str, velocity: VelocityConfig, shape: tuple[int, ...]
) -> WarmStartRecord:
    """Return the record of the run that blocks start from.

    Args:
        run: its directory, or zoo:NAME.
        velocity: the network of the blocks to be trained.
        shape: of one sample.

    Raises:
        UserError: no finished run, or one of another shape or another velocity network.
    """
    folder = locate(run)
    config, manifest = read_config(folder), read_manifest(folder)
    if not manifest.complete:
        raise UserError(
            f"the run at {run} is unfinished; --init-from needs a finished run; finish it first"
        )
    if manifest.shape != shape:
        raise UserError(
            f"the run at {run} has latents of shape {manifest.shape}; --init-from needs {shape}; "
            "give a run on the same latents"
        )
    rows = manifest.blocks
    kinds = {row.spec.velocity for row in rows}
    differing = _differences(next(iter(kinds)), velocity)
    if len(kinds) > 1 or differing:
        raise UserError(
            f"the blocks of the run at {run} have another velocity network: "
            f"{', '.join(differing) or 'they differ among themselves'}; set velocity as "
            "there, or give --init-from a run with the network of this configuration"
        )
    names = [field.name for field in dataclasses.fields(StoredBlock)]
    blocks = tuple(StoredBlock(**{name: getattr(row, name) for name in names}) for row in rows)
    interpolant = config.regression.interpolant
    return WarmStartRecord(run, config.name, config.train.objective, blocks, interpolant)


def initial_row(
    start: WarmStartRecord, index: int, free: bool, autonomous: bool = False
) -> StoredBlock | None:
    """Return the block of the other run that a block starts from; None if there is none.

    Args:
        start: from `open_warm_start`.
        index: of the block to train.
        free: whether it is the free block.
        autonomous: whether its network is.
    """
    rows = start.blocks
    if start.shares_time(autonomous):
        return rows[0]
    if free and rows[-1].step is None:
        return rows[-1]
    return rows[index] if index < len(rows) else None


def _differences(start: VelocityConfig, wanted: VelocityConfig) -> list[str]:
    """Return the settings that keep a network from starting from another one."""
    pairs = zip(
        dataclasses.asdict(start).items(), dataclasses.asdict(wanted).values(), strict=True
    )
    free = ["class_dropout"]  # a setting of the training
    if wanted.kind in BUILT_IN:
        free.append("classes")
    if widening_factor(start, wanted):
        free.append("width")
    if becomes_several(start, wanted):
        free.append("nets")
    if wanted.autonomous and can_freeze(start):
        free.append("autonomous")
        if wanted.nets == 1:
            free.append("nets")
    twice = start.widened(2)
    advice = {"width": "; a multiple of it would do"} if widening_factor(start, twice) else {}
    return [
        f"velocity.{name} ({a}, not {b}{advice.get(name, '')})"
        for (name, a), b in pairs
        if a != b and name not in free
    ]
