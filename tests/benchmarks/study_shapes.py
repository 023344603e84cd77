"""Which latent shape: the same short trainings for several shapes of latents of CIFAR-10.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.study_shapes OUT [--shapes 3x8x8 …]

For every shape, by the command line: an autoencoder (the recipe of `configs/cifar10.yaml`, but
shorter and without its adversary), the latents of some images, a class-conditional flow (the UNet
of that file, on an 8×8 grid throughout), FID of its samples and of reconstructions. A quarter of
an hour of one core a shape. What OUT holds already is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

#: what differs: the autoencoder's levels and channels, and the folding of the network's input
SHAPES = {
    "3x8x8": ("architecture.ch_mult=[1,1]", "velocity.patch=1"),
    "12x8x8": ("architecture.ch_mult=[1,1]", "velocity.patch=1"),
    "3x16x16": ("architecture.ch_mult=[1]", "velocity.patch=2"),
}


def measure(shape: str, out: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one shape; figures of the autoencoder and of the flow."""
    folder, channels = out / shape, shape.split("x")[0]
    weights = folder / "autoencoder" / "autoencoder.safetensors"
    common = [
        *SHAPES[shape],
        f"architecture.z_channels={channels}", f"architecture.embed_dim={channels}",
        f"autoencoder_training.iterations={given.autoencoder_steps}",
        "autoencoder_training.adversarial_weight=0", f"data.limit={given.images}",
        f"train.iterations={given.flow_steps}", "train.batch_size=64", "train.snapshot_every=0",
        f"evaluate.n={given.n}", "evaluate.nll=0",
    ]  # fmt: skip
    if not weights.is_file():
        _jkoflow("autoencoder", "train", common, "--out", str(weights.parent))
    common += [f"autoencoder.weights={weights}"]
    _jkoflow("encode", "", common)
    run = folder / "run"
    if not (run / "metrics.json").is_file():
        _jkoflow("train", "", common, "--run", str(run))
        subprocess.run(["jkoflow", "evaluate", "--run", str(run)], check=True)
    measured: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return measured


def _jkoflow(verb: str, sub: str, overrides: list[str], *more: str) -> None:
    changed = [part for override in overrides for part in ("--set", override)]
    command = ["jkoflow", verb, *([sub] if sub else []), "--config", "cifar10", *changed, *more]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


def main() -> None:
    """Print the metrics of every shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--autoencoder-steps", type=int, default=800)
    parser.add_argument("--flow-steps", type=int, default=1200)
    parser.add_argument("--images", type=int, default=30_000)
    parser.add_argument("-n", type=int, default=1000)
    given = parser.parse_args()
    rows = {shape: measure(shape, given.out.resolve(), given) for shape in given.shapes}
    json.dump(rows, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
