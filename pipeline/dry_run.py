"""What `--dry-run` prints: the work of a command, what it reuses, and sizes; nothing is done."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path

import torch

from flows.networks.registry import make_velocity
from pipeline.config.data import LATENTS
from pipeline.config.rules.validate import check
from pipeline.config.sampling import EvaluateConfig
from pipeline.config.schema import Config
from pipeline.data.latent_cache import (
    PLACE,
    cache_folder,
    cache_identity,
    latent_bytes,
    load_images_and_autoencoder,
    open_cache,
)
from pipeline.runs.directory import RunDirectory
from pipeline.runs.networks import is_finished, network_folder, trains_alone, unfinished_networks
from pipeline.sampling.generate import images_folder
from pipeline.sampling.sampling_plan import SamplingPlan
from pipeline.storage.shards.manifest import MANIFEST
from pipeline.training.networks.train_network import require_independent
from pipeline.training.planner import next_pass
from pipeline.training.sources import check_classes
from pipeline.training.warm_start import open_warm_start

_FLOAT = 4
_MEGABYTE = 1e6


def _samples(config: Config) -> tuple[Path | str, tuple[int, ...], dict[int, int]]:
    """Return the place and the shape of training samples, and the number of each class."""
    if config.data.name == LATENTS:
        own = open_cache(config)
        return own.reader.place, own.shape, own.class_counts
    images, autoencoder = load_images_and_autoencoder(config)
    folder = cache_folder(cache_identity(config, images, autoencoder))
    refines = config.velocity.image_channels > 0
    labels = [] if images.labels is None else images.labels.tolist()
    return folder, tuple(images.shape if refines else autoencoder.latent_shape), Counter(labels)


def encode_lines(config: Config, precision: str | None = None) -> list[str]:
    """Describe `encode`: images, latents, shards and bytes."""
    images, autoencoder = load_images_and_autoencoder(config)
    folder = cache_folder(cache_identity(config, images, autoencoder))
    shape = tuple(autoencoder.latent_shape)
    count = len(images) * (2 if config.latents.mirror else 1)
    size = latent_bytes(shape, autoencoder.stochastic, precision or "fp32")
    mirrored = " and their mirror images" if config.latents.mirror else ""
    return [
        f"encode {len(images)} images{mirrored} of {images.name} ({images.split})",
        f"latents have shape {shape}",
        _shards(folder, count, config.latents.shard_size, size * count),
    ]


def train_lines(
    config: Config, folder: Path, add_blocks: int = 0, network: int | None = None
) -> list[str]:
    """Describe `train`: the latent cache, the blocks of the next pass, and parameters.

    Args:
        config: the configuration.
        folder: the run directory.
        add_blocks: number of blocks to add; 0 for none.
        network: the network to train alone; None trains all.

    Raises:
        UserError: the configuration is wrong or has no such network, the images have other
            classes, or no block can start as `train.init_from`.
    """
    check(config)
    if network is not None:
        require_independent(config, network)
        if is_finished(folder, network):
            return [f"network {network} of run {folder} is finished; nothing to train"]
    cache, shape, counts = _samples(config)
    with torch.device("meta"):
        velocity = make_velocity(config.velocity, shape)
    parameters = sum(p.numel() for p in velocity.parameters())
    if config.velocity.classes:
        check_classes(counts, config.velocity.classes)
    place = os.environ.get(PLACE)
    absent = f"is not under the data root; it is read in {place}" if place else (
        "is absent; run `jkoflow encode`"
    )  # fmt: skip
    own = config.data.name == LATENTS  # which has been opened
    state = "is complete" if own or (Path(cache) / MANIFEST).is_file() else absent
    started = RunDirectory(folder).started
    passes = started.passes if started is not None else ()
    upcoming = next_pass(config, passes, add_blocks)
    lines = [f"latent cache {cache} {state}"]
    if started is None and config.train.init_from is not None:
        start = open_warm_start(config.train.init_from, config.velocity, shape)
        lines.append(
            f"start from {len(start.blocks)} block(s) of the {start.objective} run {start.run}"
        )
    if upcoming is None:
        return [*lines, f"run {folder} is finished; nothing to train"]
    done, total = len(upcoming.blocks), len(upcoming.steps) + upcoming.free
    more = f", {done} of them finished" if done else ""
    count = config.velocity.nets
    if network is not None:
        return [
            *lines,
            f"train network {network} of {count} alone, {upcoming.iterations[0]} iterations, lr "
            f"{upcoming.lr[0]:g}, on samples {shape}, in {network_folder(folder, network)}",
            f"{parameters // count:,} parameters per network",
        ]
    if trains_alone(folder):
        left = len(unfinished_networks(folder, count))
        return [*lines, f"join {count} networks to a block, {left} of them yet to train"]
    lines.append(
        f"train {total} block(s) in pass {len(passes) - (upcoming in passes)} ({upcoming.kind})"
        f"{more}, on samples {shape}, in {folder}"
    )
    if upcoming.tolerance:
        limit = f"{upcoming.tolerance:g} · min(1, step)²"
        lines.append(f"the pass may end earlier, when Ter(k) is below {limit}")
    for index in range(done, total):
        step = upcoming.steps[index] if index < len(upcoming.steps) else None
        kind = "free" if step is None else f"step {step:g}"
        lines.append(
            f"  block {index}: {kind}, {upcoming.iterations[index]} iterations of "
            f"{config.train.batch_size} samples, lr {upcoming.lr[index]:g}"
        )
    size = _FLOAT * parameters * total / _MEGABYTE
    return [*lines, f"{parameters:,} parameters per block, {size:.1f} MB of weights in all"]


def evaluate_lines(plan: SamplingPlan, settings: EvaluateConfig) -> list[str]:
    """Describe `evaluate`: images to sample, evaluations, and measurements."""
    shape = plan.run.manifest.require_autoencoder().image_shape
    folder = images_folder(plan, settings.n, plan.settings.seed)
    measured = [f"FID against {settings.reference}"]
    measured += ["the reconstruction floor"] * settings.floor
    measured += [f"KID, precision and recall with {settings.kid} real images"] * (settings.kid > 0)
    measured += [f"the likelihood of {settings.nll} images"] * (settings.nll > 0)
    return [
        f"sample {settings.n} images {shape} of {plan.run.name} with "
        f"{plan.nfe} network evaluations each, seed {plan.settings.seed}",
        _shards(folder, settings.n, None, settings.n * math.prod(shape)),
        f"measure {', '.join(measured)}",
        f"write {plan.run.folder / 'metrics.json'}",
    ]


def _shards(folder: Path, count: int, size: int | None, total: float) -> str:
    """Say how much of a store exists."""
    written = len(list(folder.glob("shard-*.safetensors")))
    if (folder / MANIFEST).is_file():
        return f"reuse {folder}, which is complete"
    shards = "" if size is None else f"{math.ceil(count / size)} shards, "
    state = f"{written} shards exist" if written else "nothing exists yet"
    return f"write {shards}{total / _MEGABYTE:.1f} MB to {folder}; {state}"
