"""Conversion of diffusers' AutoencoderKL, such as Stable Diffusion's, without diffusers.

A folder holds config.json and diffusion_pytorch_model.safetensors, alone or as `vae` of a
pipeline. Its networks are those of latent-diffusion under other names. The latents are the
model's own: `scaling_factor` is ignored, because a flow standardises its latents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoders import weights
from autoencoders.architecture import TamingConfig
from autoencoders.taming import TamingAutoencoder
from pipeline.integrity.checkpoints import read_checkpoint
from pipeline.integrity.reason import reason_of

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_PART = "vae"
_MAX_JSON_BYTES = 1 << 20
#: settings of AutoencoderKL that taming's networks have at these values only, with their defaults
_USUAL: dict[str, Any] = {"act_fn": "silu", "norm_num_groups": 32}
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "latent_channels": 4,
    "sample_size": 32, "mid_block_add_attention": True, "block_out_channels": [64],
    "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"],
}  # fmt: skip
_PLAIN, _ATTENDS = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
_NAMES = (
    (r"\.mid_block\.resnets\.(\d+)\.", lambda m: f".mid.block_{int(m[1]) + 1}."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", r".\1.\2.block.\3."),
    (r"\.(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.", r".\1.\2.attn.\3."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"coder\.conv_norm_out\.", "coder.norm_out."),
    (r"(\.attn(?:_1|\.\d+)\.)group_norm\.", r"\1norm."),
    # the second names are those of files before 2023
    (r"(\.attn(?:_1|\.\d+)\.)(?:to_q|query)\.", r"\1q."),
    (r"(\.attn(?:_1|\.\d+)\.)(?:to_k|key)\.", r"\1k."),
    (r"(\.attn(?:_1|\.\d+)\.)(?:to_v|value)\.", r"\1v."),
    (r"(\.attn(?:_1|\.\d+)\.)(?:to_out\.0|proj_attn)\.", r"\1proj_out."),
)


def find_folder(folder: Path) -> Path:
    """Return the folder of an autoencoder: itself, or `vae` of a pipeline.

    Raises:
        ValueError: it lacks config.json or the weights.
    """
    place = folder if (folder / CONFIG).is_file() else folder / _PART
    missing = [name for name in (CONFIG, WEIGHTS) if not (place / name).is_file()]
    if missing:
        raise ValueError(
            f"the folder {folder} lacks {' and '.join(missing)}; expected a folder of diffusers' "
            "AutoencoderKL, or of a pipeline with it; download these files"
        )
    return place


def architecture_of(
    config: Mapping[str, Any], image_shape: tuple[int, int, int] | None = None
) -> TamingConfig:
    """Build the architecture that a config.json describes.

    Without an image shape (C, H, W) the images have the side `sample_size`. Attention stays at the
    depth that the block types determine.

    Raises:
        ValueError: a value is missing, of the wrong type, or requires another network.
    """
    if config.get("_class_name") != "AutoencoderKL":
        raise ValueError(
            f"the class in config.json is {config.get('_class_name')}; expected AutoencoderKL; "
            "use other autoencoders of diffusers by autoencoder.name=diffusers"
        )
    own = {name: config.get(name, value) for name, value in (_DEFAULTS | _USUAL).items()}
    unusual = [f"{k}: {own[k]}" for k, value in _USUAL.items() if own[k] != value]
    try:
        widths = [int(width) for width in own["block_out_channels"]]
        down, up = list(own["down_block_types"]), list(own["up_block_types"])
        side, channels = int(own["sample_size"]), int(own["in_channels"])
        mirrored = [str(kind).replace("UpDecoder", "DownEncoder") for kind in reversed(up)]
        if len(down) != len(widths) or mirrored != down or {*down} - {_PLAIN, _ATTENDS}:
            unusual.append(f"down_block_types: {down} and up_block_types: {up}")
        if any(width % widths[0] for width in widths):
            unusual.append(f"block_out_channels: {widths}")
        if own["out_channels"] != channels:
            unusual.append(f"out_channels: {own['out_channels']}")
        if unusual:
            raise ValueError(
                f"config.json has {', '.join(unusual)}; expected settings of taming's networks; "
                "such a model cannot be converted; use it by autoencoder.name=diffusers"
            )
        return TamingConfig(
            flavour="kl",
            image_shape=image_shape or (channels, side, side),
            ch=widths[0],
            ch_mult=tuple(width // widths[0] for width in widths),
            num_res_blocks=int(own["layers_per_block"]),
            attn_resolutions=tuple(
                side >> level for level, kind in enumerate(down) if kind == _ATTENDS
            ),
            z_channels=int(own["latent_channels"]),
            embed_dim=int(own["latent_channels"]),
            resolution=side,
            attention=bool(own["mid_block_add_attention"]),
        )
    except (TypeError, ZeroDivisionError, IndexError) as error:
        raise ValueError(
            f"config.json has a value of the wrong type or size: {error}; download it again"
        ) from error


def load_folder(
    folder: Path, image_shape: tuple[int, int, int] | None = None
) -> TamingAutoencoder:
    """Build the autoencoder of a folder, frozen, in float32; see `architecture_of`.

    Raises:
        ValueError: the folder is no AutoencoderKL, or its weights are not finite or do not fit.
    """
    place = find_folder(folder)
    path = place / CONFIG
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"larger than {_MAX_JSON_BYTES >> 20} MiB")
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable JSON file ({reason_of(error)})") from error
    model = TamingAutoencoder(architecture_of(config, image_shape))
    stored = read_checkpoint(place / WEIGHTS)
    tensors = rename(stored, len(model.config.ch_mult))
    channels = model.config.z_channels
    if not config.get("use_quant_conv", True):
        tensors |= _identity("quant_conv", 2 * channels)
    if not config.get("use_post_quant_conv", True):
        tensors |= _identity("post_quant_conv", channels)
    weights.require_fitting(model, tensors, str(place / WEIGHTS))
    infinite = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if infinite:
        raise ValueError(
            f"{infinite[0]} in {place / WEIGHTS} is NaN or infinite; expected finite weights; "
            "download the file again"
        )
    model.load_state_dict(tensors)
    return model.freeze()


def rename(tensors: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Give the tensors (…) of an AutoencoderKL with some levels latent-diffusion's names.

    Linear layers of attention become 1×1 convolutions, (O, I) → (O, I, 1, 1).
    """
    renamed = {}
    for key, tensor in tensors.items():
        name = key
        for pattern, new in _NAMES:
            name = re.sub(pattern, new, name)
        # latent-diffusion counts the decoder's levels from the output
        name = re.sub(r"\.up\.(\d+)\.", lambda m: f".up.{levels - 1 - int(m[1])}.", name)
        matrix = tensor.ndim == 2 and ".attn" in name
        renamed[name] = (tensor[:, :, None, None] if matrix else tensor).float()
    return renamed


def _identity(name: str, channels: int) -> dict[str, Tensor]:
    """Return the weights of a 1×1 convolution that changes nothing."""
    weight = torch.eye(channels)[:, :, None, None]
    return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(channels)}
