"""Discriminators that distinguish images x from reconstructions x̂, and their losses.

* ``patchgan``: taming-transformers' discriminator, with batch normalisation and hinge loss. It
  minimises ½ E max(0, 1 − D(x)) + ½ E max(0, 1 + D(x̂)), the autoencoder −E D(x̂).
* ``r1``: convolutions without normalisation, with logistic loss. It minimises E softplus(−D(x)) +
  E softplus(D(x̂)) + γ/2 E‖∇D(x)‖², the autoencoder E softplus(−D(x̂)). The last term bounds the
  gradient at the images, so that a discriminator that is much better than the autoencoder does not
  degrade the reconstructions.

D(x) is a map of logits of patches, and E averages over images and positions.

Reference: Esser et al. 2021 (patchgan); Mescheder, Geiger, Nowozin, "Which training methods for
GANs do actually converge?", ICML 2018, Eq. (9) (r1).
"""

from __future__ import annotations

from typing import Any

import torch
from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.autoencoder import DISCRIMINATORS

#: the R1 term is computed at every R1_EVERY-th step, with R1_EVERY times its weight
R1_EVERY = 4
_SLOPE = 0.2


class Adversary(nn.Module):
    """Discriminator of a kind in `DISCRIMINATORS`, with its losses.

    Its first convolution has `width` filters; `layers` strided ones follow. γ is `r1_weight`.

    Raises:
        ValueError: the kind is unknown.
    """

    def __init__(
        self, kind: str, channels: int, width: int, layers: int, r1_weight: float
    ) -> None:
        super().__init__()
        if kind not in DISCRIMINATORS:
            kinds = ", ".join(DISCRIMINATORS)
            raise ValueError(f"the discriminator is {kind!r}; expected one of {kinds}")
        self.kind, self.r1_weight = kind, r1_weight
        build = _patchgan if kind == "patchgan" else _unnormalised
        self.main = build(channels, width, layers)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits (B, 1, h, w) of images (B, C, H, W) in [-1, 1], of even sides for r1."""
        return self.features_and_logits(x)[1]

    def features_and_logits(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Compute hidden activations, each (B, c, h, w), and logits (B, 1, h, w) of images."""
        features: list[Tensor] = []
        for layer in self.main:
            x = layer(x)
            if isinstance(layer, nn.LeakyReLU):
                features.append(x)
        return features, x

    @torch.no_grad()
    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Check that the discriminator takes images of a shape (C, H, W), on a blank image.

        Raises:
            ValueError: the sides are too small, or odd for ``r1``.
        """
        training = self.training
        try:
            self.eval()(torch.zeros(1, *image_shape))
        except RuntimeError as error:
            height, width = image_shape[1:]
            raise ValueError(
                f"the images are {height}x{width}; expected sides that every layer of the "
                f"discriminator {self.kind} can halve (even sides for r1); lower "
                "discriminator_layers, or choose the other discriminator"
            ) from error
        finally:
            self.train(training)

    def autoencoder_loss(self, logits: Tensor) -> Tensor:
        """Compute the autoencoder's loss, a scalar, from the logits of reconstructions."""
        logits = logits.float()
        return -logits.mean() if self.kind == "patchgan" else F.softplus(-logits).mean()

    def loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Compute the loss without R1, a scalar, of images and reconstructions (B, C, H, W)."""
        if self.kind == "patchgan":  # separately, so that batch normalisation does not mix them
            real_logits, fake_logits = self(real).float(), self(fake).float()
            return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())
        real_logits, fake_logits = self(torch.cat([real, fake])).float().chunk(2)
        return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()

    def penalty(self, real: Tensor) -> Tensor:
        """Compute γ/2 E‖∇D(x)‖², a scalar, on images (B, C, H, W); D averages over positions."""
        x = real.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self(x).mean((1, 2, 3)).sum(), x, create_graph=True)
        return 0.5 * self.r1_weight * gradient.square().flatten(1).sum(1).mean()


def _patchgan(channels: int, width: int, layers: int) -> nn.Sequential:
    """Build taming's PatchGAN discriminator with its own initialisation."""
    network: Any = NLayerDiscriminator(channels, ndf=width, n_layers=layers).apply(weights_init)
    main: nn.Sequential = network.main
    return main


def _unnormalised(channels: int, width: int, layers: int) -> nn.Sequential:
    """Build a discriminator without normalisation.

    It folds 2x2 pixels into channels, applies pairs of convolutions, the second one strided, and
    computes logits by a 1x1 convolution.
    """
    sizes = [width * 2**index for index in range(layers + 1)]
    parts: list[nn.Module] = [nn.PixelUnshuffle(2)]

    def add(inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> None:
        parts.append(nn.Conv2d(inputs, outputs, kernel, stride, padding))
        parts.append(nn.LeakyReLU(_SLOPE))

    add(4 * channels, width, 3, 1, 1)
    add(width, width, 3, 1, 1)
    for narrow, wide in zip(sizes, sizes[1:], strict=False):
        add(narrow, wide, 4, 2, 1)
        add(wide, wide, 3, 1, 1)
    add(sizes[-1], sizes[-1], 3, 1, 1)
    parts.append(nn.Conv2d(sizes[-1], 1, 1))
    for part in parts:
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, _SLOPE)
            assert part.bias is not None
            nn.init.zeros_(part.bias)
    last = parts[-1]
    assert isinstance(last, nn.Conv2d)
    with torch.no_grad():
        last.weight.mul_(0.1)  # so that logits start near zero
    return nn.Sequential(*parts)
