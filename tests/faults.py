"""Faults on purpose: damaged files and killed processes, counted in a table.

python -m tests.faults --corruptions 3000 --kills 500 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from autoencoders.weights import load_weights
from eval.references import read_reference, reference_bytes
from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.integrity.digests import check_file
from pipeline.runs import verify
from pipeline.runs.zoo import locate
from pipeline.storage import seal
from tests.eval.moments import stats_from
from tests.pipeline.tiny import World, child, make_world, run_child

DAMAGES = ("flipped bit", "cut", "zeros", "another file", "empty")
#: files that are compared after kills; logs and seals hold clocks or an order of commits
_COMPARED = (".safetensors", ".yaml")
_COMMITS = 12


@dataclass
class Table:
    """Counts of faults by kind of file or command."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, kind: str, result: str) -> None:
        self.counts.setdefault(kind, Counter())[result] += 1

    def total(self, result: str) -> int:
        return sum(counter[result] for counter in self.counts.values())

    def lines(self, columns: tuple[str, ...]) -> Iterator[str]:
        yield f"| | {' | '.join(columns)} |"
        yield "|---" * (len(columns) + 1) + "|"
        for kind in sorted(self.counts):
            yield f"| {kind} | {' | '.join(str(self.counts[kind][c]) for c in columns)} |"
        yield f"| all | {' | '.join(str(self.total(c)) for c in columns)} |"


def build(root: Path) -> World:
    """A world with a cache, a run with sampled images, a checkpoint, weights and a reference."""
    world = make_world(root)
    config = world.config(train={"checkpoint_seconds": 0.0})
    run = root / "run"
    run_child("encode", "-c", config, env=world.environment)
    run_child("train", "-c", config, "-r", run, env=world.environment)
    run_child("generate", "-r", run, "-n", "4", env=world.environment)
    process = child(["train", "-c", config, "-r", root / "begun"], world.environment, die_at=13)
    process.start()
    process.join()  # it leaves a checkpoint
    stats = stats_from(np.random.default_rng(0).normal(size=(40, 8)))
    card = {"dataset": "d", "split": "train", "n": 40, "extractor": "e", "content_sha256": "0"}
    (root / "reference.safetensors").write_bytes(reference_bytes(stats, card))
    os.environ["JKOFLOW_HOME"] = str(world.home)
    locate("zoo:mnist")
    return world


def targets(world: World) -> dict[Path, str]:
    """The files of a world that are trusted when they are read, with their kinds."""
    found: dict[Path, str] = {}
    roots = {
        world.root / "run": "run", world.root / "begun": "unfinished run",
        world.home / "latents": "cache", world.home / "zoo": "shipped run",
    }  # fmt: skip
    for root, name in roots.items():
        for path in sorted(root.rglob("*")):
            growing = path.name == "log.jsonl" or "tensorboard" in path.parts
            if path.is_file() and not growing and not path.name.startswith("."):
                found[path] = f"{name}: {_kind(path)}"
    found[world.root / "autoencoder.safetensors"] = "autoencoder"
    found[world.root / "reference.safetensors"] = "reference"
    return found


def _kind(path: Path) -> str:
    parents = {"blocks": "block", "checkpoints": "checkpoint", "snapshots": "snapshot"}
    if path.name.startswith("shard-"):
        return "shard"
    return parents.get(path.parent.name, path.name if path.suffix != ".png" else "picture")


def damage(data: bytes, how: str, rng: random.Random, other: bytes) -> bytes:
    """Damage the content of a file."""
    if how == "empty":
        return b""
    if how == "another file":
        return other
    place = rng.randrange(len(data))
    if how == "cut":
        return data[:place]
    if how == "zeros":
        return data[:place] + bytes(min(64, len(data) - place)) + data[place + 64 :]
    flipped = bytearray(data)
    flipped[place] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def is_noticed(path: Path, world: World) -> bool:
    """Whether the reader of a file or `verify` notices the damage."""
    if path.parent == world.root:
        try:
            (read_reference if path.name == "reference.safetensors" else load_weights)(path)
            check_file(path)
        except ValueError:
            return True
        return False
    folder = seal.folder_of(path)
    if folder is None:
        return True  # the seal itself is gone, and readers refuse the folder
    try:
        if path.name == seal.NAME:
            folder = path.parent
            return bool(verify.verify(folder))
        seal.check(path)
    except UserError:
        return True
    return False


def corrupt(world: World, count: int, seed: int, table: Table) -> None:
    """Damage files one by one; each must be noticed, and is put back."""
    rng, files = random.Random(seed), targets(world)
    paths = sorted(files)
    for number in range(count):
        path = paths[number % len(paths)]
        how, whole = rng.choice(DAMAGES), path.read_bytes()
        broken = damage(whole, how, rng, rng.choice(paths).read_bytes())
        if broken == whole:
            table.add(files[path], "harmless")
            continue
        path.write_bytes(broken)
        try:
            noticed = is_noticed(path, world)
            # a seal whose lines read as before says the same
            same = path.name == seal.NAME and not noticed and not verify.verify(path.parent)
        finally:
            path.write_bytes(whole)
        table.add(files[path], "noticed" if noticed else "harmless" if same else "silent")


def mend(world: World, table: Table) -> None:
    """Damage each file that a command makes again, follow the advice, and compare the bytes."""
    config = world.config(train={"checkpoint_seconds": 0.0})
    commands: dict[str, list[Any]] = {
        "cache": ["encode", "-c", config],
        "shipped run": [],
    }
    for path, kind in targets(world).items():
        top, _, part = kind.partition(": ")
        makes = part in ("shard", "manifest.json")
        if top not in commands or not (makes or top == "shipped run") or path.name == seal.NAME:
            continue
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        verify.repair(verify.verify(seal.folder_of(path) or path.parent))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = main.main([str(word) for word in commands[top]]) if commands[top] else 0
        same = code == 0 and path.is_file() and path.read_bytes() == before
        table.add(kind, "mended" if same else "not mended")


def content(folder: Path) -> dict[str, str]:
    """The sha256 of the files of a run or a cache that kills must not change."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix in _COMPARED and "checkpoints" not in path.parts
    }


def kill(root: Path, count: int, seed: int, table: Table) -> None:
    """Kill `encode`, `train` and `generate` at commits until `count` kills; compare the ends."""
    rng, never = random.Random(seed), make_world(root / "never")
    config = never.config(train={"checkpoint_seconds": 0.0})
    verbs: dict[str, Callable[[Path], list[Any]]] = {
        "encode": lambda run: ["encode", "-c", config],
        "train": lambda run: ["train", "-c", config, "-r", run, "--resume"],
        "generate": lambda run: ["generate", "-r", run, "-n", "10"],
    }
    for verb in verbs.values():
        run_child(*verb(root / "never" / "run"), env=never.environment)
    expected = content(root / "never" / "run"), content(never.home / "latents")
    chain, kills = 0, 0
    while kills < count:
        chain += 1
        again = World(never.root, never.settings, root / f"again-{chain}" / "home")
        run = root / f"again-{chain}" / "run"
        for name, verb in verbs.items():
            done = False
            while not done:
                at = rng.randint(1, _COMMITS) if kills < count else None
                after = rng.random() < 0.6
                process = child(verb(run), again.environment, at, after)
                process.start()
                process.join()
                done = process.exitcode == 0
                if not done:
                    assert process.exitcode == -signal.SIGKILL, (name, process.exitcode)
                    kills += 1
                    table.add(name, "kills")
                    table.add(name, "inside a write" if not after else "after a write")
        found = content(run), content(again.home / "latents")
        table.add("chain", "same bytes" if found == expected else "differences")
        shutil.rmtree(root / f"again-{chain}")


def run(corruptions: int, kills: int, seed: int) -> list[str]:
    """Run all faults in a new folder; return the lines of the tables."""
    with tempfile.TemporaryDirectory() as name:
        root, start = Path(name), time.monotonic()
        world = build(root / "world")
        damages, repairs, deaths = Table(), Table(), Table()
        corrupt(world, corruptions, seed, damages)
        mend(world, repairs)
        if kills:
            kill(root, kills, seed, deaths)
        seconds = time.monotonic() - start
    columns = ("kills", "inside a write", "after a write", "same bytes", "differences")
    return [
        f"Seed {seed}, {seconds:.0f} s.", "",
        *damages.lines(("noticed", "harmless", "silent")), "",
        *repairs.lines(("mended", "not mended")), "",
        *(deaths.lines(columns) if kills else ()),
    ]  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for option, default in (("corruptions", 3000), ("kills", 500), ("seed", 0)):
        parser.add_argument(f"--{option}", type=int, default=default)
    print("\n".join(run(**vars(parser.parse_args()))))
