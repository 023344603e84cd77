"""Schema of a flow's configuration: nested frozen dataclasses, which hold all defaults.

`pipeline.config.load` reads configurations from YAML files of differences and `--set` overrides;
`pipeline.config.keys` lists the keys with their rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from flows.networks.config import VelocityConfig
from flows.solving.solver import SolverConfig
from pipeline.errors import UserError

Objective = Literal["jko", "lfm", "fm", "distill"]
Precision = Literal["fp32", "bf16"]
Optimizer = Literal["adam", "muon"]
Interpolant = Literal["linear", "trigonometric"]
Coupling = Literal["independent", "ot"]
Times = Literal["uniform", "logit-normal"]
Divergence = Literal["exact", "hutchinson", "finite-difference"]
Fit = Literal["exact", "native", "resize"]

#: choices of train.precision and generate.precision
PRECISIONS: tuple[str, ...] = get_args(Precision)
#: choices of train.optimizer, and of training.optimizer of an autoencoder
OPTIMIZERS: tuple[str, ...] = get_args(Optimizer)
#: data sets of images
IMAGE_SETS = ("mnist", "cifar10", "imagenet32", "folder")
#: tables of numbers (`jkoflow bench tabular`); every other data.name is a set of points in the
#: plane (`jkoflow toy2d`)
TABLES = ("power", "gas", "miniboone", "bsds300")

T = TypeVar("T")


def setting(default: Any, *, resume: str | None = None, **bounds: float) -> Any:  # noqa: ANN401
    """Declare a key with its rules.

    Args:
        default: value, or an empty list.
        resume: rule of the key when a run goes on, see `pipeline.config.keys.resume_rule`.
        bounds: of the value, or of every value of a list: `least` and `most` (inclusive), `above`
            and `below` (exclusive).
    """
    metadata = {**bounds, **({} if resume is None else {"resume": resume})}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def constant(default: Any) -> Any:  # noqa: ANN401
    """Declare a field that is no key of a configuration file; code, options and tests set it."""
    return field(default=default, metadata={"key": False})


def of_block(value: T | Sequence[T], index: int) -> T:
    """Return the value of a block.

    Args:
        value: one value for all blocks, or a list of one a block, whose last value holds for all
            later blocks.
        index: of the block.
    """
    if isinstance(value, (list, tuple)):
        return value[min(index, len(value) - 1)]
    return value  # type: ignore[return-value]


@dataclass(frozen=True)
class DataConfig:
    """Images, or points in the plane.

    Attributes:
        name: mnist, cifar10, imagenet32 or folder; power, gas, miniboone or bsds300 (tables);
            under `jkoflow toy2d` a set of points.
        split: the split that the flow or the autoencoder trains on.
        test_split: the split that measures reconstruction and likelihood.
        path: the folder of the images (folder), or of the official files (imagenet32); the file
            of a table or its folder; the image of data.name=picture.
        size: folder: side of the square that images are resized and centre-cropped to.
        mode: folder: RGB or L (grey).
        limit: number of images that are used of each data set, from the first on; null uses all.
        also: more data sets, which are appended without their classes: mnist, or cifar10/train for
            another split than data.split.
    """

    name: str = "mnist"
    split: str = "train"
    test_split: str = setting("test", resume="free")
    path: str | None = setting(None, resume="moved")
    size: int | None = setting(None, least=1)
    mode: Literal["RGB", "L"] = "RGB"
    limit: int | None = setting(None, least=1)
    also: list[str] = field(default_factory=list)

    def of_split(self, split: str) -> DataConfig:
        """Return a split of the first data set alone, which measurements use."""
        return dataclasses.replace(self, split=split, also=[])


@dataclass(frozen=True)
class EncoderConfig:
    """The autoencoder whose latents the flow models.

    Attributes:
        name: pretrained (shipped, trained here or converted), identity (pixel space) or diffusers
            (a local folder or a hub id; needs the optional extra).
        weights: a shipped name (such as mnist-kl), the path of a .safetensors file, or an argument
            of diffusers.
        fit: treatment of images whose shape is not the encoder's. exact refuses them, and native
            accepts any size with the same channels. resize scales them and undoes it after
            decoding.
        size: resize: side of the square that the encoder receives; 0 takes its own.
        latents: VQ: pre flows on latents before quantisation, which decoding quantises; quantised
            flows on codebook entries.
    """

    name: Literal["pretrained", "identity", "diffusers"] = "pretrained"
    weights: str | None = "mnist-kl"
    fit: Fit = "exact"
    size: int = setting(0, least=0)
    latents: Literal["pre", "quantised"] = "pre"


@dataclass(frozen=True)
class LatentsConfig:
    """The latent cache.

    Attributes:
        shard_size: samples per file of the cache and of the stages.
        batch_size: images per call of the encoder.
        mirror: encode the mirror image of every image as well.
        noise: standard deviation of Gaussian noise that is added to the latents of a deterministic
            encoder, in units of the standardised latents; likelihoods include it.
        draws: posterior samples (or noisy copies) of every latent that the flow trains on.
        disturb: refiner: largest standard deviation of noise on the standardised latents before
            they are decoded. Every image draws its own, uniformly from 0 up, because the latents
            of a flow deviate, too.
    """

    shard_size: int = setting(10000, least=1)
    batch_size: int = setting(250, least=1)
    mirror: bool = False
    noise: float = setting(0.0, least=0)
    draws: int = setting(1, least=1)
    disturb: float = setting(0.0, least=0)


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
        optimizer: adam, or muon for the weight matrices (see `pipeline.optim.optimisers`).
        lr: peak learning rate; a list has one value per block, as for iterations.
        lr_final: last learning rate of a block, as a fraction of lr (half cosine).
        warmup: steps of linear warm-up.
        ema: decay of the moving average of the weights; 0 keeps the last weights.
        grad_clip: largest norm of the gradient; 0 turns clipping off.
        precision: lfm, fm and distill: fp32, or bf16 for autocast of the network while it trains;
            weights, averages and all integration stay in float32.
        warm_start: start each block from the weights of the block before it.
        init_from: a run whose blocks these blocks start from. It needs the same shape of latents
            and the same velocity. A width that divides this one's is possible, too (unet, conv,
            resmlp); the field then starts unchanged.
        max_minutes: minutes after which the training stops and can be resumed; 0 has no limit.
        checkpoint_seconds: least time between two checkpoints.
        log_every: steps between two lines of the log.
        seed: of initial weights, batches, probes and points.
    """

    objective: Objective = "jko"
    iterations: int | list[int] = setting(1000, least=1, resume="added")
    batch_size: int = setting(512, least=1, resume="added")
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
    seed: int = setting(0, resume="added")


@dataclass(frozen=True)
class ScheduleConfig:
    """Number of blocks and growth of their steps, h_k under jko and γ_k under lfm.

    Attributes:
        rho: growth of the step from block to block, ρ.
        max_blocks: largest number of blocks with a step.
        tolerance: training stops adding blocks when Ter(k) falls below it; under lfm, where short
            times move samples little, below tolerance · min(1, γ_k)².
        free_block: train one last block without a step: jko drops its movement term, lfm aims it
            at pure noise.
    """

    rho: float = setting(1.5, above=0, resume="added")
    max_blocks: int = setting(4, least=1)
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
        h0: first JKO step size h_0; h_k = min(ρ^k h_0, h_max), where h_max is 5.
        h_max: largest step size.
        h: explicit step sizes h_0, h_1, …, instead of h0 and schedule.max_blocks.
        solver: solver of a block's ODE while the block trains.
        divergence: estimator of ∇·v while a block trains: exact, or hutchinson or
            finite-difference with one random probe a sample.
        jacobian_weight: finite-difference: weight of ∫‖∂v/∂z‖_F² dt, which keeps the field to what
            the training grid resolves where data lie close to a surface.
        reparameterize: number of passes after the first, each with step sizes that even out the
            movements of the pass before, by half.
        eta: fraction of the way to the evened-out steps that such a pass goes.
        refine: children that every block is split into in a last pass; 1 splits nothing.
        later_iterations: optimiser steps per block in later passes; null takes those of the first.
    """

    h0: float = setting(0.5, above=0, resume="added")
    h_max: float = constant(5.0)
    h: list[float] | None = setting(None, above=0, resume="added")
    solver: TrainingSolverConfig = field(default_factory=TrainingSolverConfig)
    divergence: Divergence = setting("finite-difference", resume="added")
    jacobian_weight: float = setting(0.0, least=0, resume="added")
    reparameterize: int = setting(0, least=0, resume="later")
    eta: float = constant(0.5)
    refine: int = setting(1, least=1, resume="later")
    later_iterations: int | None = setting(None, least=1, resume="later")


@dataclass(frozen=True)
class MatchingConfig:
    """Regression of a velocity on the path between samples and targets, under lfm and fm.

    Attributes:
        interpolant: path from sample to target: linear or trigonometric.
        coupling: assignment of targets to the samples of a batch: independent (each sample its
            own), or ot (the assignment of least total squared distance).
        times: density of training times: uniform, or logit-normal, which samples the middle of the
            path more often (see `pipeline.training.matching_loss`).
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


@dataclass(frozen=True)
class SamplerConfig:
    """Solver of finished blocks: training pushes data through them, sampling inverts them.

    Attributes:
        method: euler, midpoint, heun2, heun3 or rk4 on a fixed grid; dopri5, dopri8, bosh3,
            fehlberg2 or adaptive_heun with adaptive steps. A list has one value per block, data
            side first, and the last value holds for later blocks.
        steps: sub-intervals of a fixed grid, a multiple of velocity.nets; a list as for method.
    """

    method: str | list[str] = "rk4"
    steps: int | list[int] = setting(4, least=1)

    def of_block(self, index: int) -> SolverConfig:
        """Return the solver of a block.

        Raises:
            FlowError: unknown method, or too many steps.
        """
        return SolverConfig(of_block(self.method, index), of_block(self.steps, index))

    def of_blocks(self, count: int) -> list[SolverConfig]:
        """Return the solvers of the first blocks of a flow, data side first.

        Raises:
            FlowError: unknown method, or too many steps.
        """
        return [self.of_block(index) for index in range(count)]


@dataclass(frozen=True)
class GenerateConfig:
    """Sampling; options of `generate` and `evaluate` choose seed and classes.

    Attributes:
        n: number of images.
        batch_size: images per call of the flow; it decides the noise of each image.
        columns: of the grid.
        seed: of the noise.
        labels: classes of the images of a class-conditional run, which repeat in this order; None
            samples classes as often as they occur in the training data.
        guidance: guidance weight w. A class-conditional run follows v(∅) + w (v(class) − v(∅)); a
            run with a guide, whose velocity is g, follows g + w (v − g). null takes 1, the plain
            field.
        guide: a weaker run on the same latents for autoguidance, or RUN@STEP for a snapshot.
        refiner: a run with velocity.image_channels on the same autoencoder, which samples the
            detail that the decoder leaves out.
        precision: fp32, or bf16 for autocast of the networks; solver and guidance stay in float32.
    """

    n: int = setting(64, least=1)
    batch_size: int = setting(250, least=1)
    columns: int = constant(8)
    seed: int = constant(0)
    labels: list[int] | None = constant(None)
    guidance: float | None = None
    guide: str | None = None
    refiner: str | None = None
    precision: Precision = "fp32"


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation.

    Attributes:
        n: generated images.
        reference: shipped statistics, such as mnist-train, or a .npz, .safetensors or folder.
        floor: measure the reconstruction floor (rFID), too.
        kid: real images for KID, precision and recall; 0 uses those whose features are cached, if
            any. They are of the test split, or of the training split if that is too small.
        nll: images of the test split whose likelihood is measured; 0 measures none.
    """

    n: int = setting(50000, least=1)
    reference: str = "mnist-train"
    floor: bool = True
    kid: int = constant(0)
    nll: int = setting(256, least=0)


@dataclass(frozen=True)
class PointsConfig:
    """Points of a two-dimensional experiment (`jkoflow toy2d`).

    Attributes:
        train: points that the flow trains on.
        test: fresh points that measure likelihood and inversion error.
        compare: generated and fresh points of the maximum mean discrepancy.
        grid: the density is evaluated on grid × grid points.
    """

    train: int = setting(50000, least=2, resume="fixed")
    test: int = constant(5000)
    compare: int = constant(2000)
    grid: int = constant(100)


@dataclass(frozen=True)
class Config:
    """Configuration of a flow.

    Which of the sections schedule, matching, jko, lfm and fm are there, train.objective decides.
    The section points is there for two-dimensional experiments alone.

    Attributes:
        name: of the run, whose default directory is runs/NAME.
        data: images, or points in the plane.
        autoencoder: autoencoder whose latents the flow models.
        latents: latent cache.
        velocity: velocity network of a block.
        train: training of the blocks.
        schedule: number of blocks and growth of their steps, under jko and lfm.
        matching: options of the regression, under lfm and fm.
        jko: objective jko.
        lfm: objective lfm.
        fm: objective fm.
        sampler: solver of finished blocks.
        generate: sampling.
        evaluate: evaluation.
        points: two-dimensional experiments.
    """

    name: str = setting("run", resume="free")
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: EncoderConfig = field(default_factory=EncoderConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    velocity: VelocityConfig = field(
        default_factory=VelocityConfig, metadata={"resume": "added", "fixed": ("classes",)}
    )
    train: TrainConfig = field(default_factory=TrainConfig)
    schedule: ScheduleConfig | None = None
    matching: MatchingConfig | None = None
    jko: JkoConfig | None = None
    lfm: LfmConfig | None = None
    fm: FmConfig | None = None
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig, metadata={"resume": "free"})
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig, metadata={"resume": "free"})
    points: PointsConfig | None = field(default=None, metadata={"resume": "free"})

    def __post_init__(self) -> None:
        """Make the sections that apply, and refuse those that do not.

        Raises:
            UserError: a section of another objective, or points under images.
        """
        for name, (kind, _) in SECTIONS.items():
            applies, there = self.has(name), getattr(self, name)
            if applies and there is None:
                object.__setattr__(self, name, kind())
            elif there is not None and not applies:
                raise UserError(
                    f"section {name} applies to {WHERE[name]}; this configuration has "
                    f"train.objective={self.train.objective} and data.name={self.data.name}; "
                    "remove it"
                )

    def has(self, section: str) -> bool:
        """Return whether a section applies: all do but those of other objectives, and points."""
        if section == "points":
            return self.data.name not in (*IMAGE_SETS, *TABLES)
        return section not in SECTIONS or self.train.objective in SECTIONS[section][1]

    @property
    def regression(self) -> MatchingConfig:
        """The options of the regression; those of distillation are the defaults."""
        return self.matching or MatchingConfig()


#: sections that apply under a condition, and the objectives that they belong to
SECTIONS: dict[str, tuple[type, tuple[str, ...]]] = {
    "schedule": (ScheduleConfig, ("jko", "lfm")),
    "matching": (MatchingConfig, ("lfm", "fm")),
    "jko": (JkoConfig, ("jko",)),
    "lfm": (LfmConfig, ("lfm",)),
    "fm": (FmConfig, ("fm",)),
    "points": (PointsConfig, ()),
}
#: their conditions, in words
WHERE = {
    name: f"train.objective={' or '.join(objectives)}"
    for name, (_, objectives) in SECTIONS.items()
} | {"points": "`jkoflow toy2d`, where data.name is a set of points"}
