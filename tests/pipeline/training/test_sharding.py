"""FSDP: the training of two processes that share a network is that of two that both hold it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open

from pipeline.errors import UserError
from pipeline.training.train import _check_sharding, train
from tests.pipeline.gaussian_source import GaussianSource, quiet, tiny
from tests.pipeline.tiny import ROOT, World, make_world, run_child
from tests.processes import run_job, two_networks
from tests.test_cluster import free_port

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
#: largest share of the memory of a whole network; a tensor of 5 rows gives 3 of 6 to each rank
SHARE = 0.55


def check(seen: list[dict[str, Any]], name: str) -> None:
    """Check what both ranks saw of a case of `tests.pipeline.sharding`, in float64."""
    for rank in seen:
        case = rank[name]
        assert case["moved"] > 0.02
        assert max(case["errors"]) < 1e-11  # of the weights, also after either way to resume
        assert case["checkpoint"] < 1e-11
        for plain, sharded in zip(*case["terms"], strict=True):
            for term in ("total", "grad_norm"):
                assert sharded[term] == pytest.approx(plain[term], rel=1e-10)
        whole, part, resumed = case["held"]
        assert whole["moments"] == 2 * whole["parameters"] == 2 * whole["gradients"]
        assert all(0 < part[key] <= SHARE * whole[key] for key in whole)
        assert all(0 < resumed[key] <= SHARE * whole[key] for key in ("moments", "average"))


def test_ranks_that_share_a_network_train_as_those_that_hold_it(tmp_path: Path) -> None:
    """Weights, norms, averages and checkpoints to rounding, with half of the memory."""
    check(run_job("sharded fm", tmp_path), "fm")


@pytest.mark.slow
def test_other_objectives_and_networks(tmp_path: Path) -> None:
    seen = run_job("sharded others", tmp_path)
    for name in seen[0]:
        check(seen, name)


def tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def require_close(actual: Path, expected: Path, rtol: float = 1e-3, atol: float = 1e-5) -> None:
    """The same names, order, dtypes, shapes and metadata, and values up to rounding."""
    (ours, our_notes), (theirs, their_notes) = tensors(actual), tensors(expected)
    assert list(ours) == list(theirs) and our_notes == their_notes
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=rtol, atol=atol)


@pytest.mark.slow
def test_a_run_is_continued_with_fsdp_and_without(tmp_path: Path) -> None:
    """On two processes and on one, which ends as the uninterrupted run on one does."""
    source = GaussianSource(count=64)
    for name in ("alone", "from", "to"):
        (tmp_path / name).mkdir()
    runs = {name: tmp_path / name / "run" for name in ("alone", "from", "to")}
    assert train(two_networks(), runs["alone"], Accelerator(), quiet, True, source).complete
    assert run_job("networks, halted", tmp_path / "from", **FSDP) == [False, False]
    assert train(two_networks(), runs["from"], Accelerator(), quiet, True, source).complete
    halted = two_networks("train.max_minutes=1e-9")
    assert not train(halted, runs["to"], Accelerator(), quiet, True, source).complete
    assert run_job("networks", tmp_path / "to", **FSDP) == [True, True]
    for file in ("blocks/block-00.safetensors", "snapshots/step-00000005.safetensors"):
        for name in ("from", "to"):
            require_close(runs[name] / file, runs["alone"] / file)


@pytest.mark.slow
def test_a_jko_flow_is_that_of_ranks_that_hold_it(tmp_path: Path) -> None:
    """Blocks in turn; the grids of each are compared once, on the gathered network."""
    for name, variables in (("plain", {}), ("sharded", FSDP)):
        (tmp_path / name).mkdir()
        assert run_job("jko flow", tmp_path / name, **variables) == [[2, True]] * 2
    plain, sharded = (tmp_path / name / "run" for name in ("plain", "sharded"))
    for block in range(2):
        file = f"blocks/block-{block:02d}.safetensors"
        require_close(sharded / file, plain / file, rtol=1e-2, atol=1e-4)
    logs = [(run / "log.jsonl").read_text().splitlines() for run in (plain, sharded)]
    ours, theirs = ([json.loads(line) for line in log] for log in logs)
    assert [row.get("event") for row in ours] == [row.get("event") for row in theirs]
    assert "grids agree" in {row.get("event") for row in ours}


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_on_one_rank_is_an_error_on_both(tmp_path: Path) -> None:
    seen = run_job("infinite", tmp_path, **FSDP)
    assert seen[0] == seen[1]
    assert seen[0][0] == "JkoflowError" and "the loss is inf" in seen[0][1]


@pytest.mark.slow
def test_the_configuration_of_the_documents_trains(tmp_path: Path) -> None:
    """By `accelerate launch`, with previews and snapshots; one process samples from the run."""
    world: World = make_world(tmp_path)
    config = world.config(
        velocity={"kind": "dit", "width": 16, "depth": 2, "heads": 2},
        train={"objective": "fm", "preview_every": 3},
        fm={"snapshot_every": 3},
    )
    run_child("encode", "--config", config, env=world.environment)
    launchers = {
        "plain": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        "sharded": ["accelerate.commands.launch", "--config_file", "docs/cluster/fsdp.yaml",
                    "--main_process_port", free_port()],
    }  # fmt: skip
    for name, words in launchers.items():
        command = ["-m", *words, "-m", "pipeline", "train", "--config", config, "-r"]
        done = subprocess.run(
            [sys.executable, *command, str(tmp_path / name)],
            env={**os.environ, **world.environment}, cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    plain, sharded = tmp_path / "plain", tmp_path / "sharded"
    files = [
        sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
        for run in (plain, sharded)
    ]
    assert files[0] == files[1]
    assert {"previews/block-00-step-00000003.png", "flow.json"} <= set(files[0])
    for file in files[0]:
        if file.endswith(".safetensors") and not file.startswith("stages/"):
            require_close(sharded / file, plain / file)
    run_child("generate", "--run", sharded, "-n", "4", env=world.environment)


REFUSED = [
    ("fm", "train.batch_size=255", "multiple of the processes"),
    ("fm", "train.optimizer=muon", "train.optimizer=adam"),
    ("jko", "jko.divergence=exact", "expected fm, lfm, or jko"),
    ("jko", "jko.solver.adjoint=true", "expected fm, lfm, or jko"),
    ("jko", "jko.solver.method=dopri5 jko.solver.steps=2", "expected fm, lfm, or jko"),
]


@pytest.mark.parametrize(("objective", "setting", "words"), REFUSED)
def test_settings_that_prevent_it_are_refused(objective: str, setting: str, words: str) -> None:
    both = [f"train.objective={objective}"]
    both += ["jko.divergence=finite-difference"] if objective == "jko" else []
    _check_sharding(tiny(*both), 2)
    with pytest.raises(UserError, match=words):
        _check_sharding(tiny(*both, *setting.split()), 2)
