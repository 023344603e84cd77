"""Stage 0 of many samples is drawn from the cache when it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.data.drawn_latents import DrawnLatents
from pipeline.data.encoding import encode
from pipeline.data.latent_cache import open_cache
from pipeline.distillation.distilled_blocks import PairReader
from pipeline.errors import UserError
from pipeline.runs import verify
from pipeline.storage.shards.manifest import MANIFEST
from pipeline.training import sources
from pipeline.training.sources import LatentSource
from pipeline.training.stages import stage_folder
from pipeline.training.train import train
from tests.pipeline.gaussian_source import quiet
from tests.pipeline.tiny import World

#: a short training without previews
SHORT = ("train.iterations=6", "train.batch_size=16", "train.preview_every=0")


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take any number of samples for many."""
    monkeypatch.setattr(sources, "MANY", 1)


def settings(world: World, *overrides: str) -> Config:
    return load_config(world.config(), list(overrides))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "blocks").iterdir())}


def test_draws_have_the_moments_of_the_cache(
    world: World, accelerator: Accelerator, many: None, tmp_path: Path
) -> None:
    config = settings(world, "latents.draws=60")
    cache = encode(config, accelerator, quiet)
    stage = LatentSource(config).first_stage(tmp_path, config, accelerator)
    assert isinstance(stage, DrawnLatents) and len(stage) == 60 * 40
    z, mean, std = (stage.field(name) for name in ("z", "mean", "std"))
    expected, spread = cache.moments(0, 40, 0.0)
    assert torch.equal(mean[40:80], expected) and torch.equal(std[:40], spread)
    score = ((z - mean) / std).double()
    assert abs(float(score.mean())) < 0.03 and abs(float(score.std()) - 1) < 0.02
    assert len(score.unique()) > 0.9 * score.numel()
    # a sample depends on its index alone
    order = torch.randperm(len(stage), generator=torch.Generator().manual_seed(0))
    assert torch.equal(stage.take("z", order), z[order])
    assert torch.equal(stage.read("z", 37, 91), z[37:91])
    assert torch.equal(stage.take("labels", order), torch.full((len(stage),), -1))
    assert torch.equal(PairReader(stage, stage).take("end", order), z[order])


def test_latents_without_noise_train_as_if_they_were_stored(
    world: World, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No randomness is left but that of the batches, so the blocks have the same bytes."""
    short = (*SHORT, "autoencoder.name=identity", "autoencoder.weights=null")
    config = settings(world, *short)
    encode(config, accelerator, quiet)
    train(config, tmp_path / "stored", accelerator, quiet, resume=False)
    monkeypatch.setattr(sources, "MANY", 1)
    train(config, tmp_path / "drawn", accelerator, quiet, resume=False)
    assert folder_bytes(tmp_path / "stored") == folder_bytes(tmp_path / "drawn")
    assert list(stage_folder(tmp_path / "drawn", 0).glob("shard-*")) == []
    # a run that has stored its samples keeps them
    stage = LatentSource(config).first_stage(tmp_path / "stored", config, accelerator)
    assert not isinstance(stage, DrawnLatents)


@pytest.mark.parametrize("objective", ["jko", "fm"])
def test_a_training_on_draws_resumes_with_the_same_bytes(
    world: World, accelerator: Accelerator, many: None, tmp_path: Path, objective: str
) -> None:
    config = settings(world, *SHORT, f"train.objective={objective}")
    encode(config, accelerator, quiet)
    train(config, tmp_path / "whole", accelerator, quiet, resume=False)
    halted = settings(world, *SHORT, f"train.objective={objective}", "train.max_minutes=1e-9")
    outcome = train(halted, tmp_path / "parts", accelerator, quiet, resume=False)
    assert not outcome.complete
    while not outcome.complete:
        outcome = train(halted, tmp_path / "parts", accelerator, quiet, resume=True)
    assert folder_bytes(tmp_path / "whole") == folder_bytes(tmp_path / "parts")
    assert verify.verify(tmp_path / "whole") == []


def test_other_latents_are_refused(
    world: World, accelerator: Accelerator, many: None, tmp_path: Path
) -> None:
    config = settings(world, "latents.draws=2")
    encode(config, accelerator, quiet)
    LatentSource(config).first_stage(tmp_path, config, accelerator)
    other = settings(world, "latents.draws=3")
    with pytest.raises(UserError, match="stage 0 .* was made from other draws"):
        LatentSource(other).first_stage(tmp_path, other, accelerator)


def test_classes_are_counted_at_encoding_and_in_caches_without_counts(
    world: World, accelerator: Accelerator
) -> None:
    for name in ("a", "b"):
        (world.root / "pictures" / "train" / name).mkdir()
    paths = sorted((world.root / "pictures" / "train").glob("*.png"))
    for index, path in enumerate(paths):
        path.rename(path.parent / ("a" if index < 13 else "b") / path.name)
    config = settings(world)
    cache = encode(config, accelerator, quiet)
    assert cache.class_counts == {0: 13, 1: 27}
    cache = open_cache(config)
    assert cache.reader.manifest.pop("classes") == [[0, 13], [1, 27]]
    assert cache.class_counts == {0: 13, 1: 27}


def test_the_folder_of_a_drawn_stage_has_a_manifest_alone(
    world: World, accelerator: Accelerator, many: None, tmp_path: Path
) -> None:
    config = settings(world)
    encode(config, accelerator, quiet)
    LatentSource(config).first_stage(tmp_path, config, accelerator)
    names = {path.name for path in stage_folder(tmp_path, 0).iterdir()}
    assert names == {MANIFEST, "SHA256SUMS"}
