"""Solvers of sampling: method and steps of each block, and budgets of evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from autoencoders.base import to_uint8
from flows.solving.solver import SolverConfig
from pipeline.errors import UserError
from pipeline.runs.directory import read_config
from pipeline.runs.run import Run, open_run
from pipeline.runtime.rng import generator
from pipeline.sampling.sampling_plan import SamplingPlan
from pipeline.sampling.solvers import with_solver
from tests.pipeline.drawing import plan_of
from tests.pipeline.gaussian_source import tiny
from tests.pipeline.sampling.test_generate import images_of
from tests.pipeline.tiny import say
from tests.pipeline.training.test_modes import TWO_NETS
from tests.pipeline.training.test_modes import run as train


def steps_within(plan: SamplingPlan, nfe: int) -> set[int]:
    """Return the steps of all blocks under a budget."""
    return {solver.steps for solver in plan.within(nfe).solvers}


@torch.inference_mode()
def by_hand(opened: Run, back: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Compute six grey images, uint8 (6, H, W); `back` inverts a block."""
    parts = []
    for batch, count in enumerate((4, 2)):
        z = torch.randn((count, 2, 3, 3), generator=generator(0, "sample", batch))
        for k in reversed(range(len(opened.flow))):
            z = back(k, z)
        parts.append(to_uint8(opened.autoencoder().decode(opened.standardisation.undo(z))))
    return torch.cat(parts)[:, 0]


def test_every_block_has_its_own_steps(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    opened = open_run(run)
    code, _, last = say(
        capsys, "generate", "-r", run, "-n", "6", "--method", "euler", "--steps", "1,2,4",
        "--npz", run / "a.npz",
    )  # fmt: skip
    assert code == 0 and "7 network evaluations a sample" in last

    def back(k: int, z: torch.Tensor) -> torch.Tensor:
        for step in range(2**k, 0, -1):  # Euler's steps back from t = 1
            z = z - opened.flow[k].velocity(torch.tensor(step / 2**k), z) / 2**k
        return z

    actual = torch.from_numpy(np.load(run / "a.npz")["arr_0"])[..., 0]
    assert (actual.int() - by_hand(opened, back).int()).abs().max() <= 1
    # an exported run may bring its steps along; an adaptive solver has no use for them
    words = ("--set", "sampler.steps=[1,2,4]", "--method", "dopri5")
    assert say(capsys, "generate", "-r", run, "-n", "6", *words)[0] == 0
    one = images_of(opened, n=6, method="euler", steps=2)
    assert one.manifest["nfe"] == 6 and one.manifest["identity"]["sampling"]["solvers"] == [
        {"method": "euler", "steps": 2}
    ] * 3


def test_every_block_has_its_own_method(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    opened, solvers = open_run(run, 2), [SolverConfig("midpoint", 2), SolverConfig("euler", 4)]
    words = ("generate", "-r", run, "--blocks", "2", "-n", "6")
    code, _, last = say(
        capsys, *words, "--method", "midpoint,euler", "--steps", "2,4", "--npz", run / "a.npz"
    )
    assert code == 0 and "8 network evaluations a sample" in last

    def back(k: int, z: torch.Tensor) -> torch.Tensor:
        return opened.flow[k].transport(z, reverse=True, solver=solvers[k]).z

    actual = torch.from_numpy(np.load(run / "a.npz")["arr_0"])[..., 0]
    assert torch.equal(actual, by_hand(opened, back))
    # adaptive solvers have no steps
    chosen = with_solver(opened, "2,4", "midpoint,euler")
    grids = [{"method": "midpoint", "steps": 2}, {"method": "euler", "steps": 4}]

    def solvers_of(changed: Run) -> list[dict[str, object]]:
        actual: list[dict[str, object]] = plan_of(changed).identity()["solvers"]
        return actual

    assert solvers_of(chosen) == grids
    mixed = solvers_of(with_solver(chosen, None, "dopri5, euler"))
    assert mixed == [{"method": "dopri5"}, grids[1]]
    # the last word counts, and a budget is shared by the steps of all blocks
    one = with_solver(with_solver(chosen, None, "rk4,rk4"), "3", "euler")
    assert solvers_of(one) == [{"method": "euler", "steps": 3}] * 2
    plan = plan_of(chosen)
    assert [steps_within(plan, nfe) for nfe in (8, 9)] == [{2}, {3}]
    with pytest.raises(
        UserError, match=r"below one midpoint,euler step in each of 2 blocks \(3\)"
    ):
        plan.within(2)


def test_the_methods_of_the_blocks_are_exported(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path
) -> None:
    words = ("-r", run, "--method", "midpoint,euler,dopri5", "--steps", "2")
    assert say(capsys, "generate", "-n", "6", *words)[0] == 0
    assert say(capsys, "export", "--out", tmp_path / "out", *words)[0] == 0
    assert read_config(tmp_path / "out").sampler.method == ["midpoint", "euler", "dopri5"]
    text = "in the blocks: midpoint, 2 sub-intervals; euler, 2 sub-intervals; dopri5"
    assert f"| sampling | {text} |" in (tmp_path / "out" / "CARD.md").read_text()
    assert (tmp_path / "out" / "samples" / "grid.png").is_file()  # drawn as the export draws
    assert say(capsys, "export", "--out", tmp_path / "as trained", "-r", run)[0] == 0
    assert not (tmp_path / "as trained" / "samples" / "grid.png").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "1,2"], "one per block, 3 for this run, not 2"),
        (["--steps", "0"], "--steps takes a whole number of at least 1"),
        (["--steps", "1,,2"], "not '1,,2'"),
        (["--steps", "1,2,4", "--method", "dopri5"], "--steps needs a fixed-step solver"),
        (["--method", "rk5"], "unknown solver 'rk5'"),
        (["--method", "midpoint,euler"], "one per block, 3 for this run, not 2"),
        (["--method", "euler,rk5,euler"], "unknown solver 'rk5'; choose one of euler, midpoint"),
        (["--method", "euler,,rk4"], "--method takes a solver, or several separated by commas"),
        (["--steps", "1,2,4", "--method", "dopri5,bosh3,dopri5"], "not dopri5,bosh3,dopri5"),
        (["--nfe", "50", "--method", "euler,dopri5,euler"], "not euler,dopri5,euler; choose"),
    ],
)
def test_solvers_that_do_not_fit_are_refused(
    capsys: pytest.CaptureFixture[str], run: Path, words: list[str], said: str
) -> None:
    code, _, last = say(capsys, "generate", "-r", run, *words)
    assert code == 2 and last.startswith("error: ") and said in last, last


def test_a_budget_of_evaluations_is_spent_on_whole_networks(tmp_path: Path) -> None:
    train(tmp_path / "run", *TWO_NETS, "schedule.free_block=false")
    plan = SamplingPlan.open(open_run(tmp_path / "run"), tiny().generate)
    assert [steps_within(plan, nfe) for nfe in (8, 15, 16)] == [{2}, {2}, {4}]
    with pytest.raises(UserError, match=r"in the block of 2 networks \(8\)"):
        plan.within(7)


def test_a_budget_includes_the_networks_of_the_guide(tmp_path: Path) -> None:
    train(tmp_path / "one", "schedule.free_block=false", "schedule.max_blocks=1")
    train(tmp_path / "two", *TWO_NETS, "schedule.free_block=false")
    opened, settings = open_run(tmp_path / "one"), tiny().generate
    settings = replace(settings, guide=str(tmp_path / "two"), guidance=2.0)
    plan = SamplingPlan.open(opened, settings)
    assert steps_within(plan, 31) == {2}  # three would not meet the guide's switch
    assert steps_within(plan, 32) == {4}
    with pytest.raises(UserError, match=r"in the block of 2 networks with guidance \(16\)"):
        plan.within(15)
