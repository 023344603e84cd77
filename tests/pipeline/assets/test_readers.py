"""The real assets, and the same content in every layout they come in."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.assets.catalogue import ASSETS
from pipeline.assets.download import DamagedError
from pipeline.assets.fetch import fetch_asset
from pipeline.assets.readers import (
    CIFAR10_FILES,
    INCEPTION_FILE,
    read_cifar10,
    read_inception,
    read_mnist,
)

PUBLISHED_MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def test_mnist_has_the_published_hash_also_gzipped(tmp_path):
    folder = fetch_asset("mnist")
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for name, md5 in PUBLISHED_MNIST_MD5.items():
        data = (folder / name).read_bytes()
        assert hashlib.md5(data).hexdigest() == md5
        (tmp_path / "MNIST" / "raw" / f"{name}.gz").write_bytes(gzip.compress(data, 1))
    content = read_mnist(tmp_path, tmp_path)
    assert content.sha256 == ASSETS["mnist"].sha256
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedError, match="t10k-images-idx3-ubyte.gz is damaged"):
        read_mnist(tmp_path, tmp_path)


def test_inception_has_the_same_hash_in_the_official_layout(tmp_path):
    path = fetch_asset("inception")
    state = load_file(path)
    weights = [name for name in state if name.endswith("conv.weight")]
    assert len(weights) == 94
    official = state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(official, tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    content = read_inception(tmp_path, tmp_path)
    assert content.sha256 == ASSETS["inception"].sha256
    content.files[INCEPTION_FILE](again := io.BytesIO())
    assert again.getvalue() == path.read_bytes()
    state["Mixed_7c.branch_pool.bn.bias"][3] += 1e-6
    torch.save(state, tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    assert read_inception(tmp_path, tmp_path).sha256 != content.sha256


def test_cifar10_has_the_same_hash_from_batches_and_pictures(tmp_path):
    """Both layouts, built here of the same made-up images."""
    random = np.random.default_rng(0)
    official, pictures = tmp_path / "cifar-10-batches-py", tmp_path / "package"
    official.mkdir()
    pictures.mkdir()
    digest, batches, all_labels = hashlib.sha256(), [], []
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        images = np.repeat(random.integers(0, 256, (10000, 3072 // 64), np.uint8), 64, axis=1)
        labels = random.integers(0, 10, 10000)
        batch = {b"data": images, b"labels": labels.tolist(), b"batch_label": b"made up"}
        (official / name).write_bytes(
            pickle.dumps(batch, protocol=2 if name == "test_batch" else 4)
        )
        rows = images.reshape(10000, 3, 1024).transpose(0, 2, 1)
        Image.fromarray(np.ascontiguousarray(rows)).save(
            pictures / f"{name}.png", compress_level=1
        )
        batches.append(images)
        all_labels += labels.tolist()
    (pictures / "train_lables.json").write_text(str(all_labels[:50000]))
    (pictures / "test_lables.json").write_text(str(all_labels[50000:]))
    values = np.array(all_labels, np.uint8)
    for images, labels in ((batches[:5], values[:50000]), (batches[5:], values[50000:])):
        for batch in images:
            digest.update(batch.tobytes())
        digest.update(labels.tobytes())
    one = read_cifar10(official, tmp_path)
    assert one.sha256 == read_cifar10(pictures, tmp_path).sha256 == digest.hexdigest()
    one.files["test_images.npy"](file := io.BytesIO())
    file.seek(0)
    assert np.array_equal(np.load(file), batches[5].reshape(10000, 3, 32, 32))


PUBLISHED_CIFAR10_MD5 = [  # of the official binary batches 1 to 5 and the test batch
    "5dd7e06a14cb22eb9f671a540d1b7c25",
    "5ea93a67294ea407fff1d09f752e9692",
    "942cd6a4bcdd0dd3c604fbe906cb4421",
    "ae636b3ba5c66a11e91e8cb52e771fcb",
    "53f37980c15c3d472c316c40844f3f0d",
    "803d5f7f4d78ea53de84dbe85f74fb6d",
]


@pytest.mark.network
def test_cifar10_has_the_bytes_of_the_official_archive():
    folder = fetch_asset("cifar10")
    load = {name: np.load(folder / name, mmap_mode="r") for name in CIFAR10_FILES}
    images = np.concatenate([load["train_images.npy"], load["test_images.npy"]])
    labels = np.concatenate([load["train_labels.npy"], load["test_labels.npy"]])
    assert labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    records = np.concatenate([labels[:, None], images.reshape(60000, 3072)], axis=1)
    actual = [hashlib.md5(part.tobytes()).hexdigest() for part in np.split(records, 6)]
    assert actual == PUBLISHED_CIFAR10_MD5
