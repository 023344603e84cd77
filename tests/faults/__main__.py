"""Faults on purpose, counted in tables, which docs/reliability.md shows.

python -m tests.faults --kills 500 --cuts 200 --races 20 --seed 0
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults.damages import build, corrupt, mend
from tests.faults.fuzz import FuzzError, fuzz
from tests.faults.kills import MOMENTS, kill
from tests.faults.mistakes import trying
from tests.faults.neighbours import lines as of_neighbours
from tests.faults.power import NAMES, cut
from tests.faults.races import RESULTS, race
from tests.faults.readers.every import readers
from tests.faults.strangers import reading
from tests.faults.table import Table

_ENDS = ("same bytes", "differences", "no temporary left", "temporaries left")


def lines(
    corruptions: int,
    mutations: int,
    kills: int,
    cuts: int,
    races: int,
    mistakes: int,
    files: int,
    seed: int,
) -> Iterator[str]:
    """Run all faults in a new folder; yield the lines of the tables."""
    with tempfile.TemporaryDirectory() as name:
        root, start = Path(name), time.monotonic()
        world = build(root / "world")
        if corruptions:
            damages, repairs = Table(), Table()
            corrupt(world, corruptions, seed, damages)
            mend(world, repairs)
            yield from damages.lines(("noticed", "harmless", "silent"))
            yield ""
            yield from repairs.lines(("mended", "not mended"))
            yield f"\nSeed {seed}, {time.monotonic() - start:.0f} s.\n"
        if mutations:
            start, answers = time.monotonic(), Table()
            for reader in readers(root / "readers", world, world.root / "run"):
                try:
                    answers.counts[reader.name] = fuzz(reader, mutations, seed)
                except FuzzError as error:
                    answers.add(reader.name, "other answer")
                    yield f"{str(error)[:1000]}\n"
            ends = ("sentence", "same content", "other content", "other answer")
            yield from answers.lines(ends)
            yield f"\nSeed {seed}, {time.monotonic() - start:.0f} s.\n"
        if kills:
            start, deaths = time.monotonic(), Table()
            kill(root / "kills", kills, seed, deaths)
            yield from deaths.lines(("kills", *MOMENTS, "damaged after it", *_ENDS))
            yield f"\nSeed {seed}, {time.monotonic() - start:.0f} s.\n"
        if cuts:
            start, losses = time.monotonic(), Table()
            cut(root / "cuts", cuts, seed, losses)
            yield from losses.lines(("cuts", *NAMES, "does not go on", *_ENDS[:2]))
            yield f"\nSeed {seed}, {time.monotonic() - start:.0f} s.\n"
        if races:
            start, pairs = time.monotonic(), Table()
            race(root / "races", races, pairs)
            yield from pairs.lines((*RESULTS, *_ENDS[:2]))
            yield f"\n{time.monotonic() - start:.0f} s.\n"
        if mistakes:
            start, ends = time.monotonic(), Table()
            trying.mistake(root / "mistakes", mistakes, seed, world, world.root / "run", ends)
            yield from ends.lines(("commands", *trying.RESULTS))
            yield f"\nSeed {seed}, {time.monotonic() - start:.0f} s.\n"
        if files:
            start, harms = time.monotonic(), Table()
            reading.read_all(root / "strangers", files, seed, world, harms)
            yield from harms.lines(("files", *reading.RESULTS))
            yield f"\nSeed {seed}, {time.monotonic() - start:.0f} s.\n"
        yield from of_neighbours(kills=40, flips=1000)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    #: more malicious files than there are, so that all are read
    counts = {
        "corruptions": 3000, "mutations": 200, "kills": 500, "cuts": 200, "races": 20,
        "mistakes": 500, "files": 1000, "seed": 0
    }  # fmt: skip
    for option, default in counts.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    for line in lines(**vars(parser.parse_args())):
        print(line, flush=True)
