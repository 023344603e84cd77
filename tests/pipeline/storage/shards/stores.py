"""A store of computed rows, and damages of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.shards.writer import StoreWriter

IDENTITY: dict[str, Any] = {"kind": "numbers", "seed": 3}
COUNT, SHARD = 23, 5
#: of the store that also lies at an address
REMOTE_COUNT, REMOTE_SHARD = 60, 8


def rows(first: int, last: int) -> torch.Tensor:
    return torch.arange(first, last, dtype=torch.float32)[:, None] + torch.tensor([0.0, 0.5])


def write(
    folder: Path, identity: dict[str, Any] = IDENTITY, ranks: int = 1, count: int = COUNT
) -> StoreReader:
    for rank in reversed(range(ranks)):
        writer = StoreWriter(folder, identity, count, SHARD)
        for index in writer.missing(rank, ranks):
            first, last = writer.bounds(index)
            tensors = {"x": rows(first, last), "n": torch.arange(first, last)}
            writer.write(index, tensors)
    return StoreWriter(folder, identity, count, SHARD).finish()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
