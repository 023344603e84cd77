"""VQ and KL autoencoders made of taming-transformers' own Encoder, Decoder and VectorQuantizer.

The only file that imports taming. The networks and their parameter names are those of the
official checkpoints (`encoder.*`, `decoder.*`, `quantize.embedding.weight`, `quant_conv.*`,
`post_quant_conv.*`; Gumbel: `quantize.proj.*`, `quantize.embed.weight`), so that a converted
checkpoint and one trained here load the same way.

Two additions for small images, both exact and both undone by decoding: `pad` centres a
28x28 image on a larger canvas of background (-1), and `patch` folds p x p pixels into channels
(pixel-unshuffle), so that most of the network works at a resolution where CPUs are efficient.

Reference: Esser, Rombach, Ommer, "Taming transformers for high-resolution image synthesis",
CVPR 2021; Rombach et al., "High-resolution image synthesis with latent diffusion", CVPR 2022.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from typing import Any

import torch
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from taming.modules.vqvae.quantize import VectorQuantizer
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoders.architecture import TamingConfig
from autoencoders.base import Moments, check_images, check_latents, module_fingerprint
from autoencoders.codebook import GumbelQuantizer, look_up, nearest_indices
from autoencoders.sharpen import sharpen

# a posterior narrower or wider than this is clamped, as in latent diffusion
_LOG_VAR_RANGE = (-30.0, 20.0)


class TamingAutoencoder(nn.Module):
    """A VQ, Gumbel or KL autoencoder on taming's networks.

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
            "attn_resolutions": config.attn_resolutions if config.attention else (),
            "dropout": config.dropout,
            "resolution": config.resolution or config.side // config.patch,
            "z_channels": config.z_channels,
        }
        with contextlib.redirect_stdout(io.StringIO()):  # taming's Decoder prints its shape
            self.encoder = Encoder(
                in_channels=channels, out_ch=channels, double_z=self.stochastic, **shared
            )
            self.decoder = Decoder(in_channels=channels, out_ch=channels, **shared)
        if not config.attention:
            self.encoder.mid.attn_1 = nn.Identity()
            self.decoder.mid.attn_1 = nn.Identity()
        factor = 2 if self.stochastic else 1
        self.quant_conv = nn.Conv2d(factor * config.z_channels, factor * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.quantize: Any = None
        if config.flavour == "vq":
            self.quantize = VectorQuantizer(config.n_embed, config.embed_dim, config.commitment)
        elif config.flavour == "gumbel":
            self.quantize = GumbelQuantizer(config.n_embed, config.embed_dim)

    def freeze(self) -> TamingAutoencoder:
        """Fix the weights (eval mode, no gradients) and compute the fingerprint."""
        self.eval().requires_grad_(False)
        self.fingerprint = module_fingerprint(self.describe(), self)
        return self

    def reshaped(self, image_shape: tuple[int, int, int]) -> TamingAutoencoder:
        """The same weights for images of another size, frozen; attention sits where it sat.

        Args:
            image_shape: (C, H, W), with the C of these weights.

        Raises:
            ValueError: another number of channels, or sides that cannot be halved so often.
        """
        if image_shape[0] != self.image_shape[0]:
            raise ValueError(
                f"these weights take {self.image_shape[0]} channels, not {image_shape[0]}"
            )
        kept = self.config.resolution or self.config.side // self.config.patch
        config = replace(self.config, image_shape=image_shape, canvas=0, resolution=kept)
        model = TamingAutoencoder(config)
        model.load_state_dict(self.state_dict())
        return model.freeze()

    @property
    def codebook_size(self) -> int:
        """Entries of the codebook; 0 where there is none."""
        return 0 if self.stochastic else self.config.n_embed

    def encode(self, x: Tensor) -> Moments:
        """Images to moments: mean and log-variance (KL), or the pre-quantised latent (VQ).

        Gumbel's pre-quantised latent is what its logits are computed from (see `logits`).

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
        """Codebook entries of latents: the nearest (VQ) or the most likely (Gumbel).

        With gradients on, VQ's are taming's, with the straight-through gradient; but the loss is
        ‖sg z − e‖² + β ‖z − sg e‖², means over the numbers. (In taming 0.0.1 β = `commitment` is
        the weight of the first term, which moves the entries, against its own documentation.)

        Returns:
            Quantised latents (B, C_z, H_z, W_z), the codebook loss (scalar; 0 for Gumbel), and
            the indices (B·H_z·W_z,).
        """
        entries = self._entries()
        if self.config.flavour == "gumbel":
            indices = self.quantize.indices(z)
            return look_up(indices, entries), z.new_zeros(()), indices.flatten()
        if torch.is_grad_enabled():
            quantised, _, (_, _, indices) = self.quantize(z)
            found = look_up(indices.view(z.shape[0], *z.shape[2:]), entries)
            pulled = F.mse_loss(found, z.detach())
            loss = pulled + self.config.commitment * F.mse_loss(z, found.detach())
            return quantised, loss, indices.flatten()
        indices = nearest_indices(z, entries)
        quantised = look_up(indices, entries)
        loss = (1.0 + self.config.commitment) * F.mse_loss(quantised, z)
        return quantised, loss, indices.flatten()

    def codes(self, z: Tensor, entries: bool = False) -> Tensor:
        """Numbers (B·H_z·W_z,) of the codebook entries that latents are decoded from.

        Args:
            z: (B, C_z, H_z, W_z).
            entries: the latents are entries already, but for an error (see `nearest`).
        """
        return nearest_indices(z, self._entries()).flatten() if entries else self.quantise(z)[2]

    def nearest(self, z: Tensor) -> Tensor:
        """Latents that are, but for an error, codebook entries to the entries nearest them.

        For VQ this is `quantise`; a Gumbel entry is no argument of its own logits.
        """
        return look_up(nearest_indices(z, self._entries()), self._entries())

    def logits(self, z: Tensor) -> Tensor:
        """Log-odds (B, n_embed, H_z, W_z) of the codebook entries (Gumbel only)."""
        if self.config.flavour != "gumbel":
            raise ValueError(f"only a gumbel autoencoder has logits, not {self.config.flavour}")
        return self.quantize.proj(z)

    def _entries(self) -> Tensor:
        if self.quantize is None:
            raise ValueError("a KL autoencoder has no codebook to quantise with")
        kind = "embed" if self.config.flavour == "gumbel" else "embedding"
        return getattr(self.quantize, kind).weight

    def decode(self, z: Tensor) -> Tensor:
        """Latents to images; quantises first where there is a codebook.

        Args:
            z: (B, C_z, H_z, W_z), not standardised.

        Returns:
            (B, C, H, W), clamped to `config.levels`, sharpened as the architecture says.

        Raises:
            ValueError: the latents have another shape.
        """
        check_latents(z, self.latent_shape)
        if self.quantize is not None:
            z = self.quantise(z)[0]
        return self.decode_entries(z)

    def decode_entries(self, z: Tensor) -> Tensor:
        """Latents that are already quantised (or need not be) to images, as `decode` does."""
        x = self.decode_quantised(z).clamp(*self.config.limits)
        return sharpen(x, self.config.sharpen).clamp(*self.config.limits)

    def decode_quantised(self, z: Tensor) -> Tensor:
        """Latents that are already quantised (or need not be) to images, not clamped."""
        return self._unfold(self.decoder(self.post_quant_conv(z)))

    def describe(self) -> dict[str, Any]:
        """The architecture as plain values, enough to build it again."""
        return {"kind": "taming", **self.config.to_dict()}

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
        rows, columns = self.config.canvas_shape
        return (rows - height) // 2, (columns - width) // 2


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
def keep_channels(model: TamingAutoencoder, channels: list[int]) -> TamingAutoencoder:
    """A KL autoencoder with some of its latent channels only, the others fixed at zero.

    Only the 1x1 convolutions next to the latents change, so this is exact for channels that
    are always zero, and harmless for channels that the decoder has learnt to ignore.

    Args:
        model: a frozen KL autoencoder.
        channels: those to keep, in order.

    Returns:
        A new frozen autoencoder with latents (len(channels), H_z, W_z); `model` itself where all
        are kept.

    Raises:
        ValueError: a codebook, or no channel left.
    """
    if not model.stochastic:
        raise ValueError("only a KL autoencoder's channels can be dropped")
    total = model.config.embed_dim
    if channels == list(range(total)):
        return model
    if not channels:
        raise ValueError(
            "no latent channel carries information; lower autoencoder_training.kl_weight"
        )
    slim = TamingAutoencoder(replace(model.config, embed_dim=len(channels)))
    tensors = dict(model.state_dict())
    rows = channels + [total + channel for channel in channels]  # means, then log-variances
    tensors["quant_conv.weight"] = tensors["quant_conv.weight"][rows]
    tensors["quant_conv.bias"] = tensors["quant_conv.bias"][rows]
    tensors["post_quant_conv.weight"] = tensors["post_quant_conv.weight"][:, channels]
    slim.load_state_dict(tensors)
    return slim.freeze()


@torch.no_grad()
def start_codebook(model: TamingAutoencoder, latents: Tensor, generator: torch.Generator) -> None:
    """Start a codebook from encoded data, so that its entries lie where the latents are.

    Args:
        model: a VQ autoencoder.
        latents: (B, C_z, H_z, W_z), pre-quantised.
        generator: draws the entries.
    """
    if model.config.flavour != "vq":
        raise ValueError(f"only a vq codebook can be started, not a {model.config.flavour} one")
    flat = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    chosen = torch.randint(len(flat), (model.config.n_embed,), generator=generator)
    model.quantize.embedding.weight.copy_(flat[chosen.to(flat.device)])
