"""VQ and KL autoencoders made of taming-transformers' own Encoder, Decoder and VectorQuantizer.

The only file that imports taming. The networks and their parameter names are those of the
official checkpoints (`encoder.*`, `decoder.*`, `quantize.embedding.weight`, `quant_conv.*`,
`post_quant_conv.*`), so that a converted checkpoint and one trained here load the same way.

Two additions for small images, both exact and both undone by decoding: `pad` centres a
28x28 image on a larger canvas of background (-1), and `patch` folds p x p pixels into channels
(pixel-unshuffle), so that most of the network works at a resolution where CPUs are efficient.

Reference: Esser, Rombach, Ommer, "Taming transformers for high-resolution image synthesis",
CVPR 2021; Rombach et al., "High-resolution image synthesis with latent diffusion", CVPR 2022.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import asdict, dataclass
from typing import Any

import torch
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from taming.modules.vqvae.quantize import VectorQuantizer
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoders.base import Moments, check_images, check_latents, fingerprint_of

FLAVOURS = ("kl", "vq")
# taming normalises with 32 groups, so every width must be a multiple of 32
_GROUPS = 32
# a posterior narrower or wider than this is clamped, as in latent diffusion
_LOG_VAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class TamingConfig:
    """Architecture of a taming autoencoder.

    Attributes:
        flavour: "kl" (Gaussian posterior) or "vq" (codebook).
        image_shape: (C, H, W) of the images.
        canvas: side of the square canvas the image is centred on; 0 takes the image's height.
        patch: p x p pixels folded into channels before the encoder; 1 folds nothing.
        ch: base width, a multiple of 32.
        ch_mult: width multiplier per resolution; each further entry halves the resolution.
        num_res_blocks: residual blocks per resolution.
        attn_resolutions: resolutions with self-attention (besides the middle, always).
        z_channels: channels the encoder puts out.
        embed_dim: channels of the latents (C_z).
        n_embed: codebook entries (VQ).
        commitment: weight of the commitment term in the codebook loss (VQ).
        dropout: dropout in the residual blocks.
    """

    flavour: str = "kl"
    image_shape: tuple[int, int, int] = (1, 28, 28)
    canvas: int = 0
    patch: int = 1
    ch: int = 32
    ch_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 1
    attn_resolutions: tuple[int, ...] = ()
    z_channels: int = 4
    embed_dim: int = 4
    n_embed: int = 512
    commitment: float = 0.25
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.flavour not in FLAVOURS:
            raise ValueError(f"flavour must be one of {', '.join(FLAVOURS)}, not {self.flavour!r}")
        if self.ch < _GROUPS or self.ch % _GROUPS:
            raise ValueError(f"ch must be a multiple of {_GROUPS}, not {self.ch}")
        _, height, width = self.image_shape
        if self.side < max(height, width) or (self.side - height) % 2 or (self.side - width) % 2:
            raise ValueError(
                f"canvas {self.side} cannot centre images of {height}x{width}; it must be at "
                "least as large and differ from them by an even number"
            )
        if self.patch < 1 or self.side % (self.patch * 2 ** (len(self.ch_mult) - 1)):
            raise ValueError(
                f"canvas {self.side} cannot be divided by patch {self.patch} and halved "
                f"{len(self.ch_mult) - 1} times; change canvas, patch or ch_mult"
            )

    @property
    def side(self) -> int:
        """Side of the square canvas, in pixels."""
        return self.canvas or self.image_shape[1]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C_z, H_z, W_z)."""
        side = self.side // self.patch // 2 ** (len(self.ch_mult) - 1)
        return (self.embed_dim, side, side)


class TamingAutoencoder(nn.Module):
    """A VQ or KL autoencoder on taming's networks.

    Args:
        config: its architecture.

    The weights are random until `load_state_dict`; call `freeze` once they are final.
    """

    def __init__(self, config: TamingConfig) -> None:
        super().__init__()
        self.config = config
        self.image_shape = config.image_shape
        self.latent_shape = config.latent_shape
        self.stochastic = config.flavour == "kl"
        self.fingerprint = ""
        channels = config.image_shape[0] * config.patch**2
        shared: dict[str, Any] = {
            "ch": config.ch,
            "ch_mult": config.ch_mult,
            "num_res_blocks": config.num_res_blocks,
            "attn_resolutions": config.attn_resolutions,
            "dropout": config.dropout,
            "resolution": config.side // config.patch,
            "z_channels": config.z_channels,
        }
        with contextlib.redirect_stdout(io.StringIO()):  # taming's Decoder prints its shape
            self.encoder = Encoder(
                in_channels=channels, out_ch=channels, double_z=self.stochastic, **shared
            )
            self.decoder = Decoder(in_channels=channels, out_ch=channels, **shared)
        factor = 2 if self.stochastic else 1
        self.quant_conv = nn.Conv2d(factor * config.z_channels, factor * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.quantize: VectorQuantizer | None = None
        if not self.stochastic:
            self.quantize = VectorQuantizer(config.n_embed, config.embed_dim, config.commitment)

    def freeze(self) -> TamingAutoencoder:
        """Fix the weights (eval mode, no gradients) and compute the fingerprint."""
        self.eval().requires_grad_(False)
        self.fingerprint = fingerprint_of(self.describe(), self)
        return self

    def encode(self, x: Tensor) -> Moments:
        """Images to moments: mean and log-variance (KL), or the pre-quantised latent (VQ).

        Args:
            x: (B, C, H, W), in [-1, 1].

        Returns:
            Moments of shape (B, C_z, H_z, W_z).

        Raises:
            ValueError: the images have another shape.
        """
        check_images(x, self.image_shape)
        h = self.quant_conv(self.encoder(self._fold(x)))
        if not self.stochastic:
            return Moments(h)
        mean, log_var = h.chunk(2, dim=1)
        return Moments(mean, log_var.clamp(*_LOG_VAR_RANGE))

    def quantise(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nearest codebook entries, with straight-through gradient (VQ only).

        Returns:
            Quantised latents (B, C_z, H_z, W_z), the codebook loss (scalar), and the indices
            (B·H_z·W_z,).
        """
        if self.quantize is None:
            raise ValueError("a KL autoencoder has no codebook to quantise with")
        quantised, loss, (_, _, indices) = self.quantize(z)
        return quantised, loss, indices.flatten()

    def decode(self, z: Tensor) -> Tensor:
        """Latents to images; quantises first where there is a codebook.

        Args:
            z: (B, C_z, H_z, W_z), not standardised.

        Returns:
            (B, C, H, W), clamped to [-1, 1].

        Raises:
            ValueError: the latents have another shape.
        """
        check_latents(z, self.latent_shape)
        if self.quantize is not None:
            z = self.quantise(z)[0]
        return self.decode_quantised(z).clamp(-1.0, 1.0)

    def decode_quantised(self, z: Tensor) -> Tensor:
        """Latents that are already quantised (or need not be) to images, not clamped."""
        return self._unfold(self.decoder(self.post_quant_conv(z)))

    def describe(self) -> dict[str, Any]:
        """The architecture as plain values, enough to build it again."""
        values = {
            k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.config).items()
        }
        return {"kind": "taming", **values}

    def _fold(self, x: Tensor) -> Tensor:
        rows, columns = self._margins()
        if rows or columns:
            x = F.pad(x, (columns, columns, rows, rows), value=-1.0)
        return F.pixel_unshuffle(x, self.config.patch) if self.config.patch > 1 else x

    def _unfold(self, h: Tensor) -> Tensor:
        x = F.pixel_shuffle(h, self.config.patch) if self.config.patch > 1 else h
        rows, columns = self._margins()
        return x[:, :, rows : x.shape[2] - rows, columns : x.shape[3] - columns]

    def _margins(self) -> tuple[int, int]:
        _, height, width = self.image_shape
        return (self.config.side - height) // 2, (self.config.side - width) // 2


def config_from(description: dict[str, Any]) -> TamingConfig:
    """The architecture from what `describe` gave (lists become tuples again).

    Raises:
        ValueError: a key is unknown or missing its type.
    """
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in description.items()
    }
    values.pop("kind", None)
    try:
        return TamingConfig(**values)
    except TypeError as error:
        raise ValueError(f"not a description of a taming autoencoder: {error}") from error


def patch_discriminator(channels: int, width: int, layers: int) -> nn.Module:
    """Taming's PatchGAN discriminator with its own initialisation.

    Args:
        channels: channels of the images.
        width: filters of its first convolution.
        layers: strided convolutions after the first.

    Returns:
        A module (B, C, H, W) → (B, 1, h, w) of logits.
    """
    return NLayerDiscriminator(channels, ndf=width, n_layers=layers).apply(weights_init)


@torch.no_grad()
def start_codebook(model: TamingAutoencoder, latents: Tensor, generator: torch.Generator) -> None:
    """Start a codebook from encoded data, so that its entries lie where the latents are.

    Args:
        model: a VQ autoencoder.
        latents: (B, C_z, H_z, W_z), pre-quantised.
        generator: draws the entries.
    """
    if model.quantize is None:
        raise ValueError("a KL autoencoder has no codebook to start")
    flat = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    chosen = torch.randint(len(flat), (model.config.n_embed,), generator=generator)
    model.quantize.embedding.weight.copy_(flat[chosen.to(flat.device)])
