"""Power cuts: what a process wrote and did not sync is dropped, and then the process dies.

The model of a disk has two layers. A file's content is durable once the file was synced, and its
name is durable once its folder was synced. A cut puts every file back to its durable content. It
keeps or drops the names that were not synced: a file system may do either. New folders last.
"""

from __future__ import annotations

import builtins
import io
import os
import random
import shutil
import signal
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from pipeline.storage import atomic
from tests.faults import kills
from tests.faults.table import Table
from tests.pipeline.tiny import FORKSERVER, World, make_world

#: what becomes of names that were not synced
NAMES = ("names kept", "names dropped")
_WRITING = os.O_WRONLY | os.O_RDWR


class Disk:
    """The durable state of the files below a folder, followed through calls of this process.

    Args:
        root: the folder.
        at: event (a sync, a rename or a file that is opened for writing) before which the power
            is cut.
        keep: whether names that were not synced last.
    """

    def __init__(self, root: Path, at: int, keep: bool) -> None:
        self.root, self.at, self.keep = os.path.realpath(root), at, keep
        self.events = 0
        self.numbers = count(1)  # true, see _replace
        #: file → its number, which a rename takes along
        self.live: dict[str, int] = {}
        #: number → durable content; folder → durable names with their numbers
        self.content: dict[int, bytes] = {}
        self.names: dict[str, dict[str, int]] = {}
        self.open, self.replace = io.open, os.replace
        self.fsync, self.os_open = os.fsync, os.open

    def install(self) -> None:
        """Follow the calls by which Python writes files."""
        builtins.open = io.open = self._open  # type: ignore[assignment]
        os.open, os.fsync = self._os_open, self._fsync  # type: ignore[assignment]
        os.replace = os.rename = self._replace  # type: ignore[assignment]
        atomic.os.replace = self._replace  # type: ignore[attr-defined]

    def _touch(self, path: str) -> None:
        """Take what lies in the folder of a file as durable, the first time it is written."""
        folder = os.path.dirname(path)
        if folder in self.names or not os.path.isdir(folder):
            return
        self.names[folder] = {}
        for name in os.listdir(folder):
            file = os.path.join(folder, name)
            if os.path.isfile(file) and not os.path.islink(file):
                number = self.live[file] = next(self.numbers)
                with self.open(file, "rb") as stream:
                    self.content[number] = stream.read()
                self.names[folder][name] = number

    def _begin(self, path: str) -> None:
        self._touch(path)
        if not os.path.exists(path):
            number = self.live[path] = next(self.numbers)
            self.content[number] = b""

    def _ours(self, path: Any) -> str | None:
        if isinstance(path, int):
            return None
        full = os.path.realpath(os.path.dirname(os.path.abspath(os.fspath(path))))
        full = os.path.join(full, os.path.basename(os.fspath(path)))
        return full if isinstance(full, str) and full.startswith(self.root + os.sep) else None

    def _event(self) -> None:
        self.events += 1
        if self.events == self.at:
            self._cut()

    def _open(self, file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        path = self._ours(file) if set(mode) & set("wax+") else None
        if path is not None:
            self._event()
            self._begin(path)
        return self.open(file, mode, *args, **options)

    def _os_open(self, path: Any, flags: int, *args: Any, **options: Any) -> int:
        ours = self._ours(path) if flags & _WRITING else None
        if ours is not None:
            self._event()
            self._begin(ours)
        return self.os_open(path, flags, *args, **options)

    def _replace(self, source: Any, target: Any) -> None:
        a, b = self._ours(source), self._ours(target)
        if a is not None and b is not None and os.path.isfile(a):
            self._event()
            self._touch(a)
            self._touch(b)
            self.live[b] = self.live.pop(a, None) or next(self.numbers)
            self.content.setdefault(self.live[b], b"")
        self.replace(source, target)

    def _fsync(self, descriptor: int) -> None:
        self._event()
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isdir(path):
            self._touch(os.path.join(path, "x"))
            self.names[path] = {
                name: self.live[file] for name in os.listdir(path)
                if (file := os.path.join(path, name)) in self.live
            }  # fmt: skip
        elif path in self.live:
            with self.open(path, "rb") as stream:
                self.content[self.live[path]] = stream.read()

    def _cut(self) -> None:
        """Put the files back to what the disk has, and die."""
        for folder, durable in self.names.items():
            if not os.path.isdir(folder):
                continue
            present = {
                name: self.live[file] for name in os.listdir(folder)
                if (file := os.path.join(folder, name)) in self.live
            }  # fmt: skip
            wanted = present if self.keep else durable
            for name in present:
                os.unlink(os.path.join(folder, name))
            for name, number in wanted.items():
                with self.open(os.path.join(folder, name), "wb") as stream:
                    stream.write(self.content.get(number, b""))
        os.kill(os.getpid(), signal.SIGKILL)


def cut(
    root: Path, number: int, seed: int, table: Table, only: Sequence[str] = (), sync: bool = True
) -> None:
    """Cut the power of the commands of chains, `number` times; compare the ends of the chains.

    Args:
        root: a new folder.
        number: of cuts.
        seed: of their places.
        table: gets the counts.
        only: commands; none are all.
        sync: whether files are synced at all; without it a cut must leave differences.
    """
    rng, never = random.Random(seed), make_world(root / "never")
    every = {name: verb for name, verb in kills.verbs(never).items() if not only or name in only}
    for name, verb in every.items():
        assert kills.run_to_its_end(verb(root / "never" / "chain"), never) == 0, name
    expected = kills.content(root / "never" / "chain") | kills.content(never.home)
    cuts = chain = 0
    while cuts < number:
        chain += 1
        place = root / f"again-{chain}"
        again, to = World(never.root, never.settings, place / "home"), place / "chain"
        broken = False
        for name, verb in every.items():
            for _ in range(min(kills.MOST, number - cuts)):
                at, keep = rng.randint(1, 30), rng.random() < 0.5
                code = _start(verb(to), again, place, at, keep, sync)
                if code != -signal.SIGKILL:
                    break
                cuts += 1
                table.add(name, "cuts")
                table.add(name, NAMES[0 if keep else 1])
            code = kills.run_to_its_end(verb(to), again)
            if code != 0:
                code = kills.recover(name, every, to, again)
            if code != 0:
                broken = True
                table.add(name, "does not go on")
                break
        ends = kills.content(to) | kills.content(again.home)
        same = ends == expected and not broken
        table.add("chain", "same bytes" if same else "differences")
        if sync and not same:
            names = {n for n in {*ends, *expected} if ends.get(n) != expected.get(n)}
            print(f"chain {chain} differs in {sorted(names)[:5]}")
        shutil.rmtree(place)


def _start(words: list[Any], world: World, root: Path, at: int, keep: bool, sync: bool) -> int:
    arguments = ([str(word) for word in words], world.environment, root, at, keep, sync)
    process: Any = FORKSERVER.Process(target=_run, args=arguments)
    process.start()
    process.join()
    return int(process.exitcode)


def _run(
    words: list[str], env: dict[str, str], root: Path, at: int, keep: bool, sync: bool
) -> None:
    disk = Disk(root, at, keep)
    disk.install()
    if not sync:
        os.fsync = lambda _: None  # type: ignore[assignment]
    kills.run(words, env)
