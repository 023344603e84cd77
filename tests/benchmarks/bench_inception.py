"""Images per second of the FID features: pytorch-fid's way against ours and bfloat16, in turn.

    python -m tests.benchmarks.bench_inception [--images 200] [--rounds 3]

All read the same folder of 28x28 PNGs, from the files to the statistics: pytorch-fid as its
command does (batches of 50, a worker process per core), ours with `compute_stats`. They
alternate, so that what else the machine does falls on all. The medians are compared, of the
clock and of the processor seconds with those of the workers, which other programs hardly lengthen.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from eval.features.inception import Bfloat16Inception, FidInception
from eval.features.inception_weights import read_weights
from eval.gaussian import GaussianStats
from eval.sets.images import FolderImages
from eval.sets.sources import compute_stats
from tests.eval.conftest import pytorch_fid_network


def digits(folder: Path, n: int) -> None:
    """Write n digits of MNIST's training split as PNG."""
    from pipeline.assets.fetch import fetch_asset

    raw = (fetch_asset("mnist") / "train-images-idx3-ubyte").read_bytes()
    for i, image in enumerate(np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)[:n]):
        Image.fromarray(image).save(folder / f"{i:05d}.png")


def _seconds() -> tuple[float, float]:
    """Return the clock, and the processor seconds of this process and of those that have ended."""
    return time.perf_counter(), sum(os.times()[:4])


def main() -> None:
    parser = argparse.ArgumentParser(description="pytorch-fid's way against ours")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    from pytorch_fid.fid_score import calculate_activation_statistics

    from pipeline.assets.fetch import fetch_asset

    state = read_weights(fetch_asset("inception"))
    theirs = pytorch_fid_network(state)
    ours = {"jkoflow": FidInception(state), "bf16": Bfloat16Inception(state)}
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, 8)
    ways = ("pytorch-fid", *ours)
    clock: dict[str, list[float]] = {way: [] for way in ways}
    processor: dict[str, list[float]] = {way: [] for way in ways}
    gaps: dict[str, float] = {}

    def note(way: str, began: tuple[float, float]) -> None:
        for times, now, then in zip((clock, processor), _seconds(), began, strict=True):
            times[way].append(now - then)

    with tempfile.TemporaryDirectory() as name:
        digits(Path(name), args.images)
        images = FolderImages(name)
        for network in ours.values():  # reorders the weights
            network.features(torch.zeros(10, 1, 28, 28, dtype=torch.uint8))
        for _ in range(args.rounds):
            start = _seconds()
            mean, cov = calculate_activation_statistics(
                images.files, theirs, batch_size=50, num_workers=workers
            )
            note("pytorch-fid", start)
            for way, network in ours.items():
                start = _seconds()
                actual: GaussianStats = compute_stats(images, network)
                note(way, start)
                gaps[way] = max(np.abs(actual.mean - mean).max(), np.abs(actual.cov - cov).max())
    print(f"{args.images} images, {args.rounds} rounds, {torch.get_num_threads()} threads")
    for kind, seconds in (("by the clock", clock), ("of the processor", processor)):
        for way in ways:
            rate = args.images / statistics.median(seconds[way])
            ratios = [a / b for a, b in zip(seconds["pytorch-fid"], seconds[way], strict=True)]
            rounds = " ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
            print(
                f"{way:12s} {rate:6.1f} images/s {kind}, {statistics.median(ratios):.2f} times "
                f"pytorch-fid (rounds: {rounds})"
            )
    for way, gap in gaps.items():
        print(f"{way}: largest difference of a mean or covariance {gap:.1e}")


if __name__ == "__main__":
    main()
