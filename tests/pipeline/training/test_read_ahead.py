"""A training that reads ahead has the bytes of one that does not, and leaves no thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from flows.networks.config import VelocityConfig
from flows.spec import BlockSpec, build_block
from pipeline.config.load import load_config
from pipeline.config.training import JkoConfig, MatchingConfig, TrainConfig
from pipeline.data.encoding import encode
from pipeline.errors import JkoflowError, UserError
from pipeline.runtime.rng import generator
from pipeline.storage.shards.read_ahead import THREAD
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.shards.writer import StoreWriter
from pipeline.training import sources
from pipeline.training.batches import block_batches
from pipeline.training.batches.matching_loss import IMAGE
from pipeline.training.block_trainer import BlockTrainer
from pipeline.training.stages import ensure_stage
from pipeline.training.train import train
from tests.pipeline.gaussian_source import quiet
from tests.pipeline.tiny import World
from tests.ranks import Rank

COUNT, SHAPE, BATCH, STEPS = 60, (1, 4, 4), 10, 8
#: conditions of the network, and settings of the objective
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("jko", {}, {"divergence": "hutchinson"}),
    ("jko", {"classes": 3, "class_dropout": 0.3}, {"divergence": "finite-difference"}),
    ("lfm", {}, {}),
    ("fm", {"classes": 3, "class_dropout": 0.3}, {"coupling": "ot"}),
    ("fm", {"image_channels": 1}, {}),
]
RECIPES: list[dict[str, Any]] = [
    {}, {"micro_batch": 3}, {"precision": "bf16"}, {"rank": Rank(1, 3)},
]  # fmt: skip
#: all pairs but bf16 with finite differences, which validation refuses
PAIRS = [
    (*case, recipe)
    for recipe in RECIPES
    for case in CASES
    if "precision" not in recipe or case[2] != {"divergence": "finite-difference"}
]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD)]


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Names of the threads that read from stores, with the fields."""
    seen, take = list[tuple[str, str]](), StoreReader.take

    def watched(store: StoreReader, name: str, indices: Tensor) -> Tensor:
        seen.append((threading.current_thread().name, name))
        return take(store, name, indices)

    monkeypatch.setattr(StoreReader, "take", watched)
    return seen


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Read ahead from a stage of any size; no thread is left at the end."""
    monkeypatch.setattr(block_batches, "SCATTERED", 1)
    yield
    assert threads() == []


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    """Random samples with moments, classes and images."""

    def make(writer: StoreWriter, index: int) -> dict[str, Tensor]:
        first, last = writer.bounds(index)
        source = generator("shard", index)
        names = ("z", "mean", "std", IMAGE)
        shape = (last - first, *SHAPE)
        return {name: torch.randn(shape, generator=source) for name in names}

    def labels(first: int, last: int) -> Tensor:
        return torch.arange(first, last) % 3

    identity = {"kind": "stage", "stage": 0, "shape": [*SHAPE], "moments": True}
    folder = tmp_path_factory.mktemp("ahead")
    return ensure_stage(folder, identity, COUNT, 16, make, Accelerator(), labels=labels)


def trainer_of(
    stage: StoreReader,
    objective: str,
    network: dict[str, Any],
    changes: dict[str, Any],
    rank: Any = None,
    **recipe: Any,
) -> BlockTrainer:
    kind = "conv" if network.get("image_channels") else "mlp"
    net = VelocityConfig(kind, width=8, depth=1, zero_init=False, **network)
    step = {"jko": {"h": 0.5}, "lfm": {"gamma": 0.3}, "fm": {}}[objective]
    spec = BlockSpec(net, objective="jko" if objective == "jko" else "lfm", **step)
    block = build_block(spec, SHAPE, generator(0, "weights", 0))
    options = (JkoConfig if objective == "jko" else MatchingConfig)(**changes)
    config = TrainConfig(batch_size=BATCH, iterations=STEPS, warmup=1, **recipe)
    return BlockTrainer(block, spec, stage, config, options, rank or Accelerator())


@pytest.mark.parametrize(("objective", "network", "changes", "recipe"), PAIRS)
def test_steps_have_the_same_bytes(
    stage: StoreReader, objective: str, network: dict[str, Any], changes: dict[str, Any],
    recipe: dict[str, Any], ahead: None, takes: list[tuple[str, str]],
) -> None:  # fmt: skip
    plain = trainer_of(stage, objective, network, changes, **recipe)
    reports = [plain.step() for _ in range(STEPS)]
    reading = trainer_of(stage, objective, network, changes, **recipe)
    with reading.batches.reading_ahead(STEPS):
        assert [reading.step() for _ in range(2)] == reports[:2]
        takes.clear()
        assert [reading.step() for _ in range(STEPS - 2)] == reports[2:]
    for one, other in zip(plain.parameters, reading.parameters, strict=True):
        assert torch.equal(one, other)
    names = {name for _, name in takes}
    assert all(thread.startswith(THREAD) for thread, _ in takes)
    counts = {name: sum(field == name for _, field in takes) for name in names}
    # each batch once; that of the first of these steps was perhaps read before
    assert set(counts.values()) <= {STEPS - 3, STEPS - 2}
    assert names >= ({"mean", "std"} if objective == "jko" else {"z"})
    assert ("labels" in names) == bool(network.get("classes"))
    assert (IMAGE in names) == bool(network.get("image_channels"))


def test_a_small_stage_has_no_thread(stage: StoreReader) -> None:
    trainer = trainer_of(stage, "lfm", {}, {})
    with trainer.batches.reading_ahead(STEPS):
        trainer.step()
        assert threads() == [] and trainer.batches.stage is stage


def test_a_sample_that_cannot_be_read_fails_at_its_step(
    stage: StoreReader, ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, take = trainer_of(stage, "lfm", {}, {}), StoreReader.take
    bad = int(trainer.batches.indices(4)[0])  # COUNT / BATCH steps make an epoch

    def damaged(store: StoreReader, name: str, indices: Tensor) -> Tensor:
        if bad in indices.tolist():
            raise UserError(f"sample {bad} is damaged; expected another; mend it")
        return take(store, name, indices)

    monkeypatch.setattr(StoreReader, "take", damaged)
    with trainer.batches.reading_ahead(STEPS):
        for _ in range(4):
            trainer.step()
        with pytest.raises(JkoflowError, match=f"sample {bad} is damaged; expected another"):
            trainer.step()
    assert trainer.done == 4


@pytest.mark.parametrize("objective", ["jko", "fm"])
def test_a_training_has_the_same_bytes_also_after_a_resume(
    world: World, accelerator: Accelerator, tmp_path: Path, objective: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The samples are drawn from the posteriors in the cache."""
    monkeypatch.setattr(sources, "MANY", 1)
    short = ("train.iterations=6", "train.batch_size=16", "train.preview_every=0")
    config = load_config(world.config(), [*short, f"train.objective={objective}"])
    encode(config, accelerator, quiet)
    train(config, tmp_path / "plain", accelerator, quiet, resume=False)
    monkeypatch.setattr(block_batches, "SCATTERED", 1)
    train(config, tmp_path / "ahead", accelerator, quiet, resume=False)
    parts = load_config(
        world.config(), [*short, f"train.objective={objective}", "train.max_minutes=1e-9"]
    )
    outcome = train(parts, tmp_path / "parts", accelerator, quiet, resume=False)
    while not outcome.complete:
        assert threads() == []
        outcome = train(parts, tmp_path / "parts", accelerator, quiet, resume=True)
    assert threads() == []
    files = sorted(path.name for path in (tmp_path / "plain" / "blocks").iterdir())
    assert files
    for name in files:
        expected = (tmp_path / "plain" / "blocks" / name).read_bytes()
        for run in ("ahead", "parts"):
            assert (tmp_path / run / "blocks" / name).read_bytes() == expected
