"""Discriminators that tell images from reconstructions, and what they lose.

Two kinds:

* ``patchgan``: taming-transformers' own, with batch normalisation; hinge loss,
  ½ E max(0, 1 − D(x)) + ½ E max(0, 1 + D(x̂)), against −E D(x̂).
* ``r1``: convolutions without normalisation; logistic loss,
  E softplus(−D(x)) + E softplus(D(x̂)) + γ/2 E‖∇D(x)‖², against E softplus(−D(x̂)).
  The last term keeps the discriminator's slope on the images in bounds, so that one that has won
  does not tear reconstructions apart.

Both judge patches: D(x) is a map of logits, and E runs over images and places.

Reference: Esser et al. 2021 (patchgan); Mescheder, Geiger, Nowozin, "Which training methods for
GANs do actually converge?", ICML 2018, Eq. (9) (r1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoders.taming import patch_discriminator
from pipeline.config.autoencoder_recipe import DISCRIMINATORS

#: the R1 term is computed at every so many-th step, and weighs so many times as much
R1_EVERY = 4
_SLOPE = 0.2


class Adversary(nn.Module):
    """A discriminator with its loss.

    Args:
        kind: one of `DISCRIMINATORS`.
        channels: channels of the images.
        width: filters of the first convolution.
        layers: strided convolutions after the first.
        r1_weight: γ, of ``r1``.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(
        self, kind: str, channels: int, width: int, layers: int, r1_weight: float
    ) -> None:
        super().__init__()
        if kind not in DISCRIMINATORS:
            kinds = ", ".join(DISCRIMINATORS)
            raise ValueError(f"discriminator must be one of {kinds}, not {kind!r}")
        self.kind, self.r1_weight = kind, r1_weight
        net: Any = (
            patch_discriminator(channels, width, layers).main
            if kind == "patchgan"
            else _plain(channels, width, layers)
        )
        self.main: nn.Sequential = net

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images.

        Args:
            x: (B, C, H, W), in [-1, 1]; even sides for ``r1``.

        Returns:
            (B, 1, h, w).
        """
        return self.judge(x)[1]

    def judge(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Hidden activations, each (B, c, h, w), and the logits (B, 1, h, w)."""
        features: list[Tensor] = []
        for layer in self.main:
            x = layer(x)
            if isinstance(layer, nn.LeakyReLU):
                features.append(x)
        return features, x

    @torch.no_grad()
    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Refuses images that it cannot judge, by judging one.

        Raises:
            ValueError: sides that are too small, or odd for ``r1``.
        """
        training = self.training
        try:
            self.eval()(torch.zeros(1, *image_shape))
        except RuntimeError as error:
            height, width = image_shape[1:]
            raise ValueError(
                f"a discriminator {self.kind} of these layers cannot judge images of "
                f"{height}x{width}, for every layer halves them and r1 needs even sides; lower "
                "discriminator_layers, or choose the other discriminator"
            ) from error
        finally:
            self.train(training)

    def fooling(self, logits: Tensor) -> Tensor:
        """What the autoencoder minimises, from the logits of its reconstructions; a scalar."""
        logits = logits.float()
        return -logits.mean() if self.kind == "patchgan" else F.softplus(-logits).mean()

    def loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """What the discriminator minimises, without the R1 term; a scalar.

        Args:
            real: (B, C, H, W), images.
            fake: (B, C, H, W), reconstructions, detached.
        """
        if self.kind == "patchgan":  # one at a time: batch normalisation must not mix them
            of_real, of_fake = self(real).float(), self(fake).float()
            return 0.5 * (F.relu(1.0 - of_real).mean() + F.relu(1.0 + of_fake).mean())
        of_real, of_fake = self(torch.cat([real, fake])).float().chunk(2)
        return F.softplus(-of_real).mean() + F.softplus(of_fake).mean()

    def penalty(self, real: Tensor) -> Tensor:
        """γ/2 E‖∇D(x)‖² on images (B, C, H, W), D averaged over places; a scalar."""
        x = real.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self(x).mean((1, 2, 3)).sum(), x, create_graph=True)
        return 0.5 * self.r1_weight * slope.square().flatten(1).sum(1).mean()


def _plain(channels: int, width: int, layers: int) -> nn.Sequential:
    """2x2 pixels into channels; pairs of convolutions, the second strided; logits by 1x1."""
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
        last.weight.mul_(0.1)  # logits start near zero
    return nn.Sequential(*parts)
