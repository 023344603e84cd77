"""The first block of jko draws the posterior sample of every latent again in each batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from flows.networks.config import VelocityConfig
from flows.spec import BlockSpec, build_block
from pipeline.config.load import load_config
from pipeline.config.training import JkoConfig, TrainConfig
from pipeline.data.encoding import encode
from pipeline.data.latent_cache import open_cache
from pipeline.errors import UserError
from pipeline.runtime.rng import generator
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.shards.writer import StoreWriter
from pipeline.training import stages
from pipeline.training.block_trainer import BlockTrainer
from pipeline.training.sources import LatentSource
from pipeline.training.stages import ensure_stage
from tests.pipeline.gaussian_source import quiet
from tests.pipeline.tiny import World

COUNT, BATCH = 30, 20


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    """Means 0, 10, 20, … with standard deviations 0.5 and 2; the draws themselves are 0."""

    def make(writer: StoreWriter, index: int) -> dict[str, torch.Tensor]:
        mean = 10 * torch.arange(COUNT)[:, None].expand(COUNT, 2).float()
        std = torch.tensor([0.5, 2.0]).expand(COUNT, 2)
        return {"z": torch.zeros(COUNT, 2), "mean": mean.contiguous(), "std": std.contiguous()}

    identity = {"kind": "stage", "stage": 0, "shape": [2], "moments": True}
    folder = tmp_path_factory.mktemp("fresh")
    return ensure_stage(folder, identity, COUNT, COUNT, make, Accelerator())


@pytest.mark.parametrize(("moments", "arrays"), [({}, 1), ({"moments": True}, 3)])
def test_the_room_on_the_disk_is_that_of_all_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moments: dict[str, bool], arrays: int
) -> None:
    """Samples that are drawn again are stored with their means and standard deviations."""
    asked: list[int] = []
    monkeypatch.setattr(stages, "require_disk_space", lambda _, size, what: asked.append(size))

    def make(writer: StoreWriter, index: int) -> torch.Tensor:
        return torch.zeros(COUNT, 2)

    identity = {"kind": "stage", "stage": 0, "shape": [2], **moments}
    ensure_stage(tmp_path, identity, COUNT, COUNT, make, Accelerator())
    assert asked == [arrays * 4 * COUNT * 2]


def trainer(stage: StoreReader, seed: int = 0) -> BlockTrainer:
    spec = BlockSpec(VelocityConfig("linear"), h=0.5)
    recipe = TrainConfig(batch_size=BATCH, seed=seed)
    block = build_block(spec, (2,))
    return BlockTrainer(block, spec, stage, recipe, JkoConfig(), Accelerator())


def test_every_step_draws_around_the_means(stage: StoreReader) -> None:
    block_trainer, scores = trainer(stage), []
    for step in range(200):
        rows = block_trainer.batches.indices(step)
        z = block_trainer.batches.samples(step, torch.arange(BATCH))
        scores.append((z - 10 * rows[:, None]) / torch.tensor([0.5, 2.0]))
        again = block_trainer.batches.samples(step, torch.arange(BATCH))  # of a resumed step
        assert torch.equal(z, again)
    score = torch.stack(scores).flatten(0, 1)
    assert len(score.unique()) > 0.9 * score.numel()  # equal but by rounding
    torch.testing.assert_close(score.mean(0), torch.zeros(2), atol=0.07, rtol=0)
    torch.testing.assert_close(score.std(0), torch.ones(2), atol=0.05, rtol=0)
    other = trainer(stage, seed=1).batches
    z = other.samples(199, torch.arange(BATCH)) - 10 * other.indices(199)[:, None]
    assert not torch.allclose(z / torch.tensor([0.5, 2.0]), scores[-1], atol=0.01)


def test_processes_share_the_batch(stage: StoreReader) -> None:
    block_trainer = trainer(stage)
    whole = block_trainer.batches.samples(0, torch.arange(BATCH))
    for rank in range(3):
        part = torch.arange(rank, BATCH, 3)
        share = block_trainer.batches.samples(0, part)
        assert torch.equal(share, whole[rank::3])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (("train.objective=jko",), True),
        (("jko=null", "train.objective=fm"), False),
    ],
)
def test_the_first_stage_holds_the_moments(
    world: World, accelerator: Accelerator, tmp_path: Path, settings: tuple[str, ...], kept: bool
) -> None:
    config = load_config(world.config(), [*settings, "latents.draws=2"])
    encode(config, accelerator, quiet)
    cache = open_cache(config)
    stage = LatentSource(config).first_stage(tmp_path, config, accelerator)
    assert bool(stage.manifest["identity"].get("moments")) is kept
    if not kept:
        return
    size = len(cache)
    first = min(size, config.latents.shard_size)
    source = generator(0, "draw", 0)
    noise = torch.randn((first, *cache.shape), generator=source)
    z, mean, std = (stage.field(name) for name in ("z", "mean", "std"))
    assert len(z) == 2 * size
    torch.testing.assert_close(z[:first], mean[:first] + std[:first] * noise)
    assert torch.equal(mean[:size], mean[size:]) and torch.equal(std[:size], std[size:])


def test_a_known_noise_is_drawn_again_likewise(world: World, accelerator: Accelerator) -> None:
    config = load_config(world.config())
    encode(config, accelerator, quiet)
    cache = open_cache(config)
    cache.stochastic = False
    mean, std = cache.moments(0, 5, 0.25)
    plain = cache.sample(0, 5, 0.0, generator("none"))
    assert torch.equal(mean, plain) and torch.equal(std, torch.full_like(mean, 0.25))


def test_noise_on_posterior_samples_is_refused(world: World, accelerator: Accelerator) -> None:
    """It would change nothing."""
    config = load_config(world.config(), ["latents.noise=0.25"])
    encode(config, accelerator, quiet)
    assert open_cache(config).stochastic
    with pytest.raises(UserError, match="latents.noise is 0.25; expected 0"):
        LatentSource(config)
