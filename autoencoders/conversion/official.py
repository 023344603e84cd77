"""Conversion of first stages of taming-transformers and latent-diffusion.

The input is a `model.yaml` and a checkpoint: a VQGAN or Gumbel VQGAN (taming), or a VQ or KL first
stage (latent diffusion), alone or as `first_stage_model.*` of a whole model. The yaml is read as
data; the class that it names determines the flavour. `loss.*` and the training state of an
averaging codebook are ignored; all other tensors must fit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from autoencoders import weights
from autoencoders.architecture import TamingConfig
from autoencoders.taming import TamingAutoencoder
from pipeline.integrity.checkpoints import read_checkpoint
from pipeline.integrity.reason import reason_of

_NESTED = "first_stage_model."
_AVERAGES = "model_ema."
#: prefixes of tensors that encoding and decoding do not need
_IGNORED = (
    "loss.", _AVERAGES, "quantize.embedding.cluster_size", "quantize.embedding.embed_avg",
    "quantize.used",
)  # fmt: skip
_USED = {
    "double_z", "z_channels", "resolution", "in_channels", "out_ch", "ch", "ch_mult",
    "num_res_blocks", "attn_resolutions", "dropout", "attn_type",
}  # fmt: skip
#: settings that taming's networks support at these values only
_USUAL: dict[str, Any] = {
    "resamp_with_conv": True, "use_linear_attn": False, "give_pre_end": False, "tanh_out": False,
}  # fmt: skip
_MAX_YAML_BYTES = 1 << 20


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the description of a first stage, `target` and `params`, from a model's yaml.

    It is the yaml of the first stage, or of a whole model with a `first_stage_config`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not the yaml of such a model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no model description at {path}; check the path")
    try:
        if path.stat().st_size > _MAX_YAML_BYTES:
            raise ValueError(f"larger than {_MAX_YAML_BYTES >> 20} MiB")
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable yaml file ({reason_of(error)})") from error
    node = content.get("model", content) if isinstance(content, dict) else None
    while isinstance(node, dict) and isinstance(node.get("params"), dict):
        inner = node["params"].get("first_stage_config")
        if inner is None:
            break
        node = inner
    if not isinstance(node, dict) or not isinstance(node.get("params"), dict):
        raise ValueError(f"{path} has no model.params; expected the model.yaml of the checkpoint")
    if not isinstance(node["params"].get("ddconfig"), dict):
        raise ValueError(
            f"{path} has no ddconfig in model.params or its first_stage_config; expected the yaml "
            "of a first stage"
        )
    return node


def architecture_of(
    node: Mapping[str, Any], image_shape: tuple[int, int, int] | None = None
) -> TamingConfig:
    """Build the architecture that a yaml describes, from `read_yaml`.

    Without an image shape (C, H, W) the images have the yaml's resolution. Attention stays at the
    depth that this resolution determines.

    Raises:
        ValueError: a value is missing, of the wrong type, or requires another network.
    """
    params, dd = node["params"], node["params"]["ddconfig"]
    _require_taming_networks(dd)
    try:
        channels, side = int(dd["in_channels"]), int(dd["resolution"])
        flavour = _flavour(str(node.get("target", "")), dd, params)
        return TamingConfig(
            flavour=flavour,
            image_shape=image_shape or (channels, side, side),
            ch=int(dd["ch"]),
            ch_mult=tuple(int(m) for m in dd["ch_mult"]),
            num_res_blocks=int(dd["num_res_blocks"]),
            attn_resolutions=tuple(int(r) for r in dd["attn_resolutions"]),
            z_channels=int(dd["z_channels"]),
            embed_dim=int(params["embed_dim"]),
            n_embed=int(params["n_embed"]) if flavour != "kl" else TamingConfig.n_embed,
            dropout=float(dd.get("dropout", 0.0)),
            resolution=side,
            attention=dd.get("attn_type", "vanilla") != "none",
        )
    except KeyError as error:
        raise ValueError(
            f"the yaml lacks {error.args[0]}; expected the yaml of the checkpoint"
        ) from error
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the yaml has a value of the wrong type or size: {error}") from error


def load_official(
    checkpoint: Path,
    description: Path,
    image_shape: tuple[int, int, int] | None = None,
    averaged: bool = False,
) -> TamingAutoencoder:
    """Build the autoencoder of an official checkpoint and its model.yaml, frozen, in float32.

    `image_shape` is as in `architecture_of`. `averaged` reads the moving averages `model_ema.*`;
    the official code uses the last weights.

    Raises:
        FileNotFoundError: one of the files does not exist.
        ValueError: the yaml or the checkpoint is invalid, or they do not fit; the message names
            tensors that are missing, unexpected, or of another shape.
    """
    model = TamingAutoencoder(architecture_of(read_yaml(description), image_shape))
    stored = read_checkpoint(checkpoint)
    keys = _keys_of_first_stage(stored, model.state_dict(), str(checkpoint), averaged)
    tensors = {name: stored[key] for name, key in keys.items()}
    weights.require_fitting(model, tensors, f"{checkpoint} (described by {description})")
    model.load_state_dict({name: _finite_float(tensors[name], keys[name]) for name in keys})
    return model.freeze()


def _keys_of_first_stage(
    checkpoint: Collection[str], model: Collection[str], source: str, averaged: bool
) -> dict[str, str]:
    """Map the names of the tensors in our model to those in a checkpoint (from `source`)."""
    nested = any(key.startswith(_NESTED + "encoder.") for key in checkpoint)
    prefix = _NESTED if nested else ""
    names = [key.removeprefix(prefix) for key in checkpoint if key.startswith(prefix)]
    if not any(name.startswith("encoder.") for name in names):
        parts = sorted({key.split(".")[0] for key in checkpoint})
        raise ValueError(
            f"{source} holds tensors of {', '.join(parts[:4])}…; expected encoder.*; use the "
            "checkpoint of the first stage"
        )
    if averaged:
        averages = {name: _AVERAGES + name.replace(".", "") for name in model}
        if not any(average in names for average in averages.values()):
            raise ValueError(f"{source} holds no averaged weights; omit --averaged")
        return {name: prefix + average for name, average in averages.items() if average in names}
    return {name: prefix + name for name in names if not name.startswith(_IGNORED)}


def _flavour(target: str, dd: Mapping[str, Any], params: Mapping[str, Any]) -> str:
    """Return the flavour of a first stage, from its class and settings."""
    name = target.rsplit(".", 1)[-1]
    flavour = "kl" if dd.get("double_z") else "gumbel" if "Gumbel" in name else "vq"
    if ("KL" in name) != (flavour == "kl"):
        raise ValueError(
            f"the yaml's target is {target} and double_z {dd.get('double_z')}; expected double_z: "
            "True for KL, and False for the others"
        )
    if flavour == "gumbel" and params.get("remap") is not None:
        raise ValueError(f"remap is {params['remap']}; expected none for a Gumbel codebook")
    return flavour


def _require_taming_networks(dd: Mapping[str, Any]) -> None:
    """Check that taming's package can build the networks of a ddconfig."""
    unusual = [k for k in dd if k not in _USED and (k not in _USUAL or dd[k] != _USUAL[k])]
    if unusual:
        raise ValueError(
            f"the yaml's ddconfig has {', '.join(f'{k}: {dd[k]}' for k in unusual)}; expected "
            f"settings of taming's networks ({', '.join(sorted(_USED))}); such a checkpoint "
            "cannot be converted"
        )
    kind = dd.get("attn_type", "vanilla")
    if kind not in ("vanilla", "none"):
        raise ValueError(f"attn_type is {kind!r}; expected vanilla or none")
    if dd.get("out_ch") != dd.get("in_channels"):
        raise ValueError(
            f"the yaml's out_ch is {dd.get('out_ch')} and in_channels {dd.get('in_channels')}; "
            "expected equal values"
        )


def _finite_float(tensor: Tensor, key: str) -> Tensor:
    """Convert a tensor to float32 and check that it is finite."""
    converted = tensor.float()
    if not bool(torch.isfinite(converted).all()):
        raise ValueError(
            f"{key} contains NaN or infinity; expected finite weights; the training diverged or "
            "its precision overflowed, use another checkpoint"
        )
    return converted
