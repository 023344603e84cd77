"""Reader of untrusted checkpoints: safetensors, or a file of `torch.save`, of which nothing runs.

PyTorch's restricted unpickler (`weights_only`) builds tensors and containers, and refuses names of
dangerous modules. All other names (Lightning's callbacks, optimisers) are bound to `Inert`. A
survey before that bounds the work that the pickles ask for (`pipeline.integrity.pickles`).
"""

from __future__ import annotations

import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from pathlib import Path
from pickle import REDUCE
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.integrity.pickles import BoundedUnpickler, require_small_key

_STATE_KEYS = ("state_dict", "model")
#: pickles at the start of torch's older stream format, before the bytes of its tensors
_STREAM_PICKLES = 5
#: what PyTorch's error says besides the reason
_REASON, _PREFACE = "WeightsUnpickler error: ", ("Weights only load failed", "Please file")


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
        lines = str(error).replace(_REASON, "\n").split("\n")
        reason = next((x for x in lines if x.strip() and not x.startswith(_PREFACE)), repr(error))
        raise ValueError(
            f"{path} cannot be used ({reason}); expected a safetensors file or a checkpoint of "
            "torch.save; download it again"
        ) from error
    if isinstance(state, dict):
        state = next((state[k] for k in _STATE_KEYS if isinstance(state.get(k), dict)), state)
        tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
        if any(v.numel() * v.itemsize > v.untyped_storage().nbytes() for v in tensors.values()):
            raise ValueError(f"{path} cannot be used (a tensor exceeds its storage)")
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
                    names |= _names(archive.open(entry), path.stat().st_size)
    else:
        with open(path, "rb") as file:
            for _ in range(_STREAM_PICKLES):
                names |= _names(file, path.stat().st_size)
    stand_ins: dict[str, Callable[..., Any]] = dict.fromkeys(names, Inert)
    stand_ins["collections.defaultdict"] = lambda *_: {}
    with torch.serialization.safe_globals([(kind, name) for name, kind in stand_ins.items()]):
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)


class _Anything(Inert):
    """Stand-in of the survey; it accepts every call and every item."""

    def __call__(self, *_: object, **__: object) -> _Anything:
        return self

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None: ...

    def extend(self, values: object) -> None: ...

    def add(self, value: object) -> None: ...

    def update(self, values: object) -> None: ...


class _Survey(BoundedUnpickler):
    """Unpickler that lists the names in one pickle, of which nothing runs.

    Args:
        file: at the start of the pickle.
        most: bytes of the whole file, which no tensor exceeds.
    """

    def __init__(self, file: IO[bytes], most: int) -> None:
        super().__init__(file, encoding="latin-1")
        self.names: set[str] = set()
        self.most = most

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        """Record a name."""
        present = (IMPORT_MAPPING.get(module, module), name)  # Python 2 has other names
        present = NAME_MAPPING.get((module, name), present)
        self.names |= {f"{module}.{name}", ".".join(present)}
        return _Anything

    def persistent_load(self, pid: Any) -> Any:  # noqa: ANN401
        """Check the size that a storage claims: ('storage', dtype, key, location, count, …)."""
        if isinstance(pid, tuple) and len(pid) > 4 and isinstance(pid[4], int):
            if pid[4] > self.most:
                raise ValueError(f"a tensor of {pid[4]} elements exceeds the file")
        return _Anything()

    def check(self, opcode: int) -> None:
        """Check the operands; the pairs of an ordered dictionary are hashed by torch."""
        super().check(opcode)
        if opcode == REDUCE[0] and isinstance(self.stack[-1], tuple):
            for part in self.stack[-1]:
                for pair in part if isinstance(part, list) else ():
                    for item in pair if isinstance(pair, list) else [pair]:
                        require_small_key(item)


def _names(file: IO[bytes], most: int) -> set[str]:
    """List the names in one pickle, of which nothing runs."""
    survey = _Survey(file, most)
    survey.load()
    return survey.names
