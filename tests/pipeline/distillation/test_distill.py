"""Merged blocks: the teacher's map in few steps, both ways; best regressions in closed form."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from flows.solving.solver import SolverConfig
from pipeline.cli.training import student_folder
from pipeline.config.load import load_config
from pipeline.config.sampling import SamplerConfig
from pipeline.distillation.distill import Distillation, distill, headline, student_config
from pipeline.distillation.distilled_blocks import student_manifest
from pipeline.errors import UserError
from pipeline.runs.directory import RunDirectory, read_config, read_manifest
from pipeline.runs.run import Run, open_run
from pipeline.runs.zoo import zoo
from pipeline.storage.shards.opening import open_store
from pipeline.toy2d.point_source import PointSource
from pipeline.training.stages import stage_folder
from pipeline.training.train import Outcome, train
from tests.pipeline.gaussian_source import COVARIANCE, GaussianSource, quiet, tiny
from tests.pipeline.killing import assert_same_content, kill_at
from tests.pipeline.tiny import World, say

MOONS = ("points.train=4000", "latents.shard_size=3000", "velocity.width=48", "velocity.depth=2",
         "velocity.activation=tanh", "jko=null", "train.ema=0.9", "train.batch_size=256",
         "train.lr=0.01",
         "train.warmup=10", "train.iterations=[200]", "schedule.tolerance=0",
         "train.objective=lfm", "lfm.gamma=[0.2,0.4,0.6]")  # fmt: skip
EXACT = SolverConfig("dopri5")


def merge(teacher: Run, folder: Path, *overrides: str, blocks: int = 2, resume: bool = False,
          **how: object) -> Outcome:  # fmt: skip
    settings = Distillation(blocks, **how)  # type: ignore[arg-type]
    config = student_config(teacher, settings, overrides)
    points = teacher.config.data.name == "two_moons"
    source = PointSource(config) if points else GaussianSource()
    return distill(teacher, folder, config, blocks, Accelerator(cpu=True), quiet, resume, source)


@pytest.fixture(scope="module")
def moons(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three blocks with a time and a free one, from two half circles to noise."""
    folder = tmp_path_factory.mktemp("moons") / "run"
    config = load_config("two_moons", MOONS, "toy2d")
    train(config, folder, Accelerator(cpu=True), quiet, False, PointSource(config))
    return open_run(folder)


def test_few_steps_of_a_merged_block_are_as_accurate_as_many(moons: Run, tmp_path: Path) -> None:
    """Four blocks become two; the reference is the teacher, integrated to 1e-5."""
    folder = tmp_path / "student"
    assert merge(moons, folder, "train.iterations=1000", "train.ema=0.99") == Outcome(2, True, 2)
    student = open_run(folder)
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    exact = moons.flow.decode(noise, EXACT)

    def error(run: Run, steps: int) -> tuple[int, float]:
        moved = run.flow.transport(noise, True, SolverConfig("euler", steps=steps))
        return moved.nfe, float((moved.z - exact).square().mean())

    for ours, theirs in ((2, 1), (4, 2)):
        (nfe, near), (same, far) = error(student, ours), error(moons, theirs)
        assert nfe == same == 2 * ours
        assert near < far / 10
    assert error(student, 1)[1] < error(moons, 1)[1] / 10  # with half as many evaluations
    assert error(student, 1)[1] < error(moons, 4)[1]  # with an eighth
    # what flow.json says of either direction
    stages = [open_store(stage_folder(folder, k), "stage").field("z") for k in (0, 1, 2)]
    for index, block in enumerate(student.flow):
        row, z, end = student.manifest.blocks[index], stages[index], stages[index + 1]
        solver = student.config.sampler.of_block(0)
        assert (solver.method, solver.steps) == ("rk4", 1)
        there = (block.transport(z, solver=solver).z - end).square().mean().item()
        back = (block.transport(end, reverse=True, solver=solver).z - z).square().mean().item()
        assert row.error["forward"] == pytest.approx(there, rel=0.3)
        assert row.error["reverse"] == pytest.approx(back, rel=0.3)
        moved = float((end - z).square().sum(1).mean())
        assert row.movement ** 2 == pytest.approx(moved, rel=0.2)
    assert "4 blocks of two_moons in 2" in headline(student.manifest)


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three linear JKO blocks, none of them free."""
    folder = tmp_path_factory.mktemp("gaussian") / "run"
    train(tiny(), folder, Accelerator(cpu=True), quiet, False, GaussianSource())
    return open_run(folder)


def test_a_linear_field_reaches_the_best_regression(gaussian: Run, tmp_path: Path) -> None:
    """T(z) = M z and N = M − I give A = N Σ (I + N/2)ᵀ (Σ + (N Σ + Σ Nᵀ)/2 + N Σ Nᵀ/3)⁻¹."""
    merge(gaussian, tmp_path, "train.iterations=300", "train.ema=0", blocks=3, steps=2)
    manifest = read_manifest(tmp_path)
    (row,) = manifest.blocks
    assert (row.h, row.gamma, row.objective) == (pytest.approx(1.3), None, "distill")
    z = open_store(stage_folder(tmp_path, 0), "stage").field("z").double()
    end = gaussian.flow.encode(z.float(), gaussian.config.sampler.of_block(0)).double()
    assert torch.allclose(open_store(stage_folder(tmp_path, 1), "stage").field("z").double(), end)
    ones = torch.ones(len(z), 1, dtype=torch.float64)
    n = torch.linalg.lstsq(torch.cat([z, ones], 1), end - z).solution[:2].T
    sigma = z.T.cov(correction=0)
    spread = sigma + (n @ sigma + sigma @ n.T) / 2 + n @ sigma @ n.T / 3
    best = n @ sigma @ (torch.eye(2).double() + n / 2).T @ torch.linalg.inv(spread)
    actual = open_run(tmp_path).flow[0].velocity.affine.weight.double()  # type: ignore[union-attr]
    torch.testing.assert_close(actual, best, rtol=0, atol=0.02)


def test_the_steps_of_a_group_add_up(gaussian: Run, moons: Run, tmp_path: Path) -> None:
    quick = ("train.iterations=2",)
    merge(gaussian, tmp_path / "jko", *quick)
    rows = read_manifest(tmp_path / "jko").blocks
    assert [row.h for row in rows] == [pytest.approx(0.4), pytest.approx(0.9)]
    merge(moons, tmp_path / "lfm", *quick, blocks=3)
    manifest = read_manifest(tmp_path / "lfm")
    assert [row.gamma for row in manifest.blocks] == [pytest.approx(1.2), None]
    teacher = manifest.derived_from
    assert teacher.groups == [[0, 1, 2], [3]] and teacher.objective == "lfm"
    assert teacher.blocks == [row.sha256 for row in moons.manifest.blocks]
    # a merged run can be merged again
    merge(open_run(tmp_path / "lfm"), tmp_path / "again", *quick)
    assert [row.gamma for row in read_manifest(tmp_path / "again").blocks] == [None]


def test_the_classes_keep_their_names(gaussian: Run) -> None:
    named = replace(gaussian, manifest=replace(gaussian.manifest, class_names=["cat", "dog"]))
    assert student_manifest(named, "student", [range(2)]).class_names == ["cat", "dog"]


def test_blocks_start_from_the_teachers(gaussian: Run, tmp_path: Path) -> None:
    still = ("train.iterations=1", "train.lr=1e-12")
    merge(gaussian, tmp_path / "warm", *still)
    merge(gaussian, tmp_path / "cold", *still, "train.warm_start=false")
    for name, index in (("warm", 0), ("cold", None)):
        for k, block in enumerate(open_run(tmp_path / name).flow):
            theirs = gaussian.flow[2 * k].state_dict()
            same = all(torch.allclose(v, theirs[key]) for key, v in block.state_dict().items())
            assert same == (index is not None)


def test_a_merged_block_has_the_skip_connection_of_its_start(tmp_path: Path) -> None:
    still = ("train.iterations=1", "train.lr=1e-12")
    net = ("velocity.kind=mlp", "velocity.width=16", "velocity.depth=1")
    for name, extra in {
        "fm": ("train.objective=fm",),
        "parts": (f"train.init_from={tmp_path / 'fm'}", "schedule.free_block=true"),
    }.items():
        config = tiny(*net, *still, *extra)
        train(config, tmp_path / name, Accelerator(cpu=True), quiet, False, GaussianSource())
    parts = open_run(tmp_path / "parts")
    merge(parts, tmp_path / "merged", *still)
    merge(parts, tmp_path / "random", *still, "train.warm_start=false")
    skips = [spec.skip for spec in parts.flow.specs]
    assert len(skips) == 4 and all(skips)
    assert [spec.skip for spec in open_run(tmp_path / "merged").flow.specs] == skips[::2]
    assert [spec.skip for spec in open_run(tmp_path / "random").flow.specs] == [0.0, 0.0]


OFTEN = ("train.iterations=5", "train.checkpoint_seconds=0", "train.batch_size=32")


def _resume(teacher: str, folder: str) -> None:
    merge(open_run(Path(teacher)), Path(folder), *OFTEN, resume=True)


def test_killed_and_resumed_ends_in_the_same_bytes(gaussian: Run, tmp_path: Path) -> None:
    merge(gaussian, tmp_path / "whole", *OFTEN)
    killed = tmp_path / "killed"
    kill_at((9, 14), _resume, str(gaussian.folder), str(killed))
    merge(gaussian, killed, *OFTEN, resume=True)
    assert_same_content(killed, tmp_path / "whole")


def test_invalid_settings_and_other_runs_are_errors(gaussian: Run, tmp_path: Path) -> None:
    for how, said in (
        ({"blocks": 0}, "--merge and --steps must be at least 1, not 0 and 1"),
        ({"steps": 0}, "not 2 and 0"),
        ({"method": "rk5"}, "unknown solver 'rk5'"),
    ):
        with pytest.raises((UserError, ValueError), match=said):
            merge(gaussian, tmp_path / "none", **how)
    for setting, said in (
        ("data.name=mnist", "no effect here"),
        ("train.objective=jko", "have no meaning for distill"),
        ("fm.snapshot_every=5", "no effect here"),
        ("train.iterations=0", "train.iterations is 0; expected at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            merge(gaussian, tmp_path / "none", setting)
    assert not (tmp_path / "none").exists()
    stopped = ("train.max_minutes=1e-9", *OFTEN)
    assert not merge(gaussian, tmp_path / "early", *stopped).complete  # in its first block
    with pytest.raises(UserError, match="from other blocks, or in other groups"):
        merge(gaussian, tmp_path / "early", *OFTEN, blocks=1, resume=True)
    assert merge(gaussian, tmp_path / "early", *OFTEN, resume=True).complete
    merge(gaussian, tmp_path / "run", *OFTEN)
    with pytest.raises(UserError, match="there is a run at"):
        merge(gaussian, tmp_path / "run", *OFTEN)
    with pytest.raises(UserError, match="from other blocks, or in other groups"):
        merge(gaussian, tmp_path / "run", *OFTEN, blocks=3, resume=True)
    with pytest.raises(UserError, match=r"started with train\.lr=0\.03 \(now 1\.0\)"):
        merge(gaussian, tmp_path / "run", *OFTEN, "train.lr=1", resume=True)
    with pytest.raises(UserError, match="there is a run at"):
        merge(gaussian, gaussian.folder, *OFTEN)
    with pytest.raises(UserError, match="is not distilled; choose another place with --out"):
        merge(gaussian, gaussian.folder, *OFTEN, resume=True)
    config = student_config(gaussian, Distillation())
    with pytest.raises(UserError, match="are standardised otherwise than those"):
        source = GaussianSource((*COVARIANCE, (0.0, 0.0)))  # three numbers a sample
        distill(gaussian, tmp_path / "b", config, 2, Accelerator(cpu=True), quiet, source=source)


def test_the_chain_from_pictures(
    trained: World, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Distil, generate and export, as for a trained run."""
    out = tmp_path / "run-distilled"  # beside the teacher's where nothing else is said
    words = ["distill", "-r", run, "--set", "train.iterations=5"]
    code, actual, last = say(capsys, *words, "--method", "euler", "--steps", "3")
    assert code == 0 and actual.strip() == str(out)
    assert "3 blocks of tiny in 2" in last
    command = shlex.split(RunDirectory(out).resume_command)  # of a finished run, as of any other
    assert say(capsys, *command[1:])[0] == 0
    code, _, last = say(capsys, "generate", "-r", out, "-n", "3")
    assert code == 0 and "6 network evaluations a sample" in last
    assert say(capsys, "export", "-r", out, "--out", tmp_path / "small")[0] == 0
    assert "distilled from tiny (jko, 3 blocks" in (tmp_path / "small" / "CARD.md").read_text()
    shipped = json.loads((tmp_path / "small" / "flow.json").read_text())
    assert shipped["derived_from"]["run"] == "tiny" and str(tmp_path) not in json.dumps(shipped)
    code, _, last = say(capsys, *words)
    assert code == 2 and last.startswith("error: there is a run at")
    assert last.endswith("choose another place with --out")
    elsewhere = shutil.copytree(trained.root / "pictures", tmp_path / "elsewhere")
    for teacher, place in (
        ("zoo:mnist", "runs/mnist-distilled"),
        ("hf://me/model", "runs/model-distilled"),
        (zoo()["mnist"], "runs/mnist-distilled"),  # nothing is written into the package
        ("elsewhere/mnist/", "elsewhere/mnist-distilled"),
        (run / "blocks" / "..", tmp_path / "run-distilled"),
    ):
        assert student_folder(None, Path(teacher)) == Path(place)
    moved = ["--out", tmp_path / "moved", "--set", f"data.path={elsewhere}"]
    assert say(capsys, *words, *moved)[0] == 0
    assert read_config(tmp_path / "moved").data.path == str(elsewhere)
    again = [*words, "--method", "euler", "--steps", "3", "--resume"]
    assert say(capsys, *again, "--set", f"data.path={elsewhere}")[0] == 0
    assert read_config(out).data.path == str(elsewhere)
    code, _, last = say(capsys, "train", "-r", out, "--resume")
    assert code == 2 and "make and continue distilled runs by `jkoflow distill`" in last


def test_every_block_of_the_teacher_has_its_own_solver(gaussian: Run, tmp_path: Path) -> None:
    sampler = SamplerConfig("euler", [1, 4, 2])
    teacher = replace(gaussian, config=replace(gaussian.config, sampler=sampler))
    merge(teacher, tmp_path, "train.iterations=1")
    z, end = (open_store(stage_folder(tmp_path, k), "stage").field("z") for k in (0, 1))
    for k in (0, 1):
        z = gaussian.flow[k].transport(z, solver=sampler.of_block(k)).z
    torch.testing.assert_close(end, z)


def test_a_limit_of_time_is_that_of_the_student(gaussian: Run) -> None:
    config = student_config(gaussian, Distillation(), max_minutes=2.5)
    assert config.train.max_minutes == 2.5


def test_a_resumed_distillation_takes_lower_iterations(tmp_path: Path) -> None:
    accelerator = Accelerator()
    config = tiny("train.iterations=2", "train.preview_every=0")
    train(config, tmp_path / "t", accelerator, quiet, False, GaussianSource())
    teacher, out = open_run(tmp_path / "t"), tmp_path / "s"
    for count, until in ((8, 5), (6, None)):
        config = student_config(teacher, Distillation(1), (f"train.iterations=[3,{count}]",))
        distill(teacher, out, config, 1, accelerator, quiet, True, GaussianSource(), until)
    assert [row.iterations for row in read_manifest(out).blocks] == [3, 6, 6]
