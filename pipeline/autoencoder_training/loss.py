"""Loss of an autoencoder in training.

For images x of N values each (channels times pixels) it is

    L = mean|x − x̂| + w_kl KL(q(z|x) ‖ N(0, I)) / N     (KL; VQ: + w_code · codebook loss)
        + w_over mean(y − x̂)²
        + w_feat Σ_l mean|D_l(x) − D_l(x̂)| + w_adv λ A(D(x̂)).

y is the decoder's output. x̂ is y clamped to the architecture's grey levels, with the gradient of
the identity. D is the discriminator, D_l are its hidden activations, and A is
`Adversary.autoencoder_loss`. Feature matching is the perceptual term: its features need no
download, and FID does not use them. For taming's discriminator
λ = ‖∇ mean|x − x̂|‖ / ‖∇ A‖, with gradients at the decoder's last layer, balances reconstruction
and adversarial term; for the other discriminator, whose gradient is bounded, λ = 1.

Reference: Esser et al. 2021, Eq. (6)-(7) for λ; Larsen et al. 2016 for feature matching.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoders.taming import TamingAutoencoder
from pipeline.autoencoder_training.adversary import Adversary
from pipeline.config.autoencoder import AutoencoderTraining


@dataclass(frozen=True)
class LossOfBatch:
    """Loss L of a batch, a scalar, its named terms, and x̂ (B, C, H, W), both with gradient."""

    total: Tensor
    terms: dict[str, float]
    reconstructions: Tensor


class AutoencoderLoss:
    """Loss L of an autoencoder against a discriminator, with the weights of a recipe."""

    def __init__(
        self, model: TamingAutoencoder, discriminator: Adversary, recipe: AutoencoderTraining
    ) -> None:
        self.model, self.discriminator, self.recipe = model, discriminator, recipe

    def __call__(
        self, x: Tensor, noise: Tensor, step: int, generator: torch.Generator
    ) -> LossOfBatch:
        """Compute the loss of images (B, C, H, W) in [-1, 1] at a step of the training.

        The noise (B, C_z, H_z, W_z) of the posterior sample is standard normal. The generator
        draws the noise of `recipe.latent_noise`. The step determines the KL weight and whether D
        takes part.
        """
        with self.autocast(x.device):
            with torch.set_grad_enabled(not self.recipe.decoder_only):
                z, regularisation, terms = self.latents(x, noise, step)
            output = self.model.decode_quantised(self._with_noise(z, generator))
        output = output.float()
        fake = _clamp_with_identity_gradient(output, self.model.config.limits)
        overshoot = (output - fake.detach()).square().mean()
        reconstruction = (x - fake).abs().mean()
        total = reconstruction + regularisation + self.recipe.overshoot_weight * overshoot
        terms |= {"reconstruction": reconstruction.item(), "overshoot": overshoot.item()}
        if self.adversarial(step):
            with self.autocast(x.device):
                features, logits = self.discriminator.features_and_logits(fake)
            if self.recipe.feature_weight > 0:
                matching = self._feature_distance(x, features)
                total = total + self.recipe.feature_weight * matching
                terms["matching"] = matching.item()
            adversarial = self.discriminator.autoencoder_loss(logits)
            balanced = self.recipe.discriminator == "patchgan"
            weight = self._balance(reconstruction, adversarial) if balanced else 1.0
            total = total + self.recipe.adversarial_weight * weight * adversarial
            terms["adversarial"] = adversarial.item()
        return LossOfBatch(total, terms, fake)

    def adversarial(self, step: int) -> bool:
        """Return whether the discriminator takes part in a step."""
        recipe = self.recipe
        return recipe.adversarial_weight > 0 and step >= recipe.adversarial_start

    def kl_weight(self, step: int) -> float:
        """Compute the weight w_kl of a step, which grows linearly during `kl_warmup`."""
        ramp = (step + 1) / max(self.recipe.kl_warmup, 1)
        return self.recipe.kl_weight * min(1.0, ramp)

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context of the recipe's precision."""
        enabled = self.recipe.precision == "bf16"
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

    def latents(
        self, x: Tensor, noise: Tensor, step: int
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Encode images (B, C, H, W) to latents, with the regularisation term and its named parts.

        The noise (B, C_z, H_z, W_z) is standard normal, and without effect for VQ.
        """
        moments = self.model.encode(x)
        if moments.log_var is None:
            with torch.autocast(x.device.type, enabled=False):
                # in half precision up to a tenth of the vectors would find another entry nearest
                z, codebook, _ = self.model.quantise(moments.mean.float())
            return z, self.recipe.codebook_weight * codebook, {"codebook": codebook.item()}
        mean, log_var = moments.mean.float(), moments.log_var.float()
        z = mean + (0.5 * log_var).exp() * noise
        kl = 0.5 * (mean**2 + log_var.exp() - 1.0 - log_var).flatten(1).sum(1).mean()
        return z, self.kl_weight(step) * kl / x[0].numel(), {"kl": kl.item()}

    def _with_noise(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Add noise of `recipe.latent_noise`, drawn on the CPU, to latents (B, C_z, H_z, W_z)."""
        if self.recipe.latent_noise == 0.0:
            return z
        strength = torch.rand((len(z), 1, 1, 1), generator=generator)
        noise = strength * torch.randn(z.shape, generator=generator)
        std = z.detach().std((0, 2, 3), keepdim=True)
        return z + self.recipe.latent_noise * std * noise.to(z.device)

    def _feature_distance(self, x: Tensor, fake_features: list[Tensor]) -> Tensor:
        """Compute Σ_l mean|D_l(x) − D_l(x̂)|, from images x and the activations D_l(x̂)."""
        with self.autocast(x.device), torch.no_grad():
            real_features, _ = self.discriminator.features_and_logits(x)
        pairs = zip(fake_features, real_features, strict=True)
        return torch.stack([F.l1_loss(f.float(), r.float()) for f, r in pairs]).sum()

    def _balance(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        """Compute λ from the two terms, a scalar without gradient."""
        last: Any = self.model.decoder.conv_out.weight
        (reconstructing,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
        (deceiving,) = torch.autograd.grad(adversarial, last, retain_graph=True)
        return (reconstructing.norm() / (deceiving.norm() + 1e-4)).clamp(0.0, 1e4).detach()


def _clamp_with_identity_gradient(x: Tensor, limits: tuple[float, float]) -> Tensor:
    """Clamp x with the gradient of the identity.

    A correctly saturated pixel has no loss; a wrongly saturated one still has a gradient.
    """
    return x + (x.clamp(*limits) - x).detach()
