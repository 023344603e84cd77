"""Blocks that start from the weights of another run's (`jkoflow train --init-from RUN`).

Block k starts from block k of the other run, and the free block from its free block; where the
other run has none, as without it. So blocks of (local) flow matching, which are cheap, can be
polished by maximum likelihood. A network with classes may start from one with others, or without:
all of its classes then start as what stands for no class; one r times as wide from a narrow one,
as the same field; and several in one block (`velocity.nets`) as copies of
one. Which weights they were is written into flow.json, and when a training is resumed they must be
the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flows.net2net import becomes_several, widening_factor
from flows.networks.config import VelocityConfig
from flows.spec import BlockSpec
from pipeline.errors import UserError
from pipeline.runs.directory import read_config
from pipeline.runs.manifest import read_manifest
from pipeline.runs.passes import Row, step_of
from pipeline.runs.zoo import locate

#: what is kept of it until the first block is committed, and flow.json with it
INITIAL = "initial.json"
_KEPT = ("file", "sha256", "h", "gamma", "objective", "spec")


def open_initial(run: str, velocity: VelocityConfig, shape: tuple[int, ...]) -> dict[str, Any]:
    """What flow.json keeps of the run that blocks start from.

    Args:
        run: its directory, or zoo:NAME.
        velocity: the network of the blocks to be trained.
        shape: of one sample.

    Returns:
        run, name, objective, and of each of its blocks what `load_block` needs.

    Raises:
        UserError: no finished run, or one of another shape or another velocity network.
    """
    folder = locate(run)
    config, manifest = read_config(folder), read_manifest(folder)
    if not manifest["complete"]:
        raise UserError(
            f"--init-from needs a finished run, but the run at {run} is not; finish it"
        )
    if tuple(manifest["shape"]) != shape:
        raise UserError(
            f"--init-from needs a run with latents of shape {shape}, but the run at {run} has "
            f"{tuple(manifest['shape'])}"
        )
    rows = manifest["blocks"]
    kinds = {BlockSpec.from_dict(row["spec"]).velocity for row in rows}  # keys may be missing
    # not the configuration's, which may be that of blocks that are still to be trained again
    differing = _differences(next(iter(kinds)), velocity)
    if len(kinds) > 1 or differing:
        raise UserError(
            "--init-from needs a run whose blocks all have this configuration's velocity, but the "
            f"run at {run} differs in {', '.join(differing) or 'some of its blocks'}"
        )
    return {
        "run": run,
        "name": config.name,
        "objective": config.train.objective,
        "blocks": [{key: row.get(key) for key in _KEPT} for row in rows],
    }


def initial_row(kept: dict[str, Any], index: int, free: bool) -> Row | None:
    """The block of the other run that a block starts from; None if there is none.

    Args:
        kept: as from `open_initial`.
        index: of the block to be trained.
        free: whether it is the free one.
    """
    rows: list[Row] = kept["blocks"]
    if free and step_of(rows[-1]) is None:
        return rows[-1]
    return rows[index] if index < len(rows) else None


def _differences(theirs: VelocityConfig, ours: VelocityConfig) -> list[str]:
    pairs = zip(dataclasses.asdict(theirs).items(), dataclasses.asdict(ours).values(), strict=True)
    indifferent = ["class_dropout"]  # a matter of training
    if ours.classes:
        indifferent.append("classes")
    if widening_factor(theirs, ours):
        indifferent.append("width")
    if becomes_several(theirs, ours):
        indifferent.append("nets")
    twice = dataclasses.replace(theirs, width=2 * theirs.width)
    advice = {"width": "; a multiple of it would do"} if widening_factor(theirs, twice) else {}
    return [
        f"velocity.{name} ({a}, not {b}{advice.get(name, '')})"
        for (name, a), b in pairs
        if a != b and name not in indifferent
    ]
