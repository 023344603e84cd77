"""Errors of Adam and Muon after equal processor time: autoencoder and velocity network.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_optimisers [--seconds 100]

The benchmark runs on CIFAR-10, in bfloat16, on one core. The autoencoder is that of
`configs/autoencoders/rgb32-kl.yaml` without its adversary, at a constant learning rate. Its error
is the mean L1 error of the last quarter. The network is the UNet of `cifar10-16x16`, on images at
half size, at a rate decayed by half a cosine. Its error is the mean squared error on 1000 held-out
images at fixed times and noise; at the start it is 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from flows.networks.registry import make_velocity
from pipeline.autoencoder_training.trainer import AutoencoderTrainer
from pipeline.config import packaged
from pipeline.config.autoencoder import AutoencoderConfig
from pipeline.config.load import load, load_config
from pipeline.data.datasets import load_images
from pipeline.optim.learning_rate import set_learning_rate
from pipeline.optim.optimisers import make_optimizer
from pipeline.runtime.rng import Batches, generator

AUTOENCODER = [("adam", 1.2e-3), ("adam", 4e-3), ("muon", 1.2e-3), ("muon", 4e-3), ("muon", 1e-2)]
NETWORK = [("adam", 8e-4), ("adam", 4e-3), ("muon", 3e-3), ("muon", 6e-3), ("muon", 1e-2)]
_HELD_OUT, _BATCH = 1000, 64


def autoencoder(kind: str, lr: float, seconds: float) -> tuple[int, float]:
    """Train for some seconds; return the number of images and the L1 error."""
    config = load(AutoencoderConfig, "rgb32-kl", (), packaged.AUTOENCODERS)
    recipe = dataclasses.replace(
        config.training, optimizer=kind, lr=lr, iterations=10**6, warmup=50,
        adversarial_weight=0.0,
    )  # fmt: skip
    images = load_images(config.data)
    architecture = config.architecture.build(images.shape)
    training = AutoencoderTrainer(architecture, recipe, Accelerator(cpu=True))
    batches = Batches(len(images), recipe.batch_size, recipe.seed, "autoencoder")
    errors: list[float] = []
    began = time.process_time()
    while time.process_time() - began < seconds:
        chosen = torch.from_numpy(images.take(batches.indices(training.done).numpy()))
        terms = training.step(chosen, generator(recipe.seed, "autoencoder", training.done))
        errors.append(terms["reconstruction"])
    last = errors[-max(1, len(errors) // 4) :]
    return len(errors) * recipe.batch_size, sum(last) / len(last)


def network(kind: str, lr: float, seconds: float) -> tuple[int, float]:
    """Train for some seconds; return the number of images and the held-out error."""
    config = load_config("cifar10-16x16", ["velocity.classes=0"])
    images = load_images(config.data)
    rows = torch.from_numpy(images.take(torch.arange(20_000).numpy())).float()
    x = F.avg_pool2d(rows, 2)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    draw = torch.Generator().manual_seed(0)
    held_out, x = x[:_HELD_OUT], x[_HELD_OUT:]
    times, noise = (
        torch.rand(_HELD_OUT, generator=draw),
        torch.randn(held_out.shape, generator=draw),
    )
    net = make_velocity(config.velocity, tuple(x.shape[1:]), draw)
    optimizer = make_optimizer(kind, net, lr)

    def loss(z: torch.Tensor, t: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            v = net(t, torch.lerp(z, end, t[:, None, None, None]))
        return (v.float() - (end - z)).square().mean()

    seen, began = 0, time.process_time()
    while (spent := time.process_time() - began) < seconds:
        decay = max(0.02, 0.5 * (1.0 + math.cos(math.pi * spent / seconds)))
        set_learning_rate(optimizer, lr * decay * min(1.0, (seen / _BATCH + 1) / 50))
        z = x[torch.randint(len(x), (_BATCH,), generator=draw)]
        end = torch.randn(z.shape, generator=draw)
        optimizer.zero_grad()
        loss(z, torch.rand(_BATCH, generator=draw), end).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        seen += _BATCH
    with torch.no_grad():
        return seen, loss(held_out, times, noise).item()


def main() -> None:
    """Print a row for each optimiser and learning rate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=100.0)
    given = parser.parse_args()
    cases: list[
        tuple[str, Callable[[str, float, float], tuple[int, float]], list[tuple[str, float]]]
    ]
    cases = [("autoencoder", autoencoder, AUTOENCODER), ("network", network, NETWORK)]
    print("| | optimiser | lr | images seen | error |\n|---|---|---|---|---|")
    for name, measure, settings in cases:
        for kind, lr in settings:
            seen, error = measure(kind, lr, given.seconds)
            print(f"| {name} | {kind} | {lr:g} | {seen} | {error:.4f} |", flush=True)


if __name__ == "__main__":
    main()
