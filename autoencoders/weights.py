"""Autoencoder weights as safetensors files, with the architecture in the metadata."""

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
    """Return the paths of the shipped weights by name."""
    folder = Path(__file__).parent / "pretrained"
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def locate_weights(name_or_path: str) -> Path:
    """Return the path of weights, from a shipped name or a path.

    Raises:
        ValueError: it is neither a shipped name nor a file.
    """
    known = shipped_weights()
    if name_or_path in known:
        return known[name_or_path]
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
    """Convert a model to the tensors and metadata of a file.

    Half precision halves the file. All results refer to the stored weights, because the
    fingerprint of a loaded model is that of the rounded weights. A tensor that would overflow
    keeps its dtype.

    Args:
        model: the autoencoder.
        dtype: of the stored tensors.
        recipe: JSON values about data and training, stored with the weights.
        exact: names of tensors that must not change; they keep their dtype if rounding would
            change them.

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
        ValueError: the file is damaged, holds no autoencoder, or has tensors that do not fit.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); download or write it again"
        ) from error
    if DESCRIPTION not in metadata:
        raise ValueError(
            f"{path} holds no jkoflow autoencoder; expected a file of `jkoflow autoencoder train` "
            "or `convert`"
        )
    try:
        description: dict[str, Any] = dict(json.loads(metadata[DESCRIPTION])["architecture"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the description in {path} is damaged; download or write the file again"
        ) from error
    model = TamingAutoencoder(config_from_description(description))
    fill_weights(model, tensors, str(path))
    return model.freeze()


def fill_weights(model: TamingAutoencoder, tensors: dict[str, Tensor], source: str) -> None:
    """Load tensors into a model as float32.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape; the message names it.
    """
    require_fitting(
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        source,
    )
    model.load_state_dict({k: v.float() for k, v in tensors.items()})


def require_fitting(
    expected: Mapping[str, tuple[int, ...]], available: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Check that tensors are exactly those of a model.

    Args:
        expected: shape of every tensor of the model, by name.
        available: shape of every available tensor, by name.
        source: their origin, for the message.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape; the message names it.
    """
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
