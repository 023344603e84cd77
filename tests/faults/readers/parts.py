"""Contents and readers that several kinds of files share."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.sets.sources import open_source
from pipeline.config.data import DataConfig
from pipeline.data.datasets import load_images
from tests.faults.readers.reader import RNG


def statistics(path: Path) -> Any:
    source = open_source(path)
    stats = source.stats
    batches = list(source.images.batches()) if source.images is not None else []
    return batches, (stats.n, stats.mean, stats.cov) if stats is not None else None


def npz(arrays: dict[str, np.ndarray], compressed: bool = False) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def rezipped(content: bytes, others: dict[str, bytes], name: str) -> bytes:
    """A zip archive whose checksums are right."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, value in others.items():
            archive.writestr(key, value)
        archive.writestr(name, content)
    return file.getvalue()


def tar_of(members: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def images_of(name: str, path: Path, **options: Any) -> Any:
    data = load_images(DataConfig(name=name, path=str(path), **options))
    return data.read(0, len(data)), data.labels, data.class_names


def picture_of(kind: str, side: int = 9) -> bytes:
    file = io.BytesIO()
    mode = "L" if kind == "gif" else "RGB"
    pixels = RNG.integers(0, 256, (side, side) + (3,) * (mode == "RGB"), np.uint8)
    names = {"jpg": "jpeg", "tif": "tiff"}
    Image.fromarray(pixels).save(file, names.get(kind, kind))
    return file.getvalue()
