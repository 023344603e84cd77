"""Two processes that write one folder at the same time.

One works. The other waits for it, or ends with one sentence. Of two trainings with different
configurations the second is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults import kills
from tests.faults.table import Table
from tests.pipeline.tiny import FORKSERVER, World, make_world

VERBS = ("encode", "train", "generate", "evaluate")
RESULTS = ("both worked", "one sentence", "second refused", "other end")


def race(root: Path, rounds: int, table: Table, only: Sequence[str] = VERBS) -> None:
    """Start every command twice at once, `rounds` times, and compare what it leaves.

    Args:
        root: a new folder.
        rounds: number of times.
        table: gets the counts.
        only: commands that are raced; those between them in the chain run alone.
    """
    world = make_world(root / "world")
    every = kills.verbs(world)
    expected = None
    for number in range(-1, rounds):  # the first round has no races
        place = root / f"round-{number}"
        here, to = World(world.root, world.settings, place / "home"), place / "chain"
        place.mkdir()
        for name in VERBS[: max(map(VERBS.index, only)) + 1]:
            words = every[name](to)
            if number < 0 or name not in only:
                assert kills.run_to_its_end(words, here) == 0, name
            else:
                table.add(name, _ends(_start(words, here), _start(words, here)))
        ends = kills.content(to) | kills.content(here.home)
        expected = expected or ends
        table.add("content", "same bytes" if ends == expected else "differences")
        if number >= 0 and "train" in only:
            other = world.config("other", train={"iterations": 5, "checkpoint_seconds": 0.0})
            train = [["train", "-c", config, "-r", to / "second", "--resume"]
                     for config in (every["train"](to)[2], other)]  # fmt: skip
            result = _ends(_start(train[0], here), _start(train[1], here))
            table.add("two configurations", result.replace("one sentence", "second refused"))
        shutil.rmtree(place)


def _start(words: list[Any], world: World) -> tuple[Any, Path]:
    said = world.home.parent / f"said-{len(list(world.home.parent.glob('said-*')))}"
    said.touch()
    arguments = ([str(word) for word in words], world.environment, said)
    process: Any = FORKSERVER.Process(target=kills.run, args=arguments)
    process.start()
    return process, said


def _ends(*started: tuple[Any, Path]) -> str:
    """Wait for two processes, and say how they ended."""
    codes = []
    for process, said in started:
        process.join()
        lines = [x for x in said.read_text().splitlines() if x.startswith("error: ")]
        codes.append(process.exitcode)
        if process.exitcode not in (0, 1, 2) or (process.exitcode and len(lines) != 1):
            return "other end"
    if codes == [0, 0]:
        return "both worked"
    return "one sentence" if 0 in codes else "other end"
