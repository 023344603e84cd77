"""A block that overfits the error of its training grid is reported; a sound one is not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from flows.block import Block
from flows.networks.config import VelocityConfig
from flows.networks.registry import make_velocity
from flows.solving.estimators import make_divergence
from flows.solving.solver import SolverConfig
from pipeline.errors import JkoflowError
from pipeline.runs.directory import read_manifest
from pipeline.runs.run import load_blocks
from pipeline.storage.shards.opening import open_store
from pipeline.training import diagnostics
from pipeline.training.block_trainer import BlockTrainer
from pipeline.training.diagnostics import TOLERANCE
from pipeline.training.train import train
from tests.pipeline.gaussian_source import GaussianSource, quiet, tiny

ONE_BLOCK = ("jko.h=[0.9]", "train.iterations=40")


def events(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train a block and return the entries of its log about grids."""
    config = tiny(*ONE_BLOCK, *overrides)
    outcome = train(config, folder, Accelerator(), quiet, resume=False, source=GaussianSource())
    assert outcome.complete
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("event") == "grids differ"]


def objective(folder: Path, solver: SolverConfig) -> float:
    """Compute the objective of the block, nats per dimension, over all samples."""
    block = load_blocks(folder, read_manifest(folder))[0]
    z = open_store(folder / "stages" / "stage-00", "stage").field("z")
    with torch.no_grad():
        end = block.transport(z, divergence=make_divergence("exact"), solver=solver)
    assert end.log_det is not None
    moved = (end.z - z).square().sum(1) / (2 * 0.9)
    return float((end.z.square().sum(1) / 2 - end.log_det + moved).mean()) / 2


def test_a_coarse_training_grid_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One Euler step replaces log det(I + A) by the trace, which may be larger or smaller."""
    monkeypatch.setattr("pipeline.training.diagnostics._COMPARED", 1500)  # all samples
    coarse = ("jko.solver.method=euler", "jko.solver.steps=1", "sampler.steps=4")
    (row,) = events(tmp_path / "run", *coarse)
    trained = objective(tmp_path / "run", SolverConfig("euler", steps=1))
    reference = objective(tmp_path / "run", SolverConfig("rk4", steps=8))
    assert abs(trained - reference) > 2 * TOLERANCE
    assert row["block"] == 0 and row["step"] == 40
    assert row["training_grid"] == pytest.approx(trained, rel=1e-4)
    assert row["finer_grid"] == pytest.approx(reference, rel=1e-4)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning:" in line]
    assert f"block 0's objective is {row['training_grid']:.4f}" in warning
    assert f"but {row['finer_grid']:.4f} on a finer grid (rk4, steps=8)" in warning
    assert warning.endswith("raise jko.solver.steps")


def test_a_sampler_as_coarse_as_the_training_grid_is_a_warning(tmp_path: Path) -> None:
    """The sampler has the same error, so that a comparison with it alone would show none."""
    coarse = ("jko.solver.method=euler", "jko.solver.steps=1", "sampler.method=euler")
    (row,) = events(tmp_path / "run", *coarse, "sampler.steps=1")
    assert row["training_grid"] == row["sampler"]
    assert abs(row["training_grid"] - row["finer_grid"]) > TOLERANCE


def test_a_block_that_overfits_its_grid_is_discarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.diagnostics.HOPELESS", TOLERANCE)
    coarse = ("jko.solver.method=euler", "jko.solver.steps=1", "sampler.steps=4")
    with pytest.raises(JkoflowError, match="overfits the discretisation error of its grid"):
        events(tmp_path / "run", *coarse)
    assert not read_manifest_if_any(tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert "grids differ" in [row.get("event") for row in rows]
    assert "finished" not in [row.get("event") for row in rows]


COARSE = ("jko.solver.method=euler", "jko.solver.steps=1", "sampler.steps=4", *ONE_BLOCK)


def train_coarse(folder: Path, *overrides: str) -> bool:
    """Train on a grid that the field overfits; return whether the training is complete."""
    config, source = tiny(*COARSE, *overrides), GaussianSource()
    return train(config, folder, Accelerator(), quiet, True, source).complete


def test_training_ends_before_a_block_overfits_its_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.training.diagnostics._LEAST_STEPS", 2)
    monkeypatch.setattr("pipeline.training.diagnostics._CHECKS", 20)
    assert train_coarse(tmp_path / "run")
    (row,) = read_manifest(tmp_path / "run").blocks
    assert 2 < row.iterations < 40
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    events = [entry.get("event") for entry in rows]
    assert "stopped: the block overfits its training grid" in events and "grids agree" in events
    assert f"training grid at step {row.iterations}" in capsys.readouterr().err
    while not train_coarse(tmp_path / "resumed", "train.max_minutes=1e-9"):
        pass
    assert read_manifest(tmp_path / "resumed").blocks[0].sha256 == row.sha256


def test_a_block_that_cannot_be_solved_on_the_finer_grid_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first comparison passes; in the second the finer grid allows no evaluation."""
    monkeypatch.setattr("pipeline.training.diagnostics._LEAST_STEPS", 10)
    finer, calls = diagnostics.finer_grid, []

    def failing(trainer: BlockTrainer, sampler: SolverConfig) -> SolverConfig:
        calls.append(trainer.done)
        solver = finer(trainer, sampler)
        return dataclasses.replace(solver, blow_up=1e-9) if len(calls) == 2 else solver

    monkeypatch.setattr(diagnostics, "finer_grid", failing)
    fine = ("jko.solver.steps=4", "sampler.steps=4", *ONE_BLOCK)
    config, source = tiny(*fine), GaussianSource()
    assert train(config, tmp_path / "run", Accelerator(), quiet, True, source).complete
    (row,) = read_manifest(tmp_path / "run").blocks
    assert row.iterations == 20 and calls[:2] == [10, 20]


def test_a_long_training_grid_has_a_finer_one() -> None:
    block = Block(make_velocity(VelocityConfig("linear"), (2,)), SolverConfig("rk4", steps=400))
    trainer: Any = SimpleNamespace(block=block)
    assert diagnostics.finer_grid(trainer, SolverConfig("rk4", steps=4)).steps == 800


def read_manifest_if_any(folder: Path) -> list[dict[str, Any]]:
    """Blocks that count."""
    return read_manifest(folder).blocks if (folder / "flow.json").is_file() else []


def test_an_adaptive_sampler_is_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It controls its error itself, so only the training grid can be too coarse."""
    coarse = ("jko.solver.method=euler", "jko.solver.steps=1", "sampler.method=dopri5",
              "sampler.steps=4")  # fmt: skip
    (row,) = events(tmp_path / "run", *coarse)
    assert "sampler" not in row
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning:" in line]
    assert "(euler, steps=1), but" in warning and warning.endswith("raise jko.solver.steps")


def test_a_coarse_sampler_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fine = ("jko.solver.steps=4", "sampler.method=euler", "sampler.steps=1")
    assert len(events(tmp_path / "run", *fine)) == 1
    assert capsys.readouterr().err.strip().endswith("raise sampler.steps")


@pytest.mark.parametrize("steps", [2, 4])
def test_a_fine_grid_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int
) -> None:
    assert not events(tmp_path / "run", f"jko.solver.steps={steps}", "sampler.steps=4")
    assert "warning" not in capsys.readouterr().err


def test_the_last_step_is_compared_where_there_are_weights_to_return_to() -> None:
    block = SimpleNamespace(solver=SolverConfig("rk4", steps=1))
    trainer: Any = SimpleNamespace(
        block=block, spec=SimpleNamespace(objective="jko"), iterations=150
    )
    for done, can_return, compared in (
        (150, True, True), (150, False, False), (100, False, True), (99, True, False)
    ):  # fmt: skip
        trainer.done, trainer.can_return = done, can_return
        assert diagnostics.compares_grids(trainer) == compared
