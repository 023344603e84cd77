"""Images of files that open only as a whole, unpacked for random batches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from accelerate import Accelerator

from pipeline.autoencoder_training.train import train_autoencoder
from pipeline.config import packaged
from pipeline.config.autoencoder import AutoencoderConfig
from pipeline.config.data import DataConfig
from pipeline.config.load import load
from pipeline.data import imagenet32
from pipeline.data.datasets import load_images
from pipeline.data.image_set import with_random_access
from pipeline.errors import UserError
from tests.pipeline.data.test_imagenet32 import make


def no_bar(items, total, label):
    return items


@pytest.fixture(autouse=True)
def own_root(tmp_path, monkeypatch):
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "home"))


def test_the_array_has_the_same_images_and_opens_no_file(tmp_path, monkeypatch):
    images, labels = make(tmp_path / "files", "npz")
    data = DataConfig(name="imagenet32", path=str(tmp_path / "files"))
    packed = load_images(data)
    unpacked = with_random_access(packed, Accelerator(cpu=True), no_bar)
    opened = []
    monkeypatch.setattr(imagenet32, "read_batch", lambda path: opened.append(path))
    order = np.random.default_rng(0).integers(0, len(images), 50)
    assert np.array_equal(unpacked.take(order), images[order])
    again = with_random_access(load_images(data), Accelerator(cpu=True), no_bar)
    assert np.array_equal(again.read(0, len(images)), images)
    assert opened == []
    assert again.fingerprint == packed.fingerprint
    assert np.array_equal(unpacked.labels, labels)


def test_a_training_opens_every_file_once(tmp_path, monkeypatch):
    make(tmp_path / "files", "npz")
    shape = ("patch=8", "width=32", "width_factors=[1]", "channels=2")
    recipe = ("iterations=5", "batch_size=8", "adversarial_weight=0")
    settings = ["data.name=imagenet32", f"data.path={tmp_path / 'files'}",
                "data.also=[imagenet32/test]"]  # fmt: skip
    settings += [f"architecture.{word}" for word in shape]
    settings += [f"training.{word}" for word in recipe]
    opened, read = Counter(), imagenet32.read_batch

    def counted(path):
        opened[path.name] += 1
        return read(path)

    monkeypatch.setattr(imagenet32, "read_batch", counted)
    config = load(AutoencoderConfig, "rgb32-kl", settings, packaged.AUTOENCODERS)
    train_autoencoder(config, tmp_path / "out", Accelerator(cpu=True), no_bar, False)
    assert len(opened) == 11 and set(opened.values()) == {1}


def test_a_set_with_random_access_is_unchanged(tmp_path):
    images = load_images(DataConfig(name="mnist", limit=5))
    assert with_random_access(images, Accelerator(cpu=True), no_bar) is images
    assert not (tmp_path / "home" / "pixels").exists()


def test_a_damaged_file_leaves_no_array(tmp_path):
    make(tmp_path / "files", "npz")
    images = load_images(DataConfig(name="imagenet32", path=str(tmp_path / "files")))
    (tmp_path / "files" / "train_data_batch_7.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="train_data_batch_7"):
        with_random_access(images, Accelerator(cpu=True), no_bar)
    assert list((tmp_path / "home" / "pixels").iterdir()) == []
