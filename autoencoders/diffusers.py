"""Autoencoders of the diffusers library: AutoencoderKL, VQModel and AutoencoderTiny.

The only file that imports diffusers, and only when such an autoencoder is loaded: it is an
optional extra (`pip install 'jkoflow[diffusers]'`). Weights are read from safetensors alone.

Latents are those that diffusers' pipelines work with, z = (raw - shift) * scale, and decoding
undoes it. Scale and shift are `scaling_factor` and `shift_factor` of config.json, but for VQModel:
that class writes 0.18215, the value of Stable Diffusion's KL autoencoder, into every config.json,
also of models whose latents were never scaled (all of latent diffusion's), so that the file cannot
tell. A VQModel's latents are therefore left as its codebook has them, unless the caller gives a
scale. What was applied stands in `describe()`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoders.base import Moments, check_images, check_latents, module_fingerprint
from autoencoders.codebook import look_up, nearest_indices

CLASSES = ("AutoencoderKL", "VQModel", "AutoencoderTiny")
_PARTS = ("vae", "vqvae")
_COMMITMENT = 0.25
#: seconds that the hub has to answer; what lies in its cache is used when it does not
_HUB_SECONDS = 5.0


class DiffusersAutoencoder(nn.Module):
    """One of `CLASSES` behind the protocol of `autoencoders.base`, frozen, in float32.

    Args:
        model: an instance of one of `CLASSES`.
        size: (H, W) of the images; the networks are convolutional.
        scale: multiplies the latents; None takes the model's own (1 for VQModel, see above).
        shift: is subtracted from the latents before; None takes the model's own.

    Raises:
        ValueError: sides that cannot be halved as often as the model does.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - diffusers is imported late
        size: tuple[int, int],
        scale: float | None = None,
        shift: float | None = None,
    ) -> None:
        super().__init__()
        config = dict(model.config)
        self.model = model.float().eval().requires_grad_(False)
        self.kind = type(model).__name__
        self.stochastic = self.kind == "AutoencoderKL"
        vq = self.kind == "VQModel"
        if vq and config.get("lookup_from_codebook"):
            raise ValueError(
                "a VQModel that decodes indices (lookup_from_codebook) has no latents"
            )
        self.codebook_size: int = config["num_vq_embeddings"] if vq else 0
        own_scale = 1.0 if vq else config.get("scaling_factor")
        own_shift = 0.0 if vq else config.get("shift_factor")
        self.scale = float((1.0 if own_scale is None else own_scale) if scale is None else scale)
        self.shift = float((own_shift or 0.0) if shift is None else shift)
        if not self.scale > 0.0 or not math.isfinite(self.scale + self.shift):
            raise ValueError(f"scale must be positive and finite, not {self.scale}")
        stages = "num_encoder_blocks" if self.kind == "AutoencoderTiny" else "block_out_channels"
        factor = 2 ** (len(config[stages]) - 1)
        if size[0] % factor or size[1] % factor:
            raise ValueError(
                f"this autoencoder takes images whose sides are multiples of {factor}, not "
                f"{size[0]}x{size[1]}; have them resized (autoencoder.fit=resize, and "
                "autoencoder.size)"
            )
        channels = (config.get("vq_embed_dim") if vq else None) or config["latent_channels"]
        self.image_shape = (int(config["in_channels"]), *size)
        self.latent_shape = (int(channels), size[0] // factor, size[1] // factor)
        self.fingerprint = module_fingerprint(self.describe(), self)

    def reshaped(self, image_shape: tuple[int, int, int]) -> DiffusersAutoencoder:
        """The same weights for images of another size."""
        if image_shape[0] != self.image_shape[0]:
            raise ValueError(
                f"these weights take {self.image_shape[0]} channels, not {image_shape[0]}"
            )
        return DiffusersAutoencoder(self.model, image_shape[1:], self.scale, self.shift)

    def encode(self, x: Tensor) -> Moments:
        """Images (B, C, H, W) in [-1, 1] to scaled moments; VQ: to pre-quantised latents."""
        check_images(x, self.image_shape)
        encoded = self.model.encode(x)
        if not self.stochastic:
            return Moments(self._scaled(encoded.latents))
        posterior = encoded.latent_dist
        # the log-variance of (raw - shift) * scale
        return Moments(self._scaled(posterior.mean), posterior.logvar + 2.0 * math.log(self.scale))

    def decode(self, z: Tensor) -> Tensor:
        """Latents to images, clamped to [-1, 1]; quantises first where there is a codebook."""
        check_latents(z, self.latent_shape)
        if self.codebook_size:
            z = self.nearest(z)
        return self.decode_entries(z)

    def decode_entries(self, z: Tensor) -> Tensor:
        """Latents that are already quantised (or need not be) to images, clamped to [-1, 1]."""
        return self.decode_quantised(z).clamp(-1.0, 1.0)

    def quantise(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nearest entries (scaled as the latents are), codebook loss, and indices (VQModel)."""
        raw = z / self.scale + self.shift
        entries = self._entries()
        indices = nearest_indices(raw, entries)
        found = look_up(indices, entries)
        loss = (1.0 + _COMMITMENT) * F.mse_loss(found, raw)
        return self._scaled(found), loss, indices.flatten()

    def codes(self, z: Tensor, entries: bool = False) -> Tensor:
        """Numbers (B·H_z·W_z,) of the entries nearest to latents, entries themselves or not."""
        return self.quantise(z)[2]

    def nearest(self, z: Tensor) -> Tensor:
        """The codebook entries nearest to latents (VQModel)."""
        return self.quantise(z)[0]

    def decode_quantised(self, z: Tensor) -> Tensor:
        """Latents that are already quantised (or need not be) to images, not clamped."""
        raw = z / self.scale + self.shift
        if self.codebook_size:
            return self.model.decode(raw, force_not_quantize=True).sample
        return self.model.decode(raw).sample

    def describe(self) -> dict[str, Any]:
        """Class, config.json, image shape, and the scale and shift that were applied."""
        config = {k: v for k, v in dict(self.model.config).items() if not k.startswith("_")}
        return {
            "kind": "diffusers",
            "class": self.kind,
            "image_shape": list(self.image_shape),
            "scale": self.scale,
            "shift": self.shift,
            "config": json.loads(json.dumps(config, sort_keys=True, default=str)),
        }

    def _scaled(self, raw: Tensor) -> Tensor:
        return (raw - self.shift) * self.scale

    def _entries(self) -> Tensor:
        if not self.codebook_size:
            raise ValueError(f"a {self.kind} has no codebook to quantise with")
        return self.model.quantize.embedding.weight


def load_diffusers(
    source: str,
    size: tuple[int, int] | None,
    scale: float | None = None,
    shift: float | None = None,
) -> DiffusersAutoencoder:
    """An autoencoder from a folder, or from the hub.

    Args:
        source: a folder with config.json (or a pipeline's, with `vae` in it), or a hub id, as
            OWNER/NAME or OWNER/NAME/SUBFOLDER.
        size: (H, W) of the images; None takes `sample_size` of config.json.
        scale: see `DiffusersAutoencoder`.
        shift: likewise.

    Raises:
        ValueError: diffusers is not installed; neither a folder nor a hub id that can be
            reached; another class; no safetensors; no size, and none in config.json.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(
            "this autoencoder needs the diffusers library, which is not installed; "
            "run: pip install 'jkoflow[diffusers]'"
        ) from error
    where, subfolder = _locate(source)
    options: dict[str, Any] = {"subfolder": subfolder} if subfolder else {}
    unreachable = None if Path(where).is_dir() else _unreachable(where, subfolder)
    if unreachable is not None:
        options["local_files_only"] = True
    try:
        config = diffusers.AutoencoderKL.load_config(where, **options)
        name = config.get("_class_name")
        if name not in CLASSES:
            raise ValueError(f"it is a {name}, but only {', '.join(CLASSES)} can be used")
        model = getattr(diffusers, name).from_pretrained(
            where, use_safetensors=True, torch_dtype=torch.float32, **options
        )
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001 - the hub's client raises errors of many libraries
        cause = error if unreachable is None or isinstance(error, ValueError) else unreachable
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        where_from = "folder" if Path(where).is_dir() else "hub id (is there a network?)"
        raise ValueError(
            f"the diffusers autoencoder {source!r} could not be loaded from its {where_from}: "
            f"{reason}"
        ) from error
    return DiffusersAutoencoder(model, size or _own_size(config, source), scale, shift)


def _own_size(config: dict[str, Any], source: str) -> tuple[int, int]:
    """(H, W) of the images that a model was trained on, as far as it says."""
    size = config.get("sample_size")
    if not size:
        raise ValueError(
            f"the config.json of {source!r} names no sample_size; say what to resize images to "
            "(autoencoder.size)"
        )
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height), int(width)


def _unreachable(name: str, subfolder: str | None) -> Exception | None:
    """Why a model's config.json cannot be had from the hub; None if it can.

    Asked once and before anything else, because the hub's own downloads try again and again,
    for the better part of a minute, also where there is no network.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        url = hf_hub_url(name, "config.json", subfolder=subfolder)
        get_hf_file_metadata(url, timeout=_HUB_SECONDS)
    except Exception as error:  # noqa: BLE001 - the hub's client raises errors of many libraries
        return error
    return None


def _locate(source: str) -> tuple[str, str | None]:
    """(folder or OWNER/NAME, subfolder)."""
    folder = Path(source)
    if folder.is_dir():
        for part in _PARTS:
            if (
                not (folder / "config.json").is_file()
                and (folder / part / "config.json").is_file()
            ):
                return source, part
        return source, None
    parts = source.split("/")
    if len(parts) < 2 or source.startswith((".", "/", "~")):
        raise ValueError(
            f"{source!r} is neither a folder nor a hub id (OWNER/NAME); check the path"
        )
    return "/".join(parts[:2]), "/".join(parts[2:]) or None
