"""Archives, and package registries whose clients are played by scripts."""

from __future__ import annotations

import io
import os
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from pipeline.assets.archives import find_files
from pipeline.assets.download import DamagedError
from pipeline.assets.fetch import install_asset
from pipeline.assets.mirrors import npm_package, pypi_wheel
from pipeline.errors import JkoflowError
from tests.pipeline.asset_server import THING, check_whole, thing


def test_files_of_an_archive_stay_in_the_scratch_folder(tmp_path):
    archive = tmp_path / "a" / "evil.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as tar:
        for name in ("../../thing.bin", "/etc/other", "../sneaky"):
            entry = tarfile.TarInfo(name)
            entry.size = 4
            tar.addfile(entry, io.BytesIO(b"evil"))
    scratch = tmp_path / "b" / "scratch"
    scratch.mkdir(parents=True)
    actual = find_files(archive, ["thing.bin"], scratch)
    assert actual["thing.bin"].parent == scratch
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {"a/evil.tar", "b/scratch/unpacked-thing.bin"}


def test_a_damaged_archive_next_to_whole_files(tmp_path):
    (tmp_path / "other.zip").write_bytes(b"junk")
    with pytest.raises(DamagedError, match=r"other.zip is damaged"):
        find_files(tmp_path, ["thing.bin"], tmp_path / "scratch")
    (tmp_path / "thing.bin").write_bytes(b"whole")
    names = ["thing.bin", "thing.bin.gz"]  # either would do
    files = find_files(tmp_path, names, tmp_path / "scratch")
    assert files == {"thing.bin": tmp_path / "thing.bin"}


@pytest.mark.parametrize("offset", [90, 2**31])
def test_a_member_outside_its_archive_is_damage(tmp_path, offset):
    """A directory that claims another place moves all members before the file."""
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("thing.bin", b"content")
    data = bytearray(archive.read_bytes())
    end = data.rindex(b"PK\x05\x06")  # the record whose bytes 16 to 20 are this place
    assert int.from_bytes(data[end + 16 : end + 20], "little") < offset
    data[end + 16 : end + 20] = offset.to_bytes(4, "little")
    archive.write_bytes(data)
    with pytest.raises(DamagedError, match=r"a.zip is damaged"):
        find_files(archive, ["thing.bin"], tmp_path)


def play(folder: Path, name: str, script: str) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_missing_npm_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(JkoflowError, match=r"npm package a@1 \(npm is not installed\)"):
        install_asset(thing(npm_package("a@1")), tmp_path)


def test_the_archive_of_npm_pack_is_read(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "thing.bin").write_bytes(THING)
    archive = shutil.make_archive(str(tmp_path / "packed"), "gztar", tmp_path, "package")
    script = f'[ "$1 $2" = "pack thing@1.0" ] && cp {archive} thing-1.0.tgz'
    play(tmp_path / "bin", "npm", script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    install_asset(thing(npm_package("thing@1.0")), tmp_path)
    check_whole(tmp_path)


def test_the_error_line_of_a_client_is_the_reason(tmp_path, monkeypatch):
    said = "npm ERR! code E404\\nnpm ERR! A complete log of this run is in: /x/_logs/y"
    play(tmp_path / "bin", "npm", f"printf '{said}' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    pip = play(
        tmp_path / "bin",
        "python",
        "echo WARNING: NewConnectionError >&2; echo ERROR: no match >&2; exit 1",
    )
    monkeypatch.setattr(sys, "executable", pip)
    with pytest.raises(JkoflowError) as caught:
        install_asset(thing(npm_package("a@1"), pypi_wheel("b==2")), tmp_path)
    assert "npm package a@1 (npm ERR! code E404)" in str(caught.value)
    assert "PyPI package b==2 (ERROR: no match)" in str(caught.value)
    assert "\n" not in str(caught.value)
