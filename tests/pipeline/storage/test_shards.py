"""Stores refuse what they should not trust, and hold the same bytes however they were written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.integrity import digests
from pipeline.storage import atomic, shards
from pipeline.storage.shards import (
    StoreReader,
    StoreWriter,
    content_key,
    find_similar_stores,
    open_store,
    shard_name,
)

IDENTITY: dict[str, Any] = {"kind": "numbers", "seed": 3}
COUNT, SHARD = 23, 5


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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "store")
    return tmp_path / "store"


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_store_is_read_back(folder: Path) -> None:
    store = open_store(folder, "store", IDENTITY)
    everything = rows(0, COUNT)
    assert len(store) == COUNT
    assert torch.equal(store.field("x"), everything)
    assert torch.equal(store.read("x", 3, 17), everything[3:17])
    assert torch.equal(store.read("x", 5, 10), everything[5:10])
    chosen = torch.tensor([22, 0, 4, 5, 5, 19, 0])
    assert torch.equal(store.take("x", chosen), everything[chosen])
    assert torch.equal(store.take("n", torch.tensor([7, 6])), torch.tensor([7, 6]))
    assert store.take("x", torch.empty(0, dtype=torch.long)).shape == (0, 2)


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


@pytest.mark.parametrize("damage", ["flip", "flip header", "truncate", "foreign", "remove"])
def test_a_damaged_shard_is_named(folder: Path, tmp_path: Path, damage: str) -> None:
    path = folder / shard_name(2)
    if damage == "flip":
        flip(path)
    elif damage == "flip header":
        flip(path, 20)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "foreign":
        write(tmp_path / "foreign", {**IDENTITY, "seed": 4})
        shutil.copy(tmp_path / "foreign" / path.name, path)
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"shard-00002\.safetensors of .*`jkoflow verify"):
        open_store(folder, "store", IDENTITY)


def test_a_store_without_manifest_is_incomplete(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="store .* is incomplete"):
        open_store(folder, "store")
    with pytest.raises(UserError, match="store .* does not exist"):
        open_store(folder / "nowhere", "store")


def test_another_identity_is_named_by_its_differences(folder: Path) -> None:
    with pytest.raises(UserError, match="made from other seed;"):
        open_store(folder, "store", {**IDENTITY, "seed": 4})
    with pytest.raises(UserError, match="made from other kind, more;"):
        open_store(folder, "store", {**IDENTITY, "kind": "letters", "more": 1})


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}', '"\\ud800"'])
def test_a_damaged_manifest_is_a_user_error(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest|format 1"):
        open_store(folder, "store", IDENTITY)


def test_similar_stores_differ_in_one_key(folder: Path, tmp_path: Path) -> None:
    """The longest first; none that is damaged, too short, of other things, or the one itself."""
    place = tmp_path / "place"
    for seed, count in ((1, COUNT), (2, 2 * COUNT), (3, COUNT), (IDENTITY["seed"], COUNT)):
        write(place / str(seed), {**IDENTITY, "seed": seed}, count=count)
    write(place / "other", {**IDENTITY, "seed": 1, "kind": "letters"})
    shutil.copytree(folder, place / "half")
    (place / "half" / "manifest.json").unlink()
    flip(place / "3" / shard_name(0))
    for name, text in (("a", "[]"), ("b", '{"identity": null}'), ("c", "{")):
        (place / name).mkdir()
        (place / name / "manifest.json").write_text(text)
    similar = find_similar_stores(place, IDENTITY, "seed")
    assert [store.manifest["identity"]["seed"] for store in similar] == [2, 1]
    long = find_similar_stores(place, IDENTITY, "seed", COUNT + 1)
    assert [len(store) for store in long] == [2 * COUNT]
    writer = StoreWriter(tmp_path / "new", IDENTITY, COUNT, SHARD + 1)
    writer.adopt(similar[1], COUNT - 1)  # shards are of another size here
    assert writer.missing() == [writer.shards - 1]
    assert torch.equal(atomic.read_tensors(writer.folder / shard_name(0))["x"], rows(0, SHARD + 1))


def test_a_manifest_without_an_entry_is_a_user_error(folder: Path) -> None:
    path = folder / "manifest.json"
    for entry in ("shards", "count", "key"):
        whole = path.read_text()
        manifest = json.loads(whole)
        del manifest[entry]
        path.write_text(json.dumps(manifest))
        with pytest.raises(UserError):
            open_store(folder, "store", IDENTITY)
        path.write_text(whole)


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


def test_the_key_is_independent_of_the_order() -> None:
    assert content_key({"a": 1, "b": [2.5, None]}) == content_key({"b": [2.5, None], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
    with pytest.raises(ValueError):
        content_key({"a": float("nan")})


def forget(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Begin another process that remembers nothing; return the files that it hashes."""
    digests._known.clear()
    hashed: list[str] = []
    original = digests.hashlib.sha256

    class Named:
        @staticmethod
        def sha256(*data: bytes) -> Any:
            if not data:
                hashed.append("file")
            return original(*data)

    monkeypatch.setattr(digests, "hashlib", Named)
    return hashed


def test_a_verification_is_remembered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unchanged shard is hashed once by all processes; a changed one again."""
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(shards, "WORTH_REMEMBERING", 0)
    monkeypatch.setattr(digests, "_UNSETTLED_NS", -(10**18))  # also files of this moment
    count = len(list(folder.glob("shard-*")))
    hashed = forget(monkeypatch)
    open_store(folder, "store", IDENTITY)
    assert len(hashed) == count
    hashed = forget(monkeypatch)
    store = open_store(folder, "store", IDENTITY)
    assert hashed == [] and torch.equal(store.field("x"), rows(0, COUNT))
    assert hashed == []
    flip(folder / shard_name(2))
    hashed = forget(monkeypatch)
    with pytest.raises(UserError, match="shard-00002.*missing or damaged"):
        open_store(folder, "store", IDENTITY)
    assert len(hashed) == 1
    (memory,) = (tmp_path / "home" / "verified").iterdir()
    memory.write_text("[not JSON")
    flip(folder / shard_name(2))
    hashed = forget(monkeypatch)
    assert len(open_store(folder, "store", IDENTITY)) == COUNT
    assert len(hashed) == count


def test_small_stores_are_not_remembered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(digests, "_UNSETTLED_NS", -(10**18))
    open_store(folder, "store", IDENTITY)
    assert not (tmp_path / "home").exists()
