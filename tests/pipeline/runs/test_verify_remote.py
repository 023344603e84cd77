"""A cache at an address has the faults of its local folder, and no file of it is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from pipeline.errors import UserError
from pipeline.runs import verify_remote
from pipeline.runs.verify import verify
from pipeline.storage import atomic
from pipeline.storage.shards.local_copies import FOLDER
from pipeline.storage.shards.writer import StoreWriter
from tests.pipeline.tiny import say

MANIFEST, SHARD, RECIPE = "manifest.json", "shard-00001.safetensors", "recipe.yaml"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A complete cache of three shards with a recipe."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "copies"))
    writer = StoreWriter(tmp_path / "store", {"kind": "numbers"}, 20, 8)
    for index in writer.missing():
        first, last = writer.bounds(index)
        writer.write(index, {"x": torch.arange(first, last).double()})
    place = writer.finish().folder
    atomic.write_bytes(place / RECIPE, b"name: numbers\n")
    return place


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Iterator[Any]:
    """A function that copies the cache, as it is, to an address of a file system."""
    system = fsspec.filesystem(request.param)
    root = "/bucket/store" if request.param == "memory" else str(tmp_path / "bucket" / "store")

    def copy() -> str:
        if system.exists(root):
            system.rm(root, recursive=True)
        system.put(str(folder), root, recursive=True)
        return f"{request.param}://{root.lstrip('/') if request.param == 'memory' else root}"

    yield copy
    system.rm(root, recursive=True)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damaged", [(), (SHARD,), (MANIFEST,), (RECIPE,), (SHARD, RECIPE)])
@pytest.mark.parametrize("missing", [(), ("shard-00002.safetensors",), (MANIFEST,)])
def test_faults_are_those_of_the_folder(
    folder: Path, url: Any, tmp_path: Path, damaged: tuple[str, ...], missing: tuple[str, ...]
) -> None:
    for name in damaged:
        damage(folder / name)
    for name in missing:
        (folder / name).unlink()
    place = url()
    expected = {(fault.path.name, fault.problem) for fault in verify(folder)}
    if missing == (MANIFEST,):  # without which a folder is no cache
        expected |= {(MANIFEST, "missing")}
    faults = [(fault.address.removeprefix(f"{place}/"), fault.problem) for fault in verify(place)]
    assert set(faults) == expected
    assert len(faults) == len(expected) and (expected or not (damaged or missing))
    assert not (tmp_path / "copies").exists()


def test_a_shard_of_another_manifest_is_damaged(folder: Path, url: Any) -> None:
    """Its content was written by this cache, but the manifest and so a reader wants another."""
    other = (folder / "shard-00000.safetensors").read_bytes()
    atomic.write_bytes(folder / SHARD, other)  # the seal has both
    (fault,) = verify(url())
    assert str(fault).startswith(fault.address) and fault.address.endswith(SHARD)


def test_memory_holds_a_piece_of_a_file(
    folder: Path, url: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_remote, "_CHUNK", 7)
    assert verify(url()) == []


def test_places_without_a_cache_are_an_error(
    folder: Path, url: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = url()
    for absent in (f"{place}-other", place.rpartition("/")[0]):
        with pytest.raises(UserError, match="has no SHA256SUMS; expected the address of one"):
            verify(absent)
    with pytest.raises(UserError, match="nothing://bucket cannot be read"):
        verify("nothing://bucket")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("no credentials")

    system = type(fsspec.core.url_to_fs(place)[0])
    monkeypatch.setattr(system, "open", refuse)
    with pytest.raises(UserError, match=r"cannot be read \(no credentials\)"):
        verify(place)


def test_names_of_a_seal_that_leave_its_folder_are_not_read(folder: Path, url: Any) -> None:
    lines = "".join(f"{'0' * 64}  {name}\n" for name in ("../secret", "/etc/hostname"))
    seal = folder / "SHA256SUMS"
    seal.write_text(seal.read_text() + lines)
    (folder.parent / "secret").write_text("secret")
    assert verify(url()) == []


def test_the_command(capsys: pytest.CaptureFixture[str], folder: Path, url: Any) -> None:
    place = url()
    assert say(capsys, "verify", place)[::2] == (0, "every file is whole")
    damage(folder / SHARD)
    code, out, last = say(capsys, "verify", url())
    assert (code, last) == (1, "error: 1 file is broken; see the list above")
    assert out == f"{place}/{SHARD} is damaged; {verify_remote.FETCH_AGAIN}\n"
    for option in ("--repair", "--seal"):
        code, _, last = say(capsys, "verify", place, option)
        assert code == 2 and last.startswith(f"error: {place} is an address")
