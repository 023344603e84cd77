"""Blocks that are added, settings per block, and mistakes, each refused in one sentence."""

from __future__ import annotations

import shutil
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from flows.errors import FlowError
from flows.solving.solver import SolverConfig
from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.runs.directory import ResumePolicy, RunDirectory, read_config, read_manifest
from pipeline.runs.run import open_run
from pipeline.storage.atomic import sha256_file
from pipeline.training import pass_trainer
from pipeline.training.block_loop import Place
from pipeline.training.train import Outcome, train
from tests.pipeline.gaussian_source import GaussianSource, quiet, tiny

FEW = ("train.iterations=4", "jko.h=null", "jko.h0=0.1", "schedule.rho=2",
       "schedule.max_blocks=2", "schedule.free_block=true")  # fmt: skip


def run(
    folder: Path, *overrides: str, bad: int | None = None, count: int = 700, **request: int
) -> Outcome:
    config, accelerator = tiny(*FEW, *overrides), Accelerator(cpu=True)
    source = GaussianSource(count=count, bad=bad)
    resume = (folder / "config.yaml").is_file()
    return train(config, folder, accelerator, quiet, resume, source, **request)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks with a movement term and a free one."""
    folder = tmp_path_factory.mktemp("modes") / "run"
    assert run(folder) == Outcome(3, True, 3, 1)
    return folder


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def hashes(folder: Path) -> list[str]:
    return [row.sha256 for row in read_manifest(folder).blocks]


def steps(folder: Path) -> list[float | None]:
    rows = read_manifest(folder).blocks
    return [None if row.h is None else round(row.h, 9) for row in rows]


def test_added_blocks_come_before_the_free_one(again: Path) -> None:
    before = hashes(again)
    assert run(again, add_blocks=2) == Outcome(5, True, 3, 2)
    after = hashes(again)
    assert steps(again) == [0.1, 0.2, 0.4, 0.8, None]
    assert after[:2] == before[:2]
    assert after[-1] != before[-1]  # the free block is another one now
    assert len(open_run(again).flow) == 5
    # and once more, upon what is there
    assert run(again, add_blocks=1).blocks == 6
    assert steps(again)[4] == 1.6


def test_trackers_count_the_steps_that_were_trained(
    again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that a pass takes over are not trained again."""
    original, seen = pass_trainer.optimise, []

    def counting(trainer: Any, log: Any, place: Place, *others: Any) -> bool:
        seen.append((place.before, trainer.iterations))
        return original(trainer, log, place, *others)

    monkeypatch.setattr(pass_trainer, "optimise", counting)
    before = sum(row.iterations for row in read_manifest(again).blocks)
    assert run(again, add_blocks=2).complete
    expected = list(accumulate((each for _, each in seen), initial=before))[:-1]
    assert [start for start, _ in seen] == expected and len(seen) == 3


def test_added_blocks_take_given_steps_first(again: Path) -> None:
    config = tiny(*FEW, "jko.h=[0.1,0.2,0.7]")
    source = GaussianSource(count=700)
    train(config, again, Accelerator(cpu=True), quiet, True, source, add_blocks=2)
    assert steps(again) == [0.1, 0.2, 0.7, 1.4, None]


def test_adding_blocks_resumes_where_it_was_stopped(again: Path) -> None:
    stopped = run(again, "train.max_minutes=1e-9", "train.iterations=6", add_blocks=1)
    assert stopped == Outcome(2, False, 0, 2)
    assert read_config(again).train.max_minutes == 0  # of that call, not of the run
    with pytest.raises(UserError, match="finish it with --resume"):
        run(again, "train.iterations=6", add_blocks=2)
    with pytest.raises(UserError, match=r"started with train.iterations=6 \(now 7\)"):
        run(again, "train.iterations=7", add_blocks=1)
    assert run(again, "train.iterations=6", add_blocks=1) == Outcome(4, True, 2, 2)


def test_an_unfinished_added_block_resumes_with_its_own_settings(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, "schedule.max_blocks=1", "schedule.free_block=false")
    stop = ("schedule.max_blocks=1", "schedule.free_block=false", "train.max_minutes=1e-9")
    assert run(tmp_path / "other", *stop).complete is False
    assert read_config(tmp_path / "other").train.max_minutes == 0  # of that call, not of the run
    assert run(folder, *stop, add_blocks=1).complete is False
    slower = ("schedule.max_blocks=1", "schedule.free_block=false", "train.lr=0.01")
    with pytest.raises(UserError, match=r"started with train.lr=0.03 \(now 0.01\)"):
        run(folder, *slower)
    assert run(folder, *stop[:2]) == Outcome(2, True, 1, 2)
    assert steps(folder) == [0.1, 0.2]


def test_blocks_have_their_own_iterations_and_substeps(tmp_path: Path) -> None:
    lists = ("train.iterations=[3,5]", "jko.solver.steps=[3,2]", "schedule.max_blocks=3")
    run(tmp_path / "run", *lists)
    opened = open_run(tmp_path / "run")
    assert [row.iterations for row in opened.manifest.blocks] == [3, 5, 5, 5]
    assert [spec.solver.steps for spec in opened.flow.specs] == [3, 2, 2, 2]
    run(tmp_path / "run", *lists, "jko.refine=2")
    opened = open_run(tmp_path / "run")
    # the children share the grid of their parent, rounded up
    assert [spec.solver.steps for spec in opened.flow.specs] == [2, 2, 1, 1, 1, 1, 2]
    assert [row.iterations for row in opened.manifest.blocks] == [3, 3, 5, 5, 5, 5, 5]


def rates(folder: Path) -> list[float]:
    return [row.lr for row in read_manifest(folder).blocks]


def test_blocks_have_their_own_learning_rates(again: Path, tmp_path: Path) -> None:
    folder, same = tmp_path / "other", "train.lr=[0.03]"
    run(folder, same)  # tiny()'s train.lr, said otherwise
    assert hashes(folder) == hashes(again)
    folder, own = tmp_path / "own", "train.lr=[0.03,0.01]"
    run(folder, own)
    assert rates(folder) == [0.03, 0.01, 0.01]
    assert hashes(folder)[0] == hashes(again)[0] and hashes(folder)[1] != hashes(again)[1]
    with pytest.raises(UserError, match=r"train.lr=\[0.03, 0.01\] \(now \[0.03\]\)"):
        run(folder, same)
    run(folder, own, "jko.refine=2")
    assert rates(folder) == [0.03, 0.03, 0.01, 0.01, 0.01]


TWO_NETS = ("velocity.kind=mlp", "velocity.width=8", "velocity.depth=1", "velocity.nets=2",
            "jko.solver.steps=2", "schedule.max_blocks=1")  # fmt: skip


def test_blocks_of_two_networks_train_refine_and_grow(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, *TWO_NETS)
    block = open_run(folder).flow[0]
    weights = [net.last.weight for net in block.velocity.nets]
    assert len(weights) == 2 and all(bool(weight.abs().max() > 1e-3) for weight in weights)
    run(folder, *TWO_NETS, "jko.refine=4")
    children = open_run(folder).flow
    # a quarter of the block's time holds one of its networks
    assert [len(child.velocity.inner.nets) for child in children.blocks[:4]] == [1] * 4
    assert [len(free.velocity.nets) for free in children.blocks[4:]] == [2]
    # further blocks go on from the last child, the free one with them
    run(folder, *TWO_NETS, "jko.refine=4", add_blocks=1)
    assert steps(folder) == [0.025] * 4 + [0.05, None]
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    flow, fine = open_run(folder).flow, SolverConfig("dopri5")
    torch.testing.assert_close(flow.decode(flow.encode(z, fine), fine), z, atol=1e-3, rtol=0)


def test_the_stopping_rule_ends_the_ordinary_pass(tmp_path: Path) -> None:
    outcome = run(tmp_path / "run", "schedule.max_blocks=5", "schedule.tolerance=1e9")
    assert outcome == Outcome(2, True, 2, 1, spared=4)
    assert steps(tmp_path / "run") == [0.1, None]


def test_a_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="run is a file; a run is a folder"):
        run(tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("jko.h=[0.5,0]", r"jko.h is \[0.5, 0.0\]; expected a list .* above 0"),
        ("jko.h=[]", r"jko.h is \[\]; expected a list of one value per block"),
        ("jko.h0=0", "jko.h0 is 0.0; expected above 0"),
        ("schedule.rho=-1", "schedule.rho is -1.0; expected above 0"),
        ("schedule.max_blocks=0", "schedule.max_blocks is 0; expected at least 1"),
        ("train.iterations=[3,0]", r"train.iterations is \[3, 0\]; .* each at least 1"),
        ("jko.solver.steps=[0]", r"jko.solver.steps is \[0\]; .* each at least 1"),
        ("train.lr=[0.1,-1]", r"train.lr is \[0.1, -1.0\]; .* each above 0"),
        ("jko.reparameterize=-1", "jko.reparameterize is -1; expected at least 0"),
        ("jko.refine=0", "jko.refine is 0; expected at least 1"),
        ("train.lr_final=1.5", "train.lr_final is 1.5; expected at least 0 and at most 1"),
        ("jko.later_iterations=0", "jko.later_iterations is 0; expected at least 1"),
        ("jko.divergence=guess", "jko.divergence is 'guess'; expected exact or hutchinson"),
        ("velocity.kind=magic", "velocity.kind is 'magic'; expected one of mlp"),
        ("train.lr=0", "train.lr is 0.0; expected above 0"),
        ("train.ema=1", "train.ema is 1.0; expected at least 0 and below 1"),
        ("train.lr_final=.inf", "train.lr_final is inf; expected at least 0 and at most 1"),
        ("schedule.tolerance=.inf", "schedule.tolerance is inf; expected at least 0"),
        ("jko.solver.steps=0", "jko.solver.steps is 0; expected at least 1"),
        ("jko.solver.steps=[1,900]", "jko.solver: steps=900 of rk4 takes 3600 evaluations"),
        ("sampler.steps=600", "sampler: steps=600 of rk4 takes 2400 evaluations"),
        ("jko.solver.method=leap", "jko.solver: unknown solver 'leap'"),
        ("velocity.nets=0", "velocity.nets must be at least 1"),
        ("velocity.nets=3", "solver.steps must be a multiple of velocity.nets = 3"),
    ],
)
def test_values_out_of_range_are_errors_before_anything_is_written(
    tmp_path: Path, override: str, sentence: str
) -> None:
    with pytest.raises((UserError, FlowError), match=sentence):
        run(tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_samples_with_nan_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 of the training samples .* hold NaN .* sample 650"):
        run(tmp_path / "run", bad=650)


def test_blocks_that_cannot_be_added_are_an_error(again: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--add-blocks must be at least 1, not -1"):
        run(again, add_blocks=-1)
    with pytest.raises(UserError, match="blocks are added to a finished run; finish it"):
        run(tmp_path / "none", add_blocks=1)
    with pytest.raises(UserError, match=r"started with sampler.steps=2 \(now 3\)"):
        run(again, "sampler.steps=3", add_blocks=1)
    # what added blocks would not use is not written down either
    before = (again / "config.yaml").read_text()
    for key in ("max_blocks=7", "tolerance=0.5", "free_block=false"):
        with pytest.raises(UserError, match=rf"was started with schedule\.{key.split('=')[0]}="):
            run(again, f"schedule.{key}", add_blocks=1)
    assert (again / "config.yaml").read_text() == before


def test_a_missing_block_is_one_sentence(again: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (again / "blocks" / "block-01.safetensors").unlink()
    assert main.main(["generate", "--run", str(again)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and "lacks blocks/block-01.safetensors" in error[-1]
    with pytest.raises(UserError, match="lacks blocks/block-01.safetensors"):
        run(again, add_blocks=1)


def test_the_command_says_what_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunDirectory.open_or_create(tmp_path / "run", tiny(), ResumePolicy(False), Accelerator())
    for words, sentence in {
        ("--run", "RUN", "--reparameterize", "2"): "--run with --resume",
        ("--run", "RUN", "--resume", "--reparameterize", "-2"): "jko.reparameterize is -2",
        ("--run", "RUN", "--resume", "--refine", "0"): "jko.refine is 0; expected at least 1",
        ("--run", "RUN", "--resume", "--set", "train.lr=1"): "--set train.lr=1 has no effect here",
    }.items():
        given = [str(tmp_path / "run") if word == "RUN" else word for word in words]
        assert main.main(["train", *given]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ") and sentence in last


def test_blocks_are_the_bytes_that_the_manifest_says(again: Path) -> None:
    run(again, add_blocks=1)
    rows = read_manifest(again).blocks
    for row in rows:
        assert sha256_file(again / row.file) == row.sha256
    # the free block ends the flow: nothing is trained on what it leaves, so that is not kept
    there = [(again / row.stage / "manifest.json").is_file() for row in rows]
    assert [row.h is not None for row in rows] == there == [True, True, True, False]
