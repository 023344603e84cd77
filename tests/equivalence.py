"""Checks that a change of the code has not changed any result, bit by bit.

    python -m tests.equivalence OUT.json [--only part,part] [--compare BEFORE.json]

The script writes digests of latents, samples and trained weights, and likelihoods, to OUT.json.
`--compare` prints them next to those of an earlier run and exits with 1 if any differs.
The script imports nothing of the project. It runs the commands of the working copy it lies in,
and it compares the values in the files that they write, so it runs on both sides of a redesign.
Every invocation has an empty data root, because cached results of other code would be reused.
Compare only results of the same machine and the same versions: other kernels round otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]

# ------------------------------------------------- names of the project that a redesign may change

HOME = "JKOFLOW_HOME"  # the variable that moves the data root
MNIST, SMOKE = "mnist", "smoke"  # packaged configurations
LIMIT = "data.limit"
PROMPT = {"train.checkpoint_seconds": 0}  # a checkpoint after every step
JKO = {"train.iterations": 24, "schedule.tolerance": 0}
PASSES = {
    "train.iterations": 10,
    "schedule.tolerance": 0,
    "jko.reparameterize": 1,
    "jko.refine": 2,
}
LFM = {
    "train.objective": "lfm",
    "train.iterations": 24,
    "schedule.max_blocks": 2,
    "matching.coupling": "ot",
    "matching.interpolant": "trigonometric",
    "schedule.tolerance": 0,
}
FM = {
    "schedule": "null",
    "train.objective": "fm",
    "train.iterations": 12,
    "train.optimizer": "muon",
    "matching.times": "logit-normal",
    "train.precision": "bf16",
    "velocity.kind": "unet",
    "velocity.width": 16,
}
SHIPPED = (
    "mnist", "mnist-fine", "mnist-classes", "mnist-jko",
    "cifar10", "cifar10-jko", "imagenet32-like-jko",
)  # fmt: skip
BLOCKS, CHECKPOINTS = "blocks/**/*.safetensors", "checkpoints/*.safetensors"  # in a run
LIKELIHOOD = ("likelihood.json", "nll_per_dim", "ranking", "index", "log_prob")


@dataclass(frozen=True)
class Training:
    """A tiny training.

    Attributes:
        settings: overrides of the smoke configuration.
        files: blocks that the run holds in the end, over all passes.
    """

    settings: dict[str, object]
    files: int


TRAININGS = {
    "jko": Training(JKO, files=3),
    "passes": Training(PASSES, files=3 + 3 + 5),  # the free block is not split
    "lfm": Training(LFM, files=3),
    "fm": Training(FM, files=1),
}

# ----------------------------------------------------------------------------------------- files


def tensors_of(path: Path) -> dict[str, tuple[str, bytes]]:
    """Read a safetensors file: name → (dtype, bytes)."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    spans = {name: (row["dtype"], *row["data_offsets"]) for name, row in header.items()}
    return {name: (kind, data[start + a : start + b]) for name, (kind, a, b) in spans.items()}


def digest(parts: Iterable[bytes]) -> str:
    """Compute the sha256 of the concatenated parts."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()


def in_any_order(parts: Iterable[bytes]) -> str:
    """Compute a digest that does not depend on the order of the parts, so on no names."""
    return digest(sorted(hashlib.sha256(part).digest() for part in parts))


# -------------------------------------------------------------------------------------- commands


def overrides(settings: dict[str, object]) -> list[str]:
    """Build the `--set` arguments."""
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


class Commands:
    """Runner of `python -m pipeline …` on one thread, with a data root of its own.

    Args:
        work: an empty folder; everything is written there.
    """

    def __init__(self, work: Path) -> None:
        self.work, self.home = work, work / "home"
        threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        fixed = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""}
        self.shared = {**os.environ, **dict.fromkeys(threads, "1"), **fixed}
        self.own = {**self.shared, HOME: str(self.home)}

    def share_assets(self, *names: str) -> None:
        """Link the assets of the ordinary data root into the empty one; fetch absent ones."""
        for name in names:
            asset = Path(self.run("fetch", name, env=self.shared))
            folder = next(path for path in (asset, *asset.parents) if path.name == name)
            link = self.home / folder.parent.name / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder)

    def run(self, *words: object, env: dict[str, str] | None = None) -> str:
        """Run a command to its end; returns the last line of stdout."""
        done = subprocess.run(
            self._line(words), cwd=ROOT, env=env or self.own, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{words[0]} failed: {last_line(done.stderr)}")
        return last_line(done.stdout)

    def kill_at_first(self, folder: Path, pattern: str, *words: object) -> None:
        """Start a command and kill it by SIGKILL once a file of a pattern is in a folder."""
        log = self.work / "killed.log"
        with open(log, "w") as file:
            process = subprocess.Popen(
                self._line(words), cwd=ROOT, env=self.own, stdout=file, stderr=file
            )
            while process.poll() is None and not any(folder.glob(pattern)):
                time.sleep(0.001)
            process.kill()
            code = process.wait()
        if code != -signal.SIGKILL:
            raise RuntimeError(f"{words[0]} ended before its kill: {last_line(log.read_text())}")

    @staticmethod
    def _line(words: Iterable[object]) -> list[str]:
        return [sys.executable, "-m", "pipeline", *map(str, words)]


# ----------------------------------------------------------------------------------------- parts

Values = dict[str, Any]


def latents(commands: Commands) -> Values:
    """Encode the first 500 digits of MNIST."""
    chosen = overrides({LIMIT: 500})
    cache = Path(commands.run("encode", "--config", MNIST, *chosen))
    shards = [tensors_of(path) for path in sorted(cache.glob("*.safetensors"))]
    if not shards:
        raise RuntimeError(f"no shards in {cache}")
    names, joined = sorted(shards[0]), {}
    for name in names:
        joined[name] = b"".join(shard[name][1] for shard in shards)
    real = [joined[name] for name in names if shards[0][name][0].startswith("F")]
    whole = [joined[name] for name in names if not shards[0][name][0].startswith("F")]
    return {"values": digest(real), "in any order": in_any_order(real), "labels": digest(whole)}


def samples(commands: Commands) -> Values:
    """Draw 64 images of every shipped run."""
    values: Values = {}
    for name in SHIPPED:
        file = commands.work / f"{name}.npz"
        commands.run("generate", "--run", f"zoo:{name}", "-n", 64, "--seed", 0, "--npz", file)
        with np.load(file) as archive:
            images = archive["arr_0"]
        if images.dtype != np.uint8 or len(images) != 64 or images.min() == images.max():
            raise RuntimeError(f"zoo:{name} gave {images.dtype} {images.shape}, not 64 images")
        values[name] = digest([images.tobytes()])
    return values


def training(commands: Commands, name: str) -> Values:
    """Train without interruption, then with a kill at the first checkpoint and a resumption."""
    wanted = TRAININGS[name]
    whole, killed = commands.work / name / "whole", commands.work / name / "killed"
    words = ["train", "--config", SMOKE, *overrides({**PROMPT, **wanted.settings}), "--run"]
    commands.run("encode", "--config", SMOKE)
    commands.run(*words, whole)
    commands.kill_at_first(killed, CHECKPOINTS, *words, killed)
    if any(killed.glob(BLOCKS)):
        raise RuntimeError(f"{name} had finished a block before its kill; raise its iterations")
    commands.run("train", "--run", killed, "--resume")
    values: Values = {}
    for label, run in (("whole", whole), ("killed", killed)):
        blocks = sorted(run.glob(BLOCKS))
        if len(blocks) != wanted.files:
            raise RuntimeError(f"{name} left {len(blocks)} blocks, not {wanted.files}")
        read = [tensors_of(path) for path in blocks]
        parts = [tensors[key][1] for tensors in read for key in sorted(tensors)]
        values |= {label: digest(parts), f"{label}, in any order": in_any_order(parts)}
    if values["killed"] != values["whole"]:
        raise RuntimeError(f"{name}: the resumed training differs from the uninterrupted one")
    return values


def likelihood(commands: Commands) -> Values:
    """Measure the likelihood of the first eight test digits, to full precision."""
    printed = Path(commands.run("likelihood", "--run", "zoo:mnist", "-n", 8))
    file, mean, rows, index, value = LIKELIHOOD
    result = json.loads((printed.parent / file).read_text())
    values = {"nats a dimension": repr(result[mean])}
    for row in sorted(result[rows], key=lambda row: row[index]):
        values[f"digit {row[index]}, nats"] = repr(row[value])
    return values


PARTS: dict[str, Callable[[Commands], Values]] = {
    "latents": latents,
    "samples": samples,
    **{
        name: lambda commands, name=name: training(commands, name)  # type: ignore[misc]
        for name in TRAININGS
    },
    "likelihood": likelihood,
}

# ---------------------------------------------------------------------------------------- report


def about() -> Values:
    """Describe what was run, and where."""
    git = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12")
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "scipy")}
    machine = f"{platform.system()} {platform.machine()}"
    return {"commit": commit, "python": platform.python_version(), "machine": machine, **versions}


def table(before: Values, after: Values) -> tuple[str, bool]:
    """Compare two results; returns the text of a table, and whether all that ran is the same.

    Args:
        before: the parts of an earlier run.
        after: the parts of this run; parts that it left out are left out of the table.
    """
    rows, same = [("part", "before", "after", "same")], True
    for part in after:
        old, new = before.get(part, {}), after[part]
        for key in [*new, *(key for key in old if key not in new)]:
            left, right = str(old.get(key, "absent")), str(new.get(key, "absent"))
            equal = left == right and key != "error"
            same = same and equal
            shown = [text[:16] if len(text) == 64 else text for text in (left, right)]
            rows.append((f"{part}: {key}", *shown, "yes" if equal else "NO"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(lines), same


def main() -> int:
    parser = argparse.ArgumentParser(description="digests of everything that must not change")
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--only", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--compare", type=Path, help="an earlier JSON file")
    args = parser.parse_args()
    chosen = args.only.split(",")
    if unknown := sorted(set(chosen) - set(PARTS)):
        parser.error(f"unknown parts {unknown}; choose from {', '.join(PARTS)}")
    before = json.loads(args.compare.read_text())["parts"] if args.compare else None
    result: Values = {"about": about(), "seconds": {}, "parts": {}}
    with tempfile.TemporaryDirectory(prefix="equivalence-") as name:
        commands = Commands(Path(name))
        commands.share_assets("mnist")
        for part in chosen:
            began = time.perf_counter()
            try:
                result["parts"][part] = PARTS[part](commands)
            except (RuntimeError, OSError, LookupError, ValueError) as error:
                result["parts"][part] = {"error": f"{type(error).__name__}: {error}"}
            result["seconds"][part] = round(time.perf_counter() - began, 1)
            print(f"{part}: {result['seconds'][part]} s", file=sys.stderr, flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=2) + "\n")
    failed = [part for part, values in result["parts"].items() if "error" in values]
    for part in failed:
        print(f"{part}: {result['parts'][part]['error']}", file=sys.stderr)
    if before is None:
        return 1 if failed else 0
    text, same = table(before, result["parts"])
    print(text)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
