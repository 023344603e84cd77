"""Networks that train alone and are joined, against those that are trained together."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.runs.directory import read_manifest
from pipeline.runs.networks import NetworkRecord, network_folder, require_same
from pipeline.training.train import Outcome
from tests.pipeline.gaussian_source import GaussianSource
from tests.pipeline.labelled_source import LabelledSource
from tests.pipeline.training.networks.small_networks import (
    NETS,
    alone,
    settings,
    together,
    weights_of,
)


def loss_rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "total" in row and "event" not in row]


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("train.optimizer=muon",),
        ("train.ema=0",),
        ("matching.times=logit-normal", "matching.coupling=ot"),
        ("matching.interpolant=trigonometric", "train.precision=bf16"),
        ("train.micro_batch=7",),
        ("train.batch_size=2",),  # every batch leaves a network without samples
        ("velocity.classes=2", "velocity.class_dropout=0.3"),
    ],
    ids=["adam", "muon", "last", "ot", "bf16", "micro", "few", "classes"],
)
def test_joined_networks_have_the_bytes_of_networks_trained_together(
    tmp_path: Path, changes: tuple[str, ...]
) -> None:
    """Without clipping; in an order that is not that of the times."""
    config = settings(*changes)
    labelled = any(change.startswith("velocity.classes") for change in changes)
    source: Any = LabelledSource(300) if labelled else GaussianSource(count=300)
    assert together(config, tmp_path / "together", source).complete
    for network in (2, 0, 1):
        assert alone(config, tmp_path / "alone", network, source=source)
    assert not (tmp_path / "alone" / "blocks").exists()
    assert together(config, tmp_path / "alone", source) == Outcome(1, True, 1)
    assert weights_of(tmp_path / "alone") == weights_of(tmp_path / "together")
    one, other = (read_manifest(tmp_path / name).blocks[0] for name in ("alone", "together"))
    assert replace(one, seconds=0) == replace(other, seconds=0)
    rows, wanted = (loss_rows(tmp_path / name) for name in ("alone", "together"))
    assert [row["step"] for row in rows] == [row["step"] for row in wanted] == [4, 8, 12]
    for row, other_row in zip(rows, wanted, strict=True):
        assert row["total"] == pytest.approx(other_row["total"], rel=1e-5)


def test_networks_start_from_those_of_another_run(tmp_path: Path) -> None:
    single = settings("velocity.nets=1")
    assert together(single, tmp_path / "single").complete
    config = settings()
    config = replace(config, train=replace(config.train, init_from=str(tmp_path / "single")))
    assert together(config, tmp_path / "together").complete
    for network in range(NETS):
        assert alone(config, tmp_path / "alone", network)
    assert together(config, tmp_path / "alone").complete
    assert weights_of(tmp_path / "alone") == weights_of(tmp_path / "together")
    assert read_manifest(tmp_path / "alone").init_from is not None


def test_missing_networks_are_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert alone(settings(), run, 1)
    with pytest.raises(UserError, match="networks 0 and 2 of the run at .* are not finished"):
        together(settings(), run)
    assert not alone(settings("train.max_minutes=1e-9"), run, 0)  # it has begun
    with pytest.raises(UserError, match=f"networks 0 and 2 .* --run {run} --resume --network 0"):
        together(settings(), run)
    assert alone(settings(), run, 0) and alone(settings(), run, 2)
    shutil.rmtree(network_folder(run, 1))
    with pytest.raises(UserError, match="network 1 of the run at .* is not finished"):
        together(settings(), run)
    assert alone(settings(), run, 1)
    assert together(settings(), run).complete


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("train.lr=0.02",), r"train.lr=0.02 \(the run: 0.01\)"),
        (("train.iterations=8",), r"train.iterations=8 \(the run: 12\)"),
        (("matching.times=logit-normal",), "matching.times=logit-normal"),
        (("latents.noise=0",), "other samples"),
    ],
)
def test_networks_of_another_training_are_not_joined(
    tmp_path: Path, changes: tuple[str, ...], message: str
) -> None:
    """The folder of a network may come from a machine without a common disk."""
    run, other = tmp_path / "run", tmp_path / "other"
    for network in (0, 2):
        assert alone(settings(), run, network)
    samples = GaussianSource(count=299 if "latents.noise=0" in changes else 300)
    assert alone(settings(*changes), other, 1, source=samples)
    shutil.copytree(network_folder(other, 1), network_folder(run, 1))
    with pytest.raises(UserError, match=f"network 1 of the run at .* was trained with {message}"):
        together(settings(), run)
    with pytest.raises(UserError, match="expected one training for all"):
        alone(settings(), run, 1)
    shutil.rmtree(network_folder(run, 1))
    shutil.copytree(network_folder(other, 1), network_folder(run, 0), dirs_exist_ok=True)
    with pytest.raises(UserError, match="is of network 1; expected network 0"):
        together(settings(), run)


def test_networks_of_other_initial_weights_are_not_joined() -> None:
    run, other = (NetworkRecord(1, {"train.lr": 0.1}, "key", [sha]) for sha in ("a", "b"))
    require_same(Path("run"), run, run)
    with pytest.raises(UserError, match="was trained with other initial weights; expected"):
        require_same(Path("run"), other, run)
