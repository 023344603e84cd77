"""Schema of the training of a flow: optimisation, schedule of blocks, and the objectives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from flows.solving.solver import SolverConfig
from pipeline.config.keys import constant, setting
from pipeline.config.values import of_block

Objective = Literal["jko", "lfm", "fm", "distill"]
Precision = Literal["fp32", "bf16"]
Optimizer = Literal["adam", "muon"]
Interpolant = Literal["linear", "trigonometric"]
Coupling = Literal["independent", "ot"]
Times = Literal["uniform", "logit-normal"]
Divergence = Literal["exact", "hutchinson", "finite-difference"]

#: choices of train.optimizer, and of training.optimizer of an autoencoder
OPTIMIZERS: tuple[str, ...] = get_args(Optimizer)


@dataclass(frozen=True)
class TrainConfig:
    """Training of the blocks; sections that depend on the objective have the rest.

    Attributes:
        objective: jko, lfm or fm; runs of `jkoflow distill` have distill. jko is maximum
            likelihood in JKO steps. lfm is local flow matching: block k is regressed towards the
            data diffused for a time γ_k. fm is flow matching: one block from the data to pure
            noise.
        iterations: optimiser steps per block; a list has one value per block, and the last value
            holds for later blocks.
        batch_size: latents per step, over all processes.
        micro_batch: samples of a batch that a process holds at once; null takes all of its share,
            in halves when memory runs out. The gradient is that of the whole batch.
        optimizer: adam, or muon for the weight matrices (see `pipeline.optim.optimisers`).
        lr: peak learning rate; a list has one value per block, as for iterations.
        lr_final: last learning rate of a block, as a fraction of lr (half cosine).
        warmup: steps of linear warm-up.
        ema: decay of the moving average of the weights; 0 keeps the last weights.
        grad_clip: largest norm of the gradient; 0 turns clipping off.
        precision: fp32, or bf16 for autocast of the network while it trains; weights, averages,
            integration and the sum of a divergence stay in float32. jko takes bf16 with
            jko.divergence=hutchinson or exact.
        warm_start: start each block from the weights of the block before it.
        init_from: a run whose blocks these blocks start from. It needs the same shape of latents
            and the same velocity, but for its classes. A width that divides this one's is
            possible, too (unet, conv, resmlp), by one factor for all levels of a unet; the field
            then starts unchanged.
        max_minutes: minutes after which the training stops and can be resumed; 0 has no limit.
        checkpoint_seconds: least time between two checkpoints.
        log_every: steps between two lines of the log.
        trackers: trackers that get the log and the previews, too: tensorboard, trackio, wandb and
            mlflow; each is an extra of the installation.
        preview_every: steps between two grids of samples in previews/, all from the same noise; a
            block ends with one, too. 0 draws none.
        preview_fid: samples whose FID with evaluate.reference is logged with every grid; 0
            measures none.
        seed: of initial weights, batches, probes and points.
    """

    objective: Objective = "jko"
    iterations: int | list[int] = setting(1000, least=1, most=10**9, resume="lowered")
    batch_size: int = setting(512, least=1, most=2**24, resume="added")
    micro_batch: int | None = setting(None, least=1, most=2**24, resume="free")
    optimizer: Optimizer = setting("adam", resume="added")
    lr: float | list[float] = setting(1e-3, above=0, resume="added")
    lr_final: float = setting(0.02, least=0, most=1, resume="added")
    warmup: int = setting(50, least=0, resume="added")
    ema: float = setting(0.99, least=0, below=1, resume="added")
    grad_clip: float = constant(1.0)
    precision: Precision = setting("fp32", resume="added")
    warm_start: bool = setting(True, resume="added")
    init_from: str | None = setting(None, resume="added")
    max_minutes: float = setting(0.0, least=0, resume="free")
    checkpoint_seconds: float = setting(30.0, least=0, resume="free")
    log_every: int = setting(25, least=1, resume="free")
    trackers: list[str] = setting([], resume="free")
    preview_every: int = setting(500, least=0, resume="free")
    preview_fid: int = setting(0, least=0, most=10**6, resume="free")
    seed: int = setting(0, resume="added")


@dataclass(frozen=True)
class ScheduleConfig:
    """Number of blocks and growth of their steps, h_k under jko and γ_k under lfm.

    Attributes:
        rho: growth of the step from block to block, ρ.
        max_blocks: largest number of blocks with a step.
        tolerance: training stops adding blocks when Ter(k) falls below tolerance · min(1, s_k)²,
            where s_k is the step: h_k under jko, γ_k under lfm.
        free_block: train one last block without a step: jko drops its movement term, lfm aims it
            at pure noise.
    """

    rho: float = setting(1.5, above=0, most=1000, resume="added")
    max_blocks: int = setting(4, least=1, most=1000)
    tolerance: float = setting(0.01, least=0)
    free_block: bool = True


@dataclass(frozen=True)
class TrainingSolverConfig:
    """Solver of a block's ODE while the block trains.

    Attributes:
        method: euler, midpoint, heun2, heun3 or rk4 on a fixed grid; dopri5, dopri8, bosh3,
            fehlberg2 or adaptive_heun with adaptive steps.
        steps: sub-intervals S of a fixed grid, a multiple of velocity.nets; a list has one value
            per block, and the last value holds for later blocks.
        adjoint: take gradients by the adjoint equation (constant memory) instead of
            backpropagation.
    """

    method: str = setting("rk4", resume="added")
    steps: int | list[int] = setting(2, least=1, resume="added")
    adjoint: bool = setting(False, resume="added")

    def of_block(self, index: int) -> SolverConfig:
        """Return the solver of a block."""
        return SolverConfig(self.method, of_block(self.steps, index), adjoint=self.adjoint)


@dataclass(frozen=True)
class JkoConfig:
    """JKO-iFlow: every block maximises likelihood under a penalty on its movement.

    Attributes:
        h0: first JKO step size h_1; h_k = min(ρ^(k−1) h_1, h_max), where h_max is 5.
        h_max: largest step size.
        h: explicit step sizes h_1, h_2, …, instead of h0 and schedule.max_blocks.
        solver: solver of a block's ODE while the block trains.
        divergence: estimator of ∇·v while a block trains: exact, or hutchinson or
            finite-difference with one random probe a sample.
        jacobian_weight: finite-difference: weight of ∫‖∂v/∂z‖_F² dt, which keeps the field to what
            the training grid resolves where data lie close to a surface.
        reparameterize: number of passes after the first, each with step sizes that even out the
            movements of the pass before, by half.
        eta: fraction of the way to the evened-out steps that such a pass goes.
        refine: children that every block but the free one is split into in a last pass; 1 splits
            nothing.
        later_iterations: optimiser steps per block in later passes; null takes those of the first.
    """

    h0: float = setting(0.5, above=0, resume="added")
    h_max: float = constant(5.0)
    h: list[float] | None = setting(None, above=0, resume="added")
    solver: TrainingSolverConfig = field(default_factory=TrainingSolverConfig)
    divergence: Divergence = setting("finite-difference", resume="added")
    jacobian_weight: float = setting(0.0, least=0, resume="added")
    reparameterize: int = setting(0, least=0, most=100, resume="later")
    eta: float = constant(0.5)
    refine: int = setting(1, least=1, most=100, resume="later")
    later_iterations: int | None = setting(None, least=1, resume="later")


@dataclass(frozen=True)
class MatchingConfig:
    """Regression of a velocity on the path between samples and targets, under lfm and fm.

    Attributes:
        interpolant: path from sample to target: linear or trigonometric.
        coupling: assignment of targets to the samples of a batch: independent (each sample its
            own), or ot (the assignment of least total squared distance).
        times: density of training times: uniform, or logit-normal, which samples the middle of the
            path more often (see `pipeline.training.batches.matching_loss`).
    """

    interpolant: Interpolant = setting("linear", resume="added")
    coupling: Coupling = setting("independent", resume="added")
    times: Times = setting("uniform", resume="added")


@dataclass(frozen=True)
class LfmConfig:
    """Local flow matching: block k is regressed towards the data diffused for a time γ_k.

    Attributes:
        gamma1: first Ornstein-Uhlenbeck time; γ_k = gamma1 · ρ^(k−1).
        gamma: explicit times γ_1, γ_2, …, instead of gamma1 and schedule.max_blocks.
    """

    gamma1: float = setting(0.1, above=0, resume="added")
    gamma: list[float] | None = setting(None, above=0, resume="added")


@dataclass(frozen=True)
class FmConfig:
    """Flow matching: one block is regressed towards pure noise.

    Attributes:
        snapshot_every: steps between two snapshots of the averaged weights, which `evaluate
            --curve` measures and RUN@STEP opens; 0 keeps none.
    """

    snapshot_every: int = setting(0, least=0, resume="added")
