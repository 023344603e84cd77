"""The latent cache: what it holds, how it is scaled, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from autoencoders.base import to_float
from autoencoders.weights import load_weights
from pipeline.cli import main
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.data.encoding import encode, reconstruction_psnr, storage_error
from pipeline.data.latent_cache import LatentCache, open_cache
from pipeline.data.standardisation import Standardisation
from pipeline.errors import UserError
from pipeline.runtime.rng import generator
from pipeline.storage.shards.opening import open_store
from pipeline.training.sources import LatentSource
from tests.pipeline.tiny import World, pictures, write_autoencoder


def quiet(items: Any, total: int, label: str) -> Any:
    return items


def read(world: World, **sections: Any) -> Config:
    return load_config(world.config(**sections))


def moments_of(world: World, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Straight from the autoencoder, all images at once, in float64."""
    model = load_weights(world.root / "autoencoder.safetensors")
    with torch.inference_mode():
        moments = model.encode(to_float(torch.from_numpy(images)[:, None]))
    assert moments.log_var is not None
    return moments.mean.double().numpy(), moments.log_var.double().numpy()


def test_the_cache_has_moments_of_every_image(world: World, accelerator: Accelerator) -> None:
    cache = encode(read(world), accelerator, quiet)
    mean, log_var = moments_of(world, pictures(40, seed=1))
    np.testing.assert_allclose(cache.reader.field("mean").numpy(), mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        cache.reader.field("log_var").numpy(), log_var, rtol=1e-4, atol=1e-5
    )
    assert (cache.reader.field("labels") == -1).all()  # a flat folder has no classes
    assert cache.shape == (2, 3, 3) and cache.stochastic and len(cache) == 40


def test_standardisation_is_numpys_mean_and_std(world: World, accelerator: Accelerator) -> None:
    """Of posterior samples: the variance of the means, and the mean of the variances."""
    cache = encode(read(world), accelerator, quiet)
    mean, log_var = moments_of(world, pictures(40, seed=1))
    expected = np.sqrt(mean.var((0, 2, 3)) + np.exp(log_var).mean((0, 2, 3)))
    assert (expected > 1.05 * mean.std((0, 2, 3))).all()  # the posterior counts
    scale = cache.standardisation
    np.testing.assert_allclose(scale.mean.numpy(), mean.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scale.std.numpy(), expected, rtol=1e-4)


def test_samples_are_standardised(world: World, accelerator: Accelerator) -> None:
    config = read(world, latents={"draws": 60})
    encode(config, accelerator, quiet)
    stage = LatentSource(config).first_stage(world.root / "run", config, accelerator)
    z = stage.field("z").double()
    assert len(z) == 60 * 40
    np.testing.assert_allclose(z.mean((0, 2, 3)).numpy(), 0, atol=0.05)
    np.testing.assert_allclose(z.std((0, 2, 3)).numpy(), 1, rtol=0.03)
    # copy d of image i lies at d·n + i, around that image's standardised mean
    cache = open_cache(config)
    centre = cache.standardisation.apply(cache.reader.field("mean")).double()
    spread = cache.reader.field("log_var").double().exp().sqrt()
    spread = spread / cache.standardisation.std.double().view(1, 2, 1, 1)
    score = (z.view(60, 40, 2, 3, 3) - centre) / spread
    np.testing.assert_allclose(score.mean().item(), 0, atol=0.03)
    np.testing.assert_allclose(score.std().item(), 1, rtol=0.02)
    assert not torch.equal(z[:40], z[40:80])


def test_the_samples_of_a_shard_depend_on_its_index_alone(
    world: World, accelerator: Accelerator
) -> None:
    config = read(world)
    cache = encode(config, accelerator, quiet)
    stage = LatentSource(config).first_stage(world.root / "run", config, accelerator)
    drawn = generator(0, "draw", 2)  # samples 32 … 47: images 32 … 39, then 0 … 7 again
    expected = torch.cat([cache.sample(32, 40, 0.0, drawn), cache.sample(0, 8, 0.0, drawn)])
    assert torch.equal(stage.read("z", 32, 48), expected)


def test_mirror_images_follow_the_images(world: World, accelerator: Accelerator) -> None:
    cache = encode(read(world, latents={"mirror": True}), accelerator, quiet)
    images = pictures(40, seed=1)
    mean, _ = moments_of(world, np.concatenate([images, images[:, :, ::-1]]))
    assert len(cache) == 80
    actual = cache.reader.field("mean").numpy()
    np.testing.assert_allclose(actual, mean, rtol=1e-4, atol=1e-5)
    assert np.abs(actual[:40] - actual[40:]).max() > 0.01


def test_a_deterministic_encoder_gets_known_noise(world: World, accelerator: Accelerator) -> None:
    config = read(
        world,
        autoencoder={"name": "identity", "weights": None},
        latents={"noise": 0.1, "draws": 30},
    )
    cache = encode(config, accelerator, quiet)
    assert not cache.stochastic
    x = pictures(40, seed=1) / 127.5 - 1
    scale = cache.standardisation
    assert scale.mean.item() == pytest.approx(x.mean(), rel=1e-5)
    assert scale.std.item() == pytest.approx(x.std(), rel=1e-5)
    stage = LatentSource(config).first_stage(world.root / "run", config, accelerator)
    clean = torch.from_numpy((x - x.mean()) / x.std())[:, None]
    noise = stage.field("z").double().view(30, 40, 1, 12, 12) - clean
    assert noise.std().item() == pytest.approx(0.1, rel=0.01)
    assert noise.mean().item() == pytest.approx(0, abs=0.002)
    # without noise there is nothing random
    first, other = (cache.sample(3, 9, 0.0, generator(seed)) for seed in (0, 1))
    assert torch.equal(first, other)


def test_undo_inverts_apply(world: World, accelerator: Accelerator) -> None:
    cache = encode(read(world), accelerator, quiet)
    model = load_weights(world.root / "autoencoder.safetensors")
    latents = cache.reader.field("mean")
    again = cache.standardisation.undo(cache.standardisation.apply(latents))
    torch.testing.assert_close(again, latents, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(model.decode(again), model.decode(latents), rtol=0, atol=1e-4)


def test_standardisation_of_vectors_and_of_maps() -> None:
    scale = Standardisation(torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.5]))
    x = torch.tensor([[3.0, -1.0]])
    assert torch.equal(scale.apply(x), torch.tensor([[1.0, 2.0]]))
    assert torch.equal(scale.apply(x.view(1, 2, 1, 1)).flatten(), torch.tensor([1.0, 2.0]))
    assert torch.equal(scale.undo(scale.apply(x)), x)
    again = Standardisation.from_dict(json.loads(json.dumps(scale.to_dict())))
    assert torch.equal(again.mean, scale.mean) and torch.equal(again.std, scale.std)


def test_a_constant_channel_stays_finite(world: World, accelerator: Accelerator) -> None:
    from PIL import Image

    folder = world.root / "flat"
    folder.mkdir()
    for index in range(3):
        Image.new("L", (12, 12), 7).save(folder / f"{index}.png")
    config = read(
        world, data={"path": str(folder)}, autoencoder={"name": "identity", "weights": None}
    )
    cache = encode(config, accelerator, quiet)
    assert bool(torch.isfinite(cache.sample(0, 3, 0.0, generator(0))).all())


# ------------------------------------------------------------------------------- refusals


@pytest.fixture
def cached(world: World, accelerator: Accelerator) -> tuple[World, Path]:
    encode(read(world), accelerator, quiet)
    return world, world.caches()[0]


def test_a_second_call_reads_the_cache(
    cached: tuple[World, Path], accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, folder = cached
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr("pipeline.storage.shards.writer.StoreWriter.write", None)
    again = encode(read(world), accelerator, quiet)
    assert isinstance(again, LatentCache) and len(again) == 40
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_shard_is_a_user_error(
    cached: tuple[World, Path], accelerator: Accelerator, damage: str
) -> None:
    world, folder = cached
    path = folder / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-4])
    for use in (open_cache, lambda config: encode(config, accelerator, quiet)):
        with pytest.raises(UserError, match=r"shard-00001\.safetensors of .*`jkoflow verify"):
            use(read(world))


def test_an_incomplete_cache_is_not_opened(cached: tuple[World, Path]) -> None:
    world, folder = cached
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="of folder .* does not exist; .*jkoflow encode"):
        open_cache(read(world))


def test_another_autoencoder_has_another_cache(
    cached: tuple[World, Path], accelerator: Accelerator
) -> None:
    world, folder = cached
    other = write_autoencoder(world.root / "other.safetensors", seed=1)
    config = read(world, autoencoder={"weights": str(other)})
    with pytest.raises(UserError, match="latent cache .* does not exist"):
        open_cache(config)
    encode(config, accelerator, quiet)
    (there,) = [path for path in world.caches() if path != folder]
    # the first cache in the place of the second is seen through
    shutil.rmtree(there)
    shutil.copytree(folder, there)
    with pytest.raises(UserError, match="made from other autoencoder"):
        open_cache(config)


def test_settings_that_change_latents_change_the_key(
    cached: tuple[World, Path], accelerator: Accelerator
) -> None:
    world, _ = cached
    for sections in (
        {"latents": {"mirror": True}},
        {"latents": {"shard_size": 7}},
        {"data": {"limit": 30}},
        {"data": {"split": "test"}},
    ):
        before = len(world.caches())
        encode(read(world, **sections), accelerator, quiet)
        assert len(world.caches()) == before + 1, sections
    same = dataclasses.replace(read(world), name="another", train=Config().train)
    encode(same, accelerator, quiet)
    assert len(world.caches()) == 5


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"latents": {"batch_size": 0}}, r"latents\.batch_size is 0; expected at least 1"),
        ({"latents": {"shard_size": 0}}, r"latents\.shard_size is 0; expected at least 1"),
        ({"data": {"size": 10}}, r"shape \(1, 10, 10\); expected \(1, 12, 12\)"),
        ({"data": {"mode": "RGB"}}, r"shape \(3, 12, 12\); expected \(1, 12, 12\)"),
        ({"autoencoder": {"weights": "nothing"}}, r"weights are 'nothing'; expected one of"),
        ({"autoencoder": {"name": "nothing"}}, r"autoencoder\.name is 'nothing'; expected"),
        (
            {"data": {"name": "nothing", "path": None, "size": None, "mode": "RGB"}},
            r"data set 'nothing' is unknown",
        ),
    ],
)
def test_invalid_settings_are_user_errors(
    world: World, accelerator: Accelerator, sections: dict[str, Any], named: str
) -> None:
    with pytest.raises((UserError, ValueError), match=named):
        encode(read(world, **sections), accelerator, quiet)
    assert not (world.home / "latents").exists()


def test_an_autoencoder_of_other_images_is_noticed(
    cached: tuple[World, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The random autoencoder of these tests reconstructs nothing; the identity everything."""
    world, _ = cached
    main.main(["encode", "--config", world.config()])
    assert "warning: this autoencoder does not suit these images" in capsys.readouterr().err
    assert reconstruction_psnr(read(world)) < 15
    assert reconstruction_psnr(read(world, autoencoder={"name": "identity", "weights": None})) > 60


@pytest.mark.parametrize(("precision", "bits"), [("fp16", 11), ("bf16", 8)])
def test_half_precision_rounds_the_moments(
    world: World, accelerator: Accelerator, precision: str, bits: int
) -> None:
    """Rounding to p bits has a relative error of at most 2⁻ᵖ."""
    config = read(world)
    exact = encode(config, accelerator, quiet)
    exact.reader.folder.rename(world.root / "exact")
    exact = LatentCache(open_store(world.root / "exact", "latent cache"))
    with pytest.raises(UserError, match="--precision is fp8; expected one of fp32, fp16, bf16"):
        encode(config, accelerator, quiet, "fp8")
    encode(config, accelerator, quiet, precision)
    half = open_cache(config)
    assert half.key != exact.key and half.precision == precision
    assert encode(config, accelerator, quiet).key == half.key
    with pytest.raises(UserError, match=f"is stored in {precision}; expected fp32"):
        encode(config, accelerator, quiet, "fp32")
    size = [sum(f.stat().st_size for f in c.reader.folder.glob("shard-*")) for c in (exact, half)]
    assert size[1] < 0.7 * size[0]
    for field in ("mean", "log_var"):
        stored, true = half.reader.field(field).double(), exact.reader.field(field).double()
        largest = float(((stored - true).abs() / true.abs().clamp(min=1e-4)).max())
        assert 2.0 ** -(bits + 2) < largest <= 2.0**-bits
    (mean, std), (mean_0, std_0) = half.moments(0, 40, 0.0), exact.moments(0, 40, 0.0)
    assert mean.dtype == std.dtype == torch.float32
    error = float((mean - mean_0).square().mean().sqrt())
    reported = storage_error(config, half)
    assert reported[0] == pytest.approx(error, rel=0.3) and 0 < reported[1] < 2.0**-bits * 4
    torch.testing.assert_close(std, std_0, rtol=2.0**-bits * 8, atol=0)
    stage = LatentSource(config).first_stage(world.root / "run", config, accelerator)
    assert stage.field("z").dtype == torch.float32


# ------------------------------------------------------------------------------- elsewhere


def test_a_cache_elsewhere_gives_the_same_stage(
    cached: tuple[World, Path],
    accelerator: Accelerator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a folder, at an address, and as latents of their own; copies have room for two shards."""
    world, folder = cached
    local = LatentSource(read(world))
    expected = content_of(local, tmp_path / "expected", read(world), accelerator)
    shard = max(path.stat().st_size for path in folder.glob("shard-*"))
    monkeypatch.setenv("JKOFLOW_CACHE_GIB", repr(2.1 * shard / 2**30))
    other = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, other)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="does not exist; run `jkoflow encode`"):
        open_cache(read(world))
    for place in (other.parent, other.parent.as_uri()):
        monkeypatch.setenv("JKOFLOW_LATENTS", str(place))
        source = LatentSource(read(world))
        assert source.cache.reader.place == f"{place}/{folder.name}"
        run = tmp_path / f"run{len(str(place))}"
        assert content_of(source, run, read(world), accelerator) == expected
        assert encode(read(world), accelerator, quiet).reader.place == f"{place}/{folder.name}"
    with pytest.raises(UserError, match="is stored in fp32; expected fp16"):
        encode(read(world), accelerator, quiet, "fp16")
    monkeypatch.delenv("JKOFLOW_LATENTS")
    data = {"name": "latents", "path": other.as_uri(), "size": None, "mode": "RGB"}
    own = read(world, data=data)
    assert content_of(LatentSource(own), tmp_path / "own", own, accelerator) == expected
    left = list((world.root / "home" / "remote").glob("*/shard-*"))
    assert 0 < sum(path.stat().st_size for path in left) <= 2.1 * shard


def content_of(
    source: LatentSource, run: Path, config: Config, accelerator: Accelerator
) -> dict[str, bytes]:
    stage = source.first_stage(run, config, accelerator)
    return {path.name: path.read_bytes() for path in stage.folder.glob("shard-*")}


def test_standardisations_are_close_up_to_rounding() -> None:
    def made(mean: list[float], std: list[float]) -> Standardisation:
        return Standardisation(torch.tensor(mean), torch.tensor(std))

    one = made([0.0, 0.0], [1.0, 1.0])
    assert one.is_close(made([1e-4, 0.0], [1.0, 1.0001]))
    for other in (made([0.0, 0.1], [1.0, 1.0]), made([0.0, 0.0], [1.0, 1.1]), made([0.0], [1.0])):
        assert not one.is_close(other)
