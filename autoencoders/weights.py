"""Autoencoder weights as safetensors: the tensors, and the architecture in the metadata."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autoencoders.architecture import config_from_description
from autoencoders.taming import TamingAutoencoder

#: key of the metadata entry that holds the architecture and the recipe
DESCRIPTION = "jkoflow.autoencoder"


def shipped_weights() -> dict[str, Path]:
    """Name → path of the shipped weights."""
    folder = Path(__file__).parent / "pretrained"
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def locate_weights(name_or_path: str) -> Path:
    """The file of shipped weights, or a file of one's own.

    Raises:
        ValueError: neither a shipped name nor a file.
    """
    known = shipped_weights()
    if name_or_path in known:
        return known[name_or_path]
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    names = ", ".join(known) or "none"
    raise ValueError(
        f"unknown autoencoder weights {name_or_path!r}; shipped are {names}, or give the path "
        "of a .safetensors file that `jkoflow autoencoder train` or `convert` wrote"
    )


def to_tensors(
    model: TamingAutoencoder,
    dtype: torch.dtype = torch.float16,
    recipe: dict[str, Any] | None = None,
    exact: Collection[str] = (),
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What to store of a model: tensors in a compact type, and metadata.

    Half precision halves the file; the fingerprint of a loaded model is that of the rounded
    weights, so the stored file is what all numbers refer to. A tensor that would overflow is
    stored as it is.

    Args:
        model: the autoencoder.
        dtype: of the stored tensors.
        recipe: JSON-ready notes on data and training, kept with the weights.
        exact: names of tensors that rounding may not change; they keep their type if it would.

    Returns:
        (tensors, metadata) for a safetensors file.
    """
    state = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    tensors = {k: _stored(v, dtype, k in exact) for k, v in state.items()}
    notes = {"architecture": model.describe(), "recipe": recipe or {}}
    return tensors, {DESCRIPTION: json.dumps(notes)}


def load_weights(path: Path) -> TamingAutoencoder:
    """Build the autoencoder that a file describes, with its weights, frozen.

    Raises:
        ValueError: not a whole safetensors file, not an autoencoder, or keys that do not fit.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); get it again"
        ) from error
    if DESCRIPTION not in metadata:
        raise ValueError(
            f"{path} holds no jkoflow autoencoder; give a file that `jkoflow autoencoder train` "
            "or `convert` wrote"
        )
    try:
        description: dict[str, Any] = dict(json.loads(metadata[DESCRIPTION])["architecture"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the description in {path} is damaged; get the file again") from error
    model = TamingAutoencoder(config_from_description(description))
    fill_weights(model, tensors, str(path))
    return model.freeze()


def fill_weights(model: TamingAutoencoder, tensors: dict[str, Tensor], source: str) -> None:
    """Load tensors into a model; every key must fit.

    Raises:
        ValueError: names the keys that are missing, unexpected, or of another shape.
    """
    require_fitting(
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        source,
    )
    model.load_state_dict({k: v.float() for k, v in tensors.items()})


def require_fitting(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Refuse tensors that are not exactly those of a model.

    Args:
        wanted: shape of every tensor of the model, by name.
        found: shape of every tensor at hand.
        source: where they come from, for the message.

    Raises:
        ValueError: names the keys that are missing, unexpected, or of another shape.
    """
    missing = sorted(set(wanted) - set(found))
    unexpected = sorted(set(found) - set(wanted))
    shapes = [
        f"{k} is {found[k]}, expected {wanted[k]}"
        for k in sorted(set(wanted) & set(found))
        if found[k] != wanted[k]
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
    rounded = tensor.to(dtype).contiguous()
    spoilt = bool((torch.isfinite(tensor) & ~torch.isfinite(rounded)).any())
    spoilt = spoilt or (exact and not torch.equal(rounded.to(tensor.dtype), tensor))
    return tensor.contiguous() if spoilt else rounded
