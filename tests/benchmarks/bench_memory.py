"""Peak memory of training block k, against training K blocks jointly.

    python -m tests.benchmarks.bench_memory [--blocks 16] [--out memory.png]
        [--dim 6 --width 93 --batch 10000]

The setting of the released two-dimensional code: MLP 128-128-128, batch 2000, RK4 with S = 3,
finite differences; other sizes have normal samples. Block-wise: a run grows by one block a time,
every block in a fresh process, which reads its stage from the disk. Jointly: one objective over K
blocks, differentiated through all of them, in a fresh process for each K. Printed is the largest
resident memory of the process, less what it held when the training began.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from eval.plots import curves
from flows.networks.config import VelocityConfig
from flows.solving.estimators import FiniteDifference
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec
from pipeline.config.data import DataConfig, PointsConfig
from pipeline.config.schema import Config
from pipeline.config.training import (
    JkoConfig,
    ScheduleConfig,
    TrainConfig,
    TrainingSolverConfig,
)
from pipeline.runtime.system import keep_freed_memory, peak_memory
from pipeline.training.sources import SampleSource
from tests.flows.problems import fresh_flow
from tests.pipeline.gaussian_source import GaussianSource

#: default file of the plot; runs/ is not kept with the project
OUT = Path("runs/bench/memory.png")
H, STEPS, ITERATIONS = 0.5, 3, 3


@dataclass(frozen=True)
class Size:
    """Dimensions of a sample, features of a layer, and samples of a batch."""

    dim: int = 2
    width: int = 128
    batch: int = 2000

    @property
    def network(self) -> VelocityConfig:
        return VelocityConfig("mlp", width=self.width, depth=3)


def resident() -> int:
    """Resident memory of this process now, in bytes (peak so far where /proc is absent)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory()
    return pages * 4096


def settings(size: Size = Size()) -> Config:  # noqa: B008 - it is frozen
    """A run that starts with one block and has no free block."""
    return Config(
        name="memory",
        data=DataConfig(name="two_moons"),
        points=PointsConfig(train=10000),
        velocity=size.network,
        schedule=ScheduleConfig(rho=1.0, max_blocks=1, tolerance=0.0, free_block=False),
        jko=JkoConfig(h0=H, solver=TrainingSolverConfig("rk4", STEPS)),
        train=TrainConfig(iterations=ITERATIONS, batch_size=size.batch),
    )


def train_one_more(folder: Path, size: Size) -> dict[str, float]:
    """Train the next block of a run; returns memory and seconds."""
    from accelerate import Accelerator

    from pipeline.toy2d.point_source import PointSource
    from pipeline.training.train import train

    config, there = settings(size), (folder / "flow.json").is_file()
    accelerator = Accelerator(cpu=True)
    source: SampleSource = PointSource(settings())
    if size.dim != 2:
        unit = tuple(tuple(row) for row in torch.eye(size.dim).tolist())
        source = GaussianSource(unit, 5 * size.batch)
    torch.nn.Linear(4, 4)(torch.zeros(4, 4)).sum().backward()  # what autograd itself loads
    before, began = resident(), time.perf_counter()
    train(
        config,
        folder,
        accelerator,
        lambda items, *_: items,
        there,
        source,
        add_blocks=int(there),
    )
    return {"bytes": peak_memory() - before, "seconds": time.perf_counter() - began}


def train_jointly(count: int, size: Size) -> dict[str, float]:
    """A few steps on the sum of the JKO objectives of all blocks, through all blocks at once."""
    keep_freed_memory()  # as `train` does
    spec = BlockSpec(size.network, SolverConfig("rk4", STEPS), h=H)
    flow = fresh_flow((size.dim,), [spec] * count)
    optimiser = torch.optim.Adam(flow.parameters(), 1e-3)
    divergence, generator = FiniteDifference(), torch.Generator().manual_seed(1)
    torch.nn.Linear(4, 4)(torch.zeros(4, 4)).sum().backward()
    before, began = resident(), time.perf_counter()
    for _ in range(ITERATIONS):
        start = z = torch.randn((size.batch, size.dim), generator=generator)
        total = z.new_zeros(())
        for block in flow:
            eps = divergence.draw_probe(z, generator)
            moved = block.transport(z, divergence=divergence, eps=eps)
            assert moved.log_det is not None
            movement = (moved.z - z).square().sum(dim=1) / (2 * H)
            total = total + (movement - moved.log_det).mean()
            z = moved.z
        total = total + z.square().sum() / (2 * len(start))
        optimiser.zero_grad(set_to_none=True)
        total.backward()
        optimiser.step()
    return {"bytes": peak_memory() - before, "seconds": time.perf_counter() - began}


def in_fresh_process(*arguments: str) -> dict[str, float]:
    """What a child process measured."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_memory", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="memory of block-wise and joint training")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--out", type=Path, default=OUT, help=f"the plot; default {OUT}")
    parser.add_argument("--dim", type=int, default=Size.dim)
    parser.add_argument("--width", type=int, default=Size.width)
    parser.add_argument("--batch", type=int, default=Size.batch)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = Size(args.dim, args.width, args.batch)
    if args.child:
        kind, value = args.child
        print(json.dumps(train_one_more(Path(value), size) if kind == "block" else
                         train_jointly(int(value), size)))  # fmt: skip
        return
    sizes = [f"--{name}={value}" for name, value in asdict(size).items()]
    counts = range(1, args.blocks + 1)
    megabytes: dict[str, list[float]] = {"block-wise, block k": [], "jointly, K blocks": []}
    print("  k   block k: MiB   seconds     K jointly: MiB   seconds", flush=True)
    with tempfile.TemporaryDirectory() as name:
        for k in counts:
            one = in_fresh_process(*sizes, "--child", "block", str(Path(name) / "run"))
            joint = in_fresh_process(*sizes, "--child", "joint", str(k))
            for line, row in zip(megabytes.values(), (one, joint), strict=True):
                line.append(row["bytes"] / 2**20)
            print(
                f"{k:3d}{one['bytes'] / 2**20:15.0f}{one['seconds']:10.1f}"
                f"{joint['bytes'] / 2**20:19.0f}{joint['seconds']:10.1f}",
                flush=True,
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    curves(
        args.out, {line: (list(counts), values) for line, values in megabytes.items()},
        x_label="block k, or number of blocks K", y_label="peak memory (MiB)",
    )  # fmt: skip
    print(args.out)


if __name__ == "__main__":
    main()
