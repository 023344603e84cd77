"""Assets: total failure, files put by hand, damaged caches, full disks, several processes."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.assets.fetch import fetch_asset, install_asset
from pipeline.errors import JkoflowError, UserError
from pipeline.storage.paths import data_root
from tests.pipeline.asset_server import HALF, THING, Recorder, check_whole, thing, url, wait_until


def test_failure_of_all_mirrors_names_each_and_a_remedy(tmp_path, server):
    server.plan = ["404"]
    mirrors = (url(server), Recorder("npm package a@1", "npm is not installed"))
    with pytest.raises(JkoflowError) as caught:
        install_asset(thing(*mirrors), tmp_path)
    by_hand = tmp_path / "assets" / "thing" / "by-hand"
    assert str(caught.value) == (
        f"the thing could not be fetched from any mirror: {by_hand} (it does not exist); "
        f"{server.base}thing.bin (HTTP 404 Not Found); npm package a@1 (npm is not "
        f"installed); put thing.bin into {by_hand} and try again"
    )
    assert not isinstance(caught.value, UserError)  # nothing the caller did
    by_hand.mkdir()
    (by_hand / "thing.bin").write_bytes(THING)
    install_asset(thing(*mirrors), tmp_path)
    assert mirrors[1].calls == 1
    check_whole(tmp_path)


@pytest.mark.parametrize("form", ["file", "folder", "tgz", "zip", "folder of tgz"])
def test_a_local_file_folder_or_archive_is_read(tmp_path, form):
    inside = tmp_path / "in" / "deep" / "er"
    inside.mkdir(parents=True)
    (inside / "thing.bin").write_bytes(THING)
    local = inside / "thing.bin"
    if form == "folder":
        local = tmp_path / "in"
    elif form != "file":
        archive = shutil.make_archive(
            str(tmp_path / "arc" / "hive"), "zip" if form == "zip" else "gztar", tmp_path / "in"
        )
        local = Path(archive).parent if form == "folder of tgz" else Path(archive)
    unused = Recorder("unused")
    install_asset(thing(unused), tmp_path / "root", local=local)
    assert unused.calls == 0
    check_whole(tmp_path / "root")


def test_a_wrong_local_path_is_a_user_error(tmp_path):
    unused = Recorder("unused")
    with pytest.raises(UserError, match="absent does not exist"):
        install_asset(thing(unused), tmp_path, local=tmp_path / "absent")
    (tmp_path / "thing.bin").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"thing.bin is not the thing: .*content"):
        install_asset(thing(unused), tmp_path, local=tmp_path / "thing.bin")
    (tmp_path / "broken.tgz").write_bytes(gzip.compress(THING)[:1000])
    with pytest.raises(UserError, match="broken.tgz is damaged"):
        install_asset(thing(unused), tmp_path, local=tmp_path / "broken.tgz")
    assert unused.calls == 0


def test_an_unknown_asset_is_a_user_error():
    with pytest.raises(UserError, match="'svhn' is unknown; choose .*mnist, cifar10, inception"):
        fetch_asset("svhn")


# The cache


def test_a_stored_asset_needs_no_mirror_and_logs_nothing(tmp_path, server):
    install_asset(thing(url(server)), tmp_path)
    never, said = Recorder("never"), []
    install_asset(thing(never), tmp_path, log=said.append)
    assert (never.calls, said) == (0, [])


@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing", "manifest", "other edition"])
def test_a_damaged_asset_is_fetched_again(tmp_path, server, harm):
    install_asset(thing(url(server)), tmp_path)
    folder = tmp_path / "assets" / "thing"
    stored, manifest = folder / "stored.bin", folder / "manifest.json"
    if harm == "truncated":
        os.truncate(stored, len(THING) - 1)
    elif harm == "flipped":
        data = bytearray(THING)
        data[1_000_000] ^= 4
        stored.write_bytes(data)
    elif harm == "missing":
        stored.unlink()
    elif harm == "manifest":
        manifest.write_bytes(manifest.read_bytes()[:40])
    else:
        text = manifest.read_text().replace(hashlib.sha256(THING).hexdigest(), "0" * 64, 1)
        manifest.write_text(text)
    said: list[str] = []
    install_asset(thing(url(server)), tmp_path, log=said.append)
    assert "cannot be used and are fetched again" in said[0]
    assert len(server.asked) == 2
    check_whole(tmp_path)


@pytest.mark.parametrize("when", ["downloading", "storing"])
def test_a_full_disk_is_one_sentence_and_stores_no_asset(tmp_path, server, monkeypatch, when):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    never = Recorder("never")
    with monkeypatch.context() as patched:
        target = "pipeline.assets.download._copy" if when == "downloading" else "os.fsync"
        patched.setattr(target, refuse)
        with pytest.raises(JkoflowError, match="No space left on device.*free some space"):
            install_asset(thing(url(server), never), tmp_path)
    assert never.calls == 0, "another mirror would not help"
    assert not (tmp_path / "assets" / "thing" / "manifest.json").exists()
    install_asset(thing(url(server)), tmp_path)
    check_whole(tmp_path)


def test_a_data_root_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "root").write_bytes(b"")
    with pytest.raises(JkoflowError, match="set JKOFLOW_HOME to another folder"):
        install_asset(thing(Recorder("a")), tmp_path / "root")


def test_data_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "home"))
    assert data_root() == tmp_path / "home"
    monkeypatch.delenv("JKOFLOW_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_root().name == "jkoflow"


# Several processes

CHILD = """
import sys
sys.path.insert(0, {repository!r})
from pathlib import Path
from tests.pipeline.asset_server import thing
from pipeline.assets.fetch import install_asset
from pipeline.assets.mirrors import web_files
print("ready", flush=True)
install_asset(thing(web_files({base!r}, "thing.bin")), Path({root!r}))
"""


def start_child(root: Path, base: str) -> subprocess.Popen[str]:
    repository = str(Path(__file__).resolve().parents[3])
    code = CHILD.format(repository=repository, base=base, root=str(root))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_fetch_once(tmp_path, server):
    server.plan = ["stall"]
    children = [start_child(tmp_path, server.base) for _ in range(2)]
    # Both are under way and one waits for the other, before the first answer goes on.
    said = {child: child.stdout.readline() for child in children}
    assert set(said.values()) == {"ready\n"}
    wait_until(lambda: len(server.asked) == 1)
    server.released.set()
    for child in children:
        said[child] += child.communicate(timeout=60)[0]
        assert child.returncode == 0
    assert server.asked == [None, f"bytes={HALF}-"]
    assert sum("fetched from" in text for text in said.values()) == 1
    check_whole(tmp_path)


def test_a_download_resumes_after_its_process_was_killed(tmp_path, server):
    server.plan = ["stall"]
    child = start_child(tmp_path, server.base)
    wait_until(lambda: any(p.stat().st_size >= HALF // 2 for p in tmp_path.rglob("*.part")))
    child.send_signal(signal.SIGKILL)
    child.communicate()
    (part,) = tmp_path.rglob("*.part")
    got = part.stat().st_size
    install_asset(thing(url(server)), tmp_path)
    assert server.asked == [None, f"bytes={got}-"]
    check_whole(tmp_path)
