"""ImageNet-32 in both official layouts, made up and real."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.data import DataConfig
from pipeline.data.datasets import load_images
from pipeline.errors import UserError
from pipeline.storage import atomic
from tests.pipeline.integrity.test_safe_pickle import python2

ROWS = [5, 3, 4, 1, 6, 2, 2, 2, 2, 7]
REPOSITORY = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("JKOFLOW_SHARED", REPOSITORY.parent / "shared"))
REAL = SHARED / "data" / "imagenet32_tiny200"


@pytest.fixture(autouse=True)
def own_root(tmp_path, monkeypatch):
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "home"))


def write_batch(path: Path, batch: dict[str, object], form: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "npz":
        np.savez(f"{path}.npz", **batch)
    elif form == "compressed npz":
        np.savez_compressed(f"{path}.npz", **batch)
    elif form == "python 2 pickle":
        python2(batch | {"labels": [int(label) for label in batch["labels"]]}, path)
    else:
        labels = [int(label) for label in batch["labels"]]
        path.write_bytes(pickle.dumps(batch | {"labels": labels}, protocol=4))


def make(folder: Path, form: str, rows: list[int] = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """A made-up set in an official form; returns the train images and labels from 0."""
    random = np.random.default_rng(5)
    images = random.integers(0, 256, (sum(rows), 3072), np.uint8)
    labels = random.integers(1, 1001, sum(rows))
    start = 0
    for number, count in enumerate(rows, 1):
        part = slice(start, start + count)
        batch = {"data": images[part], "labels": labels[part], "mean": images.mean(0)}
        write_batch(folder / f"train_data_batch_{number}", batch, form)
        start += count
    write_batch(folder / "val_data", {"data": images[:2] // 2, "labels": labels[:2]}, form)
    return images.reshape(-1, 3, 32, 32), labels - 1


def config(path: Path, split: str = "train", limit: int | None = None) -> DataConfig:
    return DataConfig(name="imagenet32", path=str(path), split=split, limit=limit)


@pytest.mark.parametrize("form", ["npz", "compressed npz", "pickle", "python 2 pickle"])
def test_all_official_layouts_have_the_same_images(tmp_path, form):
    images, labels = make(tmp_path / "data", form)
    ours = load_images(config(tmp_path / "data"))
    assert (len(ours), ours.shape) == (34, (3, 32, 32))
    assert np.array_equal(ours.read(0, 34), images)
    assert np.array_equal(ours.labels, labels) and ours.labels.dtype == np.int64
    assert np.array_equal(ours.read(4, 13), images[4:13]), "across four files"
    some = np.array([33, 0, 8, 8, 12, 5])
    assert np.array_equal(ours.take(some), images[some])
    for split in ("test", "val"):
        test = load_images(config(tmp_path / "data", split))
        assert (test.split, len(test)) == ("test", 2)
        assert np.array_equal(test.read(0, 2), images[:2] // 2)


def test_folders_of_the_official_archives_are_found(tmp_path):
    images, _ = make(tmp_path / "data" / "Imagenet32_train_npz", "npz")
    make(tmp_path / "data" / "Imagenet32_val", "pickle")
    (tmp_path / "data" / "Imagenet32_val" / "train_data_batch_1").unlink()
    assert np.array_equal(load_images(config(tmp_path / "data")).read(0, 34), images)
    assert len(load_images(config(tmp_path / "data", "test"))) == 2


def test_only_files_of_the_range_are_opened(tmp_path):
    images, _ = make(tmp_path, "npz")
    ours = load_images(config(tmp_path))
    for number in (1, 2, 3, 5, 6, 7, 8, 9, 10):
        (tmp_path / f"train_data_batch_{number}.npz").unlink()
    assert np.array_equal(ours.read(12, 13), images[12:13])  # the only image of file 4
    with pytest.raises(UserError, match=r"train_data_batch_5.npz"):
        ours.read(12, 14)


def test_memory_is_constant_over_the_files(tmp_path):
    """Ten files of 12 MB each are read one after the other in far less than their 120 MB."""
    folder = tmp_path / "data"
    folder.mkdir()
    data = np.zeros((4000, 3072), np.uint8)
    for number in range(1, 11):
        np.savez_compressed(
            folder / f"train_data_batch_{number}.npz", data=data, labels=[1] * 4000
        )
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pipeline.config.data import DataConfig\n"
        "from pipeline.data.datasets import load_images\n"
        "s = load_images(DataConfig(name='imagenet32', path=sys.argv[2]))\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "s.read(0, 100); before = peak()\n"
        "for i in range(0, 40000, 500): s.read(i, i + 500)\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(REPOSITORY), str(folder)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 40_000  # KiB


def test_files_after_the_limit_are_not_opened(tmp_path, monkeypatch):
    images, labels = make(tmp_path, "npz")
    seen: list[str] = []
    facts = atomic.sha256_file
    monkeypatch.setattr(
        atomic, "sha256_file", lambda path: (seen.append(path.name), facts(path))[1]
    )
    ours = load_images(config(tmp_path, limit=8))
    assert seen == ["train_data_batch_1.npz", "train_data_batch_2.npz"]
    assert np.array_equal(ours.read(0, 8), images[:8]) and np.array_equal(ours.labels, labels[:8])
    others = [load_images(config(tmp_path, limit=n)) for n in (7, 9, 33, 34, 100)]
    whole = load_images(config(tmp_path))
    assert others[3].fingerprint == others[4].fingerprint == whole.fingerprint
    prints = {s.fingerprint for s in (ours, *others, whole)}
    assert len(prints) == 5 and [len(s) for s in others] == [7, 9, 33, 34, 34]


def test_the_fingerprint_depends_on_the_content_alone(tmp_path):
    make(tmp_path / "a", "npz")
    make(tmp_path / "b", "npz")
    first = load_images(config(tmp_path / "a")).fingerprint
    assert load_images(config(tmp_path / "b")).fingerprint == first
    assert load_images(config(tmp_path / "a", "test")).fingerprint != first
    path = tmp_path / "a" / "train_data_batch_7.npz"
    data = bytearray(path.read_bytes())
    data[2000] ^= 1  # same size
    path.write_bytes(data)
    assert load_images(config(tmp_path / "a")).fingerprint != first


def test_files_are_hashed_once(tmp_path, monkeypatch):
    make(tmp_path / "data", "pickle")
    first = load_images(config(tmp_path / "data"))

    def never(_: object) -> None:
        raise AssertionError("read again")

    with monkeypatch.context() as patched:
        patched.setattr(atomic, "sha256_file", never)
        patched.setattr("pipeline.data.imagenet32.load_batch", never)
        assert load_images(config(tmp_path / "data")).fingerprint == first.fingerprint
    (index,) = (tmp_path / "home" / "file-index").glob("*.json")
    index.write_text("[] damaged")
    assert load_images(config(tmp_path / "data")).fingerprint == first.fingerprint


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="train_data_batch_1.npz.*unpack"):
        load_images(config(tmp_path))
    make(tmp_path, "npz")
    for number in (3, 10):
        (tmp_path / f"train_data_batch_{number}.npz").unlink()
    with pytest.raises(
        UserError, match=": train_data_batch_3.npz, train_data_batch_10.npz missing"
    ):
        load_images(config(tmp_path))


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_malicious_batch_is_an_error_and_runs_no_code(tmp_path):
    make(tmp_path, "pickle")
    evil = {"data": np.zeros((1, 3072), np.uint8), "labels": [1], "mean": Evil(tmp_path / "ran")}
    (tmp_path / "train_data_batch_2").write_bytes(pickle.dumps(evil))
    with pytest.raises(UserError, match=r"train_data_batch_2 .*asks for (posix|nt).system"):
        load_images(config(tmp_path))
    # An npz that is a pickle in disguise, and one that holds pickled objects.
    make(tmp_path / "npz", "npz")
    path = tmp_path / "npz" / "train_data_batch_2.npz"
    path.write_bytes(pickle.dumps(evil))
    with pytest.raises(UserError, match=r"train_data_batch_2.npz is not a batch"):
        load_images(config(tmp_path / "npz"))
    np.savez(path, data=np.zeros((3, 3072), np.uint8), labels=np.array([Evil(tmp_path / "ran")]))
    with pytest.raises(UserError, match=r"train_data_batch_2.npz is not a batch"):
        load_images(config(tmp_path / "npz")).read(5, 6)
    assert not (tmp_path / "ran").exists()


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data[:3000] + bytes([data[3000] ^ 1]) + data[3001:]


@pytest.mark.parametrize("harm", [truncated, flipped])
def test_a_damaged_npz_is_named(tmp_path, harm):
    make(tmp_path, "npz")
    path = tmp_path / "train_data_batch_1.npz"
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(UserError, match="train_data_batch_1.npz is not a batch of ImageNet-32"):
        load_images(config(tmp_path)).read(0, 1)


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        ({"labels": [1]}, "not a batch"),
        ({"data": np.zeros((1, 3072), np.uint8)}, "`labels`"),
        ({"data": np.zeros((1, 3072), np.float32), "labels": [1]}, "no uint8 array `data`"),
        ({"data": np.zeros((1, 3, 64, 64), np.uint8), "labels": [1]}, r"\(1, 3, 64, 64\)"),
        ({"data": np.zeros((1, 12288), np.uint8), "labels": [1]}, r"expected \(n, 3072\)"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "2 images and 1 labels"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [0]}, "integers from 1"),
    ],
)
def test_another_layout_is_a_user_error(tmp_path, batch, sentence):
    np.savez(tmp_path / "val_data.npz", **batch)
    with pytest.raises(UserError, match=sentence):
        load_images(config(tmp_path, "test")).read(0, 1)


def test_a_file_that_changes_in_use_is_an_error(tmp_path):
    make(tmp_path, "npz")
    ours = load_images(config(tmp_path))
    batch = {"data": np.zeros((9, 3072), np.uint8), "labels": [1] * 9}
    np.savez(tmp_path / "train_data_batch_1.npz", **batch)
    with pytest.raises(UserError, match="has changed"):
        ours.read(0, 1)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the stand-in data set is not at {REAL}")
def test_the_stand_in_data_set_is_read():
    train, val = (load_images(config(REAL, split)) for split in ("train", "val"))
    assert (len(train), len(val)) == (12000, 2000)
    with zipfile.ZipFile(REAL / "train_data_batch_6.npz") as archive:
        sixth = np.load(io.BytesIO(archive.read("data.npy")))
        labels = np.load(io.BytesIO(archive.read("labels.npy")))
    first = sum(len(np.load(REAL / f"train_data_batch_{i}.npz")["labels"]) for i in range(1, 6))
    assert np.array_equal(train.read(first, first + len(sixth)).reshape(-1, 3072), sixth)
    assert np.array_equal(train.labels[first : first + len(sixth)], labels - 1)
    assert train.labels.min() == 0
    # Photographs: neighbouring pixels are alike, channels of one place too.
    pixels = val.read(0, 500).astype(float)
    across = np.abs(np.diff(pixels, axis=3)).mean()
    assert across < 0.5 * np.abs(pixels - pixels[::-1]).mean()


ENCODE = """
import sys
from accelerate import Accelerator
from pipeline.config.load import load_config
from pipeline.data.encoding import encode
from pipeline.runtime.system import peak_memory

for limit in (2400, 12000):
    words = ["data.name=imagenet32", f"data.path={sys.argv[1]}", f"data.limit={limit}",
             "autoencoder.name=identity", "autoencoder.weights=null", "latents.shard_size=600"]
    cache = encode(load_config("smoke", words), Accelerator(cpu=True), lambda items, *_: items)
    assert len(cache) == limit
    print(peak_memory())
"""


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the stand-in data set is not at {REAL}")
def test_memory_of_encoding_is_independent_of_the_number_of_images():
    """All latents are 147 MB, all pixels 37 MB; a file is 4 MB, a shard of latents 7 MB."""
    command = [sys.executable, "-c", ENCODE, str(REAL)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    few, all_of_them = map(int, done.stdout.split()[-2:])
    assert all_of_them - few < 16e6
