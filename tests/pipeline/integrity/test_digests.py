"""Shipped files and single files are read only if their content is whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from autoencoders.weights import load_weights, shipped_weights
from eval.references import read_reference, reference_bytes
from pipeline.integrity import digests
from tests import shipped
from tests.eval.moments import stats_from
from tests.pipeline.tiny import write_autoencoder

CARD = {"dataset": "d", "split": "train", "n": 40, "extractor": "e", "content_sha256": "0" * 64}


def flip(path: Path, place: int, mask: int = 64) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= mask
    path.write_bytes(data)


def write_reference(path: Path) -> Path:
    stats = stats_from(np.random.default_rng(0).normal(size=(40, 8)))
    path.write_bytes(reference_bytes(stats, CARD))
    return path


def test_the_list_is_current() -> None:
    assert shipped.lines() == digests.LIST.read_text(), "run: python -m tests.shipped"


def test_a_shipped_file_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flipped bits of issue 29; the folders are copied, since the real ones are shipped."""
    monkeypatch.setattr(digests, "HOME", tmp_path)
    readers = {
        "eval/references/mnist-train.safetensors": read_reference,
        "autoencoders/pretrained/mnist-kl.safetensors": load_weights,
    }
    for name, read in readers.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        shutil.copy(shipped.HOME / name, path)
        read(path)
        flip(path, path.stat().st_size - 1000 if "kl" in name else 7100619)
        with pytest.raises(ValueError, match="shipped file .* is damaged; .* install"):
            read(path)


def test_a_copy_of_a_shipped_file_is_read(tmp_path: Path) -> None:
    source = shipped_weights()["mnist-kl"]
    copy = Path(shutil.copy(source, tmp_path / "copy.safetensors"))
    assert load_weights(copy).fingerprint == load_weights(source).fingerprint
    flip(copy, -1)
    with pytest.raises(ValueError, match="holds no digest of its content"):
        load_weights(copy)


@pytest.mark.parametrize("kind", ["reference", "autoencoder"])
def test_every_flipped_byte_of_a_single_file_is_found(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file.safetensors"
    read, write = {
        "reference": (read_reference, write_reference),
        "autoencoder": (load_weights, write_autoencoder),
    }[kind]
    write(path)
    read(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(0, header, 1 + header // 60), *rng.integers(header, len(whole), 30)]:
        flip(path, place, 1 << int(rng.integers(8)))
        with pytest.raises(ValueError):
            digests.check_file(path)
        path.write_bytes(whole)
    for place in (3, header // 2, header + 5, len(whole) - 1):
        flip(path, place)
        with pytest.raises(ValueError):
            read(path)
        path.write_bytes(whole[:place])
        with pytest.raises(ValueError):
            read(path)
        path.write_bytes(whole)


def test_a_hash_is_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    first = digests.sha256_file(path)
    assert str(path) not in digests._known  # it may still change without a new mtime
    monkeypatch.setattr(digests, "_UNSETTLED_NS", 0)
    assert digests.sha256_file(path) == first and str(path) in digests._known
    state = path.stat()
    with open(path, "r+b") as file:  # the same size, mtime and inode
        file.write(b"two")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert digests.sha256_file(path) != first
