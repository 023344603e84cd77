"""Checkpoints of a training in progress: a nested state in one safetensors file.

Nothing is pickled: tensors are stored by number, and all other values as JSON in the metadata.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import UserError
from pipeline.integrity.reason import reason_of
from pipeline.storage import atomic, seal

_STATE = "jkoflow.state"
_TENSOR = "__tensor__"


def save_checkpoint(path: Path, state: dict[str, Any]) -> str:
    """Write a nested state of dicts, lists, tensors and JSON values; return the file's sha256.

    Keys of a dict may be strings or integers (as in the state of an optimiser).
    """
    tensors: dict[str, Tensor] = {}
    plain = json.dumps(_flatten(state, tensors))
    digest = _digest(plain, tensors)
    return atomic.write_tensors(path, tensors, {_STATE: f"{digest}\n{plain}"})


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read the state that `save_checkpoint` wrote.

    Raises:
        UserError: the file is absent, damaged, not a checkpoint, or of another run.
    """
    if not Path(path).is_file():
        raise UserError(f"checkpoint {path} does not exist; check the path")
    seal.check(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        digest, _, plain = metadata[_STATE].partition("\n")
        if _digest(plain, tensors) != digest:
            raise ValueError("its digest differs")
        state: dict[str, Any] = _restore(json.loads(plain), tensors)
        return state
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UserError(
            f"checkpoint {path} is damaged ({reason_of(error)}); {seal.advice(path)}, which "
            "trains the block again"
        ) from error


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401 - nested state
    """Convert a nested state to JSON-ready values; move its tensors to `tensors`."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):05d}"
        tensors[name] = value.detach().clone()
        return {_TENSOR: name}
    if isinstance(value, dict):
        pairs = [[key, _flatten(item, tensors)] for key, item in value.items()]
        return {"__dict__": pairs}
    if isinstance(value, (list, tuple)):
        return [_flatten(item, tensors) for item in value]
    return value


def _restore(plain: Any, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401 - nested state
    """Invert `_flatten`."""
    if isinstance(plain, dict) and _TENSOR in plain:
        return tensors[plain[_TENSOR]].clone()
    if isinstance(plain, dict):
        return {key: _restore(item, tensors) for key, item in plain["__dict__"]}
    if isinstance(plain, list):
        return [_restore(item, tensors) for item in plain]
    return plain


def _digest(plain: str, tensors: dict[str, Tensor]) -> str:
    """Return the sha256 of the JSON text and the bytes of all tensors."""
    digest = hashlib.sha256(plain.encode())
    for name in sorted(tensors):
        array = tensors[name].detach().cpu().contiguous().flatten()
        digest.update(array.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
