"""Wall time of `encode`, `train`, `generate` and `evaluate` in one process and in two.

    python -m tests.benchmarks.bench_processes [--rounds 2] [--scale 1]

Each process has one thread. One process and two take turns, and every command starts from nothing
but the assets. *Whole* is all of a command. *Work* leaves out its start, which is the time of the
same command with little work. The medians of the rounds are compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.storage.paths import data_root

COUNTS = (1, 2)


@dataclass(frozen=True)
class Verb:
    """A command with an amount of work.

    Attributes:
        name: of the row.
        words: of the command, where {n} is the amount and {here} a new folder.
        amount: of images, or of optimiser steps.
        start: an amount whose seconds count as the start.
        before: command that the measured one builds on; its time is not measured.
    """

    name: str
    words: str
    amount: int
    start: int
    before: str | None = None


_ENCODE = "encode --config mnist --set data.limit={n}"
_TRAIN = (
    "train --config mnist -r {here}/run --set data.limit=10000 --set jko.h=[0.5] --set "
    "train.iterations={n} --set schedule.max_blocks=1 --set train.batch_size=1024"
)
VERBS = (
    Verb("encode, 28×28 digits", _ENCODE, 60_000, 1_000),
    Verb(
        "train, batches of 1 024", _TRAIN, 100, 2, "encode --config mnist --set data.limit=10000"
    ),
    Verb("generate, zoo:mnist-fine", "generate -r zoo:mnist-fine -n {n}", 1_000, 20),
    Verb(
        "evaluate, zoo:mnist without floor and NLL",
        "evaluate -r zoo:mnist -n {n} --set evaluate.nll=0 --set evaluate.floor=false",
        1_000,
        20,
    ),
)


def run(words: str, processes: int, environment: dict[str, str]) -> float:
    """Run a command in some processes; return its seconds of the clock."""
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone"]
        python += ["--nproc_per_node", str(processes)]
    began = time.perf_counter()
    subprocess.run(
        [*python, "-m", "jkoflow", *words.split()], env=environment, check=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - began


def seconds(verb: Verb, amount: int, processes: int) -> float:
    """Run a command with an amount of work in a new home; return its seconds."""
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        (here / "home").mkdir()
        (here / "home" / "assets").symlink_to(data_root() / "assets")
        environment = {**os.environ, "JKOFLOW_HOME": str(here / "home"), "OMP_NUM_THREADS": "1"}
        if verb.before is not None:
            run(verb.before, 1, environment)
        return run(verb.words.format(n=amount, here=here), processes, environment)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="of all amounts of work")
    options = parser.parse_args(arguments)
    print("| command | 1: whole | 2: whole | 2 faster: whole | 2 faster: work |")
    print("|---|---|---|---|---|")
    for verb in VERBS:
        whole: dict[int, list[float]] = {count: [] for count in COUNTS}
        start: dict[int, list[float]] = {count: [] for count in COUNTS}
        for _ in range(options.rounds):
            for count in COUNTS:
                start[count].append(seconds(verb, verb.start, count))
                whole[count].append(seconds(verb, max(1, int(verb.amount * options.scale)), count))
        one, two = (statistics.median(whole[count]) for count in COUNTS)
        first, second = (statistics.median(start[count]) for count in COUNTS)
        work = (one - first) / (two - second)
        print(
            f"| {verb.name} | {one:.1f} s | {two:.1f} s | {one / two:.2f} | {work:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
