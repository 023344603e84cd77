"""Autoencoders of the diffusers library: AutoencoderKL, VQModel and AutoencoderTiny.

diffusers is an optional dependency (`pip install 'jkoflow[diffusers]'`), imported when such an
autoencoder is loaded. Weights are read from safetensors only.

Latents are those of diffusers' pipelines, z = (raw - shift) * scale; decoding reverts this. Scale
and shift are those of config.json. VQModel writes the value of Stable Diffusion's KL autoencoder,
0.18215, into every config.json, but its latents were never scaled, so its own scale is 1.
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
from pipeline.integrity.limits import require_size

CLASSES = ("AutoencoderKL", "VQModel", "AutoencoderTiny")
_PARTS = ("vae", "vqvae")
_COMMITMENT = 0.25
#: of the numbers in a config.json, and of its lists and layers
_LARGEST, _MOST = 1 << 20, 64
_FLOAT = 4
#: timeout of the hub in seconds; after it, only the local cache is used
_HUB_SECONDS = 5.0


class DiffusersAutoencoder(nn.Module):
    """Autoencoder of the diffusers library behind our protocol, frozen, in float32.

    The model is an instance of one of `CLASSES`, for images of `size` (H, W).

    Raises:
        ValueError: the sides cannot be halved as often as the model requires, the scale is not
            positive, or the model decodes indices.
    """

    def __init__(self, model: Any, size: tuple[int, int]) -> None:  # noqa: ANN401
        super().__init__()
        config = dict(model.config)
        self.model = model.float().eval().requires_grad_(False)
        self.kind = type(model).__name__
        self.stochastic = self.kind == "AutoencoderKL"
        vq = self.kind == "VQModel"
        if vq and config.get("lookup_from_codebook"):
            raise ValueError(
                "lookup_from_codebook is true; expected a VQModel that decodes latents"
            )
        self.codebook_size: int = config["num_vq_embeddings"] if vq else 0
        own = {} if vq else config
        scale, shift = own.get("scaling_factor"), own.get("shift_factor")
        self.scale, self.shift = float(1.0 if scale is None else scale), float(shift or 0.0)
        if not self.scale > 0.0 or not math.isfinite(self.scale + self.shift):
            raise ValueError(
                f"scale is {self.scale} and shift {self.shift}; expected finite numbers, scale > 0"
            )
        stages = "num_encoder_blocks" if self.kind == "AutoencoderTiny" else "block_out_channels"
        factor = 2 ** (len(config[stages]) - 1)
        if size[0] % factor or size[1] % factor:
            raise ValueError(
                f"the images are {size[0]}x{size[1]}; expected sides that are multiples of "
                f"{factor}; resize them by autoencoder.fit=resize and autoencoder.size"
            )
        channels = (config.get("vq_embed_dim") if vq else None) or config["latent_channels"]
        self.image_shape = (int(config["in_channels"]), *size)
        self.latent_shape = (int(channels), size[0] // factor, size[1] // factor)
        self.fingerprint = module_fingerprint(self.describe(), self)

    def reshaped(self, image_shape: tuple[int, int, int]) -> DiffusersAutoencoder:
        """Return an autoencoder with the same weights for images (C, H, W) of another size."""
        return DiffusersAutoencoder(self.model, image_shape[1:])

    def encode(self, x: Tensor) -> Moments:
        """Encode images (B, C, H, W) in [-1, 1] to scaled moments; VQ: to unquantised latents."""
        check_images(x, self.image_shape)
        encoded = self.model.encode(x)
        if not self.stochastic:
            return Moments(self._scaled(encoded.latents))
        posterior = encoded.latent_dist
        # (raw - shift) * scale adds 2 log(scale) to the log-variance
        return Moments(self._scaled(posterior.mean), posterior.logvar + 2.0 * math.log(self.scale))

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents to images (B, C, H, W) in [-1, 1]; a codebook quantises them first."""
        check_latents(z, self.latent_shape)
        return self.decode_entries(self.nearest(z) if self.codebook_size else z)

    def decode_entries(self, z: Tensor) -> Tensor:
        """Decode latents (B, C_z, H_z, W_z) to images in [-1, 1], without quantising them."""
        return self.decode_quantised(z).clamp(-1.0, 1.0)

    def quantise(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise latents (B, C_z, H_z, W_z) to the nearest entries (VQModel).

        The codebook loss, a scalar, and the indices (B·H_z·W_z,) follow.
        """
        entries = self._entries()
        indices = nearest_indices(z, entries)
        chosen = look_up(indices, entries)
        return chosen, (1.0 + _COMMITMENT) * F.mse_loss(chosen, z), indices.flatten()

    def codes(self, z: Tensor, entries: bool = False) -> Tensor:
        """Return the indices (B·H_z·W_z,) of the entries nearest to latents."""
        return self.quantise(z)[2]

    def nearest(self, z: Tensor) -> Tensor:
        """Return the codebook entries (B, C_z, H_z, W_z) nearest to latents (VQModel)."""
        return self.quantise(z)[0]

    def decode_quantised(self, z: Tensor) -> Tensor:
        """Decode latents (B, C_z, H_z, W_z) without quantising and clamping."""
        raw = z / self.scale + self.shift
        if self.codebook_size:
            return self.model.decode(raw, force_not_quantize=True).sample
        return self.model.decode(raw).sample

    def describe(self) -> dict[str, Any]:
        """Describe class, config.json, image shape, scale and shift."""
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
        """Shift and scale the model's latents."""
        return (raw - self.shift) * self.scale

    def _entries(self) -> Tensor:
        """Return the codebook (num_vq_embeddings, C_z)."""
        if not self.codebook_size:
            raise ValueError(f"the autoencoder is a {self.kind}; expected a VQModel to quantise")
        return self.model.quantize.embedding.weight


def load_diffusers(source: str, size: tuple[int, int] | None) -> DiffusersAutoencoder:
    """Load an autoencoder from a folder or from the hub, for images of `size` (H, W).

    The source is a folder with config.json (or a pipeline's folder with `vae`), or a hub id
    OWNER/NAME or OWNER/NAME/SUBFOLDER. Without a size, `sample_size` of config.json is taken.

    Raises:
        ValueError: diffusers is not installed; the source is neither a folder nor a reachable hub
            id; it is of another class or has no safetensors; or there is no size.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(
            "the diffusers library is not installed; expected it for this autoencoder; "
            "run: pip install 'jkoflow[diffusers]'"
        ) from error
    place, subfolder = _split(source)
    options: dict[str, Any] = {"subfolder": subfolder} if subfolder else {}
    hub_error = None if Path(place).is_dir() else _hub_error(place, subfolder)
    if hub_error is not None:
        options["local_files_only"] = True
    try:
        config = diffusers.AutoencoderKL.load_config(place, **options)
        name = config.get("_class_name")
        if name not in CLASSES:
            raise ValueError(f"its class is {name}; expected one of {', '.join(CLASSES)}")
        _require_small(getattr(diffusers, name), config)
        model, loaded = getattr(diffusers, name).from_pretrained(
            place, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True,
            **options,
        )  # fmt: skip
        missing = [*loaded["missing_keys"], *loaded["mismatched_keys"]]
        if missing:  # diffusers leaves them at random values
            raise ValueError(
                f"its file lacks {len(missing)} of the weights, such as {missing[0]}; expected "
                "all of config.json; download it again"
            )
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001 - the hub's client raises errors of many libraries
        cause = error if hub_error is None or isinstance(error, ValueError) else hub_error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        kind = "folder" if Path(place).is_dir() else "hub id (is there a network?)"
        raise ValueError(
            f"the diffusers autoencoder {source!r} could not be loaded from its {kind}: {reason}"
        ) from error
    return DiffusersAutoencoder(model, size or _own_size(config, source))


def _require_small(kind: Any, config: dict[str, Any]) -> None:  # noqa: ANN401 - of diffusers
    """Check the size of the network that a config.json describes, before it is built.

    Raises:
        ValueError: it has a huge number or list, or its weights exceed the limit.
    """
    for key, value in config.items():
        parts = value if isinstance(value, list) else [value]
        numbers = [abs(part) for part in parts if isinstance(part, int)]
        most = _MOST if "layers" in key or key.endswith("coder_blocks") else _LARGEST
        if len(parts) > _MOST or max(numbers, default=0) > most:
            raise ValueError(
                f"{key} is {str(value)[:99]}; expected at most {_MOST} numbers up to {most}"
            )
    with torch.device("meta"):
        weights = sum(p.numel() for p in kind.from_config(config).parameters())
    require_size(weights * _FLOAT, "the network in config.json")


def _own_size(config: dict[str, Any], source: str) -> tuple[int, int]:
    """Return (H, W) of the images that a model was trained on, from its config.json."""
    size = config.get("sample_size")
    if not size:
        raise ValueError(
            f"the config.json of {source!r} has no sample_size; expected one, or a size; set "
            "autoencoder.size"
        )
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height), int(width)


def _hub_error(name: str, subfolder: str | None) -> Exception | None:
    """Request a model's config.json from the hub once; return the error, or None.

    The hub's own downloads retry for most of a minute, even without a network.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        url = hf_hub_url(name, "config.json", subfolder=subfolder)
        get_hf_file_metadata(url, timeout=_HUB_SECONDS)
    except Exception as error:  # noqa: BLE001 - the hub's client raises errors of many libraries
        return error
    return None


def _split(source: str) -> tuple[str, str | None]:
    """Split a source into a folder or OWNER/NAME, and a subfolder."""
    folder = Path(source)
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return source, None
        parts = (part for part in _PARTS if (folder / part / "config.json").is_file())
        return source, next(parts, None)
    owner, _, rest = source.partition("/")
    name, _, subfolder = rest.partition("/")
    if not rest or source.startswith((".", "/", "~")):
        raise ValueError(
            f"the source {source!r} is neither a folder nor a hub id (OWNER/NAME); check the path"
        )
    return f"{owner}/{name}", subfolder or None
