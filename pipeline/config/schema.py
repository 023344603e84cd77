"""Configuration: nested frozen dataclasses, which hold the only defaults there are.

`pipeline.config.load` reads them from YAML files of differences and `--set` overrides.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from autoencoders.architecture import TamingConfig
from flows.networks.config import VelocityConfig
from flows.solving.solver import SolverConfig
from pipeline.config.autoencoder_recipe import AutoencoderTraining


@dataclass(frozen=True)
class DataConfig:
    """Which images.

    Attributes:
        name: mnist, cifar10, imagenet32 or folder.
        split: the split that is encoded and trained on.
        test_split: the split that measures reconstruction and likelihood.
        path: the folder of images (folder), or of the official files (imagenet32).
        size: folder only: images are resized and centre-cropped to size x size.
        mode: folder only: RGB or L (grey).
        limit: only the first so many images, of each data set; null takes all.
        also: more data sets, joined behind this one without their classes: mnist, cifar10, or with
            another split than this one's, cifar10/train.
    """

    name: str = "mnist"
    split: str = "train"
    test_split: str = "test"
    path: str | None = None
    size: int | None = None
    mode: str = "RGB"
    limit: int | None = None
    also: list[str] = field(default_factory=list)

    def of_split(self, split: str) -> DataConfig:
        """A split of the first data set alone, as for what measures."""
        return dataclasses.replace(self, split=split, also=[])


@dataclass(frozen=True)
class AutoencoderConfig:
    """Which autoencoder.

    Attributes:
        name: pretrained (shipped, trained here or converted, by name or path), identity (pixel
            space) or diffusers (a local folder or a hub id; needs the optional extra).
        weights: a shipped name (such as mnist-kl), the path of a .safetensors file, or what
            diffusers loads.
        fit: how images of another shape than the encoder takes are brought to it, undone after
            decoding: exact (refused), native (any size, same channels) or resize.
        size: resize: side of the square the encoder sees; 0 takes its own.
        latents: pre (before quantisation; decoding quantises) or quantised.
    """

    name: str = "pretrained"
    weights: str | None = "mnist-kl"
    fit: str = "exact"
    size: int = 0
    latents: str = "pre"


@dataclass(frozen=True)
class LatentsConfig:
    """The latent cache.

    Attributes:
        shard_size: images a shard.
        batch_size: images encoded at once.
        mirror: encode the mirror image of every image too, as a second set.
        noise: standard deviation of Gaussian noise added to the latents of a deterministic
            encoder, in units of the standardised latents; likelihoods include it.
        draws: posterior samples (or noisy copies) of every latent that the flow trains on.
        disturb: refiners (velocity.image_channels) only: largest standard deviation of the noise
            on the standardised latents that the refiner is trained on. Each image draws its own
            deviation uniformly from 0. Latents that a flow samples have small errors, too.
        seed: of the draws.
    """

    shard_size: int = 10000
    batch_size: int = 250
    mirror: bool = False
    noise: float = 0.0
    draws: int = 1
    disturb: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class ScheduleConfig:
    """Step sizes, stopping, what differs from block to block, and the passes after the first.

    Attributes:
        h0: first JKO step size h_0.
        rho: its growth per block, h_k = min(rho^k h_0, h_max).
        h_max: largest step size.
        h: explicit step sizes h_0, h_1, …, in place of h0, rho and max_blocks.
        gamma1: lfm: first Ornstein-Uhlenbeck time, gamma_k = gamma1 rho^(k-1).
        gamma: lfm: explicit times gamma_1, gamma_2, …, in place of gamma1, rho and max_blocks.
        max_blocks: most blocks with a step (h_k or gamma_k).
        tolerance: stop when Ter(k) falls below it; under lfm, where short times move little,
            below tolerance times the smaller of 1 and gamma_k squared.
        free_block: add one last block without a step: no movement term, or aimed at pure noise.
        iterations: optimiser steps of each block, in place of train.iterations; the last value
            holds for all blocks after it.
        substeps: jko: sub-intervals S of each block while it trains, in place of solver.steps;
            the last value likewise.
        lr: peak learning rate of each block, in place of train.lr; the last value likewise.
        reparameterize: jko: passes after the first, each with step sizes that even out the
            movements of the pass before.
        eta: how far each of them goes towards the evened-out steps, in (0, 1].
        refine: jko: children that every block is split into in a last pass; 1 splits nothing.
        later_iterations: optimiser steps a block in these passes; null takes those of the first.
    """

    h0: float = 0.5
    rho: float = 1.5
    h_max: float = 5.0
    h: list[float] | None = None
    gamma1: float = 0.1
    gamma: list[float] | None = None
    max_blocks: int = 4
    tolerance: float = 0.01
    free_block: bool = True
    iterations: list[int] | None = None
    substeps: list[int] | None = None
    lr: list[float] | None = None
    reparameterize: int = 0
    eta: float = 0.5
    refine: int = 1
    later_iterations: int | None = None


@dataclass(frozen=True)
class TrainConfig:
    """Training of the blocks.

    Attributes:
        objective: jko (maximum likelihood in JKO steps), lfm (local flow matching: block k is
            regressed towards the data diffused for a time gamma_k, nothing is integrated), or fm
            (flow matching: one block, from the data to pure noise); runs of `jkoflow distill`
            have distill.
        interpolant: lfm, fm: linear or trigonometric.
        coupling: lfm, fm: which sample of a batch is joined with which target: independent (its
            own), or ot (the pairs of least total squared distance).
        times: lfm, fm: where a block's time is trained most: uniform, or logit-normal (its middle,
            where the regression is hardest; see `pipeline.training.matching_loss`).
        iterations: optimiser steps a block.
        batch_size: latents a step, over all processes.
        optimizer: adam, or muon for the weights (see `pipeline.optim.optimisers`).
        lr: peak learning rate.
        lr_final: last learning rate of a block, as a fraction of `lr` (half cosine).
        warmup: steps of linear warm-up.
        ema: decay of the moving average of a block's weights; 0 keeps the last weights.
        grad_clip: largest norm of the gradient; 0 clips nothing.
        precision: lfm, fm: fp32, or bf16 for what autocast does in half precision while a network
            trains; weights, averages, and all that integrates stay in float32.
        snapshot_every: fm: keep the averaged weights of every so many steps, for
            `evaluate --curve`; 0 keeps none.
        divergence: jko: exact, hutchinson or finite-difference.
        probes: jko: probes of the estimator (hutchinson).
        sigma0: jko: step of the finite difference, sigma = sigma0 / sqrt(D).
        jacobian_weight: jko, finite-difference: weight of the squared Frobenius norm of the
            Jacobian, integrated over a block's time; keeps the field to what the training grid
            can follow, where data lie close to a surface.
        max_substeps: jko: look every tenth step whether a block has outgrown its training grid,
            and give that half as many sub-intervals again, up to so many, once it has (the
            objective on twice as many differs by 0.003 nats per dimension); 0 keeps
            those of the solver.
        warm_start: start each block from the weights of the block before it.
        init_from: a run whose blocks these blocks start from, of the same latents' shape and the
            same velocity, or a multiple of its width (unet, conv, resmlp): copied features then
            share out what read them, and the field starts as it was; null for none.
        max_minutes: stop cleanly after so long, to be resumed; 0 runs to the end.
        checkpoint_seconds: least time between two checkpoints.
        log_every: steps between two lines of the log.
        seed: of initial weights, batches and probes.
    """

    objective: str = "jko"
    interpolant: str = "linear"
    coupling: str = "independent"
    times: str = "uniform"
    iterations: int = 1000
    batch_size: int = 512
    optimizer: str = "adam"
    lr: float = 1e-3
    lr_final: float = 0.02
    warmup: int = 50
    ema: float = 0.99
    grad_clip: float = 1.0
    precision: str = "fp32"
    snapshot_every: int = 0
    divergence: str = "finite-difference"
    probes: int = 1
    sigma0: float = 0.02
    jacobian_weight: float = 0.0
    max_substeps: int = 0
    warm_start: bool = True
    init_from: str | None = None
    max_minutes: float = 0.0
    checkpoint_seconds: float = 30.0
    log_every: int = 25
    seed: int = 0


@dataclass(frozen=True)
class GenerateConfig:
    """Sampling.

    Attributes:
        n: images.
        batch_size: images at once; part of what decides the noise of each image.
        columns: of the grid.
        seed: of the noise.
        method: solver, null takes the one that pushes.
        steps: its sub-intervals a block (fixed-step solvers).
        block_steps: the same for each block, data side first, in place of `steps`; that of a block
            with an adaptive solver is not used.
        block_methods: the solver of each block, data side first, in place of `method`.
        labels: of a class-conditional run: the classes of the images, in turn; null draws them as
            often as they stand in the training data.
        guidance: of a class-conditional run: w of v(null) + w (v(class) - v(null)), the field
            that is followed; null takes 1, the plain conditional field. With a guide, whose
            velocity is g: w of g + w (v - g), of any run.
        guide: a run on the same latents, smaller or trained for less long, or RUN@STEP, as
            train.snapshot_every kept it; null for none.
        refiner: a run with velocity.image_channels on the same autoencoder, which samples the
            detail that the decoder leaves out of an image; null for none.
        precision: fp32, or bf16 for networks evaluated in half precision under autocast, which is
            faster where the processor has it; solver and guidance stay in fp32.
    """

    n: int = 64
    batch_size: int = 250
    columns: int = 8
    seed: int = 0
    method: str | None = None
    steps: int | None = None
    block_steps: list[int] | None = None
    block_methods: list[str] | None = None
    labels: list[int] | None = None
    guidance: float | None = None
    guide: str | None = None
    refiner: str | None = None
    precision: str = "fp32"


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation.

    Attributes:
        n: generated images.
        reference: shipped statistics, such as mnist-train, or a .npz or folder.
        floor: measure the reconstruction floor (rFID) too.
        kid: real images (of the test split, or the training split where that is smaller) for KID,
            precision and recall; 0 takes those whose features are at hand, and none if none are.
        nll: images of the test split whose likelihood is measured; 0 leaves it out.
        seed: of the generated images.
    """

    n: int = 50000
    reference: str = "mnist-train"
    floor: bool = True
    kid: int = 0
    nll: int = 256
    seed: int = 0


@dataclass(frozen=True)
class PointsConfig:
    """Two-dimensional experiments (`jkoflow toy2d`); data.name is then a point set.

    Attributes:
        train: points that the flow trains on.
        test: fresh points that measure likelihood and inversion error.
        compare: generated and fresh points of the maximum mean discrepancy.
        grid: the density is drawn on grid x grid squares.
        invert: picture only: bright pixels carry the density instead of dark ones.
        seed: of the points.
    """

    train: int = 50000
    test: int = 5000
    compare: int = 2000
    grid: int = 100
    invert: bool = False
    seed: int = 0


def _push() -> SolverConfig:
    return SolverConfig(method="rk4", steps=4)


@dataclass(frozen=True)
class Config:
    """Everything: see each section.

    Attributes:
        name: of the run; its directory is runs/NAME unless told otherwise.
        data: which images.
        autoencoder: which autoencoder.
        architecture: of an autoencoder to be trained.
        autoencoder_training: its recipe.
        latents: the latent cache.
        velocity: the network of a block.
        solver: integrates a block while it trains (jko).
        push: integrates a finished block: pushing its data on, and sampling.
        schedule: step sizes and stopping.
        train: training of the blocks.
        generate: sampling.
        evaluate: evaluation.
        points: two-dimensional experiments.
    """

    name: str = "run"
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    architecture: TamingConfig = field(default_factory=TamingConfig)
    autoencoder_training: AutoencoderTraining = field(default_factory=AutoencoderTraining)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    velocity: VelocityConfig = field(default_factory=VelocityConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    push: SolverConfig = field(default_factory=_push)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    points: PointsConfig = field(default_factory=PointsConfig)
