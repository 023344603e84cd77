"""Damaged files: each is noticed or harmless, and `verify --repair` mends it."""

from __future__ import annotations

import contextlib
import io
import os
import random
from pathlib import Path

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
from tests.faults.table import Table
from tests.pipeline.tiny import World, child, make_world, run_child

DAMAGES = ("flipped bit", "cut", "zeros", "another file", "empty")


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
    """Damage each file that is made again; `verify --repair` alone leads to the same bytes."""
    for path, kind in targets(world).items():
        top, _, part = kind.partition(": ")
        made = part in ("shard", "picture", "manifest.json", "recipe.json", "recipe.yaml")
        made = made and top in ("run", "cache") and path.parent.name != "previews"
        if not (made or top == "shipped run") or path.name == seal.NAME:
            continue
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        words = ["verify", str(world.root / "run"), str(world.home), "--repair"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = main.main(words)
        same = code == 0 and path.is_file() and path.read_bytes() == before
        table.add(kind, "mended" if same else "not mended")
