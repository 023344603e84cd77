"""Trains a small VQ or KL autoencoder: reconstruction, patch-adversarial, feature matching.

The loss of the autoencoder, per image of N pixels and channels, is

    L = mean|x − x̂| + w_kl · KL(q(z|x) ‖ N(0, I)) / N      (KL; for VQ: + w_code · codebook loss)
        + w_over · mean(y − x̂)²
        + w_feat · Σ_l mean|D_l(x) − D_l(x̂)|  +  w_adv · λ · A(D(x̂)),

with x̂ the decoder's output y clamped to the architecture's grey levels (straight through), and
A what `pipeline.autoencoder_training.adversary` has the autoencoder minimise. With taming's
discriminator
λ = ‖∇ mean|x − x̂|‖ / ‖∇ A‖ at the decoder's last layer, so that the adversarial
term neither drowns nor is drowned; with the other, whose slope is bounded, λ = 1. The hidden
features D_l of the discriminator serve as the perceptual term: they need no download, and
they are not the features that FID is measured with.

The caller gives every step its images and a generator that derive from (seed, step), so a
resumed training equals one that was never stopped.

Reference: Esser et al. 2021, Eq. (6)-(7) for λ; Larsen et al. 2016 for feature matching.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from autoencoders.architecture import TamingConfig
from autoencoders.base import to_float
from autoencoders.taming import TamingAutoencoder, keep_channels, start_codebook
from pipeline.autoencoder_training.adversary import R1_EVERY, Adversary
from pipeline.autoencoder_training.finishing import sharpened
from pipeline.config.autoencoder_recipe import AutoencoderTraining
from pipeline.optim.ema import Ema
from pipeline.optim.gradients import average_gradients
from pipeline.optim.learning_rate import set_learning_rate, warmup_cosine
from pipeline.optim.optimisers import MuonAdam, make_optimizer
from pipeline.runtime.distributed import sum_over_ranks


class AutoencoderTrainer:
    """Holds the networks, the optimisers and the step; `step()` makes one.

    Args:
        architecture: of the autoencoder.
        recipe: of the training.
        start: a frozen autoencoder to start from, in place of `architecture` and random weights;
            any unsharp mask of its is taken off.
        accelerator: device and processes; every process gives `step` its share of each batch,
            and gradients are averaged, weighted with the shares. λ and the discriminator's batch
            normalisation see a process's own share only.

    Raises:
        ValueError: images that the discriminator cannot judge.
    """

    def __init__(
        self,
        architecture: TamingConfig,
        recipe: AutoencoderTraining,
        accelerator: Accelerator,
        start: TamingAutoencoder | None = None,
    ) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        if start is not None:
            architecture = replace(start.config, sharpen=0.0)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(recipe.seed)
            self.model = TamingAutoencoder(architecture)
            self.discriminator = Adversary(
                recipe.discriminator,
                architecture.image_shape[0],
                recipe.discriminator_width,
                recipe.discriminator_layers,
                recipe.r1_weight,
            )
        if recipe.adversarial_weight > 0 and recipe.adversarial_start < recipe.iterations:
            self.discriminator.check(architecture.image_shape)
        if start is not None:
            self.model.load_state_dict(start.state_dict())
        if recipe.decoder_only:
            self.model.requires_grad_(False)
            for part in (self.model.decoder, self.model.post_quant_conv):
                part.requires_grad_(True)
        device = accelerator.device
        self.model.to(device)
        self.discriminator.to(device)
        self.average = Ema(self.model, recipe.ema)
        # without momentum for r1, as its analysis has it
        betas = (0.5, 0.9) if recipe.discriminator == "patchgan" else (0.0, 0.99)
        first = betas[0] if recipe.momentum is None else recipe.momentum
        self.optimizer = make_optimizer(recipe.optimizer, self.model, recipe.lr, (first, betas[1]))
        self.discriminator_optimizer = Adam(
            self.discriminator.parameters(), recipe.lr * recipe.discriminator_lr, betas
        )
        self.done = 0

    @property
    def kl_weight(self) -> float:
        """Weight of the KL term at the present step."""
        ramp = (self.done + 1) / max(self.recipe.kl_warmup, 1)
        return self.recipe.kl_weight * min(1.0, ramp)

    @property
    def untrained(self) -> set[str]:
        """Names of the tensors that stay as they were: those before the decoder, decoder_only."""
        if not self.recipe.decoder_only:
            return set()
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        return set(self.model.state_dict()) - trained

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
        self._set_learning_rates()
        x, noise = self._prepare(images, generator)
        started = self.done > 0 or self.recipe.start is not None
        if not started and self.model.quantize is not None:
            self._start_codebook(x, generator)
        adversarial = (
            self.recipe.adversarial_weight > 0 and self.done >= self.recipe.adversarial_start
        )
        self.discriminator.requires_grad_(False)
        self.model.train()
        if self.recipe.decoder_only:
            self.model.encoder.eval()  # its latents are those that it gives in use
        with self._dropout(generator):
            loss, terms, fake = self._autoencoder_loss(x, noise, adversarial, generator)
        summed = sum_over_ranks(self.accelerator, loss.detach())  # every rank raises, or none
        if not torch.isfinite(summed):
            raise FloatingPointError(
                f"the autoencoder's loss is {summed.item()} at step {self.done}; lower lr, or use "
                "precision fp32"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._apply(self.model, self.optimizer, loss, len(x))
        if adversarial:
            self.discriminator.requires_grad_(True)
            with self._autocast():
                d_loss = self.discriminator.loss(x, fake.detach())
            self.discriminator_optimizer.zero_grad(set_to_none=True)
            d_loss.backward()
            if self.recipe.discriminator == "r1" and self.done % R1_EVERY == 0:
                penalty = self.discriminator.penalty(x)
                (R1_EVERY * penalty).backward()
                terms["penalty"] = R1_EVERY * penalty.item()  # so that means over steps are right
            self._apply(self.discriminator, self.discriminator_optimizer, d_loss, len(x))
            terms["discriminator"] = d_loss.item()
        self.average.update(self.model)
        self.done += 1
        return terms

    def finished(self, images: Tensor) -> TamingAutoencoder:
        """The averaged autoencoder, frozen, on the CPU, without latent channels that are off.

        Args:
            images: uint8 (B, C, H, W), over which the use of the channels, and the strength of
                the unsharp mask, are measured.
        """
        averaged = copy.deepcopy(self.model)
        self.average.copy_to(averaged)
        model = self._pruned(averaged.cpu().float().freeze(), images)
        return sharpened(model, images) if self.recipe.sharpen else model

    def _pruned(self, model: TamingAutoencoder, images: Tensor) -> TamingAutoencoder:
        if not model.stochastic or self.recipe.decoder_only or not self.recipe.iterations:
            return model
        with torch.inference_mode():
            moments = model.encode(to_float(images))
        assert moments.log_var is not None
        mean, log_var = moments.mean, moments.log_var
        nats = 0.5 * (mean**2 + log_var.exp() - 1.0 - log_var).mean((0, 2, 3))
        return keep_channels(model, (nats >= self.recipe.prune).nonzero().flatten().tolist())

    def _autoencoder_loss(
        self, x: Tensor, noise: Tensor, adversarial: bool, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float], Tensor]:
        with self._autocast():
            with torch.set_grad_enabled(not self.recipe.decoder_only):
                z, regulariser, terms = self._latents(x, noise)
            fake = self.model.decode_quantised(self._disturbed(z, generator))
        output = fake.float()
        fake = _saturated(output, self.model.config.limits)
        overshoot = (output - fake.detach()).square().mean()
        reconstruction = (x - fake).abs().mean()
        loss = reconstruction + regulariser + self.recipe.overshoot_weight * overshoot
        terms |= {"reconstruction": reconstruction.item(), "overshoot": overshoot.item()}
        if adversarial:
            with self._autocast():
                fake_features, logits = self.discriminator.judge(fake)
            if self.recipe.feature_weight > 0:
                matching = self._matching(x, fake_features)
                loss = loss + self.recipe.feature_weight * matching
                terms["matching"] = matching.item()
            fooling = self.discriminator.fooling(logits)
            balanced = self.recipe.discriminator == "patchgan"
            weight = self._adaptive_weight(reconstruction, fooling) if balanced else 1.0
            loss = loss + self.recipe.adversarial_weight * weight * fooling
            terms["fooling"] = fooling.item()
        return loss, terms, fake

    @contextmanager
    def _dropout(self, generator: torch.Generator) -> Iterator[None]:
        """Dropout masks that follow from the step's generator; torch's own state stays.

        Without dropout nothing is drawn.
        """
        if not self.model.config.dropout:
            yield
            return
        device = self.accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            yield

    def _matching(self, x: Tensor, of_fake: list[Tensor]) -> Tensor:
        """Mean distance of the discriminator's hidden activations, summed over its layers."""
        with self._autocast(), torch.no_grad():
            of_real, _ = self.discriminator.judge(x)
        pairs = zip(of_fake, of_real, strict=True)
        return torch.stack([F.l1_loss(f.float(), r.float()) for f, r in pairs]).sum()

    def _latents(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Latents that are decoded, what regularises them, and its named terms."""
        moments = self.model.encode(x)
        if moments.log_var is None:
            with torch.autocast(self.accelerator.device.type, enabled=False):
                # the nearest entry in half precision is another one, up to every tenth time
                z, codebook, _ = self.model.quantise(moments.mean.float())
            return z, self.recipe.codebook_weight * codebook, {"codebook": codebook.item()}
        mean, log_var = moments.mean.float(), moments.log_var.float()
        z = mean + (0.5 * log_var).exp() * noise
        kl = 0.5 * (mean**2 + log_var.exp() - 1.0 - log_var).flatten(1).sum(1).mean()
        return z, self.kl_weight * kl / x[0].numel(), {"kl": kl.item()}

    def _disturbed(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Latents with noise of `recipe.latent_noise`, drawn on the CPU."""
        if self.recipe.latent_noise == 0.0:
            return z
        strength = torch.rand((len(z), 1, 1, 1), generator=generator)
        noise = strength * torch.randn(z.shape, generator=generator)
        spread = z.detach().std((0, 2, 3), keepdim=True)
        return z + self.recipe.latent_noise * spread * noise.to(z.device)

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

    def _set_learning_rates(self) -> None:
        """Give both optimisers the learning rates of the present step."""
        recipe = self.recipe
        lr = warmup_cosine(
            self.done,
            recipe.iterations,
            peak=recipe.lr,
            final=recipe.lr_final,
            warmup=recipe.warmup,
        )
        set_learning_rate(self.optimizer, lr)
        set_learning_rate(self.discriminator_optimizer, recipe.discriminator_lr * lr)

    def _apply(
        self, module: nn.Module, optimizer: Adam | MuonAdam, loss: Tensor, count: int
    ) -> None:
        """Step with the gradient of the whole batch, `count` images of which are on this rank."""
        weight = count * self.accelerator.num_processes / self.recipe.batch_size
        average_gradients(self.accelerator, module.parameters(), weight, loss.detach().reshape(1))
        optimizer.step()

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
        self.average.restart(self.model)


def _saturated(x: Tensor, limits: tuple[float, float]) -> Tensor:
    """Clamp, with the gradient of the identity.

    A pixel that rightly saturates has no loss, however far beyond the limit the network puts
    it; one that wrongly saturates still has a gradient.
    """
    return x + (x.clamp(*limits) - x).detach()
