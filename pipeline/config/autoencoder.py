"""Schema of an autoencoder's configuration: images, architecture and training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from autoencoders.architecture import TamingConfig
from pipeline.config.data import DataConfig
from pipeline.config.keys import constant, setting
from pipeline.config.training import Optimizer, Precision

Discriminator = Literal["patchgan", "r1"]
#: kinds of `pipeline.autoencoder_training.adversary`
DISCRIMINATORS: tuple[str, ...] = get_args(Discriminator)


@dataclass(frozen=True)
class ArchitectureConfig:
    """Architecture of an autoencoder that is trained here; see `TamingConfig` for the rest.

    Attributes:
        flavour: kl (Gaussian posterior) or vq (codebook).
        canvas: side of the square canvas on which images are centred; 0 takes images as they are.
        patch: p × p pixels that are folded into channels before the encoder; 1 folds nothing.
        width: base width of the networks, a multiple of 32.
        width_factors: factor of the width per resolution; each later entry halves the resolution.
        channels: channels of the latents.
        codebook: VQ: number of codebook entries.
        levels: darkest and brightest grey level of decoded images, which saturate there.
    """

    flavour: Literal["kl", "vq"] = "kl"
    canvas: int = setting(0, least=0, most=2**14)
    patch: int = setting(1, least=1, most=2**8)
    width: int = setting(32, least=32, most=2**13)
    width_factors: list[int] = setting([1, 2, 4], least=1, most=2**6)
    channels: int = setting(4, least=1, most=2**12)
    codebook: int = setting(512, least=1, most=2**20)
    levels: list[int] = setting([0, 255], least=0, most=255)

    def build(self, image_shape: tuple[int, ...]) -> TamingConfig:
        """Return the whole architecture for images of a shape (C, H, W).

        Raises:
            ValueError: the canvas or the factors do not fit the images.
        """
        channels, height, width = image_shape
        if len(self.levels) != 2:
            raise ValueError(
                f"architecture.levels is {self.levels}; expected two grey levels, darkest first"
            )
        return TamingConfig(
            flavour=self.flavour,
            image_shape=(channels, height, width),
            canvas=self.canvas,
            patch=self.patch,
            ch=self.width,
            ch_mult=tuple(self.width_factors),
            z_channels=self.channels,
            embed_dim=self.channels,
            n_embed=self.codebook,
            levels=(self.levels[0], self.levels[1]),
        )


@dataclass(frozen=True)
class AutoencoderTraining:
    """Training of an autoencoder.

    Attributes:
        iterations: optimiser steps; 0, with start and sharpen, measures the unsharp mask alone and
            keeps the weights.
        batch_size: images per step, over all processes.
        optimizer: adam, or muon for the autoencoder's weight matrices (see
            `pipeline.optim.optimisers`); the discriminator always has adam.
        lr: peak learning rate, with linear warm-up and half a cosine of decay.
        momentum: Adam's first beta for the autoencoder; null takes the discriminator's, 0.5 for
            patchgan and 0 for r1.
        lr_final: last learning rate, as a fraction of lr.
        warmup: steps of linear warm-up.
        kl_weight: KL: weight of the KL term.
        kl_warmup: KL: steps over which the weight grows from 0; 0 starts with the full weight. A
            slow start keeps latent channels on until the decoder has learnt to use them.
        overshoot_weight: weight of the term that keeps the decoder's output near the grey levels;
            without it the output of a long training runs far beyond them.
        codebook_weight: VQ: weight of the codebook loss.
        start: weights that the training starts from, shipped or a .safetensors; their architecture
            is then used. null starts from random weights.
        decoder_only: train the decoder alone; encoder, latents and codebook stay as they are.
        latent_noise: largest standard deviation of noise on the latents that are decoded in
            training, in standard deviations of their channel over the batch. Each image draws its
            own, uniformly from 0 up, because the latents of a flow deviate, too.
        adversarial_weight: weight of the adversarial term; 0 trains no discriminator.
        feature_weight: weight of the feature-matching term.
        adversarial_start: step from which the discriminator takes part.
        discriminator: patchgan (taming's; hinge loss, balanced by λ) or r1 (without normalisation;
            logistic loss with a penalty on its slope, not balanced).
        r1_weight: r1: weight γ of the penalty.
        discriminator_width: filters of the discriminator's first convolution.
        discriminator_layers: strided convolutions after the first.
        discriminator_lr: learning rate of the discriminator, as a fraction of lr.
        ema: decay of the moving average of the weights, which is kept in the end.
        prune: KL: latent channels that carry fewer nats per position are dropped at the end.
        sharpen: measure, at the end, the unsharp mask with which reconstructions have as much
            detail as the images (see `autoencoders.sharpen`).
        precision: fp32, or bf16 for autocast of the networks.
        flip: mirror half of the images.
        checkpoint_seconds: least time between two checkpoints.
        trackers: trackers that get the log, too: tensorboard, trackio, wandb and mlflow.
        seed: of everything random.
    """

    iterations: int = setting(6000, least=0, most=10**9)
    batch_size: int = setting(128, least=1, most=2**24)
    optimizer: Optimizer = "adam"
    lr: float = setting(5e-4, above=0)
    momentum: float | None = setting(None, least=0, below=1)
    lr_final: float = constant(0.05)
    warmup: int = constant(200)
    kl_weight: float = setting(0.7, least=0)
    kl_warmup: int = setting(0, least=0)
    overshoot_weight: float = constant(0.1)
    codebook_weight: float = constant(1.0)
    start: str | None = None
    decoder_only: bool = False
    latent_noise: float = setting(0.0, least=0)
    adversarial_weight: float = setting(0.5, least=0)
    feature_weight: float = setting(0.5, least=0)
    adversarial_start: int = setting(500, least=0)
    discriminator: Discriminator = "patchgan"
    r1_weight: float = constant(0.02)
    discriminator_width: int = setting(32, least=1, most=2**12)
    discriminator_layers: int = setting(2, least=1, most=16)
    discriminator_lr: float = setting(1.0, above=0)
    ema: float = setting(0.999, least=0, below=1)
    prune: float = constant(0.05)
    sharpen: bool = False
    precision: Precision = "fp32"
    flip: bool = False
    checkpoint_seconds: float = constant(30.0)
    trackers: list[str] = setting([], resume="free")
    seed: int = constant(0)

    def __post_init__(self) -> None:
        """Check settings that depend on each other.

        Raises:
            ValueError: no step or no encoder is there to train with.
        """
        if not self.iterations and not (self.start and self.sharpen):
            raise ValueError(
                "training.iterations is 0; expected at least 1, or training.start and "
                "training.sharpen, which measure the mask alone"
            )
        if self.decoder_only and not self.start:
            raise ValueError(
                "training.decoder_only needs training.start, the weights whose encoder is kept; "
                "set it to a shipped name or the path of a .safetensors"
            )


@dataclass(frozen=True)
class AutoencoderConfig:
    """Configuration of an autoencoder (`jkoflow autoencoder train | evaluate`).

    Attributes:
        name: of the autoencoder, whose default directory is runs/autoencoder-NAME.
        data: images.
        architecture: architecture of the networks; unused where training.start is given.
        training: training.
    """

    name: str = setting("autoencoder", resume="free")
    data: DataConfig = field(default_factory=DataConfig)
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    training: AutoencoderTraining = field(default_factory=AutoencoderTraining)
