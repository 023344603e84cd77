"""The commit protocol: what has the final name is whole, whatever happened."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import JkoflowError, UserError
from pipeline.storage import atomic


def in_child(work: Callable[[], None]) -> int:
    """Fork, run `work` in the child and end it; returns its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(17)
    return pid


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never happened")


def temporaries(folder: Path) -> list[Path]:
    return list(folder.glob(f"{atomic.TEMPORARY_PREFIX}*"))


def test_write_returns_the_sha256_of_the_file(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    digest = atomic.write_with(path, lambda f: [f.write(b"one "), f.write(memoryview(b"two"))])
    assert path.read_bytes() == b"one two"
    assert digest == hashlib.sha256(b"one two").hexdigest() == atomic.sha256_file(path)
    assert temporaries(path.parent) == []
    atomic.verify_file(path, digest)


def test_numpy_writes_to_the_stream(tmp_path):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    digest = atomic.write_with(tmp_path / "a.npy", lambda f: np.lib.format.write_array(f, array))
    assert np.array_equal(np.load(tmp_path / "a.npy"), array)
    assert digest == atomic.sha256_file(tmp_path / "a.npy")


def test_tensors_are_read_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    tensors = {"a": torch.randn(5, 3).t(), "b": torch.tensor([1, -2])}
    tensors["c"] = torch.tensor(0.1).bfloat16()
    digest = atomic.write_tensors(tmp_path / "t.safetensors", tensors, {"k": "v"})
    back = atomic.read_tensors(tmp_path / "t.safetensors", digest)
    assert {k: (v.dtype, v.tolist()) for k, v in back.items()} == {
        k: (v.dtype, v.tolist()) for k, v in tensors.items()
    }


def test_json_is_read_back_and_has_no_nan(tmp_path):
    atomic.write_json(tmp_path / "j", {"a": [1, 0.1, None]})
    assert atomic.read_json(tmp_path / "j", "thing") == {"a": [1, 0.1, None]}
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(tmp_path / "k", {"fid": float("nan")})
    assert not (tmp_path / "k").exists()


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty", "missing", "foreign"])
def test_a_damaged_file_is_named(tmp_path, harm):
    path = tmp_path / "t.safetensors"
    digest = atomic.write_tensors(path, {"a": torch.arange(1000.0)})
    data = bytearray(path.read_bytes())
    if harm == "truncated":
        path.write_bytes(data[:-7])
    elif harm == "flipped":
        data[2000] ^= 1
        path.write_bytes(data)
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "missing":
        path.unlink()
    else:
        atomic.write_tensors(path, {"a": torch.arange(1000.0) + 1})
    with pytest.raises(UserError, match="t.safetensors"):
        atomic.read_tensors(path, digest)
    if harm in ("truncated", "empty", "missing"):  # seen even without the sha256
        with pytest.raises(UserError, match="t.safetensors"):
            atomic.read_tensors(path)


def test_damaged_or_absent_json_is_named(tmp_path):
    (tmp_path / "half").write_text('{"a": ')
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("half", "binary", "absent"):
        with pytest.raises(UserError, match=name):
            atomic.read_json(tmp_path / name, "manifest")


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_a_failed_write_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    atomic.write_bytes(path, b"old")

    def fill(file):
        file.write(b"half of the n")
        raise error

    with pytest.raises(type(error)):
        atomic.write_with(path, fill)
    assert path.read_bytes() == b"old"
    assert temporaries(tmp_path) == []


def test_a_killed_write_keeps_the_old_file_and_its_rest_is_removed(tmp_path):
    path = tmp_path / "file"
    atomic.write_bytes(path, b"old")

    def fill(file):
        for _ in range(50):
            file.write(bytes(1 << 16))
        (tmp_path / "half-way").touch()
        signal.pause()

    pid = in_child(lambda: atomic.write_with(path, fill))
    wait_until((tmp_path / "half-way").exists)
    assert atomic.remove_temporaries(tmp_path) == 0, "its writer is alive"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert path.read_bytes() == b"old"
    (left,) = temporaries(tmp_path)
    assert left.stat().st_size >= 49 << 16
    assert atomic.remove_temporaries(tmp_path) == 1
    assert temporaries(tmp_path) == []
    atomic.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_write_killed_at_any_moment_leaves_one_version(tmp_path):
    path = tmp_path / "file"
    versions = [bytes([i]) * (300_000 + i) for i in range(4)]
    allowed = {hashlib.sha256(v).hexdigest() for v in versions}
    atomic.write_bytes(path, versions[0])

    def overwrite_for_ever():
        while True:
            for version in versions:
                atomic.write_bytes(path, version)
                (tmp_path / "running").touch()

    moments = random.Random(0)
    for _ in range(25):
        (tmp_path / "running").unlink(missing_ok=True)
        pid = in_child(overwrite_for_ever)
        wait_until((tmp_path / "running").exists)
        time.sleep(moments.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert atomic.sha256_file(path) in allowed
    atomic.remove_temporaries(tmp_path)
    assert temporaries(tmp_path) == []


def test_a_file_beyond_the_size_limit_is_an_error(tmp_path):
    """The kernel refuses in the middle of the file, as a full disk does."""
    path = tmp_path / "file"
    atomic.write_bytes(path, b"old")

    def try_to_write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            atomic.write_bytes(path, bytes(3 << 20))
        except JkoflowError as error:
            os._exit(3 if "File too large" in str(error) and str(path) in str(error) else 4)

    _, status = os.waitpid(in_child(try_to_write), 0)
    assert os.waitstatus_to_exitcode(status) == 3
    assert path.read_bytes() == b"old"
    assert temporaries(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    real = open
    monkeypatch.setattr(atomic, "open", lambda _, mode: real("/dev/full", mode), raising=False)
    with pytest.raises(JkoflowError, match=r"could not be written \(No space left on device\)"):
        atomic.write_bytes(tmp_path / "file", b"some bytes")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_sync_is_one_sentence(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    atomic.write_bytes(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(JkoflowError, match="No space left"):
        atomic.write_bytes(tmp_path / "file", b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_a_file_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    """A rename may reach the disk before the data does, unless the data was synced first."""
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    atomic.write_bytes(tmp_path / "file", b"x")
    assert order == ["sync", "rename", "sync"]  # the file, its name, the folder


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for name in ("file/below", "file/far/below", "x" * 300):
        with pytest.raises(UserError, match="could not be written"):
            atomic.write_bytes(tmp_path / name, b"x")


def test_a_scratch_folder_goes_with_its_block_or_process(tmp_path):
    with atomic.scratch_folder(tmp_path) as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "file").write_bytes(b"x")
        assert temporaries(tmp_path) == [folder]
        with atomic.scratch_folder(tmp_path) as other:
            assert other != folder and other.is_dir()
        assert folder.is_dir()  # its process runs
        atomic.discard_temporaries()  # as a signal does
        assert not folder.exists()

    def die():
        with atomic.scratch_folder(tmp_path) as mine:
            (mine / "file").write_bytes(b"x")
            os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(in_child(die), 0)
    assert len(temporaries(tmp_path)) == 1
    with atomic.scratch_folder(tmp_path) as folder:
        assert temporaries(tmp_path) == [folder]
    assert list(tmp_path.iterdir()) == []


def test_temporaries_of_other_machines_are_kept_for_a_day(tmp_path):
    other = tmp_path / f"{atomic.TEMPORARY_PREFIX}shard-1.safetensors-0123abcd-1-89abcdef"
    odd = tmp_path / f"{atomic.TEMPORARY_PREFIX}x"
    for path in (other, odd):
        path.write_bytes(b"")
    (tmp_path / "other").write_bytes(b"")
    assert atomic.remove_temporaries(tmp_path) == 0
    old = time.time() - 25 * 3600
    for path in (other, odd, tmp_path / "other"):
        os.utime(path, (old, old))
    assert atomic.remove_temporaries(tmp_path) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"other", odd.name}  # not of our making
    assert atomic.remove_temporaries(tmp_path / "absent") == 0


def test_a_killed_command_leaves_no_temporary_for_ever(tmp_path: Path) -> None:
    """The next command that writes in the folder sweeps it; files of running processes stay."""
    ended, alive = 2**22 + 1, os.getppid()
    for pid in (ended, alive):
        (tmp_path / f".tmp-x.png-{atomic._HOST}-{pid}-{'0' * 8}").touch()
    atomic.write_bytes(tmp_path / "x.png", b"x")
    assert [path.name.split("-")[3] for path in tmp_path.glob(".tmp-*")] == [str(alive)]
