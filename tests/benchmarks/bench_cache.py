"""Opening and first training step on a latent cache of many latents, without their disk space.

    python -m tests.benchmarks.bench_cache [--latents 20000,2000000,100000000] [--objective fm|jko]
    python -m tests.benchmarks.bench_cache --wait --latents 2000000 [--compute 0.1] [--cold]
    python -m tests.benchmarks.bench_cache --encode --latents 20000,2000000 --shape 3,8,8

The shards are sparse files: every mean and logarithm of a variance is zero, and none takes room on
the disk. Their verification counts as done by an earlier command. A fresh process opens each cache
and trains the network of `imagenet32` for some steps. Printed are the seconds until the cache is
open and until the first step is done, by the clock and of the processor. The processor seconds of
a step follow, the share of reading in it, and the memory that all this adds.

With --wait, each cache is trained on twice, with the thread that reads ahead and without. Printed
are the seconds by the clock that a step waits for its samples and takes in all, and the processor
seconds of all threads in it. --compute lets every step sleep, as the processor does while a GPU
computes. --cold writes real shards and drops their pages from memory first. --remote reads them
at an address of fsspec, and each copy of a shard takes that many seconds longer.

With --encode, a fresh process encodes computed images by the identity instead, and opens their
cache, which takes room on the disk. Printed are the seconds and the memory that this adds.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoencoders.identity import IdentityAutoencoder
from pipeline.config.load import load_config
from pipeline.data import encoding
from pipeline.data.image_set import ImageSet
from pipeline.data.latent_cache import open_cache
from pipeline.data.standardisation import Standardisation
from pipeline.integrity.digests import sha256_file
from pipeline.runtime.console import no_progress
from pipeline.runtime.system import peak_memory
from pipeline.storage import atomic, seal
from pipeline.storage.shards.manifest import FORMAT, MANIFEST, content_key, shard_name
from pipeline.storage.shards.opening import memory_file, open_store
from pipeline.storage.shards.read_ahead import ReadAhead
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.shards.remote import RemoteStoreReader
from pipeline.storage.shards.writer import StoreWriter
from pipeline.training.batches import block_batches
from pipeline.training.batches.block_objective import BlockObjective
from pipeline.training.train import train

SHARD = 10_000
#: seconds after which the hash of a new file is remembered
_SETTLED = 5.0
#: of the training: `imagenet32` without half precision, which a CPU emulates
SETTINGS = ("data.name=latents", "train.precision=fp32", "train.preview_every=0")
OBJECTIVES = {
    "fm": ("fm.snapshot_every=0",),
    "jko": ("train.objective=jko", "jko.h=[1.0]", "velocity.autonomous=true"),
}


def write_sparse_cache(folder: Path, count: int, shape: tuple[int, ...]) -> None:
    """Write a stochastic cache whose shards are holes, and remember their verification."""
    identity = {
        "kind": "latents", "format": FORMAT, "data": "sparse", "dataset": "latents",
        "split": "train", "count": count, "latent_shape": list(shape), "stochastic": True,
        "shard_size": SHARD,
    }  # fmt: skip
    seal.start(folder)
    rows, states, sums = [], {}, {}
    for index in range(math.ceil(count / SHARD)):
        size = min(SHARD, count - index * SHARD)
        path = folder / shard_name(index)
        _write_hole(path, size, shape)
        if not index or size < SHARD:
            sha256 = sha256_file(path)
        state = os.stat(path)
        states[path.name] = [
            state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_dev, state.st_ino, sha256
        ]
        sums[path.name] = sha256
        rows.append({"file": path.name, "count": size, "sha256": sha256})
    channels = torch.zeros(shape[0])
    manifest = {
        "format": FORMAT, "key": content_key(identity), "identity": identity,
        "count": count, "shards": rows, "complete": True,
        "standardisation": Standardisation(channels, channels + 1).to_dict(),
        "classes": [[0, count]],
    }  # fmt: skip
    text = atomic.json_bytes(manifest)
    sums[MANIFEST] = hashlib.sha256(text).hexdigest()
    atomic.write_bytes(folder / seal.NAME, seal.lines(sums))
    atomic.write_bytes(folder / MANIFEST, text, sealed=False)
    atomic.write_bytes(memory_file(folder), json.dumps(states).encode(), sealed=False)


def _write_hole(path: Path, size: int, shape: tuple[int, ...]) -> None:
    """Write a safetensors file of zeros that takes no room: its header, and a hole."""
    header: dict[str, Any] = {}
    end = 0
    for name, kind, sides, width in (
        ("labels", "I64", [size], 8),
        ("log_var", "F32", [size, *shape], 4),
        ("mean", "F32", [size, *shape], 4),
    ):
        begin, end = end, end + width * math.prod(sides)
        header[name] = {"dtype": kind, "shape": sides, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_cold_cache(folder: Path, count: int, shape: tuple[int, ...], size: int) -> None:
    """Write a stochastic cache of zeros that takes room, and drop its pages from memory."""
    identity = {
        "kind": "latents", "dataset": "latents", "data": "zeros", "split": "train",
        "count": count, "latent_shape": list(shape), "stochastic": True, "shard_size": size,
    }  # fmt: skip
    writer = StoreWriter(folder, identity, count, size)
    for index in writer.missing():
        first, last = writer.bounds(index)
        zeros = torch.zeros(last - first, *shape)
        labels = torch.zeros(last - first, dtype=torch.int64)
        writer.write(index, {"mean": zeros, "log_var": zeros.clone(), "labels": labels})
    channels = torch.zeros(shape[0])
    moments = Standardisation(channels, channels + 1).to_dict()
    writer.finish(lambda _: {"standardisation": moments, "classes": [[0, count]]})
    time.sleep(_SETTLED)
    open_store(folder, "latent cache")  # remembers that it is verified


def drop_pages(folder: Path) -> None:
    """Drop the pages of the files in a folder from memory."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _Clock:
    """Seconds that the main thread spends inside some methods, which it replaces."""

    def __init__(
        self, methods: list[tuple[type, str]], now: Callable[[], float] = time.process_time
    ) -> None:
        self.seconds, self._inside = 0.0, False
        for owner, name in methods:
            setattr(owner, name, self._timed(getattr(owner, name), now))

    def _timed(self, inner: Callable[..., Any], now: Callable[[], float]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            if self._inside or threading.current_thread() is not threading.main_thread():
                return inner(*args)
            self._inside, began = True, now()
            try:
                return inner(*args)
            finally:
                self.seconds += now() - began
                self._inside = False

        return timed


def measure(folder: Path, steps: int, objective: str, width: int) -> dict[str, Any]:
    """Open a cache and train some steps in this process."""
    from accelerate import Accelerator

    from pipeline.data.drawn_latents import MANY, DrawnLatents

    config = load_config("imagenet32", [
        *SETTINGS, *OBJECTIVES[objective], f"data.path={folder}", f"train.iterations={steps}",
        f"velocity.width={width}",
    ])  # fmt: skip
    base, began = peak_memory(), _now()
    count = len(open_cache(config))
    opened, first, share = _since(began), list[float](), list[float]()
    reading = _Clock([(DrawnLatents if count >= MANY else StoreReader, "take")])
    stepping = 0.0

    def progress(items: Any, total: int, label: str) -> Any:
        nonlocal first, stepping
        for item in items:
            seen, spent = reading.seconds, time.process_time()
            yield item
            first = first or _since(began)
            step = time.process_time() - spent
            stepping += step
            share.append((reading.seconds - seen) / step)
            if len(share) == steps:
                raise _Done

    with tempfile.TemporaryDirectory() as name, contextlib.suppress(_Done):
        train(config, Path(name) / "run", Accelerator(cpu=True), progress, resume=False)
    return {
        "latents": count, "open_s": opened, "first_step_s": first, "step_s": stepping / steps,
        "reading": statistics.median(share), "MiB": (peak_memory() - base) / 2**20,
    }  # fmt: skip


def measure_waiting(
    place: str, steps: int, objective: str, width: int, compute: float, delay: float, ahead: bool
) -> dict[str, Any]:
    """Train some steps in this process, and measure how long they wait for their samples."""
    from accelerate import Accelerator

    from pipeline.data.drawn_latents import DrawnLatents

    config = load_config("imagenet32", [
        *SETTINGS, *OBJECTIVES[objective], f"data.path={place}", f"train.iterations={steps + 1}",
        f"velocity.width={width}",
    ])  # fmt: skip
    copy = RemoteStoreReader._copy

    def slow_copy(reader: RemoteStoreReader, index: int) -> None:
        time.sleep(delay)
        copy(reader, index)

    RemoteStoreReader._copy = slow_copy  # type: ignore[method-assign]
    owners = (StoreReader, DrawnLatents, ReadAhead)
    takes: list[tuple[type, str]] = [(owner, "take") for owner in owners]
    waiting = _Clock([*takes, (block_batches.BlockBatches, "indices")], time.perf_counter)
    if not ahead:
        block_batches.SCATTERED = 1 << 62
    gradient = BlockObjective.loss_and_gradient

    def slow(objective: BlockObjective, step: int) -> Any:
        loss = gradient(objective, step)
        time.sleep(compute)
        return loss

    BlockObjective.loss_and_gradient = slow  # type: ignore[method-assign]
    rows = list[tuple[float, float, float]]()

    def progress(items: Any, total: int, label: str) -> Any:
        for item in items:
            seen, began, spent = waiting.seconds, time.perf_counter(), time.process_time()
            yield item
            rows.append((
                waiting.seconds - seen, time.perf_counter() - began, time.process_time() - spent
            ))  # fmt: skip
            if len(rows) == steps:
                raise _Done

    with tempfile.TemporaryDirectory() as name, contextlib.suppress(_Done):
        train(config, Path(name) / "run", Accelerator(cpu=True), progress, resume=False)
    later = rows[len(rows) // 2 :]  # the first steps open shards, and nothing is read ahead yet
    result: dict[str, Any] = {"latents": len(open_cache(config)), "ahead": ahead}
    for part, name in ((rows, "all"), (later, "later half")):
        means = (statistics.fmean(column) for column in zip(*part, strict=True))
        result[name] = dict(zip(("wait_s", "step_s", "cpu_s"), map(_rounded, means), strict=True))
    return result


def _rounded(value: float) -> float:
    return round(value, 5)


class _Computed:
    """Pixels of images (C, H, W) of a hundred classes, functions of their indices."""

    random_access = True

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self.count, self.places = count, np.arange(math.prod(shape)).reshape(shape)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Return pixels uint8 (n, C, H, W)."""
        rows = indices[:, None, None, None] * 2_654_435_761 + self.places * 40_503
        return (rows >> 13).astype(np.uint8)

    def labels(self) -> np.ndarray:
        """Return classes int64 (N,)."""
        return np.arange(self.count) % 100


def measure_encoding(count: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """Encode images in this process, and open their cache."""
    from accelerate import Accelerator

    config = load_config("imagenet32", ["latents.mirror=false"])
    sides = (shape[0], shape[1], shape[2])
    images = ImageSet("computed", "train", sides, f"computed-{count}", count,
                      _Computed(count, sides))  # fmt: skip
    model = IdentityAutoencoder(sides)
    encoding.load_images_and_autoencoder = lambda _: (images, model)
    base, began = peak_memory(), _now()
    cache = encoding.encode(config, Accelerator(cpu=True), no_progress)
    spent = _since(began)
    moments = cache.standardisation
    assert len(cache) == count and float((moments.std - 3**-0.5).abs().max()) < 0.02, moments
    return {"latents": count, "encode_s": spent, "MiB": (peak_memory() - base) / 2**20}


def _now() -> tuple[float, float]:
    """Return the clock, and the processor seconds of this process."""
    return time.perf_counter(), time.process_time()


def _since(began: tuple[float, float]) -> list[float]:
    """Return the seconds since then by both, in the same order."""
    return [round(now - then, 2) for now, then in zip(_now(), began, strict=True)]


class _Done(Exception):  # noqa: N818 - no error
    """The steps are measured."""


def main() -> None:
    """Measure every number of latents in a process of its own."""
    parser = argparse.ArgumentParser(description="opening of large caches, and a first step")
    parser.add_argument("--latents", default="20000,2000000,100000000", help="several by commas")
    parser.add_argument("--shape", default="11,8,8", help="C,H,W of a latent")
    parser.add_argument("--objective", default="fm", choices=OBJECTIVES)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--width", type=int, default=128, help="channels of the network")
    parser.add_argument("--encode", action="store_true", help="encode images instead")
    parser.add_argument("--wait", action="store_true", help="measure how long steps wait")
    parser.add_argument("--compute", type=float, default=0.0, help="seconds that a step sleeps")
    parser.add_argument("--cold", action="store_true", help="real shards, dropped from memory")
    parser.add_argument("--remote", type=float, help="seconds of a copy of a shard")
    parser.add_argument("--shard", type=int, default=SHARD, help="latents in a cold shard")
    parser.add_argument("--ahead", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child and args.encode:
        sides = tuple(map(int, args.shape.split(",")))
        return print(json.dumps(measure_encoding(int(args.latents), sides)))
    if args.child and args.wait:
        remote = args.remote is not None
        return print(json.dumps(measure_waiting(
            f"file://{args.child}" if remote else str(args.child), args.steps, args.objective,
            args.width, args.compute, args.remote or 0.0, bool(args.ahead),
        )))  # fmt: skip
    if args.child:
        return print(json.dumps(measure(args.child, args.steps, args.objective, args.width)))
    shape = tuple(map(int, args.shape.split(",")))
    with tempfile.TemporaryDirectory() as name:
        os.environ["JKOFLOW_HOME"] = name
        for count in map(int, args.latents.split(",")):
            folder = Path(name) / "latents" / f"sparse-{count}"
            if args.cold:
                write_cold_cache(folder, count, shape, args.shard)
            elif not args.encode:
                write_sparse_cache(folder, count, shape)
            command = [sys.executable, "-m", "tests.benchmarks.bench_cache", "--child"]
            command += [str(folder), "--steps", str(args.steps), "--objective", args.objective]
            command += ["--width", str(args.width), "--shape", args.shape]
            command += ["--encode", "--latents", str(count)] if args.encode else []
            command += ["--wait", "--compute", str(args.compute)] if args.wait else []
            command += ["--remote", str(args.remote)] if args.remote is not None else []
            for ahead in (0, 1) if args.wait else (1,):
                if args.cold:
                    drop_pages(folder)
                shutil.rmtree(Path(name) / "remote", ignore_errors=True)
                own = [*command, "--ahead", str(ahead)]
                done = subprocess.run(own, check=True, stdout=subprocess.PIPE, text=True)
                print(done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
