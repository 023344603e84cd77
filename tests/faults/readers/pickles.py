"""Readers of pickles and of checkpoints that are pickles."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.features.inception_weights import read_weights
from pipeline.integrity.checkpoints import read_checkpoint
from pipeline.integrity.safe_pickle import load_batch
from tests.faults.readers.parts import statistics
from tests.faults.readers.reader import RNG, Reader


def pickle_readers(root: Path) -> Iterator[Reader]:
    batch = {b"data": RNG.integers(0, 256, (3, 30), np.uint8), b"labels": [1, 2, 3]}
    for protocol in (0, 2, 5):
        content = pickle.dumps(batch, protocol)
        yield Reader(f"pickle {protocol}", root / f"batch{protocol}", content, load_batch,
                     names=("it ",))  # fmt: skip
    moments = {"fid": {"mu": np.zeros(3), "sigma": np.eye(3)}}
    yield Reader("pickled statistics", root / "s.pkl", pickle.dumps(moments), statistics)
    state = {"state_dict": {"w": torch.arange(6.0), "b": torch.zeros(2, 2)}, "epoch": 3}
    for name, zipped in (("zip", True), ("stream", False)):
        file = io.BytesIO()
        torch.save(state, file, _use_new_zipfile_serialization=zipped)
        yield Reader(f"checkpoint {name}", root / f"{name}.ckpt", file.getvalue(), read_checkpoint)
        yield Reader(f"inception {name}", root / f"{name}.pth", file.getvalue(), read_weights,
                     names=("Inception",))  # fmt: skip
    with zipfile.ZipFile(io.BytesIO(_saved(state))) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    for what, read in (("checkpoint", read_checkpoint), ("inception", read_weights)):
        yield Reader(
            f"{what} zip: pickle", root / f"p-{what}.pth", entries[name], read,
            pack=partial(_restored, entries=entries, name=name), names=("Inception",),
        )  # fmt: skip


def _saved(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _restored(content: bytes, entries: dict[str, bytes], name: str) -> bytes:
    """A checkpoint of torch.save with another pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for key, value in entries.items():
            archive.writestr(key, content if key == name else value)
    return file.getvalue()
