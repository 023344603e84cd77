"""A caller's tensors as data sets: what is written is what is read, and mistakes are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.data import DataConfig
from pipeline.config.load import load_config
from pipeline.data.datasets import load_images
from pipeline.data.latent_cache import LatentCache, open_cache
from pipeline.data.tensors import write_images, write_latents
from pipeline.errors import UserError
from pipeline.storage.shards.opening import open_store


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path))


def test_images_are_read_as_written() -> None:
    x = torch.randint(0, 256, (7, 3, 5, 4), dtype=torch.uint8)
    path = write_images(x, torch.arange(7) % 3)
    images = load_images(DataConfig(name="npz", path=str(path), limit=6))
    assert images.shape == (3, 5, 4) and len(images) == 6
    assert np.array_equal(images.take(np.array([5, 0])), x[[5, 0]].numpy())
    assert images.labels is not None and images.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert write_images(x, torch.arange(7) % 3) == path != write_images(x, None)


def test_latents_are_standardised_by_their_moments() -> None:
    z = 3 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 1
    cache = LatentCache(open_store(write_latents(z, None), "latent cache"))
    assert torch.allclose(cache.standardisation.mean, z.mean(0), atol=1e-5)
    assert torch.allclose(cache.standardisation.std, z.std(0, correction=0), atol=1e-5)
    drawn = cache.sample(0, 50, 0.0, torch.Generator())
    assert torch.allclose(cache.standardisation.undo(drawn), z, atol=1e-5)


def test_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_text("no archive")
    np.savez(tmp_path / "b.npz", arr_0=np.zeros((2, 3, 3, 1)))
    pixels = np.zeros((2, 3, 3, 1), np.uint8)
    np.savez(tmp_path / "f.npz", arr_0=np.zeros((0, 3, 3, 1), np.uint8))
    np.savez(tmp_path / "d.npz", arr_0=pixels, labels=[0.2, 1.7])
    np.savez(tmp_path / "e.npz", arr_0=pixels, labels=["cat", "dog"])
    for name, split, message in (
        ("a.npz", "train", "is no .npz of images"),
        ("b.npz", "train", "arr_0 of .* is float64"),
        ("b.npz", "test", "has no split 'test'"),
        ("c.npz", "train", "set it to an .npz of images"),
        ("d.npz", "train", "labels of .* are float64; expected whole numbers"),
        ("e.npz", "train", "labels of .* are <U3; expected whole numbers"),
        ("f.npz", "train", r"arr_0 of .* has the shape \(0, 3, 3, 1\); expected some images"),
    ):
        with pytest.raises(UserError, match=message):
            load_images(DataConfig(name="npz", path=str(tmp_path / name), split=split))
    with pytest.raises(UserError, match="data.path is null; set it to the latent cache"):
        open_cache(load_config("mnist-fm", ["data.name=latents"]))
    with pytest.raises(UserError, match="of which there are no images"):
        load_images(DataConfig(name="latents", path="x"))
    with pytest.raises(UserError, match="expected some images"):
        write_images(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), None)
    with pytest.raises(UserError, match="expected 3 whole numbers"):
        write_latents(torch.randn(3, 2), torch.tensor([0, -1, 1]))
