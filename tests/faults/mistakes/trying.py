"""Runs the cases in children that have imported everything, in empty working directories.

A case may leave no file there.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from pipeline.cli import main
from tests.faults.mistakes.cases import Case, cases
from tests.faults.table import Table
from tests.pipeline.glance import stand_in
from tests.pipeline.tiny import FORKSERVER, World

#: of the processor, after the imports
SECONDS = 5.0
RESULTS = (
    "one sentence",
    "accepted",
    "other exit code",
    "other words",
    "too slow",
    "leaves files",
)


def try_all(
    every: Sequence[Case], world: World, root: Path, table: Table, say: Any = print
) -> None:
    """Run the cases; count their ends by verb."""
    before = {path: path.stat().st_mtime_ns for path in world.root.rglob("*") if path.is_file()}
    for number, case in enumerate(every):
        here = root / f"here-{number}"
        here.mkdir(parents=True)
        said = root / "said"
        said.write_text("")
        process: Any = FORKSERVER.Process(
            target=_run, args=(case.words, world.environment, here, said)
        )
        process.start()
        process.join(200 * SECONDS)  # of the clock, on a core that others may share
        if process.is_alive():
            process.kill()
            process.join()
        result, reason = _judge(
            process.exitcode,
            said.read_text(),
            [path for path in here.rglob("*") if path.is_file()],
        )
        table.add(case.verb, result)
        table.add(case.verb, "commands")
        if result != "one sentence":
            say(f"{result}: {' '.join(case.words)} ({case.mistake}): {reason}")
        shutil.rmtree(here)
    after = {path: path.stat().st_mtime_ns for path in world.root.rglob("*") if path.is_file()}
    for path in sorted({*before, *after}):
        if before.get(path) != after.get(path) and not {"file-index", "assets"} & {*path.parts}:
            say(f"changed: {path}")


def _judge(code: int | None, said: str, left: list[Path]) -> tuple[str, str]:
    lines = said.splitlines()
    seconds = float(lines[0]) if lines else float("inf")
    errors = [line for line in lines if line.startswith("error: ")]
    if seconds > SECONDS:
        return "too slow", f"{seconds:.1f} s, {code}"
    if code == 0:
        return "accepted", ""
    if code != 2:
        return "other exit code", f"{code} {said[-300:]}"
    if (
        len(errors) != 1
        or lines[-1] != errors[0]
        or "Traceback" in said
        or not 20 < len(errors[0]) < 2000
    ):
        return "other words", said[-300:]
    if left:
        return "leaves files", str(left[:3])
    return "one sentence", errors[0]


def _run(words: Sequence[str], env: dict[str, str], here: Path, said: Path) -> None:
    """Run a command in this child; write its seconds of the processor and its errors."""
    os.environ.update(env, HF_HUB_OFFLINE="1")
    os.chdir(here)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    if words[0] != "metrics":  # which has another way to Inception, with all its features
        stand_in(pytest.MonkeyPatch())
    errors, begun = io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = main.main(words)
    said.write_text(f"{time.process_time() - begun:.2f}\n{errors.getvalue()}")
    os._exit(code)


def mistake(root: Path, count: int, seed: int, world: World, run: Path, table: Table) -> None:
    """Run some cases, chosen by a seed; all if there are fewer.

    Args:
        root: a new folder.
        count: number of cases.
        seed: of the choice.
        world: has a cache.
        run: a finished run of it.
        table: gets the counts.
    """
    every = list(cases(root / "files", world, run))
    chosen = every if count >= len(every) else random.Random(seed).sample(every, count)
    try_all(chosen, world, root, table)
