"""Stores at an address: the samples of a local reader, within the bound, and verified."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.storage import atomic
from pipeline.storage.shards.local_copies import BOUND, bound
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.shards.remote import (
    RemoteStoreReader,
    find_remote_store,
    open_remote_store,
)
from tests.pipeline.storage.shards.stores import REMOTE_COUNT as COUNT


def size_of_shard(local: StoreReader) -> int:
    return (local.folder / "shard-00000.safetensors").stat().st_size


def hold(monkeypatch: pytest.MonkeyPatch, shards: float, local: StoreReader) -> int:
    """Set the bound to a number of shards; return its bytes."""
    size = int(shards * size_of_shard(local))
    monkeypatch.setenv(BOUND, repr(size / 2**30))
    return bound()


def copies(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "copies").glob("*/*"))


def test_samples_are_those_of_a_local_reader(local: StoreReader, url: str) -> None:
    remote = open_remote_store(url, "store")
    assert len(remote) == COUNT and remote.place == url
    assert torch.equal(remote.read("x", 5, 41), local.read("x", 5, 41))
    rows = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    for name in ("x", "n"):
        assert torch.equal(remote.take(name, rows), local.take(name, rows))
        assert torch.equal(remote.field(name), local.field(name))
        assert torch.equal(remote.take(name, rows[:0]), local.take(name, rows[:0]))


@pytest.mark.parametrize("shards", [1, 2.5, 4])
def test_copies_stay_within_the_bound(
    local: StoreReader, url: str, tmp_path: Path, shards: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured whenever a file has been written, its temporary name included."""
    most, seen = hold(monkeypatch, shards, local), list[int]()
    write_with = atomic.write_with

    def write(path: Path, fill: object, sealed: bool = True) -> str:
        sha256 = write_with(path, fill, sealed)  # type: ignore[arg-type]
        total = 0
        for file in copies(tmp_path):
            with contextlib.suppress(FileNotFoundError):  # another thread has renamed it
                total += file.stat().st_size
        seen.append(total)
        return sha256

    monkeypatch.setattr(atomic, "write_with", write)
    remote, rng = open_remote_store(url, "store"), np.random.default_rng(0)
    for _ in range(20):
        rows = torch.from_numpy(rng.integers(0, COUNT, 6))
        assert torch.equal(remote.take("x", rows), local.take("x", rows))
    assert torch.equal(remote.field("n"), torch.arange(COUNT))
    assert max(seen) <= most and len(seen) > 20
    # as many whole shards as fit are kept
    assert sum(file.stat().st_size for file in copies(tmp_path)) > most - size_of_shard(local)


def test_a_copy_is_kept_for_the_next_process(
    local: StoreReader, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_remote_store(url, "store").field("x")
    monkeypatch.setattr(RemoteStoreReader, "_copy", None)
    assert torch.equal(open_remote_store(url, "store").field("x"), local.field("x"))


def test_a_damaged_copy_is_replaced(local: StoreReader, url: str, tmp_path: Path) -> None:
    """A process hashes a copy of an earlier one when it first uses it."""
    open_remote_store(url, "store").field("x")
    for path in copies(tmp_path)[:2]:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    assert torch.equal(open_remote_store(url, "store").field("x"), local.field("x"))


def test_a_damaged_shard_is_refused_at_its_first_use(
    local: StoreReader, url: str, tmp_path: Path
) -> None:
    memory = fsspec.filesystem("memory")
    path = "/bucket/store/shard-00002.safetensors"
    data = memory.cat_file(path)
    memory.pipe_file(path, data[:-1] + bytes([data[-1] ^ 1]))
    remote = open_remote_store(url, "store")
    assert torch.equal(remote.read("x", 0, 16), local.read("x", 0, 16))
    with pytest.raises(UserError, match=r"shard-00002\.safetensors of memory.* is damaged"):
        remote.take("x", torch.tensor([3, 17]))
    memory.rm(path)
    with pytest.raises(UserError, match=r"shard-00002\.safetensors of memory.* cannot be read"):
        remote.take("x", torch.tensor([17]))
    assert [path.name for path in copies(tmp_path)] == [
        "shard-00000.safetensors", "shard-00001.safetensors",
    ]  # fmt: skip


def test_two_readers_share_the_room_of_three_shards(
    local: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each removes copies that the other needs."""
    most = hold(monkeypatch, 3.2, local)
    wrong: list[object] = []

    def read(seed: int) -> None:
        remote = open_remote_store(local.folder.as_uri(), "store")
        rng = np.random.default_rng(seed)
        try:
            for _ in range(15):
                rows = torch.from_numpy(rng.integers(0, COUNT, 5))
                if not torch.equal(remote.take("n", rows), rows):
                    wrong.append(rows)
        except Exception as error:  # noqa: BLE001 - of the thread, for the assertion below
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sum(file.stat().st_size for file in copies(tmp_path)) <= most


def test_shards_are_checked_at_their_first_use(url: str) -> None:
    remote, checked = open_remote_store(url, "store"), list[int]()
    remote.check_shards(checked.append)
    assert checked == []
    remote.take("n", torch.tensor([0, 20]))
    remote.take("n", torch.tensor([1, 21, 50]))
    assert checked == [0, 2, 6]

    def refuse(index: int) -> None:
        raise ValueError(f"shard {index} has another shape")

    other = open_remote_store(url, "store")
    other.check_shards(refuse)
    with pytest.raises(UserError, match=r"does not describe its shards \(shard 3 has another"):
        other.take("n", torch.tensor([30]))


def test_mistakes_are_named(
    local: StoreReader, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    assert find_remote_store("memory://bucket/nothing", "store") is None
    for place in ("memory://bucket/nothing", "memory://nothing"):
        with pytest.raises(UserError, match="is absent or incomplete; expected manifest.json"):
            open_remote_store(place, "store")
    with pytest.raises(UserError, match=r"nosuch://x cannot be read \(Protocol not known"):
        open_remote_store("nosuch://x", "store")
    remote = open_remote_store(url, "store")
    hold(monkeypatch, 0.5, local)
    with pytest.raises(UserError, match="expected room for a shard of"):
        remote.take("n", torch.tensor([0]))
    for text in ("0", "-1", "much", "inf"):
        monkeypatch.setenv(BOUND, text)
        with pytest.raises(UserError, match=f"{BOUND} is '{text}'; expected a positive"):
            open_remote_store(url, "store")
    monkeypatch.delenv(BOUND)
    memory.pipe_file("/bucket/store/manifest.json", b"{}")
    with pytest.raises(UserError, match="manifest.json of store .* is damaged or foreign"):
        open_remote_store(url, "store")


@pytest.mark.usefixtures("no_credentials")
def test_a_bucket_without_credentials_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"s3://bucket/store cannot be read \(.*credentials"):
        open_remote_store("s3://bucket/store", "store")


def test_a_bucket_holds_a_store(
    local: StoreReader, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.mkdir("latents")
    s3.put(str(local.folder), "latents/store", recursive=True)
    hold(monkeypatch, 3, local)
    remote = open_remote_store("s3://latents/store", "store")
    rows = torch.randperm(COUNT, generator=torch.Generator().manual_seed(2))
    assert torch.equal(remote.take("x", rows), local.take("x", rows))
    assert find_remote_store("s3://latents/none", "store") is None
