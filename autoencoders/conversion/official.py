"""First stages of taming-transformers and latent-diffusion: `model.yaml` + checkpoint → ours.

Read are: VQGAN and Gumbel VQGAN (taming), VQ and KL first stages (latent diffusion), alone or
as `first_stage_model.*` within a whole model. The yaml is only read as data; which class it
names decides the flavour. `loss.*` (discriminator, perceptual network) and what an averaging
codebook keeps of its training are ignored; every other key must fit.

Latents, per flavour: KL, mean and log-variance; VQ, the output of `quant_conv` before it is
quantised; Gumbel, likewise, the argument of `quantize.proj` (`TamingAutoencoder.logits`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from autoencoders import weights
from autoencoders.architecture import TamingConfig
from autoencoders.conversion.checkpoint import Checkpoint
from autoencoders.taming import TamingAutoencoder

_NESTED = "first_stage_model."
_AVERAGES = "model_ema."
#: keys of a first stage that encoding and decoding need nothing of
_IGNORED = (
    "loss.", _AVERAGES, "quantize.embedding.cluster_size", "quantize.embedding.embed_avg",
    "quantize.used",
)  # fmt: skip
_USED = {
    "double_z", "z_channels", "resolution", "in_channels", "out_ch", "ch", "ch_mult",
    "num_res_blocks", "attn_resolutions", "dropout", "attn_type",
}  # fmt: skip
#: what changes the networks into ones that taming's package cannot build, at its usual value
_USUAL: dict[str, Any] = {
    "resamp_with_conv": True, "use_linear_attn": False, "give_pre_end": False, "tanh_out": False,
}  # fmt: skip
_MAX_YAML_BYTES = 1 << 20


def read_yaml(path: Path) -> dict[str, Any]:
    """The node of a first stage in a model's yaml, plain values: `target` and `params`.

    Args:
        path: of the first stage itself, or of a whole model with a `first_stage_config`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a yaml of such a model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no model description at {path}; check the path")
    try:
        if path.stat().st_size > _MAX_YAML_BYTES:
            raise ValueError("larger than any model's description")
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable yaml file ({error})") from error
    node = content.get("model", content) if isinstance(content, dict) else None
    while isinstance(node, dict) and isinstance(node.get("params"), dict):
        inner = node["params"].get("first_stage_config")
        if inner is None:
            break
        node = inner
    if not isinstance(node, dict) or not isinstance(node.get("params"), dict):
        raise ValueError(f"{path} has no model.params; give the model.yaml beside the checkpoint")
    if not isinstance(node["params"].get("ddconfig"), dict):
        raise ValueError(
            f"{path} describes no autoencoder (no ddconfig in model.params or its "
            "first_stage_config); give the yaml of the first stage"
        )
    return node


def config_of(
    node: Mapping[str, Any], image_shape: tuple[int, int, int] | None = None
) -> TamingConfig:
    """The architecture that a yaml's node describes.

    Args:
        node: what `read_yaml` gave.
        image_shape: (C, H, W) of the images; None takes the yaml's resolution. Attention stays
            where the yaml's resolution puts it.

    Raises:
        ValueError: a value is missing, of the wrong type, or asks for another network.
    """
    params, dd = node["params"], node["params"]["ddconfig"]
    _refuse_unusual(dd, params)
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
        raise ValueError(f"the yaml lacks {error.args[0]}; give the checkpoint's own") from error
    except TypeError as error:
        raise ValueError(f"the yaml has a value of the wrong type: {error}") from error


def load_official(
    checkpoint: Path,
    description: Path,
    image_shape: tuple[int, int, int] | None = None,
    averaged: bool = False,
) -> TamingAutoencoder:
    """Build the autoencoder of an official checkpoint, frozen, in float32.

    Args:
        checkpoint: .ckpt (no code of it is run) or .safetensors.
        description: its model.yaml.
        image_shape: (C, H, W) of the images; None takes the yaml's resolution.
        averaged: take the moving averages of `model_ema.*`; the official code encodes and
            decodes with the last weights, and so does this by default.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: the yaml, the checkpoint, or that they do not fit; missing, unexpected and
            misshapen keys are named.
    """
    config = config_of(read_yaml(description), image_shape)
    model = TamingAutoencoder(config)
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    with Checkpoint(checkpoint) as file:
        names = _first_stage(file.shapes, wanted, str(checkpoint), averaged)
        weights.require_fitting(
            wanted,
            {ours: file.shapes[theirs] for ours, theirs in names.items()},
            f"{checkpoint} (described by {description})",
        )
        tensors = {ours: _float(file.read(theirs), theirs) for ours, theirs in names.items()}
    model.load_state_dict(tensors)
    return model.freeze()


def _first_stage(
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    source: str,
    averaged: bool,
) -> dict[str, str]:
    """Our name → the checkpoint's, of every tensor of its first stage."""
    nested = any(name.startswith(_NESTED + "encoder.") for name in shapes)
    prefix = _NESTED if nested else ""
    own = [n.removeprefix(prefix) for n in shapes if n.startswith(prefix)]
    if not any(name.startswith("encoder.") for name in own):
        held = sorted({name.split(".")[0] for name in shapes})
        raise ValueError(
            f"{source} holds no autoencoder (no encoder.* among its tensors, only "
            f"{', '.join(held[:4])}…); give the checkpoint of the first stage"
        )
    if averaged:
        shadows = {name: _AVERAGES + name.replace(".", "") for name in wanted}
        if not any(shadow in own for shadow in shadows.values()):
            raise ValueError(f"{source} keeps no averaged weights; leave --averaged out")
        return {name: prefix + shadow for name, shadow in shadows.items() if shadow in own}
    return {name: prefix + name for name in own if not name.startswith(_IGNORED)}


def _flavour(target: str, dd: Mapping[str, Any], params: Mapping[str, Any]) -> str:
    name = target.rsplit(".", 1)[-1]
    flavour = "kl" if dd.get("double_z") else "gumbel" if "Gumbel" in name else "vq"
    if ("KL" in name) != (flavour == "kl"):
        raise ValueError(f"the yaml names {target}, but has double_z: {dd.get('double_z')}")
    if flavour == "gumbel" and params.get("remap") is not None:
        raise ValueError("the yaml remaps a Gumbel codebook, which is not supported")
    return flavour


def _refuse_unusual(dd: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    unusual = [k for k in dd if k not in _USED and (k not in _USUAL or dd[k] != _USUAL[k])]
    if unusual:
        raise ValueError(
            f"the yaml's ddconfig has {', '.join(f'{k}: {dd[k]}' for k in unusual)}, which "
            "taming's networks have not; such a checkpoint cannot be converted"
        )
    kind = dd.get("attn_type", "vanilla")
    if kind not in ("vanilla", "none"):
        raise ValueError(f"attn_type must be vanilla or none, not {kind!r}")
    if dd.get("out_ch") != dd.get("in_channels"):
        raise ValueError(
            f"the yaml's out_ch is {dd.get('out_ch')} and in_channels {dd.get('in_channels')}; "
            "an autoencoder gives back the channels that it takes"
        )


def _float(tensor: Tensor, name: str) -> Tensor:
    converted = tensor.float()
    if not bool(torch.isfinite(converted).all()):
        raise ValueError(
            f"{name} holds numbers that are not finite; the checkpoint is of a training that "
            "diverged or of a precision that overflowed, get another"
        )
    return converted
