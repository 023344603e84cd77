"""VQ, Gumbel and KL autoencoders on the networks of taming-transformers.

Names of parameters are those of official checkpoints. There are two exact additions for small
images, which decoding reverts. `canvas` centres an image on a larger canvas of background (-1).
`patch` folds p x p pixels into channels, so that most of the network runs at a resolution where
CPUs are efficient.

Reference: Esser, Rombach, Ommer, "Taming transformers for high-resolution image synthesis", CVPR
2021; Rombach et al., "High-resolution image synthesis with latent diffusion", CVPR 2022.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from typing import Any

import torch
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import VectorQuantizer
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoders.architecture import TamingConfig
from autoencoders.base import Moments, check_images, check_latents, module_fingerprint
from autoencoders.codebook import GumbelQuantizer, look_up, nearest_indices
from autoencoders.sharpen import sharpen

# range to which log-variances are clamped, as in latent diffusion
_LOG_VAR_RANGE = (-30.0, 20.0)


class TamingAutoencoder(nn.Module):
    """VQ, Gumbel or KL autoencoder on taming's networks.

    The weights are random until `load_state_dict`; call `freeze` when they are final.
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
        """Return an autoencoder with these weights for images (C, H, W) of another size, frozen.

        The channels are those of the weights, and attention stays at the same depth.

        Raises:
            ValueError: the sides cannot be halved often enough.
        """
        resolution = self.config.resolution or self.config.side // self.config.patch
        config = replace(self.config, image_shape=image_shape, canvas=0, resolution=resolution)
        model = TamingAutoencoder(config)
        model.load_state_dict(self.state_dict())
        return model.freeze()

    @property
    def codebook_size(self) -> int:
        """Number of codebook entries; 0 without a codebook."""
        return 0 if self.stochastic else self.config.n_embed

    def encode(self, x: Tensor) -> Moments:
        """Encode images (B, C, H, W) in [-1, 1] to moments (B, C_z, H_z, W_z).

        They are mean and log-variance (KL), or the unquantised latent (VQ; Gumbel: input of the
        logits).

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
        """Quantise latents (B, C_z, H_z, W_z) to the nearest (VQ) or most likely (Gumbel) entries.

        With gradients enabled, VQ entries have taming's straight-through gradient, and the loss is

            mean ‖sg z − e‖² + β mean ‖z − sg e‖²,   β = `commitment`.

        In taming 0.0.1 β weights the first term, which contradicts its documentation. The result
        is the quantised latents, the loss (a scalar; 0 for Gumbel), and the indices (B·H_z·W_z,).
        """
        entries = self._entries()
        if self.config.flavour == "gumbel":
            indices = self.quantize.indices(z)
            return look_up(indices, entries), z.new_zeros(()), indices.flatten()
        if torch.is_grad_enabled():
            quantised, _, (_, _, indices) = self.quantize(z)
            chosen = look_up(indices.view(z.shape[0], *z.shape[2:]), entries)
            codebook = F.mse_loss(chosen, z.detach())
            loss = codebook + self.config.commitment * F.mse_loss(z, chosen.detach())
            return quantised, loss, indices.flatten()
        indices = nearest_indices(z, entries)
        quantised = look_up(indices, entries)
        loss = (1.0 + self.config.commitment) * F.mse_loss(quantised, z)
        return quantised, loss, indices.flatten()

    def codes(self, z: Tensor, entries: bool = False) -> Tensor:
        """Return the indices (B·H_z·W_z,) of the codebook entries that decoding uses.

        With `entries` the latents are codebook entries up to an error (see `nearest`).
        """
        return nearest_indices(z, self._entries()).flatten() if entries else self.quantise(z)[2]

    def nearest(self, z: Tensor) -> Tensor:
        """Round latents (B, C_z, H_z, W_z) that are entries up to an error to the nearest entries.

        For Gumbel this is not `quantise`, because an entry is no argument of the logits.
        """
        return look_up(nearest_indices(z, self._entries()), self._entries())

    def _entries(self) -> Tensor:
        """Return the codebook (n_embed, C_z)."""
        if self.quantize is None:
            raise ValueError("the flavour is kl; expected vq or gumbel, which have a codebook")
        kind = "embed" if self.config.flavour == "gumbel" else "embedding"
        return getattr(self.quantize, kind).weight

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (B, C_z, H_z, W_z), which a codebook quantises, to images (B, C, H, W).

        The images are clamped to `config.levels`, and sharpened by `config.sharpen`.

        Raises:
            ValueError: the latents have another shape.
        """
        check_latents(z, self.latent_shape)
        if self.quantize is not None:
            z = self.quantise(z)[0]
        return self.decode_entries(z)

    def decode_entries(self, z: Tensor) -> Tensor:
        """Decode latents z (B, C_z, H_z, W_z) like `decode`, without quantising them."""
        x = self.decode_quantised(z).clamp(*self.config.limits)
        return sharpen(x, self.config.sharpen).clamp(*self.config.limits)

    def decode_quantised(self, z: Tensor) -> Tensor:
        """Decode latents z (B, C_z, H_z, W_z) without quantising, clamping and sharpening."""
        return self._unfold(self.decoder(self.post_quant_conv(z)))

    def describe(self) -> dict[str, Any]:
        """Describe the architecture as JSON values (see `config_from_description`)."""
        return {"kind": "taming", **self.config.to_dict()}

    def _fold(self, x: Tensor) -> Tensor:
        """Centre images (B, C, H, W) on the canvas and fold patches into channels."""
        rows, columns = self._margins()
        if rows or columns:
            x = F.pad(x, (columns, columns, rows, rows), value=-1.0)
        return F.pixel_unshuffle(x, self.config.patch) if self.config.patch > 1 else x

    def _unfold(self, h: Tensor) -> Tensor:
        """Revert `_fold`."""
        x = F.pixel_shuffle(h, self.config.patch) if self.config.patch > 1 else h
        rows, columns = self._margins()
        return x[:, :, rows : x.shape[2] - rows, columns : x.shape[3] - columns]

    def _margins(self) -> tuple[int, int]:
        """Return the margins of the canvas above and left of the image."""
        _, height, width = self.image_shape
        rows, columns = self.config.canvas_shape
        return (rows - height) // 2, (columns - width) // 2
