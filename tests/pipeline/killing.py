"""Trainings that are killed at chosen commits, and the content of a run."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.pipeline import tiny as harness


def _until(commit: int, work: Callable[..., object], words: Sequence[object]) -> None:
    torch.set_num_threads(1)
    harness._die_at_commit(commit, after=commit % 2 == 0)
    work(*words)


def kill_at(commits: Sequence[int], work: Callable[..., object], *words: object) -> None:
    """Do the work in one new process for each commit, and kill it there.

    Args:
        commits: even ones are killed after the rename, odd ones before it.
        work: a function of a module, which resumes what it finds.
        words: its arguments, such as can be sent to another process.
    """
    for commit in commits:
        process = harness.FORKSERVER.Process(target=_until, args=(commit, work, words))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL


def content(folder: Path) -> dict[str, Any]:
    """Read everything in a run except times."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k != "seconds"}
        return [plain(v) for v in value] if isinstance(value, list) else value

    files: dict[str, Any] = {}
    for path in folder.rglob("*.*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.suffix in (".safetensors", ".png", ".yaml"):
            files[name] = path.read_bytes()
    files["flow.json"] = plain(json.loads((folder / "flow.json").read_text()))
    return files


def assert_same_content(killed: Path, whole: Path) -> None:
    """Check that two runs have the same bytes."""
    expected, actual = content(whole), content(killed)
    assert sorted(actual) == sorted(expected)
    assert [name for name in expected if actual[name] != expected[name]] == []
