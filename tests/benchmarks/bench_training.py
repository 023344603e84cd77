"""Training iterations per second: other formulations of a JKO block against ours.

    python -m tests.benchmarks.bench_training [--iterations 20] [--rounds 3] [--compile]
        [--dim 6 --width 93 --batch 10000]

The setting of the released two-dimensional code: MLP 128-128-128 of z alone with Softplus(β = 20),
batch 2000, RK4 on S = 3 sub-intervals, finite-difference divergence, Adam, gradient clipping.

released     the released formulation: two network calls an evaluation; torchdiffeq's adjoint on
             each sub-interval by itself, with new probes; a third state of zeros, where that code
             has the Jacobian's norm
plain        two network calls an evaluation, torchdiffeq's adjoint on all sub-intervals
ours         `jko_loss` on a `Block`, the same estimator: both calls in one batch, ordinary
             backpropagation
compiled     ours with the network under torch.compile (with --compile)
derivative   another estimator, the limit of the finite difference: ε·(∂v/∂z)ε with the same ε,
             by forward mode (`jko.divergence=hutchinson` is its kin)

Every formulation trains in a process of its own, from the same weights, on the same samples and
probes (the released formulation draws two more). The processes take turns step by step, so other
work of the machine falls on all of them. The table has medians over the iterations, ratios of
processor seconds to the released formulation, the losses, and the growth of resident memory from
before the first step to its peak.

"kept": with freed memory kept, as `jkoflow train` has it (`keep_freed_memory`). A step frees its
activations; glibc may give them back to the system, and the next step pays for every page again.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchdiffeq import odeint_adjoint

from flows.block import Block
from flows.networks.config import VelocityConfig
from flows.networks.mlp import MlpVelocity
from flows.networks.registry import make_velocity
from flows.objectives.losses import jko_loss
from flows.solving.divergence import Divergence
from flows.solving.estimators import FiniteDifference, Hutchinson
from flows.solving.solver import SolverConfig
from pipeline.runtime.system import keep_freed_memory, peak_memory

H, STEPS, SIGMA0, LR = 0.25, 3, 0.02, 1e-3
WARMUP = 3
Loss = Callable[[Tensor, Tensor], Tensor]


class PlainNet(nn.Module):
    """The network as one would write it down, layer by layer."""

    def __init__(self, like: MlpVelocity) -> None:
        super().__init__()
        layers = (like.first, *like.middle, like.last)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in layers)
        self.activation = nn.Softplus(beta=20)

    def forward(self, z: Tensor) -> Tensor:
        x = z
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class PlainField(nn.Module):
    """(v, ∇·v) by two network calls, for the adjoint solver."""

    def __init__(self, net: PlainNet) -> None:
        super().__init__()
        self.net = net
        self.sigma = SIGMA0 / 2**0.5
        self.eps = torch.empty(0)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        z, _ = state
        v = self.net(z)
        moved = self.net(z + self.sigma * self.eps)
        return v, ((moved - v) * self.eps).sum(dim=1) / self.sigma


class ReleasedField(PlainField):
    """(v, ∇·v, 0), a field of three states."""

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # type: ignore[override]
        v, divergence = super().forward(t, (state[0], state[1]))
        return v, divergence, torch.zeros_like(divergence)


def released_loss(field: ReleasedField, z: Tensor, eps: Tensor) -> Tensor:
    """The JKO objective as the released code computes it, one sub-interval after the other."""
    start, log_det = z.clone(), z.new_zeros(())
    for index in range(STEPS):
        field.eps = eps if index == 0 else torch.randn_like(z)
        times = torch.linspace(index / STEPS, (index + 1) / STEPS, 2)
        state = (z, z.new_zeros(len(z)), z.new_zeros(len(z)))
        path, divergence, _ = odeint_adjoint(
            field, state, times, method="rk4", rtol=1e-5, atol=1e-5
        )
        z, log_det = path[-1], log_det + divergence[-1].mean()
    movement = 0.5 * (z - start).pow(2).sum(dim=1).mean() / H
    return 0.5 * z.pow(2).sum(dim=1).mean() - log_det + movement


def plain_loss(field: PlainField, z: Tensor, eps: Tensor) -> Tensor:
    """The JKO objective by the plain formulation."""
    field.eps = eps
    times = torch.linspace(0, 1, STEPS + 1)
    path, log_det = odeint_adjoint(field, (z, z.new_zeros(len(z))), times, method="rk4")
    end = path[-1]
    movement = (end - z).square().sum(dim=1) / (2 * H)
    return (end.square().sum(dim=1) / 2 - log_det[-1] + movement).mean()


def samples(n: int, dim: int, generator: torch.Generator) -> Tensor:
    """Two moons in the first two dimensions, noise in the others."""
    angle = torch.pi * torch.rand(n, generator=generator)
    lower = torch.rand(n, generator=generator) < 0.5
    x = torch.where(lower, 1 - angle.cos(), angle.cos()) - 0.5
    y = torch.where(lower, 0.5 - angle.sin(), angle.sin()) - 0.25
    noise = torch.randn((n, 2), generator=generator)
    plane = 2 * torch.stack([x, y], dim=1) + 0.2 * noise
    return torch.cat([plane, torch.randn((n, dim - 2), generator=generator)], dim=1)


def ways(dim: int, width: int) -> dict[str, tuple[nn.Module, Loss]]:
    """Each formulation's module and loss(z, ε), all with the same weights."""
    config = VelocityConfig("mlp", width=width, depth=3, autonomous=True)
    velocity = make_velocity(config, (dim,), torch.Generator().manual_seed(0))
    assert isinstance(velocity, MlpVelocity)
    plain, released = PlainField(PlainNet(velocity)), ReleasedField(PlainNet(velocity))

    def ours(divergence: Divergence) -> tuple[Block, Loss]:
        block = Block(copy.deepcopy(velocity), SolverConfig("rk4", STEPS))
        return block, lambda z, eps: jko_loss(block, z, H, divergence, eps[None]).total

    difference = FiniteDifference(SIGMA0)
    return {
        "released": (released, lambda z, eps: released_loss(released, z, eps)),
        "plain": (plain, lambda z, eps: plain_loss(plain, z, eps)),
        "ours": ours(difference),
        "compiled": ours(difference),
        "derivative": ours(Hutchinson(noise="gaussian", mode="jvp")),
    }


def work(name: str, batch: int, dim: int, width: int) -> None:
    """Train one formulation, a step for every line of stdin; report each as a line of JSON."""
    module, loss = ways(dim, width)[name]
    if name == "compiled":
        module.velocity.compile(dynamic=False)
    optimiser = torch.optim.Adam(module.parameters(), LR)
    generator = torch.Generator().manual_seed(1)
    loss(torch.zeros(8, dim), torch.ones(8, dim)).backward()  # what torch loads at first use
    before = resident()
    for _ in sys.stdin:
        z = samples(batch, dim, generator)
        eps = torch.randn((batch, dim), generator=generator)
        began, worked = time.perf_counter(), time.process_time()
        optimiser.zero_grad(set_to_none=True)
        value = loss(z, eps)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        report = {
            "wall": time.perf_counter() - began,
            "cpu": time.process_time() - worked,
            "loss": float(value.detach()),
            "memory": peak_memory() - before,
        }
        print(json.dumps(report), flush=True)


def resident() -> int:
    """Resident memory now, in bytes (the peak so far where /proc is absent)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return peak_memory()


class Worker:
    """A formulation in training, in another process."""

    def __init__(self, name: str, kept: bool, arguments: list[str]) -> None:
        self.name, self.title = name, f"{name}, kept" if kept else name
        module = "tests.benchmarks.bench_training"
        command = [sys.executable, "-m", module, *arguments, "--work", name]
        self.process = subprocess.Popen(
            [*command, "--kept"] if kept else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.steps: list[dict[str, float]] = []

    def step(self) -> None:
        """One step, waited for."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.steps.append(json.loads(self.process.stdout.readline()))

    def median(self, what: str, part: slice) -> float:
        """Of the steps of a round."""
        return statistics.median(step[what] for step in self.steps[part])


def measure(workers: list[Worker], iterations: int, rounds: int) -> None:
    """Let the formulations take turns; print their rates, losses and memory."""
    for _ in range(WARMUP + iterations * rounds):
        for worker in workers:
            worker.step()
    starts = range(WARMUP, WARMUP + iterations * rounds, iterations)
    parts, whole = [slice(start, start + iterations) for start in starts], slice(WARMUP, None)
    released, kept = workers[0], workers[1]
    print(
        f"{'':17s}  it/s  × released, kept (each round){'':{max(1, 5 * rounds - 18)}}CPU ms"
        "  × released  last loss  difference to plain  memory MiB"
    )
    plain = next(worker for worker in workers if worker.name == "plain")
    for worker in workers:
        ratios = [kept.median("cpu", part) / worker.median("cpu", part) for part in parts]
        each = " ".join(f"{ratio:.2f}" for ratio in ratios)
        cpu = worker.median("cpu", whole)
        pairs = zip(worker.steps, plain.steps, strict=True)
        difference = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
        print(
            f"{worker.title:17s}{1 / worker.median('wall', whole):6.2f}"
            f"  {statistics.median(ratios):7.2f} ({each})   {1000 * cpu:6.1f}"
            f"  {released.median('cpu', whole) / cpu:7.2f}  {worker.steps[-1]['loss']:9.6f}"
            f"  {difference:18.1e}  {worker.steps[-1]['memory'] / 2**20:10.0f}"
        )
    curve = range(0, len(plain.steps), max(1, len(plain.steps) // 5))
    for worker in workers:
        losses = "  ".join(f"{worker.steps[step]['loss']:.6f}" for step in curve)
        print(f"{worker.title:17s} losses at steps {', '.join(map(str, curve))}:  {losses}")


def main() -> None:
    parser = argparse.ArgumentParser(description="other formulations against ours")
    parser.add_argument("--iterations", type=int, default=20, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="also ours under torch.compile")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--kept", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        torch.set_num_threads(args.threads)
        if args.kept:
            keep_freed_memory()
        work(args.work, args.batch, args.dim, args.width)
        return
    print(
        f"batch {args.batch}, D {args.dim}, width {args.width}, {args.threads} threads, "
        f"{args.rounds} rounds of {args.iterations} iterations, one in turn of each",
        flush=True,
    )
    names = [("released", False), ("released", True), ("plain", True), ("ours", False)]
    names += [("ours", True), ("derivative", True)] + [("compiled", True)] * args.compile
    workers = [Worker(name, kept, sys.argv[1:]) for name, kept in names]
    try:
        measure(workers, args.iterations, args.rounds)
    finally:
        for worker in workers:
            worker.process.kill()


if __name__ == "__main__":
    main()
