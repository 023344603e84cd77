"""Safe reader of pickled torch checkpoints, which keeps references to tensors only.

A pickle is a program that names classes and functions and calls them. This reader imports no
name:
- Names that rebuild tensors and dictionaries are bound to stand-ins of this file, which record
  their arguments.
- Names that no checkpoint needs (`os.system`, `builtins.eval`, …) raise an error.
- All other names (Lightning's callbacks, enums, optimisers) are bound to `Inert`, which accepts
  every call and ignores it.

Before that, `pickletools` reads the opcodes without running them, and a pickle that needs more
memory than its own size is rejected.

`pipeline.storage.safe_pickle` reads data sets instead. It accepts the names of numeric arrays only
and raises on every other, whereas a checkpoint legitimately holds unknown classes. It also copies
arrays, whereas this reader records where tensors lie in a file of many gigabytes.
"""

from __future__ import annotations

import pickle
import pickletools
from dataclasses import dataclass
from typing import IO, Any, NoReturn

import torch

MAX_PICKLE_BYTES = 64 << 20
_MAX_OPCODES = 8_000_000
_EXTENSIONS = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
_HOSTILE_MODULES = set(
    "os posix nt io _io subprocess pty socket shutil importlib runpy sys ctypes webbrowser code "
    "pdb multiprocessing asyncio http urllib requests pip pickle _pickle marshal commands".split()
)
_HOSTILE_BUILTINS = set("eval exec compile open input breakpoint execfile __import__".split())
_DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip


class UnsafeCheckpointError(ValueError):
    """Error of a checkpoint that uses names that no file of tensors needs; no code has run."""


class DamagedCheckpointError(ValueError):
    """Error of a checkpoint that is truncated or of an unknown format."""


class _FrozenClass(type):
    """Metaclass of classes that a pickle may call but not change."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise UnsafeCheckpointError(f"it tries to change {name} of a class")


class Inert(metaclass=_FrozenClass):
    """Stand-in for an unknown class, its instances and their results; it does nothing."""

    __slots__ = ()

    def __new__(cls, *_: object, **__: object) -> Inert:  # noqa: D102
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __call__(self, *_: object, **__: object) -> Inert:  # noqa: D102
        return self

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None:
        """Ignore a value."""

    def extend(self, values: object) -> None:
        """Ignore values."""

    def add(self, value: object) -> None:
        """Ignore a value."""

    def update(self, values: object) -> None:
        """Ignore values."""


class _Dict(dict, metaclass=_FrozenClass):
    """Stand-in for `collections.OrderedDict`; it ignores attributes (`_metadata`)."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None: ...


@dataclass(frozen=True, slots=True)
class Storage:
    """Contiguous elements in the file.

    Attributes:
        key: name in the file.
        dtype: dtype of the elements.
        numel: number of elements.
    """

    key: str
    dtype: torch.dtype
    numel: int


class TensorReference(metaclass=_FrozenClass):
    """Reference to a tensor in the file: storage, offset, size and stride, checked for bounds."""

    __slots__ = ("storage", "offset", "size", "stride")
    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __init__(
        self, storage: object, offset: object, size: object, stride: object, *_: object
    ) -> None:
        plain = isinstance(storage, Storage) and _are_counts(size) and _are_counts(stride)
        if not plain or not isinstance(offset, int) or offset < 0 or len(size) != len(stride):  # type: ignore[arg-type]
            raise DamagedCheckpointError("the state of a tensor is not of torch's form")
        for name, value in zip(self.__slots__, (storage, offset, size, stride), strict=True):
            object.__setattr__(self, name, value)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        # a stride of 0 would expand one element to a tensor of any size
        if self.numel and (last >= self.storage.numel or self.numel > self.storage.numel):
            raise DamagedCheckpointError("a tensor exceeds its storage")

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for n in self.size:
            count *= n
        return count

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise UnsafeCheckpointError(f"it tries to change {name} of a tensor")

    def __setstate__(self, state: object) -> None:
        """Ignore the attributes of a tensor subclass."""


class _Parameter(metaclass=_FrozenClass):
    """Stand-in for `torch._utils._rebuild_parameter`; it returns its tensor."""

    def __new__(cls, data: object, *_: object) -> Any:  # noqa: ANN401, D102
        return data


def _are_counts(value: object) -> bool:
    """Return whether a value is a tuple of integers that are not negative."""
    return isinstance(value, tuple) and all(isinstance(n, int) and n >= 0 for n in value)


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor"): TensorReference,
    ("torch._utils", "_rebuild_tensor_v2"): TensorReference,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _Parameter,
}


class _CheckpointUnpickler(pickle.Unpickler):
    """Unpickler that binds names to stand-ins, and records storages without loading them."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin-1")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        """Return the stand-in of a name, or raise UnsafeCheckpointError; nothing is imported."""
        builtin = module in ("builtins", "__builtin__") and name.split(".")[0] in _HOSTILE_BUILTINS
        if builtin or module.split(".")[0] in _HOSTILE_MODULES:
            raise UnsafeCheckpointError(
                f"it uses {module}.{name}, which no checkpoint needs; no code of it has run"
            )
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        return _KNOWN.get((module, name), Inert)

    def persistent_load(self, pid: Any) -> Any:  # noqa: ANN401
        """Record a storage, pickled as ('storage', dtype, key, location, count, …)."""
        if isinstance(pid, tuple) and pid[:1] == ("module",):  # source code, in old versions
            return Inert
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise DamagedCheckpointError("it refers to another object than a storage")
        _, dtype, key, _, numel = pid[:5]
        part = len(pid) > 5 and pid[5] is not None  # a storage within another: torch < 0.4
        if part or not isinstance(key, str) or not isinstance(numel, int) or numel < 0:
            raise DamagedCheckpointError("the state of a storage is not of torch's form")
        # tensors of other dtypes are no weights, so their storages are ignored
        if not isinstance(dtype, torch.dtype):
            return Inert()
        return self.storages.setdefault(key, Storage(key, dtype, numel))


def read_pickle(file: IO[bytes]) -> tuple[Any, dict[str, Storage]]:
    """Read one pickle at the position of a file, which is then at its end.

    Args:
        file: seekable; at most 64 MiB of it are read.

    Returns:
        (value, storages): plain values, with `TensorReference` for tensors and `Inert` for all
        other objects; and the storages of the tensors, by key.

    Raises:
        UnsafeCheckpointError: it uses names that no checkpoint needs; no code has run.
        DamagedCheckpointError: it is truncated or not a pickle.
    """
    start = file.tell()
    _inspect(file)
    stop = file.tell()
    file.seek(start)
    try:
        unpickler = _CheckpointUnpickler(file)
        value = unpickler.load()
    except (UnsafeCheckpointError, DamagedCheckpointError):
        raise
    except Exception as error:  # noqa: BLE001 - a damaged pickle can raise any error
        raise DamagedCheckpointError(f"its pickle cannot be read ({error})") from error
    file.seek(stop)
    return value, unpickler.storages


def _inspect(file: IO[bytes]) -> None:
    """Check the opcodes of one pickle without running them."""
    start, count = file.tell(), 0
    try:
        for opcode, argument, position in pickletools.genops(file):
            count += 1
            if count > _MAX_OPCODES or (position or 0) - start > MAX_PICKLE_BYTES:
                raise UnsafeCheckpointError(
                    f"its pickle is larger than {MAX_PICKLE_BYTES >> 20} MiB"
                )
            if opcode.name in _EXTENSIONS:
                raise UnsafeCheckpointError(f"it uses {opcode.name}, which torch never writes")
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > count:
                raise UnsafeCheckpointError("it asks for more memory than it needs")
    except UnsafeCheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged pickle can raise any error
        raise DamagedCheckpointError(f"its pickle cannot be read ({error})") from error
