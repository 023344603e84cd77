"""Readers of archives: npz, zip, tar and gz."""

from __future__ import annotations

import gzip
import pickle
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.assets.archives import find_files, read_bytes
from pipeline.assets.readers import read_mnist
from pipeline.data.imagenet32 import read_batch
from tests.faults.readers.parts import images_of, npy, npz, rezipped, statistics, tar_of
from tests.faults.readers.reader import RNG, Reader


def _found(path: Path) -> Any:
    scratch = path.parent / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    files = find_files(path, ["wanted"], scratch)
    return {name: found.read_bytes() for name, found in files.items()}


def _mnist(path: Path) -> Any:
    return read_mnist(path.parent, path.parent / "scratch").sha256


def archive_readers(root: Path) -> Iterator[Reader]:
    pixels = RNG.integers(0, 256, (5, 4, 4, 3), np.uint8)
    arrays = {"arr_0": pixels, "labels": np.arange(5)}
    moments = {"mu": np.zeros(4), "sigma": np.eye(4), "n": np.array(9)}
    for name, content in (("stored", npz(arrays)), ("deflated", npz(arrays, True))):
        yield Reader(f"npz {name}", root / f"{name}.npz", content, statistics)
        read = partial(images_of, "npz")
        yield Reader(f"npz {name}: data", root / f"{name}-d.npz", content, read)
    yield Reader("npz statistics", root / "m.npz", npz(moments), statistics)
    labels = {"labels.npy": npy(np.arange(5))}
    for name, read in (("", statistics), (": data", partial(images_of, "npz"))):
        yield Reader(
            f"npy in npz{name}", root / f"arr{len(name)}.npz", npy(pixels), read,
            pack=partial(rezipped, others=labels, name="arr_0.npy"),
        )  # fmt: skip
    for key in ("mu", "sigma", "n"):
        others = {f"{k}.npy": npy(v) for k, v in moments.items() if k != key}
        yield Reader(
            f"npy {key} in npz", root / f"{key}.npz", npy(moments[key]), statistics,
            pack=partial(rezipped, others=others, name=f"{key}.npy"),
        )  # fmt: skip
    batch = {"data": RNG.integers(0, 256, (3, 3072), np.uint8), "labels": np.arange(1, 4)}
    yield Reader("ImageNet-32 npz", root / "train.npz", npz(batch), read_batch)
    yield Reader("ImageNet-32 pickle", root / "train", pickle.dumps(batch), read_batch)
    for ending, mode in (("tar", "w"), ("tar.gz", "w:gz")):
        content = tar_of({"x/other": b"o" * 700, "x/wanted": b"w" * 900}, mode)
        yield Reader(f"archive {ending}", root / "t" / f"a.{ending}", content, _found)
    content = rezipped(b"w" * 900, {"x/other": b"o" * 700}, "x/wanted")
    yield Reader("archive zip", root / "z" / "a.zip", content, _found)
    idx = {
        f"{part}-{kind}-ubyte": bytes([0, 0, 8, 3]) + RNG.bytes(100)
        for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    }  # fmt: skip
    folder = root / "idx"
    folder.mkdir(parents=True)
    for name, data in idx.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(data))
    first = folder / "train-images-idx3-ubyte.gz"
    yield Reader("IDX gz", first, first.read_bytes(), _mnist)
    yield Reader("gz", root / "x.gz", gzip.compress(RNG.bytes(300)), read_bytes)
