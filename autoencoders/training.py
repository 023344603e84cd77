"""Trains a small VQ or KL autoencoder: reconstruction, patch-adversarial, feature matching.

The loss of the autoencoder, per image of N pixels and channels, is

    L = mean|x − x̂| + w_kl · KL(q(z|x) ‖ N(0, I)) / N      (KL; for VQ: + w_code · codebook loss)
        + w_over · mean(y − x̂)²
        + w_feat · Σ_l mean|D_l(x) − D_l(x̂)|  −  w_adv · λ · mean D(x̂),

with x̂ the decoder's output y clamped to the architecture's grey levels (straight through), and
λ = ‖∇ mean|x − x̂|‖ / ‖∇ mean D(x̂)‖ at the decoder's last layer, so that the adversarial
term neither drowns nor is drowned; the discriminator minimises the hinge loss. The hidden
features D_l of the discriminator serve as the perceptual term: they need no download, and
they are not the features that FID is measured with.

The caller gives every step its images and a generator that derive from (seed, step), so a
resumed training equals one that was never stopped.

Reference: Esser et al. 2021, Eq. (6)-(7) for λ; Larsen et al. 2016 for feature matching.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoders.base import to_float
from autoencoders.finishing import sharpened
from autoencoders.taming import (
    TamingAutoencoder,
    TamingConfig,
    keep_channels,
    patch_discriminator,
    start_codebook,
)


@dataclass(frozen=True)
class AutoencoderTraining:
    """Recipe of a training.

    Attributes:
        iterations: optimiser steps.
        batch_size: images a step, over all processes.
        lr: peak learning rate (Adam, betas 0.5 and 0.9), warmed up, decayed by a half cosine.
        lr_final: last learning rate, as a fraction of `lr`.
        warmup: steps of linear warm-up.
        kl_weight: weight of the KL term (KL flavour).
        kl_warmup: steps over which it grows from 0, so that no latent channel is switched off
            before the decoder has learnt to use it; 0 has the full weight from the start.
        overshoot_weight: weight of the term that keeps the decoder's output near the grey levels.
            Without it the output of a long training runs away far beyond them, and grey pixels
            between ink and paper become hard to hit.
        codebook_weight: weight of the codebook loss (VQ flavour).
        adversarial_weight: weight of the adversarial term; 0 trains no discriminator.
        feature_weight: weight of the feature-matching term.
        adversarial_start: step from which the discriminator takes part.
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
    lr: float = 5e-4
    lr_final: float = 0.05
    warmup: int = 200
    kl_weight: float = 0.7
    kl_warmup: int = 0
    overshoot_weight: float = 0.1
    codebook_weight: float = 1.0
    adversarial_weight: float = 0.5
    feature_weight: float = 0.5
    adversarial_start: int = 500
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
        if self.iterations < 1 or self.batch_size < 1:
            raise ValueError("iterations and batch_size must be at least 1")
        if self.kl_warmup < 0:
            raise ValueError(f"kl_warmup must not be negative, not {self.kl_warmup}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be fp32 or bf16, not {self.precision!r}")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema must lie in [0, 1), not {self.ema}")


class AutoencoderTrainer:
    """Holds the networks, the optimisers and the step; `step()` makes one.

    Args:
        architecture: of the autoencoder.
        recipe: of the training.
        accelerator: device and processes; every process gives `step` its share of each batch,
            and gradients are averaged, weighted with the shares. λ and the discriminator's batch
            normalisation see a process's own share only.
    """

    def __init__(
        self,
        architecture: TamingConfig,
        recipe: AutoencoderTraining,
        accelerator: Accelerator,
    ) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model = TamingAutoencoder(architecture)
            self.discriminator = patch_discriminator(
                architecture.image_shape[0],
                recipe.discriminator_width,
                recipe.discriminator_layers,
            )
        device = accelerator.device
        self.model.to(device)
        self.discriminator.to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.model.parameters(), recipe.lr, (0.5, 0.9))
        self.discriminator_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), recipe.lr * recipe.discriminator_lr, (0.5, 0.9)
        )
        self.done = 0

    @property
    def kl_weight(self) -> float:
        """Weight of the KL term at the present step."""
        ramp = (self.done + 1) / max(self.recipe.kl_warmup, 1)
        return self.recipe.kl_weight * min(1.0, ramp)

    def state(self) -> dict[str, Any]:
        """Everything that a resumed training needs, as nested dicts of tensors and numbers."""
        return {
            "step": self.done,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` gave."""
        self.done = state["step"]
        for name in ("model", "average", "discriminator", "optimizer", "discriminator_optimizer"):
            getattr(self, name).load_state_dict(state[name])

    def step(self, images: Tensor, generator: torch.Generator) -> dict[str, float]:
        """One step of the autoencoder and one of the discriminator.

        Args:
            images: uint8 (B, C, H, W), this process's share of the batch.
            generator: draws the posterior noise, the mirror images and, at the first step of a
                VQ autoencoder, the codebook.

        Returns:
            The named terms of the loss, of this process's share of the batch.

        Raises:
            FloatingPointError: the loss is not finite, here or on another process.
        """
        self._set_lr()
        x, noise = self._prepare(images, generator)
        if self.done == 0 and self.model.quantize is not None:
            self._start_codebook(x, generator)
        adversarial = (
            self.recipe.adversarial_weight > 0 and self.done >= self.recipe.adversarial_start
        )
        self.discriminator.requires_grad_(False)
        self.model.train()
        loss, terms, fake = self._autoencoder_loss(x, noise, adversarial)
        total = loss.detach()
        if self.accelerator.num_processes > 1:  # all of them stop, or none
            total = self.accelerator.reduce(total, "sum")
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"the autoencoder's loss is {total.item()} at step {self.done}; lower lr, or use "
                "precision fp32"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._apply(self.model, self.optimizer, len(x))
        if adversarial:
            self.discriminator.requires_grad_(True)
            d_loss = self._discriminator_loss(x, fake.detach())
            self.discriminator_optimizer.zero_grad(set_to_none=True)
            d_loss.backward()
            self._apply(self.discriminator, self.discriminator_optimizer, len(x))
            terms["discriminator"] = d_loss.item()
        self._update_average()
        self.done += 1
        return terms

    def finished(self, images: Tensor) -> TamingAutoencoder:
        """The averaged autoencoder, frozen, on the CPU, without latent channels that are off.

        Args:
            images: uint8 (B, C, H, W), over which the use of the channels, and the strength of
                the unsharp mask, are measured.
        """
        model = self._pruned(copy.deepcopy(self.average).cpu().float().freeze(), images)
        return sharpened(model, images) if self.recipe.sharpen else model

    def _pruned(self, model: TamingAutoencoder, images: Tensor) -> TamingAutoencoder:
        if not model.stochastic:
            return model
        with torch.inference_mode():
            moments = model.encode(to_float(images))
        assert moments.log_var is not None
        mean, log_var = moments.mean, moments.log_var
        nats = 0.5 * (mean**2 + log_var.exp() - 1.0 - log_var).mean((0, 2, 3))
        return keep_channels(model, (nats >= self.recipe.prune).nonzero().flatten().tolist())

    def _autoencoder_loss(
        self, x: Tensor, noise: Tensor, adversarial: bool
    ) -> tuple[Tensor, dict[str, float], Tensor]:
        with self._autocast():
            moments = self.model.encode(x)
            if moments.log_var is None:
                z, codebook, _ = self.model.quantise(moments.mean.float())
                regulariser = self.recipe.codebook_weight * codebook
                terms = {"codebook": codebook.item()}
            else:
                mean, log_var = moments.mean.float(), moments.log_var.float()
                z = mean + (0.5 * log_var).exp() * noise
                kl = 0.5 * (mean**2 + log_var.exp() - 1.0 - log_var).flatten(1).sum(1).mean()
                regulariser = self.kl_weight * kl / x[0].numel()
                terms = {"kl": kl.item()}
            fake = self.model.decode_quantised(z)
        output = fake.float()
        fake = _saturated(output, self.model.config.limits)
        overshoot = (output - fake.detach()).square().mean()
        reconstruction = (x - fake).abs().mean()
        loss = reconstruction + regulariser + self.recipe.overshoot_weight * overshoot
        terms |= {"reconstruction": reconstruction.item(), "overshoot": overshoot.item()}
        if adversarial:
            with self._autocast():
                with torch.no_grad():
                    real_features, _ = self._judge(x)
                fake_features, logits = self._judge(fake)
            matching = torch.stack(
                [
                    F.l1_loss(f.float(), r.float())
                    for f, r in zip(fake_features, real_features, strict=True)
                ]
            ).sum()
            fooling = -logits.float().mean()
            weight = self._adaptive_weight(reconstruction, fooling)
            loss = loss + self.recipe.feature_weight * matching
            loss = loss + self.recipe.adversarial_weight * weight * fooling
            terms |= {"matching": matching.item(), "fooling": fooling.item()}
        return loss, terms, fake

    def _discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        with self._autocast():
            real_logits = self._judge(real)[1].float()
            fake_logits = self._judge(fake)[1].float()
        return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())

    def _judge(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Hidden activations of the discriminator, and its logits."""
        features: list[Tensor] = []
        main: Any = self.discriminator.main
        for layer in main:
            x = layer(x)
            if isinstance(layer, nn.LeakyReLU):
                features.append(x)
        return features, x

    def _adaptive_weight(self, reconstruction: Tensor, fooling: Tensor) -> Tensor:
        last: Any = self.model.decoder.conv_out.weight
        (wanted,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
        (given,) = torch.autograd.grad(fooling, last, retain_graph=True)
        return (wanted.norm() / (given.norm() + 1e-4)).clamp(0.0, 1e4).detach()

    def _prepare(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Float images, half of them mirrored where asked for, and posterior noise."""
        x = to_float(images)
        noise = torch.randn((len(x), *self.model.latent_shape), generator=generator)
        if self.recipe.flip:
            mirrored = torch.rand(len(x), generator=generator) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        return x.to(self.accelerator.device), noise.to(self.accelerator.device)

    def _set_lr(self) -> None:
        recipe = self.recipe
        progress = torch.tensor(self.done / recipe.iterations)
        cosine = 0.5 * (1.0 + torch.cos(torch.pi * progress)).item()
        scale = recipe.lr_final + (1.0 - recipe.lr_final) * cosine
        scale *= min(1.0, (self.done + 1) / max(recipe.warmup, 1))
        self.optimizer.param_groups[0]["lr"] = recipe.lr * scale
        self.discriminator_optimizer.param_groups[0]["lr"] = (
            recipe.lr * recipe.discriminator_lr * scale
        )

    def _apply(self, module: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        """Step with the mean over the whole batch, `count` images of which are here."""
        ranks = self.accelerator.num_processes
        if ranks > 1:
            share = count * ranks / self.recipe.batch_size
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(share * parameter.grad, "mean")
        optimizer.step()

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.recipe.ema, (1.0 + self.done) / (10.0 + self.done))
        averaged, current = self.average.state_dict(), self.model.state_dict()
        torch._foreach_lerp_(list(averaged.values()), list(current.values()), 1.0 - decay)

    def _autocast(self) -> torch.autocast:
        enabled = self.recipe.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled)

    def _start_codebook(self, x: Tensor, generator: torch.Generator) -> None:
        with torch.no_grad():
            latents = self.model.encode(x).mean
        start_codebook(self.model, latents, generator)
        if self.accelerator.num_processes > 1 and self.model.quantize is not None:
            # of one process: a mean of entries that lie where the latents are need not lie there
            entries = self.model.quantize.embedding.weight.data
            entries.copy_(broadcast(entries, from_process=0))
        self.average.load_state_dict(self.model.state_dict())


def _saturated(x: Tensor, limits: tuple[float, float]) -> Tensor:
    """Clamp, with the gradient of the identity.

    A pixel that rightly saturates has no loss, however far beyond the limit the network puts
    it; one that wrongly saturates still has a gradient.
    """
    return x + (x.clamp(*limits) - x).detach()
