"""Writers resume at missing shards, and write the same bytes on any number of processes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.storage.shards.manifest import shard_name
from pipeline.storage.shards.opening import open_store
from pipeline.storage.shards.writer import StoreWriter
from tests.pipeline.storage.shards.stores import COUNT, IDENTITY, SHARD, content, rows, write


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_any_number_of_processes_writes_the_same_bytes(
    folder: Path, tmp_path: Path, ranks: int
) -> None:
    write(tmp_path / "other", ranks=ranks)
    assert content(tmp_path / "other") == content(folder)


def test_writing_resumes_at_the_missing_shards(folder: Path) -> None:
    expected = content(folder)
    (folder / "manifest.json").unlink()
    (folder / shard_name(1)).unlink()
    path = folder / shard_name(3)
    path.write_bytes(path.read_bytes()[:-9])
    writer = StoreWriter(folder, IDENTITY, COUNT, SHARD)
    assert writer.missing() == [1, 3]
    assert writer.missing(1, 2) == [1, 3] and writer.missing(0, 2) == []
    write(folder)
    assert content(folder) == expected


def test_a_shard_of_another_store_is_written_again(folder: Path, tmp_path: Path) -> None:
    """Same shapes, another key; and one of ours in the wrong place."""
    write(tmp_path / "foreign", {**IDENTITY, "seed": 4})
    expected = content(folder)
    (folder / "manifest.json").unlink()
    shutil.copy(tmp_path / "foreign" / shard_name(0), folder / shard_name(0))
    shutil.copy(folder / shard_name(1), folder / shard_name(2))
    writer = StoreWriter(folder, IDENTITY, COUNT, SHARD)
    assert writer.missing() == [0, 2]
    with pytest.raises(UserError, match=r"shard-00000.*missing or damaged"):
        writer.finish()
    write(folder)
    assert content(folder) == expected


def test_extra_entries_are_computed_from_the_samples(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, IDENTITY, COUNT, SHARD)
    for index in writer.missing():
        writer.write(index, {"x": rows(*writer.bounds(index))})
    writer.finish(lambda reader: {"sum": float(reader.field("x").sum())})
    expected = float(np.sum(np.arange(COUNT) * 2 + 0.5))
    assert open_store(tmp_path, "store").manifest["sum"] == expected


def test_invalid_sizes_are_user_errors(tmp_path: Path) -> None:
    for count, size in ((0, 5), (5, 0), (-1, 5)):
        with pytest.raises(UserError, match="expected at least 1"):
            StoreWriter(tmp_path, IDENTITY, count, size)
    writer = StoreWriter(tmp_path, IDENTITY, 7, 5)
    with pytest.raises(UserError, match="x of shard 1 has 5 samples; expected 2"):
        writer.write(1, {"x": rows(0, 5)})
    assert not list(tmp_path.iterdir())


def test_a_resumed_store_may_have_other_sizes_of_shards(tmp_path: Path) -> None:
    """Shards of the size before are written again: with them the store had other samples."""
    writer = StoreWriter(tmp_path, IDENTITY, COUNT, SHARD)
    for index in (0, 1):
        writer.write(index, {"x": rows(*writer.bounds(index))})
    other = StoreWriter(tmp_path, IDENTITY, COUNT, SHARD + 3)
    assert other.missing() == [0, 1, 2]
    assert StoreWriter(tmp_path, IDENTITY, COUNT, SHARD).missing() == [2, 3, 4]
