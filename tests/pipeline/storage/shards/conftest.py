"""Fixtures of the tests of stores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from pipeline.storage.shards.local_copies import FOLDER
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.shards.writer import StoreWriter
from tests.pipeline.storage.shards.stores import REMOTE_COUNT, REMOTE_SHARD, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreReader:
    """Store whose copies go to a folder of their own."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "copies"))
    writer = StoreWriter(tmp_path / "store", {"kind": "numbers"}, REMOTE_COUNT, REMOTE_SHARD)
    x = torch.randn(REMOTE_COUNT, 200, generator=torch.Generator().manual_seed(0))
    for index in writer.missing():
        first, last = writer.bounds(index)
        writer.write(index, {"x": x[first:last].clone(), "n": torch.arange(first, last)})
    return writer.finish()


@pytest.fixture
def url(local: StoreReader) -> Iterator[str]:
    """Address of the store in fsspec's memory."""
    memory = fsspec.filesystem("memory")
    memory.put(str(local.folder), "/bucket/store", recursive=True)
    yield "memory://bucket/store"
    memory.rm("/bucket", recursive=True)
