"""Chains of all commands that write, killed again and again, and damaged in between.

A chain that was killed must end with the bytes of one that never was. With some kills a shard or a
checkpoint is damaged, too, as by a failing disk. A command that reads it notices, and
`jkoflow verify --repair` leads to the same bytes; a file that no command reads again is named.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tqdm import tqdm

from pipeline.cli import main
from pipeline.runs import verify
from pipeline.storage import atomic, seal
from tests.faults.table import Table
from tests.pipeline.glance import stand_in
from tests.pipeline.tiny import FORKSERVER, World, make_world

# a child starts with everything imported, so that it dies in its work
FORKSERVER.set_forkserver_preload([
    "tests.faults.kills", "pipeline.training.train", "pipeline.sampling.generate",
    "pipeline.evaluation.evaluator", "pipeline.autoencoder_training.train",
    "pipeline.distillation.distill", "pipeline.publishing.export", "pipeline.bench.bench",
    "pipeline.toy2d.experiment", "torch._dynamo", "matplotlib.pyplot",
])  # fmt: skip

#: where a process is killed: in the middle of a file, before its rename, after it, or at any time
MOMENTS = ("middle of a file", "before a rename", "after a rename", "any time")
_WEIGHTS = (35, 25, 20, 20)
_COMMITS = {"encode": 6, "train": 12, "generate": 8, "evaluate": 10, "toy2d": 12}
_SECONDS = 0.6
#: kills of a command in a chain
MOST = 6
#: share of the kills after which a file is damaged
_DAMAGED = 0.25
_SEALED_ENDINGS = (".safetensors", ".yaml", ".json", ".jsonl", ".png", ".npz", ".csv")
#: entries that are times, or belong to a process
_OF_THE_CLOCK = ("seconds", "time", "peak_memory_bytes", "overhead")

Verb = Callable[[Path], list[Any]]


def verbs(world: World) -> dict[str, Verb]:
    """The commands of a chain, in order; each goes on when it is repeated."""
    config = world.config(train={"checkpoint_seconds": 0.0})
    recipe = {
        "data": world.settings["data"],
        "architecture": {"width_factors": [1], "patch": 4, "channels": 2},
        "training": {"iterations": 4, "batch_size": 8, "adversarial_start": 2},
    }
    path = world.root / "autoencoder.yaml"
    path.write_text(yaml.safe_dump(recipe))
    toy = [f"--set={s}" for s in ("velocity.width=8", "velocity.depth=2", "jko.h=[0.5]",
           "train.iterations=[3,2]", "train.batch_size=64", "points.train=256",
           "train.checkpoint_seconds=0")]  # fmt: skip
    bench = [f"--set={s}" for s in ("points.train=300", "train.batch_size=50", "jko.h=[0.5]",
             "velocity.depth=1")]  # fmt: skip
    real = world.root / "pictures" / "train"
    two = sorted(real.rglob("*.png"))[:2]
    return {
        "encode": lambda to: ["encode", "-c", config],
        "train": lambda to: ["train", "-c", config, "-r", to / "run", "--resume"],
        "generate": lambda to: ["generate", "-r", to / "run", "-n", "10", "--npz", to / "x.npz",
                                "--images", to / "images"],
        "reference": lambda to: ["reference", to / "reference.safetensors", "-c", config],
        "evaluate": lambda to: ["evaluate", "-r", to / "run", "-n", "12", "--reference", real,
                                "--kid", "12"],
        "likelihood": lambda to: ["likelihood", "-r", to / "run", "-n", "6"],
        "invert": lambda to: ["invert", "-r", to / "run", "-n", "3", "--out", to / "strip.png",
                              "--npz", to / "noise.npz"],
        "interpolate": lambda to: ["interpolate", "-r", to / "run", *two, "-n", "3", "--out",
                                   to / "between.png"],
        "export": lambda to: ["export", "-r", to / "run", "--out", to / "exported"],
        "distill": lambda to: ["distill", "-r", to / "run", "--out", to / "short", "--resume",
                               "--set", "train.iterations=4"],
        "autoencoder train": lambda to: ["autoencoder", "train", "-c", path, "--out", to / "ae",
                                         "--resume"],
        "toy2d": lambda to: ["toy2d", "-c", "gaussian", "-r", to / "toy", "--resume", *toy],
        "bench": lambda to: ["bench", "toy2d", "--budget", "2batches", "--models", "jko",
                             "--data", "8gaussians", "--seeds", "1", "--test", "60",
                             "--parameters", "600", "-r", to / "bench", *bench],
    }  # fmt: skip


def content(folder: Path) -> dict[str, str]:
    """The sha256 of every file that kills must not change, without times and paths."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        skipped = {"checkpoints", "tensorboard", ".locks"} & {*parts} or path.name in (
            "environment.json", "checkpoint.safetensors"
        )  # fmt: skip
        if path.suffix in _SEALED_ENDINGS and path.is_file() and not skipped:
            data = path.read_bytes()
            if path.suffix == ".csv" or {"file-index", "plots"} & {*parts}:
                continue  # times of a benchmark, and of files
            if path.suffix in (".json", ".jsonl"):
                with contextlib.suppress(ValueError):  # a broken file counts as it is
                    data = repr([_plain(json.loads(x), folder) for x in _documents(path)]).encode()
            sums["/".join(parts)] = hashlib.sha256(data).hexdigest()
    return sums


def _documents(path: Path) -> list[str]:
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def _plain(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v, folder) for k, v in value.items()
                if not any(word in k for word in _OF_THE_CLOCK)}  # fmt: skip
    if isinstance(value, list):
        return [_plain(v, folder) for v in value]
    return value.replace(str(folder), "") if isinstance(value, str) else value


def kill(
    root: Path, count: int, seed: int, table: Table, unsealed: bool = False,
    only: Sequence[str] = (),
) -> None:  # fmt: skip
    """Kill the commands of chains until `count` kills; compare the ends of the chains.

    Args:
        root: a new folder.
        count: number of kills.
        seed: of their places.
        table: gets the counts.
        unsealed: switch the seal off, which must leave differences.
        only: commands; none are all.
    """
    rng, never = random.Random(seed), make_world(root / "never")
    every = {name: verb for name, verb in verbs(never).items() if not only or name in only}
    for name, verb in every.items():
        code = run_to_its_end(verb(root / "never" / "chain"), never, unsealed)
        assert code == 0, (name, code)
    expected = content(root / "never" / "chain") | content(never.home)
    assert expected
    kills = chain = 0
    while kills < count:
        chain += 1
        again = World(never.root, never.settings, root / f"again-{chain}" / "home")
        to = root / f"again-{chain}" / "chain"
        for name, verb in every.items():
            for _ in range(min(MOST, count - kills)):
                moment = rng.choices(MOMENTS, _WEIGHTS)[0]
                at = rng.uniform(0, _SECONDS) if moment == "any time" else rng.randint(
                    1, _COMMITS.get(name, 5)
                )  # fmt: skip
                code = _start(verb(to), again, moment, at, unsealed)
                if code == 0 or _is_exported(name, to):
                    break
                if code != -signal.SIGKILL:
                    code = recover(name, every, to, again, unsealed)
                    assert code == 0, (name, moment, at, code)
                    break
                kills += 1
                table.add(name, "kills")
                table.add(name, moment)
                if rng.random() < _DAMAGED and _damage(to, again.home, rng):
                    table.add(name, "damaged after it")
            if not _is_exported(name, to):
                code = run_to_its_end(verb(to), again, unsealed)
            if code != 0 and not _is_exported(name, to):
                code = recover(name, every, to, again, unsealed)
            assert code == 0 or _is_exported(name, to), (name, code)
        ends = content(to) | content(again.home)
        # a damaged file that no later command reads stays as it is, and `verify` names it
        named = {f.path.relative_to(top).as_posix() for top in (to, again.home)
                 for f in verify.verify(top)}  # fmt: skip
        silent = {n for n in {*ends, *expected} if ends.get(n) != expected.get(n)}
        silent -= named | _not_needed(ends, expected)
        table.add("chain", "differences" if silent else "same bytes")
        if silent and not unsealed:
            print(f"chain {chain} differs in {sorted(silent)[:5]}")
        left = list((root / f"again-{chain}").rglob(".tmp-*"))
        if left:
            print(f"chain {chain} leaves {left[:3]}")
        table.add("chain", "temporaries left" if left else "no temporary left")
        shutil.rmtree(root / f"again-{chain}")


def _is_exported(name: str, to: Path) -> bool:
    """Whether this is an export that is whole, whose folder a second one refuses."""
    return name == "export" and (to / "exported" / "flow.json").is_file()


def _not_needed(ends: Mapping[str, str], expected: Mapping[str, str]) -> set[str]:
    """Files that repair removed from stages of a finished run, which no training needs.

    Without its manifest a stage is unfinished, so nothing trusts it.
    """
    absent = {name for name in expected if name not in ends and "/stages/" in name}
    stages = {str(Path(name).parent) for name in absent if name.endswith("manifest.json")}
    return {name for name in absent if str(Path(name).parent) in stages}


def recover(
    name: str, every: Mapping[str, Verb], to: Path, world: World, unsealed: bool = False
) -> int:
    """Follow the advice of the errors: repair, and repeat the commands up to the broken one."""
    for folder in (to, world.home):
        if folder.exists():
            run_to_its_end(["verify", folder, "--repair"], world, unsealed)
    code = 0
    for earlier, verb in every.items():
        code = run_to_its_end(verb(to), world, unsealed)
        if earlier == name:
            break
    return code


def _damage(to: Path, home: Path, rng: random.Random) -> bool:
    """Flip a bit of a shard or a checkpoint, which a command can make again."""
    paths = [
        path for folder in (to, home) for path in sorted(folder.rglob("*.safetensors"))
        if path.name.startswith("shard-") or path.parent.name == "checkpoints"
    ]  # fmt: skip
    if not paths:
        return False
    path = rng.choice(paths)
    data = bytearray(path.read_bytes())
    data[-1 - rng.randrange(min(len(data) // 2, 400))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return True


def run_to_its_end(words: list[Any], world: World, unsealed: bool = False) -> int:
    """Run a command to its end in a child; return its exit code."""
    return _start(words, world, None, 0, unsealed)


def _start(words: list[Any], world: World, moment: str | None, at: float, unsealed: bool) -> int:
    arguments = ([str(word) for word in words], world.environment, moment, at, unsealed)
    process: Any = FORKSERVER.Process(target=_run, args=arguments)
    process.start()
    process.join()
    return int(process.exitcode)


def _run(
    words: list[str], env: dict[str, str], moment: str | None, at: float, unsealed: bool
) -> None:
    """Run a command in a child, and kill it at a moment."""
    if unsealed:
        patch = pytest.MonkeyPatch()
        patch.setattr(seal, "check", lambda *_: None)
        patch.setattr(seal, "is_whole", lambda *_: True)
        patch.setattr(atomic, "verify_file", lambda *_: None)
    if moment == "any time":
        threading.Thread(target=_kill_after, args=(at,), daemon=True).start()
    elif moment is not None:
        _kill_at_commit(int(at), moment)
    run(words, env)


def run(words: list[str], env: dict[str, str], said: Path | None = None) -> None:
    """Run a command in this child, with a stand-in for Inception, and end with its code.

    Its errors go to the file `said`.
    """
    os.environ.update(env)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its default is a semaphore, which the killed leave behind
    stand_in(pytest.MonkeyPatch())
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = main.main(words)
    if said is not None:
        said.write_text(errors.getvalue())
    sys.exit(code)


def _kill_after(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_at_commit(number: int, moment: str) -> None:
    """Kill this process at its commit of a number."""
    rename, fill, count = os.replace, atomic._HashingFile.write, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count == number and moment == "before a rename":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
        if count == number and moment == "after a rename":
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self: Any, data: Any) -> int:
        if count + 1 == number and moment == "middle of a file":
            fill(self, memoryview(data)[: len(data) // 2])
            self.inner.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return fill(self, data)

    atomic.os.replace = replace  # type: ignore[attr-defined]
    atomic._HashingFile.write = write  # type: ignore[method-assign]
