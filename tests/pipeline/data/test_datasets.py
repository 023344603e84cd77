"""The data sets that come as assets, and what every data set promises."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision import datasets as theirs

from pipeline.assets.fetch import fetch_asset
from pipeline.config.data import DataConfig
from pipeline.data.datasets import load_images
from pipeline.data.image_set import ArrayPixels, ImageSet
from pipeline.errors import UserError


def small(count: int = 10) -> ImageSet:
    images = np.arange(count * 12, dtype=np.uint8).reshape(count, 3, 2, 2)
    return ImageSet("made up", "train", (3, 2, 2), "00", count, ArrayPixels(images, None))


@pytest.fixture(scope="module")
def mnist() -> ImageSet:
    return load_images(DataConfig(name="mnist"))


def test_mnist_train_has_the_known_statistics(mnist):
    assert (mnist.name, mnist.split, mnist.shape, len(mnist)) == (
        "mnist",
        "train",
        (1, 28, 28),
        60000,
    )
    assert mnist.labels.dtype == np.int64
    assert mnist.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(mnist.labels).tolist() == counts
    pixels = mnist.read(0, 60000)
    assert pixels.dtype == np.uint8 and pixels.shape == (60000, 1, 28, 28)
    # The mean and standard deviation in every tutorial: 0.1307 and 0.3081.
    assert abs(pixels.mean() / 255 - 0.1307) < 5e-5
    assert abs(pixels.std() / 255 - 0.3081) < 5e-5


@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist_equals_torchvisions(tmp_path, split):
    (tmp_path / "MNIST").mkdir()
    (tmp_path / "MNIST" / "raw").symlink_to(fetch_asset("mnist"))
    reference = theirs.MNIST(str(tmp_path), train=split == "train")
    ours = load_images(DataConfig(name="mnist", split=split))
    assert np.array_equal(ours.read(0, len(ours))[:, 0], reference.data.numpy())
    assert np.array_equal(ours.labels, reference.targets.numpy())


@pytest.mark.network
def test_cifar10_has_the_known_statistics():
    train, test = (load_images(DataConfig(name="cifar10", split=s)) for s in ("train", "test"))
    assert (len(train), len(test), train.shape) == (50000, 10000, (3, 32, 32))
    assert train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    pixels = train.read(0, 50000).transpose(1, 0, 2, 3).reshape(3, -1)
    assert np.allclose(pixels.mean(1) / 255, [0.4914, 0.4822, 0.4465], atol=5e-5)
    assert np.allclose(pixels.std(1) / 255, [0.2470, 0.2435, 0.2616], atol=5e-5)


def test_fingerprints_are_stable_and_distinct(mnist):
    again = load_images(DataConfig(name="mnist"))
    test = load_images(DataConfig(name="mnist", split="test"))
    some = load_images(DataConfig(name="mnist", limit=100))
    assert again.fingerprint == mnist.fingerprint
    assert len({mnist.fingerprint, test.fingerprint, some.fingerprint}) == 3
    # A limit that cuts nothing off is no limit.
    assert load_images(DataConfig(name="mnist", limit=60000)).fingerprint == mnist.fingerprint
    # Caches are found by it: it may only change together with the data.
    assert mnist.fingerprint == "f975853a370052a45bd39b876d9fa44318346b92a852f43ff53d6cb1229de5b9"


def test_a_limit_keeps_the_first_images(mnist):
    some = load_images(DataConfig(name="mnist", limit=7))
    assert len(some) == 7 and len(some.labels) == 7
    assert np.array_equal(some.read(0, 7), mnist.read(0, 7))
    with pytest.raises(IndexError, match="mnist has 7"):
        some.read(5, 8)


def test_read_and_take_agree(mnist):
    indices = np.array([59999, 3, 3, 17, 0])
    taken = mnist.take(indices)
    for row, index in zip(taken, indices.tolist(), strict=True):
        assert np.array_equal(row, mnist.read(index, index + 1)[0])
    assert mnist.read(5, 5).shape == mnist.take(np.array([], int)).shape[:0] + (0, 1, 28, 28)


def test_images_are_copies():
    images = small()
    images.read(0, 3)[:] = 0
    images.take(np.array([1, 2]))[:] = 0
    assert images.read(0, 3).ravel().tolist() == list(range(36))


@pytest.mark.parametrize("bounds", [(-1, 3), (3, 2), (0, 11), (11, 11)])
def test_read_checks_its_range(bounds):
    with pytest.raises(IndexError, match="made up has 10"):
        small().read(*bounds)


@pytest.mark.parametrize("indices", [[-1, 2], [10]])
def test_take_checks_its_indices(indices):
    with pytest.raises(IndexError, match="of 10"):
        small().take(np.array(indices))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "svhn"}, "'svhn' is unknown; choose one of mnist, cifar10, imagenet32, folder"),
        ({"split": "valid"}, "mnist has no split 'valid'; choose one of train, test"),
        ({"split": "val"}, "mnist has no split 'val'; choose one of train, test"),
        ({"limit": 0}, "data.limit is 0; expected 1 or more"),
        ({"limit": -5}, "data.limit is -5; expected 1 or more"),
        ({"name": "imagenet32"}, "data.path is null; set it to the folder"),
        ({"name": "folder", "size": 8}, "data.path is null; set it to the images of data.name"),
        ({"name": "folder", "size": 8, "path": "/no/such"}, "data.path is /no/such, not a folder"),
    ],
)
def test_invalid_settings_are_user_errors(settings: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        load_images(DataConfig(**settings))


def test_a_damaged_asset_is_not_read(tmp_path, monkeypatch, capsys):
    """The digits come from what was verified, not from what lies there."""
    stored = fetch_asset("mnist")
    by_hand = tmp_path / "assets" / "mnist" / "by-hand"
    by_hand.parent.mkdir(parents=True)
    by_hand.symlink_to(stored)
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path))
    load_images(DataConfig(name="mnist"))
    path: Path = tmp_path / "assets" / "mnist" / "t10k-images-idx3-ubyte"
    data = bytearray(path.read_bytes())
    data[5000] ^= 255
    path.write_bytes(data)
    images = load_images(DataConfig(name="mnist", split="test"))
    assert "is damaged" in capsys.readouterr().err
    digest = hashlib.md5(path.read_bytes()).hexdigest()
    assert digest == "2646ac647ad5339dbf082846283269ea" and len(images) == 10000
