"""One process at a time writes a folder, and the lock of a dead one is taken over."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import JkoflowError
from pipeline.storage import lock
from tests.pipeline.tiny import World, say

ROOT = Path(__file__).parents[3]
COUNT = """
import sys, time
from pathlib import Path
from pipeline.storage.lock import locked
folder = Path(sys.argv[1])
for _ in range(5):
    with locked(folder, "the run at", wait=lambda _: None):
        number = int((folder / "number").read_text())
        time.sleep(0.002)
        (folder / "number").write_text(str(number + 1))
"""
HOLD = """
import sys, time
from pathlib import Path
from pipeline.storage.lock import locked
with locked(Path(sys.argv[1]), "the run at"):
    print("held", flush=True)
    time.sleep(60)
"""


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("links", [True, False])
def test_processes_take_turns(folder: Path, links: bool) -> None:
    (folder / "number").write_text("0")
    code = COUNT if links else f"import os\ndel os.link\n{COUNT}"
    code = code.replace("del os.link", "def link(*_): raise OSError(95, 'no')\nos.link = link")
    processes = [start(code, folder) for _ in range(6)]
    assert [process.wait() for process in processes] == [0] * 6
    assert (folder / "number").read_text() == "30"
    assert [path.name for path in folder.parent.iterdir()] == ["run"]


def test_the_second_ends_with_a_sentence_until_the_first_is_dead(folder: Path) -> None:
    holder = start(HOLD, folder)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    owner = f"is in use by process {holder.pid} on .* for [0-9]+ s; wait for its end"
    with pytest.raises(JkoflowError, match=owner):
        with lock.locked(folder, "the run at"):
            pass
    holder.kill()
    while not lock.has_ended(holder.pid):  # it is dead, though its parent has not noticed yet
        time.sleep(0.01)
    with lock.locked(folder, "the run at"):
        with lock.locked(folder, "the run at"):  # again, in the same process
            pass
        assert lock.lock_file(folder).is_file()
    assert not lock.lock_file(folder).exists()
    assert holder.wait() != 0


def owner(**changes: Any) -> str:
    return json.dumps({**lock._owner(os.getppid()), **changes})


def test_whose_lock_is_stale(folder: Path) -> None:
    path = lock.lock_file(folder)
    for text, age, stale in (
        (owner(), 0, False),  # the parent of this process runs
        (owner(start="1"), 0, True),  # another process has its number now
        (owner(pid=2**22 + 1), 0, True),
        (owner(host="elsewhere"), 10, False),
        (owner(space="pid:[1]", pid=2**22 + 1), 10, False),  # a container of the same name
        (owner(space="pid:[1]", pid=2**22 + 1), 1000, True),
        (owner(host="elsewhere"), 1000, True),
        ("damaged", 10, False),
        ("damaged", 1000, True),
    ):
        path.write_text(text)
        os.utime(path, (time.time() - age,) * 2)
        try:
            with lock.locked(folder, "the run at"):
                assert stale, text
        except JkoflowError as error:
            assert not stale and str(error).startswith("the run at")
        path.unlink(missing_ok=True)
    assert platform.node() == lock._owner(1)["host"]


def test_folders_of_exports_and_benchmarks_have_one_writer(
    trained: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, out = trained.root / "run", tmp_path / "out"
    lock.lock_file(out).write_text(json.dumps(lock._owner(1)))
    for words in (
        ("export", "-r", run, "--out", out),
        ("bench", "toy2d", "--budget", "100batches", "-r", out),
        ("train", "-c", trained.config(), "-r", out),
    ):
        code, _, line = say(capsys, *words)
        assert code == 1 and "in use by process 1 on" in line
    assert not out.exists()


def test_pictures_are_written_by_one_process_after_the_other(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, words = tmp_path / "images", ("generate", "-r", run, "-n", "4")
    holder = start(HOLD, folder)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    threading.Timer(1.0, holder.kill).start()
    code, _, _ = say(capsys, *words, "--images", folder, "--out", tmp_path / "grid.png")
    assert code == 0 and holder.wait() != 0
    assert len(list(folder.iterdir())) == 4


def test_the_owner_touches_its_lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other hosts would take over a lock that was not touched for minutes."""
    monkeypatch.setattr(lock, "_TOUCH_SECONDS", 0.01)
    path = lock.lock_file(folder)
    with lock.locked(folder, "the run at"):
        os.utime(path, (0, 0))
        end = time.time() + 10
        while path.stat().st_mtime < end - 60 and time.time() < end:
            time.sleep(0.01)
        assert path.stat().st_mtime > end - 60


def test_a_lock_that_another_has_just_taken_over_is_put_back(folder: Path) -> None:
    path = lock.lock_file(folder)
    path.write_text(owner(pid=2**22 + 1))
    stale = lock._read(path)
    assert stale is not None
    path.write_text(owner())  # a second process was faster
    lock._remove(path, stale)
    assert json.loads(path.read_text())["pid"] == os.getppid()
    assert [each.name for each in folder.parent.iterdir() if each != folder] == [path.name]


def test_a_lock_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    lock.lock_file(tmp_path / "a").mkdir()  # root can read any file
    with (
        pytest.raises(JkoflowError, match="is in use by another process for "),
        lock.locked(tmp_path / "a", "the run at"),
    ):
        raise AssertionError("the lock was taken")
