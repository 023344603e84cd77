"""A block that profits from the error of its training grid is told of; a sound one is not."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from flows.block import Block
from flows.networks.config import VelocityConfig
from flows.objectives.losses import jko_loss
from flows.solving.divergence import make_divergence
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec, build_block
from pipeline.config.validate import check
from pipeline.errors import JkoflowError, UserError
from pipeline.runs.manifest import read_manifest
from pipeline.runs.run import load_blocks
from pipeline.storage.shards import open_store
from pipeline.training.diagnostics import TOLERANCE
from pipeline.training.grid_error import finer, grid_error
from pipeline.training.train import train
from tests.pipeline.gaussian_source import GaussianSource, quiet, tiny

ONE_BLOCK = ("schedule.h=[0.9]", "train.iterations=40")


def events(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train a block; what its log says of its grids."""
    config = tiny(*ONE_BLOCK, *overrides)
    outcome = train(config, folder, Accelerator(), quiet, resume=False, source=GaussianSource())
    assert outcome.complete
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("event") == "grids differ"]


def objective(folder: Path, solver: SolverConfig) -> float:
    """Of the block, in nats per dimension, over all samples."""
    block = load_blocks(folder, read_manifest(folder))[0]
    z = open_store(folder / "stages" / "stage-00", "stage").field("z")
    with torch.no_grad():
        end = block.transport(z, divergence=make_divergence("exact"), solver=solver)
    assert end.log_det is not None
    moved = (end.z - z).square().sum(1) / (2 * 0.9)
    return float((end.z.square().sum(1) / 2 - end.log_det + moved).mean()) / 2


def test_a_coarse_grid_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One Euler step takes the trace for log det(I + A), which flatters or slanders the map."""
    coarse = ("solver.method=euler", "solver.steps=1", "push.steps=4")
    (row,) = events(tmp_path / "run", *coarse)
    trained = objective(tmp_path / "run", SolverConfig("euler", steps=1))
    pushed = objective(tmp_path / "run", SolverConfig("rk4", steps=4))
    assert abs(trained - pushed) > 2 * TOLERANCE
    assert row["block"] == 0 and row["step"] == 40
    assert row["training_grid"] == pytest.approx(trained, rel=1e-4)
    assert row["push_solver"] == pytest.approx(pushed, rel=1e-4)
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "warning:" in line]
    assert f"block 0's objective is {row['training_grid']:.4f}" in told
    assert f"but {row['push_solver']:.4f} with the push solver (rk4, steps=4)" in told
    assert told.endswith("raise solver.steps (or train.max_substeps)")


def test_a_block_far_off_its_grid_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.diagnostics.HOPELESS", TOLERANCE)
    coarse = ("solver.method=euler", "solver.steps=1", "push.steps=4")
    with pytest.raises(JkoflowError, match="learnt the error of its grid and is not kept"):
        events(tmp_path / "run", *coarse)
    assert not read_manifest_if_any(tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert "grids differ" in [row.get("event") for row in rows]
    assert "finished" not in [row.get("event") for row in rows]


def read_manifest_if_any(folder: Path) -> list[dict[str, Any]]:
    """Blocks that count."""
    return read_manifest(folder)["blocks"] if (folder / "flow.json").is_file() else []


def test_a_coarse_push_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fine = ("solver.steps=4", "push.method=euler", "push.steps=1")
    assert len(events(tmp_path / "run", *fine)) == 1
    assert capsys.readouterr().err.strip().endswith("raise push.steps")


@pytest.mark.parametrize("steps", [2, 4])
def test_a_fine_grid_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int
) -> None:
    assert not events(tmp_path / "run", f"solver.steps={steps}", "push.steps=4")
    assert "warning" not in capsys.readouterr().err


# ------------------------------------------------------------- grids that grow with their field


def test_the_error_of_a_grid_is_its_distance_from_twice_as_many() -> None:
    """On a field at random, followed by one Euler step, and by two."""
    block = build_block(BlockSpec(VelocityConfig("mlp", width=8, depth=1)), (2,))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    z = torch.randn((32, 2), generator=torch.Generator().manual_seed(0))
    block.solver, exact, h = SolverConfig("euler", steps=1), make_divergence("exact"), 0.5
    block.requires_grad_(False)
    totals = torch.tensor(
        [
            [
                float(jko_loss(Block(block.velocity, SolverConfig("euler", n)), x, h, exact).total)
                for x in z[:, None]
            ]
            for n in (1, 2)
        ]
    )
    apart = (totals[0] - totals[1]) / 2
    expected = float(apart.mean().abs() - apart.std() / 32**0.5)
    error = grid_error(block, z, h, exact, None, None)
    assert error == pytest.approx(expected, rel=1e-4) and error > 0.01
    assert block.solver == SolverConfig("euler", steps=1)


def test_a_field_that_cannot_be_followed_has_an_infinite_error() -> None:
    block = build_block(BlockSpec(VelocityConfig("mlp", width=8, depth=1)), (2,))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(1e6)
    z = torch.ones((4, 2))
    assert grid_error(block, z, 0.5, make_divergence("exact"), None, None) == math.inf


GROWING = ("solver.method=euler", "solver.steps=1", "push.steps=4", "train.max_substeps=32")


def test_a_grid_grows_until_it_follows_the_field(tmp_path: Path) -> None:
    """What is told of above when the grid is kept is not when it may grow."""
    assert not events(tmp_path / "run", *GROWING)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    grown = [row["substeps"] for row in rows if row.get("event") == "finer grid"]
    (block,) = read_manifest(tmp_path / "run")["blocks"]
    assert grown == sorted(set(grown)) and grown[-1] == block["spec"]["solver"]["steps"]
    assert 2 < grown[-1] <= 32
    trained = objective(tmp_path / "run", SolverConfig("euler", steps=grown[-1]))
    assert trained == pytest.approx(
        objective(tmp_path / "run", SolverConfig("rk4", steps=8)), abs=TOLERANCE
    )


def test_a_grid_grows_no_further_than_it_may(tmp_path: Path) -> None:
    assert events(tmp_path / "run", *GROWING[:3], "train.max_substeps=2")
    (block,) = read_manifest(tmp_path / "run")["blocks"]
    assert block["spec"]["solver"]["steps"] == 2


@pytest.mark.parametrize(
    ("nets", "most", "grids"),
    [(1, 20, [1, 2, 3, 4, 6, 9, 13, 19, 20, 20]), (3, 30, [3, 6, 9, 12, 18, 27, 30, 30])],
)
def test_grids_on_the_way(nets: int, most: int, grids: list[int]) -> None:
    assert [finer(steps, nets, most) for steps in grids[:-1]] == grids[1:]
    assert finer(2 * most, nets, most) == 2 * most  # given so, by substeps of another pass


def test_a_grid_that_grew_is_kept_when_killed_and_resumed(tmp_path: Path) -> None:
    words = (*ONE_BLOCK, *GROWING, "train.checkpoint_seconds=0")
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    train(tiny(*words), whole, Accelerator(), quiet, resume=False, source=GaussianSource())

    def stop(things: Iterable[int], total: int, what: str) -> Iterator[int]:
        for count, thing in enumerate(things):
            if what.startswith("block") and count == 33:
                raise KeyboardInterrupt
            yield thing

    with pytest.raises(KeyboardInterrupt):
        train(tiny(*words), torn, Accelerator(), stop, resume=False, source=GaussianSource())
    train(tiny(*words), torn, Accelerator(), quiet, resume=True, source=GaussianSource())
    first, second = read_manifest(whole)["blocks"][0], read_manifest(torn)["blocks"][0]
    assert first["sha256"] == second["sha256"] and first["spec"] == second["spec"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train.max_substeps=-1",), "at least 0"),
        (("train.max_substeps=8", "train.objective=fm"), "has no effect with train.objective=fm"),
        (("train.max_substeps=8", "solver.method=dopri5"), "chooses its own steps"),
        (("train.max_substeps=7", "velocity.nets=2", "solver.steps=2"), "a multiple of"),
        (("train.max_substeps=2", "solver.steps=4"), "less than the 4 sub-intervals"),
        (("train.max_substeps=1000",), "train.max_substeps = 1000 of rk4 take 4000"),
    ],
)
def test_mistakes_are_told(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        check(tiny(*ONE_BLOCK, *words))
