"""Noise of a block's gradient: the critical batch size, and the share of the probes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.runs.directory import RunDirectory
from pipeline.runs.run import load_block
from pipeline.runtime.console import Progress
from pipeline.training.block_source import TrainedBlocks, TrainingContext
from pipeline.training.block_trainer import BlockTrainer
from pipeline.training.sources import SampleSource, source_of

#: groups of batches of the jackknife, and batches of a group
_GROUPS, _BATCHES = 8, 4


@dataclass(frozen=True)
class GradientNoise:
    """Noise of the gradient at the weights of one block.

    G is the mean gradient, and Σ is the covariance of one sample's gradient. Both count the noise
    of the probes, or of times and Gaussian noise under lfm and fm.

    Attributes:
        block: its index.
        batch: samples in a batch of the measurement.
        squared_norm: unbiased estimate of ‖G‖².
        variance: estimate of tr Σ.
        critical_batch: tr Σ / ‖G‖², in samples; infinite where ‖G‖² is below its error.
        error: standard error of critical_batch, by a jackknife over batches.
        drawn: share of tr Σ that comes from the noise drawn for each step, not from the samples.

    Reference: McCandlish et al. (2018), simple noise scale.
    """

    block: int
    batch: int
    squared_norm: float
    variance: float
    critical_batch: float
    error: float
    drawn: float


class _Moments:
    """Sums over the gradients g_i of M batches of b samples, and of their repetitions g_i'.

    A repetition has the same samples and other noise.
    """

    def __init__(self, total: Tensor) -> None:
        self.count, self.squares, self.differences = 0, 0.0, 0.0
        self.total = total

    def add(self, gradient: Tensor, repeated: Tensor) -> None:
        """Add g_i and g_i'."""
        self.count += 1
        self.squares += float(gradient.square().sum())
        self.differences += float((gradient - repeated).square().sum())
        self.total = self.total + gradient

    def combine(self, other: _Moments, sign: int) -> _Moments:
        """Return the sums with (+1) or without (-1) those of another part."""
        both = _Moments(self.total + sign * other.total)
        both.count = self.count + sign * other.count
        both.squares = self.squares + sign * other.squares
        both.differences = self.differences + sign * other.differences
        return both

    def estimates(self, batch: int) -> tuple[float, float, float]:
        """Return unbiased ‖G‖² and tr Σ, and the share of the noise that is drawn."""
        pairs = self.count * (self.count - 1)
        squared_norm = (float(self.total.square().sum()) - self.squares) / pairs
        variance = self.squares / self.count - squared_norm
        drawn = self.differences / 2 / self.count
        return squared_norm, batch * variance, drawn / variance if variance > 0 else math.nan


def measure_gradient_noise(
    config: Config,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
    source: SampleSource | None = None,
) -> Iterator[GradientNoise]:
    """Measure the noise of the gradient at the weights of each finished block of a run.

    Args:
        config: of the run; it may have another batch size or divergence.
        folder: the run directory, which stays as it is; lost stages are made again.
        accelerator: device; one process.
        progress: wraps loops.
        source: of the samples; None is the latent cache.

    Raises:
        UserError: the run has no finished block or is distilled, or there are several processes.
        JkoflowError: a block cannot be integrated.
    """
    if accelerator.num_processes > 1:
        raise UserError("--measure-noise has several processes; expected one; launch one")
    if config.train.objective == "distill":
        raise UserError(
            f"the run at {folder} is distilled; expected one of jko, lfm or fm; measure its "
            "teacher"
        )
    manifest = RunDirectory(folder).started
    if manifest is None or not manifest.passes or not manifest.passes[-1].blocks:
        raise UserError(
            f"the run at {folder} has no finished block; expected one; train it first"
        )
    samples = source or source_of(config)
    context = TrainingContext(config, folder, samples, accelerator, progress)
    blocks = TrainedBlocks(context, None)
    number = len(manifest.passes) - 1
    for index, row in enumerate(manifest.passes[-1].blocks):
        spec, block = load_block(folder, row, manifest.shape)
        stage = blocks.samples(manifest.passes, index)
        options = config.jko or config.regression
        trainer = BlockTrainer(block, spec, stage, config.train, options, accelerator, number)
        yield gradient_noise(trainer, progress)


def gradient_noise(
    trainer: BlockTrainer, progress: Progress, groups: int = _GROUPS, batches: int = _BATCHES
) -> GradientNoise:
    """Measure the noise of a block's gradient at its present weights, which stay.

    Args:
        trainer: of the block; its batch size is that of the measurement.
        progress: wraps the loop over batches.
        groups: parts of the jackknife, at least 2.
        batches: of each part, at least 1, and 2 for two groups.

    Raises:
        JkoflowError: the block cannot be integrated.
    """
    zero = torch.zeros(sum(p.numel() for p in trainer.parameters), dtype=torch.float64)
    parts = [_Moments(zero) for _ in range(groups)]
    count, objective = groups * batches, trainer.objective
    for step in progress(range(count), count, f"noise of block {trainer.index}"):
        gradient, repeated = objective.gradient(step), objective.gradient(step, redraw=1)
        parts[step % groups].add(gradient, repeated)
    whole = _Moments(zero)
    for part in parts:
        whole = whole.combine(part, 1)
    size = trainer.recipe.batch_size
    squared_norm, variance, drawn = whole.estimates(size)
    critical = _critical(squared_norm, variance)
    others = [_critical(*whole.combine(part, -1).estimates(size)[:2]) for part in parts]
    error = math.inf
    if all(map(math.isfinite, others)):
        mean = sum(others) / groups
        error = math.sqrt((groups - 1) / groups * sum((each - mean) ** 2 for each in others))
    return GradientNoise(trainer.index, size, squared_norm, variance, critical, error, drawn)


def _critical(squared_norm: float, variance: float) -> float:
    """Return tr Σ / ‖G‖²; infinity where the estimate of ‖G‖² is not positive."""
    return variance / squared_norm if squared_norm > 0 else math.inf
