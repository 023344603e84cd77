"""Reader of untrusted checkpoints: safetensors, or a file of `torch.save`, of which nothing runs.

PyTorch's restricted unpickler (`weights_only`) builds tensors and containers, and refuses names of
dangerous modules. All other names (Lightning's callbacks, optimisers) are bound to `Inert`.
"""

from __future__ import annotations

import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

_STATE_KEYS = ("state_dict", "model")
#: pickles at the start of torch's older stream format, before the bytes of its tensors
_STREAM_PICKLES = 5
_REASON = "WeightsUnpickler error: "


class Inert:
    """Stand-in for an unknown class and its instances; it accepts every state and does nothing."""

    def __new__(cls, *_: object, **__: object) -> Inert:  # noqa: D102
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the tensors (…) of a checkpoint by name; its content decides on the format.

    Tensors are mapped, so a part of a file of many gigabytes needs only its own memory. Torch's
    older stream format (before 1.6) is read whole.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is damaged, of another format, or uses a name that torch refuses.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; check the path")
    with open(path, "rb") as file:
        head = file.read(9)
    try:
        if head[8:] == b"{":
            state: Any = load_file(path)
        else:
            state = _load_pickled(path, zipped=head[:4] == b"PK\x03\x04")
    except Exception as error:  # noqa: BLE001 - a damaged file can raise any error
        reason = (str(error).rpartition(_REASON)[2].strip() or repr(error)).split("\n")[0]
        raise ValueError(
            f"{path} cannot be used ({reason}); expected a safetensors file or a checkpoint of "
            "torch.save; download it again"
        ) from error
    if isinstance(state, dict):
        state = next((state[k] for k in _STATE_KEYS if isinstance(state.get(k), dict)), state)
        tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
        if tensors:
            return tensors
    raise ValueError(f"{path} holds no dictionary of tensors; use another checkpoint")


def _load_pickled(path: Path, zipped: bool) -> object:
    """Load a file of `torch.save` with a stand-in for every name that torch does not know."""
    names: set[str] = set()
    if zipped:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:  # it could expand to any size
                    raise ValueError(f"its entry {entry.filename} is compressed")
                if entry.filename.endswith("/data.pkl"):
                    names |= _names(archive.open(entry))
    else:
        with open(path, "rb") as file:
            for _ in range(_STREAM_PICKLES):
                names |= _names(file)
    stand_ins: dict[str, Callable[..., Any]] = dict.fromkeys(names, Inert)
    stand_ins["collections.defaultdict"] = lambda *_: {}
    with torch.serialization.safe_globals([(kind, name) for name, kind in stand_ins.items()]):
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)


def _names(file: IO[bytes]) -> set[str]:
    """List the names in one pickle, of which nothing runs."""
    names = set()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            module, name = str(argument).split(" ", 1)
            present = (IMPORT_MAPPING.get(module, module), name)  # Python 2 has other names
            present = NAME_MAPPING.get((module, name), present)
            names |= {f"{module}.{name}", ".".join(present)}
    return names
