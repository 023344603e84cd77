"""Stores that should not be trusted are refused, and what was verified is remembered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.integrity import digests
from pipeline.storage import atomic
from pipeline.storage.shards import opening
from pipeline.storage.shards.manifest import shard_name
from pipeline.storage.shards.opening import find_similar_stores, open_store
from pipeline.storage.shards.writer import StoreWriter
from tests.pipeline.storage.shards.stores import COUNT, IDENTITY, SHARD, flip, rows, write


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
    monkeypatch.setattr(opening, "WORTH_REMEMBERING", 0)
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
