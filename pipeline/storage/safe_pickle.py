"""Reading the pickled batches of CIFAR-10 and ImageNet-32 without trusting them.

A pickle is a program. Here it may name only what an array of numbers needs, and even that it
does not get: every name is bound to a stand-in of this file, which gathers the parts and
builds the array with `numpy.frombuffer`. Any other name ends the reading before anything of
it has run.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

_NUMBERS = re.compile("[biuf](1|2|4|8)")
"""The dtypes of numbers; anything else that numpy would parse is refused unread."""


class UnsafePickleError(ValueError):
    """The pickle is damaged, or asks for more than arrays of numbers and plain containers."""


class _Sealed:
    """A callable that the pickle may call and cannot change."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *arguments: Any) -> Any:  # noqa: ANN401
        return self._call(*arguments)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise UnsafePickleError(f"it tries to change {name}")

    def __setstate__(self, state: object) -> NoReturn:
        raise UnsafePickleError("it tries to change a function")


class _Type:
    """Stands for a numpy dtype: a code such as "u1", completed by its byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: object, *_: object) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else str(code)
        self.order = "="
        self.resolve()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        self.order = order.decode("ascii") if isinstance(order, bytes) else str(order)

    def resolve(self) -> np.dtype:
        """The dtype, when it is one of plain numbers."""
        if not _NUMBERS.fullmatch(self.code):
            raise UnsafePickleError(f"it holds an array of {self.code!r}, not of numbers")
        if self.order not in ("=", "<", ">", "|"):
            raise UnsafePickleError(f"it holds an array of byte order {self.order!r}")
        return np.dtype(self.order + self.code)


class _Array:
    """Stands for an array until its state arrives."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _from_buffer(raw, dtype, shape, "F" if fortran else "C")


def _from_buffer(raw: object, dtype: object, shape: object, order: object) -> np.ndarray:
    if not isinstance(dtype, _Type) or not isinstance(shape, tuple) or order not in ("C", "F"):
        raise UnsafePickleError("an array's state is not of numpy's form")
    if isinstance(raw, str):  # Python 2's bytes, read as latin-1
        raw = raw.encode("latin-1")
    if not isinstance(raw, (bytes, bytearray)):
        raise UnsafePickleError("an array holds something other than bytes")
    return np.frombuffer(raw, dtype.resolve()).reshape(shape, order=order)


def _scalar(dtype: object, raw: object) -> Any:  # noqa: ANN401
    return _from_buffer(raw, dtype, (1,), "C")[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes under protocol 2."""
    if encoding not in ("latin1", "latin-1"):
        raise UnsafePickleError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin-1")


def _bytes(*arguments: object) -> bytes:
    """`bytes()`: how Python 3 writes the empty bytes under protocol 2."""
    if arguments:
        raise UnsafePickleError("it calls bytes() with arguments")
    return b""


_ARRAY_TYPE = object()  # numpy.ndarray, which is only handed on to _reconstruct


def _reconstruct(kind: object, *_: object) -> _Array:
    if kind is not _ARRAY_TYPE:
        raise UnsafePickleError("it builds something other than an array")
    return _Array()


def _allowed() -> dict[tuple[str, str], object]:
    names: dict[tuple[str, str], object] = {
        ("numpy", "ndarray"): _ARRAY_TYPE,
        ("numpy", "dtype"): _Sealed(_Type),
        ("_codecs", "encode"): _Sealed(_encode),
        ("builtins", "bytes"): _Sealed(_bytes),
        ("__builtin__", "bytes"): _Sealed(_bytes),
    }
    for core in ("numpy.core", "numpy._core"):  # before and after numpy 2
        names[f"{core}.multiarray", "_reconstruct"] = _Sealed(_reconstruct)
        names[f"{core}.multiarray", "scalar"] = _Sealed(_scalar)
        names[f"{core}.numeric", "_frombuffer"] = _Sealed(_from_buffer)
    return names


_ALLOWED = _allowed()


class _Unpickler(pickle.Unpickler):
    """An unpickler that knows the names of `_ALLOWED` and no other."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        """The stand-in of a name, or the end."""
        if (module, name) not in _ALLOWED:
            raise UnsafePickleError(f"it asks for {module}.{name}, which a batch does not need")
        return _ALLOWED[module, name]


def _require_small_memo(file: IO[bytes]) -> None:
    """Refuse a pickle that numbers what it remembers beyond what it has: memory for nothing."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > count:
            raise UnsafePickleError("it asks for memory that it does not need")


def load_batch(path: Path) -> dict[str, Any]:
    """Read a pickled dictionary of arrays, numbers, texts and lists.

    Args:
        path: a batch file written by Python 2 or 3, any protocol.

    Returns:
        The dictionary, its keys as text and its arrays as read-only numpy arrays.

    Raises:
        UnsafePickleError: damaged, not a dictionary, or asking for anything else; the text says
            what. Nothing that the pickle asked for has been run.
    """
    try:
        with open(path, "rb") as file:
            _require_small_memo(file)
            file.seek(0)
            batch = _Unpickler(file, encoding="bytes").load()
    except UnsafePickleError:
        raise
    except (
        pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError,
        KeyError, LookupError, ImportError, MemoryError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        raise UnsafePickleError(f"it is not a whole pickle ({error})") from error
    if not isinstance(batch, dict):
        raise UnsafePickleError(f"expected a dictionary, found {type(batch).__name__}")
    return {
        key.decode("latin-1") if isinstance(key, bytes) else str(key): (
            value.value if isinstance(value, _Array) else value
        )
        for key, value in batch.items()
    }
