"""Opening and first training step on a latent cache of many latents, without their disk space.

    python -m tests.benchmarks.bench_cache [--latents 20000,2000000,100000000]
    python -m tests.benchmarks.bench_cache --wait --latents 2000000 [--cold]
    python -m tests.benchmarks.bench_cache --encode --latents 20000,2000000 --shape 3,8,8

The shards are sparse files: every mean and logarithm of a variance is zero, and none takes room on
the disk. Their verification counts as done by an earlier command. A fresh process opens each cache
and trains the network of `imagenet32`, of width 32, for some steps. Printed are the seconds until
the cache is open and until the first step is done, by the clock and of the processor. Then follow
the processor seconds of a step, the share of reading in it, and the memory that all this adds.

With --wait, each cache is trained on twice, without the thread that reads ahead and with it.
Every step also sleeps 0.1 s, as the processor does while a GPU computes. Printed are the seconds
by the clock that a step waits for its samples and takes in all, and the processor seconds of all
threads in it. --cold writes real shards and drops their pages from memory first.

With --encode, a fresh process encodes computed images by the identity instead, and opens their
cache, which takes room on the disk. Printed are the seconds and the memory that this adds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from autoencoders.identity import IdentityAutoencoder
from pipeline.config.load import load_config
from pipeline.data import encoding
from pipeline.data.image_set import ImageSet
from pipeline.data.latent_cache import open_cache
from pipeline.runtime.console import no_progress
from pipeline.runtime.system import peak_memory
from pipeline.storage.shards.read_ahead import ReadAhead
from pipeline.storage.shards.reader import StoreReader
from pipeline.training.batches import block_batches
from pipeline.training.batches.block_objective import BlockObjective
from pipeline.training.train import train
from tests.large_caches import drop_pages, write_cold_cache, write_sparse_cache

#: of the training: `imagenet32` with a small network, without half precision, which a CPU emulates
SETTINGS = ("data.name=latents", "train.precision=fp32", "train.preview_every=0",
            "fm.snapshot_every=0", "velocity.width=32")  # fmt: skip
#: seconds that a step of --wait sleeps
COMPUTE = 0.1


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


def measure(folder: Path, steps: int) -> dict[str, Any]:
    """Open a cache and train some steps in this process."""
    from accelerate import Accelerator

    from pipeline.data.drawn_latents import MANY, DrawnLatents

    changes = [*SETTINGS, f"data.path={folder}", f"train.iterations={steps}"]
    config = load_config("imagenet32", changes)
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


def measure_waiting(folder: Path, steps: int, ahead: bool) -> dict[str, Any]:
    """Train some steps in this process, and measure how long they wait for their samples."""
    from accelerate import Accelerator

    from pipeline.data.drawn_latents import DrawnLatents

    changes = [*SETTINGS, f"data.path={folder}", f"train.iterations={steps + 1}"]
    config = load_config("imagenet32", changes)
    owners = (StoreReader, DrawnLatents, ReadAhead)
    takes: list[tuple[type, str]] = [(owner, "take") for owner in owners]
    waiting = _Clock([*takes, (block_batches.BlockBatches, "indices")], time.perf_counter)
    if not ahead:
        block_batches.SCATTERED = 1 << 62
    gradient = BlockObjective.loss_and_gradient

    def slow(objective: BlockObjective, step: int) -> Any:
        loss = gradient(objective, step)
        time.sleep(COMPUTE)
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


def in_fresh_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> None:
    """Call a function in a process of its own, and print what it returns."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        print(json.dumps(pool.submit(function, *arguments).result()), flush=True)


def main() -> None:
    """Measure every number of latents in a process of its own."""
    parser = argparse.ArgumentParser(description="opening of large caches, and a first step")
    parser.add_argument("--latents", default="20000,2000000,100000000", help="several by commas")
    parser.add_argument("--shape", default="11,8,8", help="C,H,W of a latent")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--encode", action="store_true", help="encode images instead")
    parser.add_argument("--wait", action="store_true", help="measure how long steps wait")
    parser.add_argument("--cold", action="store_true", help="real shards, dropped from memory")
    args = parser.parse_args()
    shape = tuple(map(int, args.shape.split(",")))
    with tempfile.TemporaryDirectory() as name:
        os.environ["JKOFLOW_HOME"] = name
        for count in map(int, args.latents.split(",")):
            if args.encode:
                in_fresh_process(measure_encoding, count, shape)
                continue
            folder = Path(name) / "latents" / f"sparse-{count}"
            (write_cold_cache if args.cold else write_sparse_cache)(folder, count, shape)
            for ahead in (False, True) if args.wait else (True,):
                if args.cold:
                    drop_pages(folder)
                if args.wait:
                    in_fresh_process(measure_waiting, folder, args.steps, ahead)
                else:
                    in_fresh_process(measure, folder, args.steps)


if __name__ == "__main__":
    main()
