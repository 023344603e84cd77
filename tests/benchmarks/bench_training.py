"""Training iterations per second: the plain formulation of a JKO block against ours.

    python -m tests.benchmarks.bench_training [--iterations 40] [--threads 1] [--compile]

The setting of the released two-dimensional code: MLP 128-128-128 with Softplus(β = 20), batch
2000, RK4 on S = 3 sub-intervals, finite-difference divergence, Adam. Plain: two network calls an
evaluation and torchdiffeq's adjoint. Ours: `jko_loss` on a `Block`: both calls in one batch and
ordinary backpropagation. They start from the same weights, see the same samples and probes, and
take turns in one process, so that what else the machine does falls on both. Their losses are
printed side by side.

The whole is done in two fresh processes: as it is, and with an allocator that keeps freed memory
(glibc: MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_). A step frees some 150 MB of
activations; glibc gives them back to the system, and the next step pays for every page again.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor, nn
from torchdiffeq import odeint_adjoint

from flows.block import Block, SolverConfig
from flows.divergence import FiniteDifference
from flows.mlp import MlpVelocity
from flows.objective import jko_loss
from flows.velocity import VelocityConfig, make_velocity

H, STEPS, SIGMA0, LR = 0.25, 3, 0.02, 1e-3
KEEP = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}


class PlainNet(nn.Module):
    """The network as one would write it down: z and t concatenated, layer by layer."""

    def __init__(self, like: MlpVelocity) -> None:
        super().__init__()
        layers = (like.first, *like.middle, like.last)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in layers)
        self.activation = nn.Softplus(beta=20)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        x = torch.cat([z, torch.ones_like(z[:, :1]) * t], dim=1)
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
        v = self.net(t, z)
        moved = self.net(t, z + self.sigma * self.eps)
        return v, ((moved - v) * self.eps).sum(dim=1) / self.sigma


def plain_loss(field: PlainField, z: Tensor, eps: Tensor) -> Tensor:
    """The JKO objective by the plain formulation."""
    field.eps = eps
    times = torch.linspace(0, 1, STEPS + 1)
    path, log_det = odeint_adjoint(field, (z, z.new_zeros(len(z))), times, method="rk4")
    end = path[-1]
    movement = (end - z).square().sum(dim=1) / (2 * H)
    return (end.square().sum(dim=1) / 2 - log_det[-1] + movement).mean()


def moons(n: int, generator: torch.Generator) -> Tensor:
    """Samples to train on."""
    angle = torch.pi * torch.rand(n, generator=generator)
    lower = torch.rand(n, generator=generator) < 0.5
    x = torch.where(lower, 1 - angle.cos(), angle.cos()) - 0.5
    y = torch.where(lower, 0.5 - angle.sin(), angle.sin()) - 0.25
    noise = torch.randn((n, 2), generator=generator)
    return 2 * torch.stack([x, y], dim=1) + 0.2 * noise


def measure(iterations: int, batch: int, compiled: bool) -> None:
    """Let the formulations take turns; print their rates and losses."""
    config = VelocityConfig("mlp")
    velocity = make_velocity(config, (2,), torch.Generator().manual_seed(0))
    assert isinstance(velocity, MlpVelocity)
    field = PlainField(PlainNet(velocity))
    block, divergence = Block(velocity, SolverConfig("rk4", STEPS)), FiniteDifference(SIGMA0)
    ways = {
        "plain": (field, lambda z, eps: plain_loss(field, z, eps)),
        "ours": (block, lambda z, eps: jko_loss(block, z, H, divergence, eps[None]).total),
    }
    if compiled:
        fast = copy.deepcopy(block)
        fast.velocity.compile(dynamic=False)
        ways["compiled"] = (
            fast, lambda z, eps: jko_loss(fast, z, H, divergence, eps[None]).total
        )  # fmt: skip
    optimisers = {name: torch.optim.Adam(m.parameters(), LR) for name, (m, _) in ways.items()}
    generator = torch.Generator().manual_seed(1)
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(iterations + 3):
        z, eps = moons(batch, generator), torch.randn((batch, 2), generator=generator)
        losses = {}
        for name, (model, loss) in ways.items():
            began, worked = time.perf_counter(), time.process_time()
            optimisers[name].zero_grad(set_to_none=True)
            value = loss(z, eps)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimisers[name].step()
            if step >= 3:
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - worked)
            losses[name] = float(value.detach())
        if step % max(1, iterations // 4) == 0 or step == iterations + 2:
            shown = "   ".join(f"{name} {value:.6f}" for name, value in losses.items())
            print(f"  step {step:4d}   loss: {shown}")
    base = statistics.median(wall["plain"]), statistics.median(cpu["plain"])
    for name in ways:
        took, spent = statistics.median(wall[name]), statistics.median(cpu[name])
        print(
            f"  {name:9s} {1 / took:6.2f} it/s   ×{base[0] / took:.2f}     CPU time "
            f"{1000 * spent:6.1f} ms an iteration   ×{base[1] / spent:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="the plain formulation against ours")
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--batch", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="also ours under torch.compile")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        torch.set_num_threads(args.threads)
        measure(args.iterations, args.batch, args.compile)
        return
    print(f"batch {args.batch}, {args.threads} threads, medians of {args.iterations} iterations")
    own = {k: v for k, v in os.environ.items() if k not in KEEP}
    for title, more in (("the allocator as it is", {}), ("freed memory kept", KEEP)):
        print(f"{title}:", flush=True)
        command = [sys.executable, "-m", "tests.benchmarks.bench_training", *sys.argv[1:]]
        subprocess.run([*command, "--child"], env={**own, **more}, check=True)


if __name__ == "__main__":
    main()
