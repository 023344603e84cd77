"""Reads malicious files, each in a child whose memory and seconds are measured.

A payload would create a file, whose name the test looks for.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import ImageFile

from tests.faults.strangers.archives import archives
from tests.faults.strangers.pickles import pickles
from tests.faults.strangers.pictures import pictures
from tests.faults.strangers.readers import readers_of
from tests.faults.strangers.stranger import Stranger
from tests.faults.table import Table
from tests.pipeline.tiny import FORKSERVER, World

SECONDS, BYTES = 10.0, 2 << 30
RESULTS = ("harmless", "payload ran", "written outside", "too slow", "too large", "other end")
#: of a payload; the readers' files lie in another folder
CANARY = "payload-ran"


def strangers(canary: Path) -> Iterator[Stranger]:
    """All malicious files; payloads would create `canary`."""
    yield from pickles(canary)
    yield from archives()
    yield from pictures()


def read_all(
    root: Path, count: int, seed: int, world: World, table: Table, say: Any = print
) -> None:
    """Make malicious files and read them; count the ends by kind.

    Args:
        root: a new folder.
        count: number of files, chosen by a seed; all if there are fewer.
        seed: of the choice.
        world: its environment is used.
        table: gets the counts.
        say: receives a line for every end that must not be.
    """
    root.mkdir(parents=True)
    canary, victim, said = root / CANARY, root / "victim", root / "said"
    victim.mkdir()
    outside = [root / "outside.png", root / "outside", Path("/tmp/jkoflow-outside.png")]
    every = list(strangers(canary))
    if count < len(every):
        every = random.Random(seed).sample(every, count)
    for number, stranger in enumerate(every):
        folder = root / f"{number}" / "files"
        folder.mkdir(parents=True)
        path = folder / stranger.name.replace(" ", "-")
        stranger.make(path)
        said.write_text("")
        before = {p for p in root.rglob("*") if not p.is_relative_to(folder)}
        env = {**world.environment, "JKOFLOW_HOME": str(folder / "home")}
        process: Any = FORKSERVER.Process(target=_read, args=(stranger.kind, path, env, said))
        process.start()
        process.join(60 * SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        result, reason = _judge(process.exitcode, said.read_text())
        new = {p for p in root.rglob("*") if not p.is_relative_to(folder)} - before
        if canary.exists() or not victim.is_dir():
            result = "payload ran"
            canary.unlink(missing_ok=True)
            victim.mkdir(exist_ok=True)
        elif new or any(os.path.lexists(p) for p in outside):
            result, reason = "written outside", str([*new, *outside][:4])
        table.add(stranger.kind, "files")
        table.add(stranger.kind, result)
        if result != "harmless":
            say(f"{result}: {stranger.kind} {stranger.name}: {reason}")
        shutil.rmtree(folder.parent)


def _judge(code: int | None, said: str) -> tuple[str, str]:
    lines = said.splitlines()
    if code != 0 or not lines:
        return "other end", f"exit code {code}: {said[-300:]}"
    seconds, size = (float(word) for word in lines[0].split())
    if lines[1:]:
        return "other end", lines[1][:300]
    if seconds > SECONDS:
        return "too slow", f"{seconds:.1f} s"
    if size > BYTES:
        return "too large", f"{size / 2**30:.1f} GiB"
    return "harmless", f"{seconds:.1f} s, {size / 2**20:.0f} MiB"


def _read(kind: str, path: Path, env: dict[str, str], said: Path) -> None:
    """Read a file in this child; write the slowest reader's seconds, memory, and other ends."""
    from pipeline.assets.download import DamagedError
    from pipeline.errors import JkoflowError

    os.environ.update(env)
    os.chdir(path.parent)
    torch.set_num_threads(1)
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * BYTES,) * 2)  # spares the machine
    before, slowest, others = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0, []
    for read in readers_of(kind, path):
        begun = time.process_time()
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                read()
        except (JkoflowError, ValueError, OSError, DamagedError) as error:
            if not str(error):
                others.append(f"{type(error).__name__} without words")
        except BaseException as error:  # noqa: BLE001 - of a reader that met what it did not expect
            others.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        slowest = max(slowest, time.process_time() - begun)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    said.write_text("\n".join([f"{slowest:.2f} {grown}", *others]))
    os._exit(0)
