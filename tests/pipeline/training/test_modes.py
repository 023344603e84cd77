"""Blocks added, trained again, set one by one; and what a training refuses, in one sentence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from flows.errors import FlowError
from flows.solving.solver import SolverConfig
from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.runs.directory import read_config, start_run
from pipeline.runs.manifest import passes_of, read_manifest
from pipeline.runs.run import open_run
from pipeline.storage.atomic import sha256_file
from pipeline.training.train import Outcome, train
from tests.pipeline.gaussian_source import GaussianSource, quiet, tiny

FEW = ("train.iterations=4", "schedule.h=null", "schedule.h0=0.1", "schedule.rho=2",
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
    return [row["sha256"] for row in read_manifest(folder)["blocks"]]


def steps(folder: Path) -> list[float | None]:
    rows = read_manifest(folder)["blocks"]
    return [None if row["h"] is None else round(row["h"], 9) for row in rows]


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


def test_added_blocks_take_given_steps_first(again: Path) -> None:
    config = tiny(*FEW, "schedule.h=[0.1,0.2,0.7]")
    source = GaussianSource(count=700)
    train(config, again, Accelerator(cpu=True), quiet, True, source, add_blocks=2)
    assert steps(again) == [0.1, 0.2, 0.7, 1.4, None]


def test_blocks_are_trained_again_from_one_on(again: Path) -> None:
    before = hashes(again)
    assert run(again, "train.iterations=7", from_block=1) == Outcome(3, True, 2, 2)
    after, manifest = hashes(again), read_manifest(again)
    assert after[0] == before[0] and after[1:] != before[1:]
    assert [row["iterations"] for row in manifest["blocks"]] == [4, 7, 7]
    assert read_config(again).train.iterations == 7
    # what was there before is still whole
    assert [row["sha256"] for row in open_run(again, number=0).manifest["blocks"]] == before


def test_a_request_that_was_stopped_goes_on_when_it_is_repeated(again: Path) -> None:
    stopped = run(again, "train.max_minutes=1e-9", "train.iterations=6", from_block=1)
    assert stopped == Outcome(1, False, 0, 2)
    assert read_config(again).train.max_minutes == 0  # kept with the run: what decides it only
    assert run(again, "train.iterations=6", from_block=1) == Outcome(3, True, 2, 2)
    stopped = run(again, "train.max_minutes=1e-9", "train.iterations=6", add_blocks=1)
    assert stopped == Outcome(2, False, 0, 3)
    with pytest.raises(UserError, match="finish it with --resume"):
        run(again, "train.iterations=6", add_blocks=2)
    with pytest.raises(UserError, match=r"begun with another train\.iterations; finish them"):
        run(again, "train.iterations=7", add_blocks=1)
    assert run(again, "train.iterations=6", add_blocks=1) == Outcome(4, True, 2, 3)


def test_an_unfinished_block_can_be_trained_with_other_settings(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, "schedule.max_blocks=1", "schedule.free_block=false")
    stop = ("schedule.max_blocks=1", "schedule.free_block=false", "train.max_minutes=1e-9")
    assert run(tmp_path / "other", *stop).complete is False
    assert read_config(tmp_path / "other").train.max_minutes == 0  # of that call, not of the run
    assert run(folder, *stop, add_blocks=1).complete is False
    slower = ("schedule.max_blocks=1", "schedule.free_block=false", "train.lr=0.01")
    with pytest.raises(UserError, match=r"started with train.lr=0.03 \(now 0.01\)"):
        run(folder, *slower)
    assert run(folder, *slower, from_block=1) == Outcome(2, True, 1, 3)
    assert passes_of(read_manifest(folder))[-1].recipe["lr"] == 0.01
    assert steps(folder) == [0.1, 0.2]


def test_blocks_have_their_own_iterations_and_substeps(tmp_path: Path) -> None:
    lists = ("schedule.iterations=[3,5]", "schedule.substeps=[3,2]", "schedule.max_blocks=3")
    run(tmp_path / "run", *lists)
    opened = open_run(tmp_path / "run")
    assert [row["iterations"] for row in opened.manifest["blocks"]] == [3, 5, 5, 5]
    assert [spec.solver.steps for spec in opened.flow.specs] == [3, 2, 2, 2]
    run(tmp_path / "run", *lists, "schedule.refine=2")
    opened = open_run(tmp_path / "run")
    # the children share the grid of their parent, rounded up
    assert [spec.solver.steps for spec in opened.flow.specs] == [2, 2, 1, 1, 1, 1, 2]
    assert [row["iterations"] for row in opened.manifest["blocks"]] == [3, 3, 5, 5, 5, 5, 5]


def rates(folder: Path) -> list[float]:
    return [row["lr"] for row in read_manifest(folder)["blocks"]]


def test_blocks_have_their_own_learning_rates(again: Path, tmp_path: Path) -> None:
    folder, same = tmp_path / "other", "schedule.lr=[0.03]"
    run(folder, same)  # tiny()'s train.lr, said otherwise
    assert hashes(folder) == hashes(again)
    own = ("schedule.lr=[0.03,0.01]", "train.lr=1.0")
    run(folder, *own, from_block=1)
    assert rates(folder) == [0.03, 0.01, 0.01]
    before = hashes(folder)
    run(again, "train.lr=0.01", from_block=1)
    assert hashes(again) == before
    with pytest.raises(UserError, match=r"schedule.lr=\[0.03, 0.01\] \(now \[0.03\]\)"):
        run(folder, same, "train.lr=1.0")
    run(folder, *own, "schedule.refine=2")
    assert rates(folder) == [0.03, 0.03, 0.01, 0.01, 0.01]
    other = ("schedule.lr=[0.02,0.04]", "train.lr=1.0", "schedule.refine=2")
    run(folder, *other, from_block=3)
    assert rates(folder) == [0.03, 0.03, 0.01, 0.04, 0.04]


TWO_NETS = ("velocity.kind=mlp", "velocity.width=8", "velocity.depth=1", "velocity.nets=2",
            "solver.steps=2", "schedule.max_blocks=1")  # fmt: skip


def test_blocks_of_two_networks_train_refine_and_grow(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, *TWO_NETS)
    block = open_run(folder).flow[0]
    weights = [net.last.weight for net in block.velocity.nets]
    assert len(weights) == 2 and all(bool(weight.abs().max() > 1e-3) for weight in weights)
    run(folder, *TWO_NETS, "schedule.refine=4")
    children = open_run(folder).flow
    # a quarter of the block's time holds one of its networks
    assert [len(child.velocity.inner.nets) for child in children.blocks[:4]] == [1] * 4
    assert [len(free.velocity.nets) for free in children.blocks[4:]] == [2]
    # further blocks go on from the last child, the free one with them
    run(folder, *TWO_NETS, "schedule.refine=4", add_blocks=1)
    assert steps(folder) == [0.025] * 4 + [0.05, None]
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    flow, fine = open_run(folder).flow, SolverConfig("dopri5")
    torch.testing.assert_close(flow.decode(flow.encode(z, fine), fine), z, atol=1e-3, rtol=0)


def test_the_stopping_rule_ends_the_ordinary_pass(tmp_path: Path) -> None:
    run(tmp_path / "run", "schedule.max_blocks=5", "schedule.tolerance=1e9")
    assert steps(tmp_path / "run") == [0.1, None]


def test_other_block_networks_start_anew(again: Path) -> None:
    wider = ("velocity.kind=mlp", "velocity.width=8", "velocity.depth=1")
    assert run(again, *wider, from_block=2) == Outcome(3, True, 1, 2)
    kinds = [spec.velocity.kind for spec in open_run(again).flow.specs]
    assert kinds == ["linear", "linear", "mlp"]


def test_networks_of_another_width_start_anew_or_wider(again: Path) -> None:
    narrow = ("velocity.kind=resmlp", "velocity.width=8", "velocity.depth=1")
    assert run(again, *narrow, from_block=0).complete
    for width in (12, 16, 6):
        wide = (*narrow[::2], f"velocity.width={width}")
        assert run(again, *wide, from_block=1).complete
        widths = [spec.velocity.width for spec in open_run(again).flow.specs]
        assert widths == [8, width, width]


def test_an_unfinished_block_of_another_network_is_begun_again(again: Path) -> None:
    wide = ("velocity.kind=resmlp", "velocity.width=16", "velocity.depth=1")
    assert not run(again, *wide, "train.max_minutes=1e-9", from_block=1).complete
    narrow = ("velocity.kind=resmlp", "velocity.width=8", "velocity.depth=1")
    assert run(again, *narrow, from_block=1).complete
    assert [spec.velocity.kind for spec in open_run(again).flow.specs][0] == "linear"
    assert [spec.velocity.width for spec in open_run(again).flow.specs][1:] == [8, 8]


@pytest.mark.parametrize(
    "override", ["solver.steps=2", "train.iterations=9", "schedule.h=[1,1]", "velocity.kind=mlp"]
)
def test_blocks_that_train_on_keep_what_they_go_on_with(again: Path, override: str) -> None:
    evened = ("schedule.reparameterize=1",)
    assert run(again, *evened) == Outcome(3, True, 3, 2)
    name = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"{name} has no effect on the blocks of this pass"):
        run(again, *evened, override, from_block=1)
    assert run(again, *evened, "schedule.later_iterations=2", from_block=1).complete
    assert read_manifest(again)["passes"][-1]["iterations"] == [2, 2, 2]


def test_a_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="run is a file; a run is a folder"):
        run(tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("schedule.h=[0.5,0]", "schedule.h needs one positive step"),
        ("schedule.h=[]", "schedule.h needs one positive step"),
        ("schedule.h0=0", "h0 must be positive"),
        ("schedule.rho=-1", "rho must be positive"),
        ("schedule.max_blocks=0", "schedule.max_blocks must be at least 1, not 0"),
        ("schedule.iterations=[3,0]", "schedule.iterations needs one value a block"),
        ("schedule.substeps=[0]", "schedule.substeps needs one value a block"),
        ("schedule.lr=[0.1,-1]", "schedule.lr needs one positive rate a block"),
        ("schedule.reparameterize=-1", "schedule.reparameterize must be at least 0"),
        ("schedule.refine=0", "schedule.refine must be at least 1"),
        ("schedule.eta=1.5", r"schedule.eta must lie in \(0, 1\]"),
        ("schedule.later_iterations=0", "schedule.later_iterations must be at least 1"),
        ("train.probes=0", "train.probes must be at least 1"),
        ("train.divergence=guess", "unknown divergence 'guess'"),
        ("velocity.kind=magic", "unknown velocity 'magic'"),
        ("train.lr=0", "train.lr must be positive"),
        ("train.ema=1", "train.ema must lie in"),
        ("train.grad_clip=.inf", "train.grad_clip must be finite"),
        ("schedule.tolerance=.inf", "schedule.tolerance must be finite"),
        ("solver.steps=0", "solver.steps must be at least 1"),
        ("schedule.substeps=[1,900]", "schedule.substeps = 900 of rk4 take 3600 evaluations"),
        ("push.steps=600", "push.steps = 600 of rk4 take 2400 evaluations"),
        ("solver.method=leap", "unknown solver 'leap'"),
        ("velocity.nets=0", "velocity.nets must be at least 1"),
        ("velocity.nets=3", "solver.steps must be a multiple of velocity.nets = 3"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_is_written(
    tmp_path: Path, override: str, sentence: str
) -> None:
    with pytest.raises((UserError, FlowError), match=sentence):
        run(tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_data_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 of the training samples .* hold NaN .* sample 650"):
        run(tmp_path / "run", bad=650)


@pytest.mark.parametrize("from_block", [-1, 3])
def test_a_block_that_is_not_there_cannot_be_trained_again(again: Path, from_block: int) -> None:
    with pytest.raises(UserError, match="names no block: the run has 3 finished blocks"):
        run(again, from_block=from_block)


def test_requests_that_contradict_are_refused(again: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="either --add-blocks or --from-block"):
        run(again, add_blocks=1, from_block=1)
    with pytest.raises(UserError, match="--add-blocks must be at least 1, not -1"):
        run(again, add_blocks=-1)
    with pytest.raises(UserError, match="added to a finished run only"):
        run(tmp_path / "none", add_blocks=1)
    with pytest.raises(UserError, match=r"started with push.steps=2 \(now 3\)"):
        run(again, "push.steps=3", from_block=1)
    with pytest.raises(UserError, match="no block to train after the first 2"):
        run(again, "schedule.free_block=false", from_block=2)
    # what added blocks would not use is not written down either
    for key in ("max_blocks=7", "tolerance=0.5", "free_block=false"):
        with pytest.raises(UserError, match=rf"schedule\.{key.split('=')[0]} has no effect here"):
            run(again, f"schedule.{key}", add_blocks=1)
    before = (again / "config.yaml").read_text()
    run(again, add_blocks=1)
    for key in ("h=[0.3,0.3,0.3]", "rho=1.5", "max_blocks=7"):
        with pytest.raises(UserError, match=rf"schedule\.{key.split('=')[0]} has no effect here"):
            run(again, f"schedule.{key}", from_block=2)
    assert (again / "config.yaml").read_text() == before


def test_before_any_block_is_finished_none_is_trained_again(tmp_path: Path) -> None:
    run(tmp_path / "run", "train.max_minutes=1e-9")
    with pytest.raises(UserError, match="no block is finished yet; begin anew"):
        run(tmp_path / "run", from_block=0)


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
    start_run(tmp_path / "run", tiny())
    for words, sentence in {
        ("--run", "RUN", "--reparameterize", "2"): "--run with --resume",
        ("--run", "RUN", "--resume", "--reparameterize", "-2"): "must be at least 0, not -2",
        ("--run", "RUN", "--resume", "--refine", "0"): "schedule.refine must be at least 1",
        ("--run", "RUN", "--resume", "--set", "train.lr=1"): "--set goes with --config",
    }.items():
        given = [str(tmp_path / "run") if word == "RUN" else word for word in words]
        assert main.main(["train", *given]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ") and sentence in last


def test_blocks_are_the_bytes_that_the_manifest_says(again: Path) -> None:
    run(again, add_blocks=1)
    rows = read_manifest(again)["blocks"]
    for row in rows:
        assert sha256_file(again / row["file"]) == row["sha256"]
    # the free block ends the flow: nothing is trained on what it leaves, so that is not kept
    there = [(again / row["stage"] / "manifest.json").is_file() for row in rows]
    assert [row["h"] is not None for row in rows] == there == [True, True, True, False]
