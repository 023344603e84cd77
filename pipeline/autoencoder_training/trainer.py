"""Trains a VQ or KL autoencoder against a discriminator, step by step.

If images and generator derive from (seed, step), a resumed training equals an uninterrupted one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim import Adam

from autoencoders.architecture import TamingConfig
from autoencoders.base import to_float
from autoencoders.taming import TamingAutoencoder
from pipeline.autoencoder_training.adversary import R1_EVERY, Adversary
from pipeline.autoencoder_training.loss import AutoencoderLoss
from pipeline.autoencoder_training.postprocessing import (
    with_unsharp_mask,
    without_unused_channels,
)
from pipeline.config.autoencoder import AutoencoderTraining
from pipeline.optim.ema import Ema
from pipeline.optim.gradients import average_gradients
from pipeline.optim.learning_rate import set_learning_rate, warmup_cosine
from pipeline.optim.optimisers import MuonAdam, make_optimizer
from pipeline.runtime.devices import to_device
from pipeline.runtime.distributed import sum_over_ranks
from pipeline.runtime.system import require_memory

_FLOAT = 4
#: of the weights: themselves, their gradients, averages and two moments
_COPIES = 5


class AutoencoderTrainer:
    """Trainer of an autoencoder: networks, optimisers and the optimiser step.

    A frozen autoencoder `start` replaces `architecture` and random weights; its unsharp mask is
    removed. Every rank passes its part of each batch to `step`, and gradients are averaged over
    the batch. λ (see `AutoencoderLoss`) and the discriminator's batch normalisation use the part
    of the rank only.

    Raises:
        ValueError: the discriminator does not take images of this size.
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
        _require_memory(architecture, recipe)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(recipe.seed)
            self.model, self.discriminator = _networks(architecture, recipe)
        if recipe.adversarial_weight > 0 and recipe.adversarial_start < recipe.iterations:
            self.discriminator.check(architecture.image_shape)
        if start is not None:
            self.model.load_state_dict(start.state_dict())
        if recipe.decoder_only:
            self.model.requires_grad_(False)
            for part in (self.model.decoder, self.model.post_quant_conv):
                part.requires_grad_(True)
        self.model.to(accelerator.device)
        self.discriminator.to(accelerator.device)
        self.loss = AutoencoderLoss(self.model, self.discriminator, recipe)
        self.average = Ema(self.model, recipe.ema)
        # r1 has no momentum, as in its analysis
        betas = (0.5, 0.9) if recipe.discriminator == "patchgan" else (0.0, 0.99)
        momentum = betas[0] if recipe.momentum is None else recipe.momentum
        self.optimizer = make_optimizer(
            recipe.optimizer, self.model, recipe.lr, (momentum, betas[1])
        )
        self.discriminator_optimizer = Adam(
            self.discriminator.parameters(), recipe.lr * recipe.discriminator_lr, betas
        )
        self.done = 0

    @property
    def untrained(self) -> set[str]:
        """Names of the tensors that the training leaves unchanged: all without any step."""
        if not self.recipe.iterations:
            return set(self.model.state_dict())
        if not self.recipe.decoder_only:
            return set()
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        return set(self.model.state_dict()) - trained

    def state(self) -> dict[str, Any]:
        """Return the state of a resumable training, as nested dicts of tensors and numbers."""
        return {
            "step": self.done,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state` returned."""
        self.done = state["step"]
        for name in ("model", "average", "discriminator", "optimizer", "discriminator_optimizer"):
            getattr(self, name).load_state_dict(state[name])

    def step(self, images: Tensor, generator: torch.Generator) -> dict[str, float]:
        """Make one step of the autoencoder and, if it takes part, one of the discriminator.

        The images, uint8 (B, C, H, W), are this rank's part of the batch. The generator draws
        posterior noise, mirroring and, in the first step of a VQ autoencoder, the codebook. The
        named terms of the loss on this part are returned.

        Raises:
            FloatingPointError: the loss is not finite, on this or another rank.
        """
        self._set_learning_rates()
        x, noise = self._prepare(images, generator)
        if self.done == 0 and self.recipe.start is None and self.model.quantize is not None:
            self._initialise_codebook(x, generator)
        self.discriminator.requires_grad_(False)
        self.model.train()
        if self.recipe.decoder_only:
            self.model.encoder.eval()  # so that its latents are those of the finished model
        with self._dropout(generator):
            loss = self.loss(x, noise, self.done, generator)
        total = sum_over_ranks(self.accelerator, loss.total.detach())  # all ranks raise, or none
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"the autoencoder's loss is {total.item()} at step {self.done}; expected a finite "
                "number; lower lr, or use precision fp32"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        self._apply(self.model, self.optimizer, loss.total, len(x))
        terms = loss.terms
        if self.loss.adversarial(self.done):
            terms |= self._step_discriminator(x, loss.reconstructions.detach())
        self.average.update(self.model)
        self.done += 1
        return terms

    def finished(self, images: Tensor) -> TamingAutoencoder:
        """Return the averaged, frozen autoencoder, postprocessed by images (B, C, H, W)."""
        model = copy.deepcopy(self.model)
        self.average.copy_to(model)
        model = model.cpu().float().freeze()
        recipe = self.recipe
        if model.stochastic and not recipe.decoder_only and recipe.iterations:
            model = without_unused_channels(model, images, recipe.prune)
        return with_unsharp_mask(model, images) if recipe.sharpen else model

    def _step_discriminator(self, real: Tensor, fake: Tensor) -> dict[str, float]:
        """Make one step of the discriminator on images and reconstructions, both (B, C, H, W)."""
        terms: dict[str, float] = {}
        self.discriminator.requires_grad_(True)
        with self.loss.autocast(real.device):
            loss = self.discriminator.loss(real, fake)
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.recipe.discriminator == "r1" and self.done % R1_EVERY == 0:
            penalty = self.discriminator.penalty(real)
            (R1_EVERY * penalty).backward()
            terms["penalty"] = R1_EVERY * penalty.item()  # so that its mean over steps is right
        self._apply(self.discriminator, self.discriminator_optimizer, loss, len(real))
        return {**terms, "discriminator": loss.item()}

    @contextmanager
    def _dropout(self, generator: torch.Generator) -> Iterator[None]:
        """Derive dropout masks from the step's generator, and keep torch's own state."""
        if not self.model.config.dropout:
            yield
            return
        device = self.accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            yield

    def _prepare(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Convert images to float, mirror half of them if required, and draw posterior noise."""
        x = to_float(images)
        noise = torch.randn((len(x), *self.model.latent_shape), generator=generator)
        if self.recipe.flip:
            mirrored = torch.rand(len(x), generator=generator) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        device = self.accelerator.device
        return to_device(x, device), to_device(noise, device)

    def _set_learning_rates(self) -> None:
        """Set the learning rates of both optimisers for the present step."""
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

    def _initialise_codebook(self, x: Tensor, generator: torch.Generator) -> None:
        """Initialise the codebook, the same on all ranks, from images (B, C, H, W)."""
        with torch.no_grad():
            latents = self.model.encode(x).mean
        initialise_codebook(self.model, latents, generator)
        if self.accelerator.num_processes > 1 and self.model.quantize is not None:
            # from one rank, because a mean over ranks need not lie near the latents
            entries = self.model.quantize.embedding.weight.data
            entries.copy_(broadcast(entries, from_process=0))
        self.average.restart(self.model)


def _networks(
    architecture: TamingConfig, recipe: AutoencoderTraining
) -> tuple[TamingAutoencoder, Adversary]:
    """Build the autoencoder and its discriminator with random weights."""
    return TamingAutoencoder(architecture), Adversary(
        recipe.discriminator,
        architecture.image_shape[0],
        recipe.discriminator_width,
        recipe.discriminator_layers,
        recipe.r1_weight,
    )


def _require_memory(architecture: TamingConfig, recipe: AutoencoderTraining) -> None:
    """Check that the machine can hold the training: weights, gradients, moments and a batch.

    Raises:
        UserError: it cannot.
    """
    with torch.device("meta"):
        networks = _networks(architecture, recipe)
    weights = sum(p.numel() for network in networks for p in network.parameters())
    batch = recipe.batch_size * architecture.ch * math.prod(architecture.canvas_shape)
    require_memory(
        _FLOAT * (_COPIES * weights + batch // architecture.patch**2),
        f"the training of {weights:,} weights on batches of {recipe.batch_size} images",
        "choose smaller networks (architecture.width, training.discriminator_width) or "
        "training.batch_size",
    )


@torch.no_grad()
def initialise_codebook(
    model: TamingAutoencoder, latents: Tensor, generator: torch.Generator
) -> None:
    """Initialise a VQ codebook with random vectors of unquantised latents (B, C_z, H_z, W_z).

    Raises:
        ValueError: the autoencoder is of another flavour.
    """
    if model.config.flavour != "vq":
        raise ValueError(f"the flavour is {model.config.flavour}; expected vq for its codebook")
    vectors = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    chosen = torch.randint(len(vectors), (model.config.n_embed,), generator=generator)
    model.quantize.embedding.weight.copy_(vectors[chosen.to(vectors.device)])
