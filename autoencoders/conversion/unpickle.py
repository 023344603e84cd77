"""Reading the pickle of a checkpoint as data: tensors by name, and nothing else of it.

A pickle is a program that names classes and functions and calls them. Here no name is ever
imported: the few that rebuild tensors and dictionaries are bound to stand-ins of this file,
which only note what they were given; those that no checkpoint of tensors needs (`os.system`,
`builtins.eval`, …) end the reading; all others (Lightning's callbacks, enums, optimisers) become
`Inert`: it may be called, filled and set, and forgets everything.

Before any of it, the opcodes are read one by one (`pickletools`), which runs nothing, and a
pickle that asks for memory beyond its own size is refused.
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
    """The checkpoint asks for what no file of tensors needs; nothing of it has been run."""


class DamagedCheckpointError(ValueError):
    """The checkpoint is cut off, or not of a form that is known."""


class _FrozenClass(type):
    """Classes that a pickle may call but not change."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise UnsafeCheckpointError(f"it tries to change {name} of a class")


class Inert(metaclass=_FrozenClass):
    """Stands for an unknown class, its instances and whatever they return; does nothing."""

    __slots__ = ()

    def __new__(cls, *_: object, **__: object) -> Inert:  # noqa: D102
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __call__(self, *_: object, **__: object) -> Inert:  # noqa: D102
        return self

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None:
        """Forget it, as the three below do."""

    def extend(self, values: object) -> None:
        """Forget them."""

    def add(self, value: object) -> None:
        """Forget it."""

    def update(self, values: object) -> None:
        """Forget them."""


class _Dict(dict, metaclass=_FrozenClass):
    """Stands for `collections.OrderedDict`; its attributes (`_metadata`) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None: ...


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of numbers somewhere in the file.

    Attributes:
        key: its name there.
        dtype: of the numbers.
        numel: how many.
    """

    key: str
    dtype: torch.dtype
    numel: int


class TensorReference(metaclass=_FrozenClass):
    """Where a tensor lies: storage, offset, size and stride, checked against each other."""

    __slots__ = ("storage", "offset", "size", "stride")
    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __init__(
        self, storage: object, offset: object, size: object, stride: object, *_: object
    ) -> None:
        plain = isinstance(storage, Storage) and _counts(size) and _counts(stride)
        if not plain or not isinstance(offset, int) or offset < 0 or len(size) != len(stride):  # type: ignore[arg-type]
            raise DamagedCheckpointError("a tensor's description is not of torch's form")
        for name, value in zip(self.__slots__, (storage, offset, size, stride), strict=True):
            object.__setattr__(self, name, value)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        # a stride of 0 would make one number a tensor of any size
        if self.numel and (last >= self.storage.numel or self.numel > self.storage.numel):
            raise DamagedCheckpointError("a tensor reaches beyond its storage")

    @property
    def numel(self) -> int:
        """Numbers in the tensor."""
        count = 1
        for n in self.size:
            count *= n
        return count

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise UnsafeCheckpointError(f"it tries to change {name} of a tensor")

    def __setstate__(self, state: object) -> None:
        """A tensor subclass's attributes; dropped."""


class _Parameter(metaclass=_FrozenClass):
    """Stands for `torch._utils._rebuild_parameter`: gives its tensor back."""

    def __new__(cls, data: object, *_: object) -> Any:  # noqa: ANN401, D102
        return data


def _counts(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(n, int) and n >= 0 for n in value)


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor"): TensorReference,
    ("torch._utils", "_rebuild_tensor_v2"): TensorReference,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _Parameter,
}


class _CheckpointUnpickler(pickle.Unpickler):
    """Binds every name to a stand-in, and notes storages instead of loading them."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin-1")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        """The stand-in of a name, or the end; nothing is imported."""
        builtin = module in ("builtins", "__builtin__") and name.split(".")[0] in _HOSTILE_BUILTINS
        if builtin or module.split(".")[0] in _HOSTILE_MODULES:
            raise UnsafeCheckpointError(
                f"it asks for {module}.{name}, which no checkpoint needs; nothing of it was run"
            )
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        return _KNOWN.get((module, name), Inert)

    def persistent_load(self, pid: Any) -> Any:  # noqa: ANN401
        """A storage, as ('storage', dtype, key, place, count, …)."""
        if isinstance(pid, tuple) and pid[:1] == ("module",):  # source code kept by old versions
            return Inert
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise DamagedCheckpointError("it refers to something other than a storage")
        _, dtype, key, _, numel = pid[:5]
        part = len(pid) > 5 and pid[5] is not None  # a storage within another: torch < 0.4
        if part or not isinstance(key, str) or not isinstance(numel, int) or numel < 0:
            raise DamagedCheckpointError("a storage's description is not of torch's form")
        # storages of other types are not read: their tensors are no weights
        if not isinstance(dtype, torch.dtype):
            return Inert()
        return self.storages.setdefault(key, Storage(key, dtype, numel))


def read_pickle(file: IO[bytes]) -> tuple[Any, dict[str, Storage]]:
    """Read one pickle from where a file stands, and leave it just behind.

    Args:
        file: seekable; at most 64 MiB of it are read.

    Returns:
        (value, storages): plain values, with `TensorReference` for tensors and `Inert` for
        everything else; and every storage that is referred to, by key.

    Raises:
        UnsafeCheckpointError: it asks for what no checkpoint needs; nothing has been run.
        DamagedCheckpointError: it is cut off or not a pickle.
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
    except Exception as error:  # noqa: BLE001 - a pickle can fail in any way it likes
        raise DamagedCheckpointError(f"its pickle cannot be read ({error})") from error
    file.seek(stop)
    return value, unpickler.storages


def _inspect(file: IO[bytes]) -> None:
    """Walk over the opcodes of one pickle without running any."""
    start, count = file.tell(), 0
    try:
        for opcode, argument, position in pickletools.genops(file):
            count += 1
            if count > _MAX_OPCODES or (position or 0) - start > MAX_PICKLE_BYTES:
                raise UnsafeCheckpointError("its pickle is larger than any checkpoint's")
            if opcode.name in _EXTENSIONS:
                raise UnsafeCheckpointError(f"it uses {opcode.name}, which torch never writes")
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > count:
                raise UnsafeCheckpointError("it asks for memory that it does not need")
    except UnsafeCheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever pickletools makes of rubbish
        raise DamagedCheckpointError(f"its pickle cannot be read ({error})") from error
