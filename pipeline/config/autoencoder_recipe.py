"""The recipe of an autoencoder's training, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

#: kinds of `pipeline.autoencoder_training.adversary`
DISCRIMINATORS = ("patchgan", "r1")
#: kinds of `pipeline.optim.optimisers`
OPTIMIZERS = ("adam", "muon")


@dataclass(frozen=True)
class AutoencoderTraining:
    """Recipe of a training.

    Attributes:
        iterations: optimiser steps; 0, with start and sharpen, measures the mask alone and keeps
            the weights.
        batch_size: images a step, over all processes.
        optimizer: adam, or muon for the autoencoder's weights (see `pipeline.optim.optimisers`);
            the discriminator always has Adam.
        lr: peak learning rate, warmed up, decayed by a half cosine.
        momentum: Adam's first beta for the autoencoder. null takes the discriminator's, 0.5 for
            patchgan and 0 for r1; 0.9 reconstructs sooner.
        lr_final: last learning rate, as a fraction of `lr`.
        warmup: steps of linear warm-up.
        kl_weight: weight of the KL term (KL flavour).
        kl_warmup: steps over which it grows from 0, so that no latent channel is switched off
            before the decoder has learnt to use it; 0 has the full weight from the start.
        overshoot_weight: weight of the term that keeps the decoder's output near the grey levels.
            Without it the output of a long training runs away far beyond them, and grey pixels
            between ink and paper become hard to hit.
        codebook_weight: weight of the codebook loss (VQ flavour).
        start: weights that the training starts from, shipped or a .safetensors; the architecture
            is then theirs. null starts from random ones.
        decoder_only: leave the encoder, the latents and the codebook as they are.
        latent_noise: largest standard deviation of noise on the latents that are decoded in
            training, in standard deviations of their channel over the batch; each image draws its
            own, uniformly from 0 up. Latents that a flow generates are a little off, too.
        adversarial_weight: weight of the adversarial term; 0 trains no discriminator.
        feature_weight: weight of the feature-matching term.
        adversarial_start: step from which the discriminator takes part.
        discriminator: patchgan (taming's; hinge loss, balanced by λ) or r1 (without normalisation;
            logistic loss with a penalty on its slope, not balanced).
        r1_weight: weight γ of that penalty.
        discriminator_width: filters of its first convolution.
        discriminator_layers: its strided convolutions after the first.
        discriminator_lr: its learning rate, as a fraction of `lr`.
        ema: decay of the moving average of the weights, which is what is kept.
        prune: a KL autoencoder's latent channels that carry less than so many nats a position
            are dropped at the end: the KL term has switched them off, they hold only noise.
        sharpen: measure, at the end, the unsharp mask with which reconstructions have as much
            detail as the images (see `autoencoders.sharpen`).
        precision: "bf16" or "fp32".
        flip: mirror half of the images (never for digits).
        seed: of everything random.
    """

    iterations: int = 6000
    batch_size: int = 128
    optimizer: str = "adam"
    lr: float = 5e-4
    momentum: float | None = None
    lr_final: float = 0.05
    warmup: int = 200
    kl_weight: float = 0.7
    kl_warmup: int = 0
    overshoot_weight: float = 0.1
    codebook_weight: float = 1.0
    start: str | None = None
    decoder_only: bool = False
    latent_noise: float = 0.0
    adversarial_weight: float = 0.5
    feature_weight: float = 0.5
    adversarial_start: int = 500
    discriminator: str = "patchgan"
    r1_weight: float = 0.02
    discriminator_width: int = 32
    discriminator_layers: int = 2
    discriminator_lr: float = 1.0
    ema: float = 0.999
    prune: float = 0.05
    sharpen: bool = False
    precision: str = "fp32"
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        least = 0 if self.start and self.sharpen else 1
        if self.iterations < least or self.batch_size < 1:
            raise ValueError(
                "iterations and batch_size must be at least 1 (or iterations 0 with start and "
                "sharpen, which then measures the mask alone)"
            )
        if self.discriminator not in DISCRIMINATORS:
            kinds = ", ".join(DISCRIMINATORS)
            raise ValueError(f"discriminator must be one of {kinds}, not {self.discriminator!r}")
        if self.optimizer not in OPTIMIZERS:
            kinds = ", ".join(OPTIMIZERS)
            raise ValueError(f"optimizer must be one of {kinds}, not {self.optimizer!r}")
        if self.decoder_only and not self.start:
            raise ValueError(
                "decoder_only needs start, the weights whose encoder is kept: a shipped name or "
                "the path of a .safetensors"
            )
        for name in ("latent_noise", "r1_weight", "adversarial_weight", "feature_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.momentum is not None and not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum must lie in [0, 1), not {self.momentum}")
        if self.kl_warmup < 0:
            raise ValueError(f"kl_warmup must not be negative, not {self.kl_warmup}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be fp32 or bf16, not {self.precision!r}")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema must lie in [0, 1), not {self.ema}")
