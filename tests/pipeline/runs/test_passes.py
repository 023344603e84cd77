"""Reparameterization and refinement on Gaussian data, whose JKO steps are known exactly."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from flows.networks.config import VelocityConfig
from flows.refinement import split_block
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec, build_block
from pipeline.errors import UserError
from pipeline.runs.directory import read_manifest
from pipeline.runs.passes import Pass, labels, spread, summarise
from pipeline.runs.run import build_stored, open_run
from pipeline.storage.shards.opening import open_store
from pipeline.training.block_trainer import BlockTrainer, StepReport
from pipeline.training.stages import stage_folder
from pipeline.training.train import Outcome, train
from tests.flows.closed_form import GaussianStep, jko_iterates
from tests.pipeline.gaussian_source import GaussianSource, quiet, tiny
from tests.pipeline.killing import assert_same_content, kill_at
from tests.pipeline.records import block_row


def run(folder: Path, *overrides: str, resume: bool = True, **request: int) -> Outcome:
    config, accelerator = tiny(*overrides), Accelerator(cpu=True)
    return train(config, folder, accelerator, quiet, resume, GaussianSource(), **request)


def exact(folder: Path, h: list[float]) -> list[GaussianStep]:
    """Compute the exact JKO steps from mean and covariance of the training samples."""
    z = open_store(stage_folder(folder, 0), "stage 0").field("z").double()
    return jko_iterates(z.mean(dim=0), z.T.cov(correction=0), h)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its first pass only."""
    folder = tmp_path_factory.mktemp("passes") / "run"
    assert run(folder, resume=False) == Outcome(3, True, 3, 1)
    return folder


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def evened(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after three reparameterizations."""
    folder = tmp_path_factory.mktemp("evened") / "run"
    shutil.copytree(finished, folder)
    later = ("jko.reparameterize=3", "jko.later_iterations=40")
    assert run(folder, *later) == Outcome(3, True, 9, 4)
    return folder


def test_every_pass_reaches_the_exact_jko_steps(evened: Path) -> None:
    for entry in read_manifest(evened).passes:
        steps = exact(evened, entry.h)
        movements = [step.squared_movement**0.5 for step in steps]
        assert entry.summary.movement == pytest.approx(movements, rel=0.05)
        nll = steps[-1].squared_norm / 2 - sum(step.log_det for step in steps)
        nll += torch.tensor(2 * torch.pi).log().item()
        assert entry.summary.nll == pytest.approx(nll, abs=3e-3)
        assert entry.summary.nll_per_dim == entry.summary.nll / 2


def test_reparameterization_evens_out_the_movements(evened: Path) -> None:
    passes = read_manifest(evened).passes
    assert [entry.kind for entry in passes] == ["ordinary"] + 3 * ["reparameterize"]
    spreads = [entry.summary.spread for entry in passes]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < spreads[0] / 2
    assert spreads[0] == pytest.approx(spread([row.movement for row in passes[0].blocks]))


def test_refinement_starts_as_the_same_map(again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_still(trainer: BlockTrainer) -> StepReport:
        trainer.done += 1
        return StepReport({"total": 0.0}, 0)

    with monkeypatch.context() as patch:
        patch.setattr(BlockTrainer, "step", stand_still)
        run(again, "jko.refine=2")
    before, after = open_run(again, number=0).flow, open_run(again).flow
    assert [spec.h for spec in after.specs] == [0.05, 0.05, 0.15, 0.15, 0.45, 0.45]
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    solver = SolverConfig(method="rk4", steps=8)
    assert torch.allclose(before.encode(z, solver), after.encode(z, solver), atol=1e-5)
    halfway = list(after.trajectory(z, solver=solver))[1]
    assert 0 < (halfway - z).norm() < (before[:1].encode(z, solver) - z).norm()


def test_refinement_lowers_the_nll_and_may_be_repeated(again: Path) -> None:
    assert run(again, "jko.refine=2", "jko.later_iterations=40").trained == 6
    first, second = read_manifest(again).passes
    assert second.summary.nll < first.summary.nll - 0.01
    exact_nll = exact(again, second.h)[-1].squared_norm / 2
    exact_nll -= sum(step.log_det for step in exact(again, second.h))
    assert second.summary.objective > exact_nll  # the way costs something
    assert [row.iterations for row in second.blocks] == 6 * [40]
    assert labels([first, second]) == ["Iter 1", "r-Iter 1"]
    # --refine is counted in all: the same again is nothing to do, 3 is no multiple of 2
    assert run(again, "jko.refine=2").trained == 0
    with pytest.raises(UserError, match="give --refine a multiple of 2"):
        run(again, "jko.refine=3")
    # a run that starts from blocks that were split has split none itself
    started = again.parent / "started"
    run(started, f"train.init_from={again}", "jko.refine=2", "train.iterations=1",
        resume=False)  # fmt: skip
    assert [len(plan.blocks) for plan in read_manifest(started).passes] == [3, 6]


def test_the_log_names_the_pass_and_the_plot_shows_all(evened: Path) -> None:
    rows = [json.loads(line) for line in (evened / "log.jsonl").read_text().splitlines()]
    assert sorted({row["pass"] for row in rows}) == [0, 1, 2, 3]
    ends = [row for row in rows if row.get("event") == "pass finished"]
    summaries = [entry.summary for entry in read_manifest(evened).passes]
    assert [row["movement"] for row in ends] == [one.movement for one in summaries]
    assert [row["nll"] for row in ends] == [one.nll for one in summaries]
    assert (evened / "samples" / "movement.png").read_bytes().startswith(b"\x89PNG")
    names = labels(read_manifest(evened).passes)
    assert names == ["Iter 1", "Iter 2", "Iter 3", "Iter 4"]


def test_a_pass_is_in_use_until_a_later_one_is_complete(again: Path) -> None:
    in_time = ("jko.reparameterize=1", "train.max_minutes=1e-9")
    outcome = run(again, *in_time)
    assert (outcome.complete, outcome.passes) == (False, 2)
    opened = open_run(again)
    assert opened.manifest.number == 0 and len(opened.flow) == 3
    with pytest.raises(UserError, match="stopped after 0 blocks"):
        open_run(again, number=1)
    with pytest.raises(UserError, match="pass 2 does not exist"):
        open_run(again, number=2)
    half = again / "stages" / "pass-00" / "stage-07"  # of a push that was killed
    half.mkdir(parents=True)
    (half / "shard-00000.safetensors").write_bytes(b"")
    assert run(again, "jko.reparameterize=1").trained == 3
    assert open_run(again).manifest.number == 1
    # nothing is kept but what is used
    stages = {path.name for path in (again / "stages").glob("**/stage-*")}
    assert stages == {"stage-00", "stage-01", "stage-02", "stage-03"}
    assert not list((again / "stages").glob("stage-01"))
    assert not list((again / "checkpoints").iterdir())


LATER = (
    "jko.reparameterize=1",
    "jko.refine=2",
    "jko.later_iterations=5",
    "train.checkpoint_seconds=0",
)


def _resume(folder: str) -> None:
    run(Path(folder), *LATER)


def test_killed_in_later_passes_and_resumed_ends_in_the_same_bytes(
    again: Path, tmp_path: Path
) -> None:
    killed = Path(shutil.copytree(again, tmp_path / "killed"))
    run(again, *LATER)
    kill_at((3, 30, 57), _resume, str(killed))
    assert 1 < len(read_manifest(killed).passes)
    run(killed, *LATER)
    assert_same_content(killed, again)


def test_later_passes_have_a_free_block_too(tmp_path: Path) -> None:
    few = ("schedule.free_block=true", "train.iterations=4", "jko.h=[0.2,0.4]")
    run(tmp_path / "run", *few, "jko.reparameterize=1", "jko.refine=2", resume=False)
    passes = read_manifest(tmp_path / "run").passes
    assert [[row.h is None for row in entry.blocks] for entry in passes] == [
        [False, False, True],
        [False, False, True],
        [False, False, False, False, True],
    ]
    assert sum(passes[2].h) == pytest.approx(sum(passes[1].h))


def test_labels_follow_the_paper() -> None:
    kinds = ["ordinary", "reparameterize", "refine", "reparameterize", "add"]
    entries = [Pass(kind, [0.5, 0.5, 0.5], False, None, [], [], [], kept=1) for kind in kinds]
    assert labels(entries) == [
        "Iter 1",
        "Iter 2",
        "r-Iter 1",
        "r-Iter 2",
        "2 more",
    ]


def test_the_summary_by_hand() -> None:
    """The objective has the movements once; the spread leaves the free block out."""
    rows = [
        block_row(h, None, movement=m, terms={"potential": 3.0, "neg_log_det": 0.5, **way})
        for h, m, way in ((0.1, 1.0, {"movement": 0.25}), (0.2, 3.0, {"movement": 0.5}),
                          (None, 9.0, {}))
    ]  # fmt: skip
    summary = summarise(rows, 2)
    assert summary.movement == [1.0, 3.0, 9.0] and summary.spread == spread([1.0, 3.0]) == 0.5
    assert summary.objective == pytest.approx(3 + 1.5 + 0.75)
    assert summary.nll == pytest.approx(4.5 + math.log(2 * math.pi))


def test_the_free_block_continues_the_free_block() -> None:
    """Of two blocks that are split into two, and a free one, which is not."""
    plan = Pass("refine", [0.1] * 4, True, None, [], [], [], base=0, parts=2)
    parents = [plan.parent(index) for index in range(5)]
    assert parents == [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2), (2, 0, 1)]


def test_a_small_part_of_many_networks_is_loaded() -> None:
    config = VelocityConfig("mlp", width=16, depth=4, nets=16, autonomous=True)
    spec = BlockSpec(config, SolverConfig(steps=16), h=1.0)
    child, block = split_block(spec, build_block(spec, (2,)), 16)[3]
    build_stored(child, (2,), block.state_dict(), Path("x"))
