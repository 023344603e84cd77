"""Which latent shape: the same short trainings for several shapes of latents of CIFAR-10.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.study_shapes OUT [--shapes 3x8x8 …]

For every shape, by the command line: an autoencoder (the recipe of `rgb32-kl-8x8`, but shorter),
the latents of some images, a class-conditional flow (the UNet of `cifar10`, on an 8×8 grid
throughout), FID of its samples and of reconstructions. A quarter of an hour of one core a shape.
Results that OUT holds already are kept.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

#: factors of the autoencoder's width, and the folding of the flow's input
SHAPES = {"3x8x8": ([1, 1], 1), "12x8x8": ([1, 1], 1), "3x16x16": ([1], 2)}


def commands(shape: str, folder: Path, options: argparse.Namespace) -> dict[Path, list[list[str]]]:
    """Return the commands of a shape by the file that the last of them writes."""
    factors, patch = SHAPES[shape]
    weights = folder / "autoencoder" / "autoencoder.safetensors"
    run = folder / "run"
    autoencoder = with_settings(
        "rgb32-kl-8x8",
        f"architecture.width_factors={factors}".replace(" ", ""),
        f"architecture.channels={shape.split('x')[0]}",
        f"training.iterations={options.autoencoder_steps}", f"data.limit={options.images}",
    )  # fmt: skip
    flow = with_settings(
        "cifar10",
        f"autoencoder.weights={weights}", f"velocity.patch={patch}",
        f"data.limit={options.images}", f"train.iterations={options.flow_steps}",
        "train.batch_size=64", "fm.snapshot_every=0", "generate.guidance=null",
        f"evaluate.n={options.n}", "evaluate.nll=0",
    )  # fmt: skip
    return {
        weights: [["autoencoder", "train", *autoencoder, "--out", str(weights.parent)]],
        run / "metrics.json": [
            ["encode", *flow],
            ["train", *flow, "--run", str(run)],
            ["evaluate", "--run", str(run)],
        ],
    }


def with_settings(config: str, *overrides: str) -> list[str]:
    """Return the options of a configuration with overrides."""
    return ["--config", config, *(part for each in overrides for part in ("--set", each))]


def measure(shape: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one shape; return the metrics of its flow."""
    metrics: dict[str, Any] = {}
    for file, calls in commands(shape, folder, options).items():
        for words in [] if file.is_file() else calls:
            print(shlex.join(["jkoflow", *words]), file=sys.stderr, flush=True)
            subprocess.run([sys.executable, "-m", "pipeline", *words], check=True, stdout=2)
        if file.suffix == ".json":
            metrics = json.loads(file.read_text())
    return metrics


def options_of(words: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--autoencoder-steps", type=int, default=800)
    parser.add_argument("--flow-steps", type=int, default=1200)
    parser.add_argument("--images", type=int, default=30_000)
    parser.add_argument("-n", type=int, default=1000)
    return parser.parse_args(words)


def main() -> None:
    """Print the metrics of every shape."""
    options = options_of()
    rows = {
        shape: measure(shape, options.out.resolve() / shape, options) for shape in options.shapes
    }
    json.dump(rows, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
