"""Autoencoder weights as safetensors files, with the architecture in the metadata."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from autoencoders.architecture import TamingConfig, config_from_description
from autoencoders.taming import TamingAutoencoder
from pipeline.integrity import hub
from pipeline.integrity.digests import BLANK, check_file
from pipeline.integrity.reason import reason_of

HUB_FILE = "autoencoder.safetensors"
"""Name of the weights in a repository of the hub."""

#: key of the metadata entry that holds the architecture and the recipe
DESCRIPTION = "jkoflow.autoencoder"


def shipped_weights() -> dict[str, Path]:
    """Return the paths of the shipped weights by name."""
    folder = Path(__file__).parent / "pretrained"
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def locate_weights(name_or_path: str) -> Path:
    """Return the path of weights, from a shipped name, a path or hf://owner/name.

    A repository of the hub has them as `autoencoder.safetensors`.

    Raises:
        ValueError: it is neither a shipped name nor a file, or the hub has no such file.
    """
    known = shipped_weights()
    if name_or_path in known:
        return known[name_or_path]
    if hub.is_hub(name_or_path):
        path = hub.download(name_or_path, [HUB_FILE]) / HUB_FILE
        if not path.is_file():
            raise ValueError(
                f"{name_or_path} has no {HUB_FILE}; expected a run or an autoencoder of "
                "`jkoflow push`"
            )
        return path
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    names = ", ".join(known) or "none"
    raise ValueError(
        f"the autoencoder weights are {name_or_path!r}; expected one of {names}, or the path of a "
        ".safetensors file of `jkoflow autoencoder train` or `convert`"
    )


def to_tensors(
    model: TamingAutoencoder,
    dtype: torch.dtype = torch.float16,
    recipe: dict[str, Any] | None = None,
    exact: Collection[str] = (),
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Convert a model to the tensors (…) and metadata of a safetensors file.

    Half precision halves the file. All results refer to the stored weights, because the
    fingerprint of a loaded model is that of the rounded weights. A tensor that would overflow
    keeps its dtype, and so do those named in `exact` that rounding would change. `recipe` has JSON
    values about data and training.
    """
    state = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    tensors = {k: _stored(v, dtype, k in exact) for k, v in state.items()}
    notes = {"architecture": model.describe(), "recipe": recipe or {}, "seal": BLANK}
    return tensors, {DESCRIPTION: json.dumps(notes)}


def load_weights(path: Path) -> TamingAutoencoder:
    """Build the autoencoder that a file describes, with its weights, frozen.

    Raises:
        ValueError: the file differs from its digest, holds no autoencoder, or has tensors that do
            not fit.
    """
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({reason_of(error)}); download or write "
            "it again"
        ) from error
    if DESCRIPTION not in metadata:
        raise ValueError(
            f"{path} holds no jkoflow autoencoder; expected a file of `jkoflow autoencoder train` "
            "or `convert`"
        )
    check_file(path)
    try:
        description: dict[str, Any] = dict(json.loads(metadata[DESCRIPTION])["architecture"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the description in {path} is damaged; download or write the file again"
        ) from error
    try:
        config = config_from_description(description)
    except ValueError as error:
        raise ValueError(f"the architecture in {path} cannot be built: {error}") from error
    _require_size(config, tensors, str(path))
    model = TamingAutoencoder(config)
    require_fitting(model, tensors, str(path))
    model.load_state_dict(tensors)  # as float32
    return model.freeze()


def _require_size(config: TamingConfig, tensors: Mapping[str, Tensor], source: str) -> None:
    """Check that an architecture is no larger than its tensors (…), before it is built.

    Its widest level has a convolution of width² · 9 weights.

    Raises:
        ValueError: it is larger.
    """
    width = config.ch * max(config.ch_mult)
    sizes = [
        9 * width**2, config.image_shape[0] * config.patch**2 * config.ch,
        config.z_channels * config.embed_dim, config.z_channels * width,
    ]  # fmt: skip
    if config.flavour != "kl":
        sizes.append(config.n_embed * config.embed_dim)
    largest = max((tensor.numel() for tensor in tensors.values()), default=0)
    blocks = config.num_res_blocks * len(config.ch_mult)
    if max(sizes) > largest or blocks > len(tensors):
        raise ValueError(
            f"the weights in {source} do not fit this architecture: it is larger than they are"
        )


def require_fitting(model: TamingAutoencoder, tensors: Mapping[str, Tensor], source: str) -> None:
    """Check that tensors (…) by name are exactly those of a model; `source` names their origin.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape; the message names it.
    """
    expected, available = (
        {name: tuple(tensor.shape) for name, tensor in state.items()}
        for state in (model.state_dict(), tensors)
    )
    missing = sorted(set(expected) - set(available))
    unexpected = sorted(set(available) - set(expected))
    shapes = [
        f"{name} is {available[name]}, expected {expected[name]}"
        for name in sorted(set(expected) & set(available))
        if available[name] != expected[name]
    ]
    faults = []
    for title, names in (("missing", missing), ("unexpected", unexpected), ("shapes", shapes)):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            faults.append(f"{title}: {'; '.join(names[:4])}{more}")
    if faults:
        raise ValueError(
            f"the weights in {source} do not fit this architecture: " + " | ".join(faults)
        )


def _stored(tensor: Tensor, dtype: torch.dtype, exact: bool) -> Tensor:
    """Round a tensor, unless it overflows, or changes and must be exact."""
    rounded = tensor.to(dtype).contiguous()
    keep = bool((torch.isfinite(tensor) & ~torch.isfinite(rounded)).any())
    keep = keep or (exact and not torch.equal(rounded.to(tensor.dtype), tensor))
    return tensor.contiguous() if keep else rounded
