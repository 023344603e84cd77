"""Safe reader of the pickled batches of CIFAR-10 and ImageNet-32.

A pickle is a program. This reader resolves only the names that a numeric array needs. It binds
each to a stand-in of this file, which collects the parts and builds the array with
`numpy.frombuffer`. Any other name raises an error before code of the pickle runs.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

_NUMERIC_CODE = re.compile("[biuf](1|2|4|8)")
"""Codes of numeric dtypes; numpy never parses any other code."""


class UnsafePickleError(ValueError):
    """Error of a pickle that is damaged or holds other objects than arrays and containers."""


class _FrozenCallable:
    """Callable that a pickle can call but not change."""

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


class _DtypeStandIn:
    """Stand-in for a numpy dtype: a code such as "u1" and a byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: object, *_: object) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else str(code)
        self.order = "="
        self.resolve()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        self.order = order.decode("ascii") if isinstance(order, bytes) else str(order)

    def resolve(self) -> np.dtype:
        """Return the dtype if it is numeric.

        Raises:
            UnsafePickleError: the dtype is not numeric.
        """
        if not _NUMERIC_CODE.fullmatch(self.code):
            raise UnsafePickleError(f"it holds dtype {self.code!r}; expected a numeric dtype")
        if self.order not in ("=", "<", ">", "|"):
            raise UnsafePickleError(f"it holds an array of byte order {self.order!r}")
        return np.dtype(self.order + self.code)


class _ArrayStandIn:
    """Stand-in for an array until its state is read."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _from_buffer(raw, dtype, shape, "F" if fortran else "C")


def _from_buffer(raw: object, dtype: object, shape: object, order: object) -> np.ndarray:
    """Build an array from the parts of its pickled state."""
    if not isinstance(dtype, _DtypeStandIn):
        raise UnsafePickleError("an array has a dtype that is not of numpy's form")
    if not isinstance(shape, tuple) or order not in ("C", "F"):
        raise UnsafePickleError("an array's state is not of numpy's form")
    if isinstance(raw, str):  # Python 2's bytes, read as latin-1
        raw = raw.encode("latin-1")
    if not isinstance(raw, (bytes, bytearray)):
        raise UnsafePickleError("an array holds something other than bytes")
    return np.frombuffer(raw, dtype.resolve()).reshape(shape, order=order)


def _scalar(dtype: object, raw: object) -> Any:  # noqa: ANN401
    """Build a numpy scalar as a Python number."""
    return _from_buffer(raw, dtype, (1,), "C")[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """Return the bytes that Python 3 writes as text under protocol 2."""
    if encoding not in ("latin1", "latin-1"):
        raise UnsafePickleError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin-1")


def _bytes(*arguments: object) -> bytes:
    """Return the empty bytes, which Python 3 writes as `bytes()` under protocol 2."""
    if arguments:
        raise UnsafePickleError("it calls bytes() with arguments")
    return b""


_ARRAY_TYPE = object()  # stands for numpy.ndarray, an argument of _new_array


def _new_array(kind: object, *_: object) -> _ArrayStandIn:
    """Return an array without state."""
    if kind is not _ARRAY_TYPE:
        raise UnsafePickleError("it builds something other than an array")
    return _ArrayStandIn()


def _allowed() -> dict[tuple[str, str], object]:
    """Return the stand-in of every name that a batch may use, by module and name."""
    names: dict[tuple[str, str], object] = {
        ("numpy", "ndarray"): _ARRAY_TYPE,
        ("numpy", "dtype"): _FrozenCallable(_DtypeStandIn),
        ("_codecs", "encode"): _FrozenCallable(_encode),
        ("builtins", "bytes"): _FrozenCallable(_bytes),
        ("__builtin__", "bytes"): _FrozenCallable(_bytes),
    }
    for core in ("numpy.core", "numpy._core"):  # before and after numpy 2
        names[f"{core}.multiarray", "_reconstruct"] = _FrozenCallable(_new_array)
        names[f"{core}.multiarray", "scalar"] = _FrozenCallable(_scalar)
        names[f"{core}.numeric", "_frombuffer"] = _FrozenCallable(_from_buffer)
    return names


_ALLOWED = _allowed()


class _BatchUnpickler(pickle.Unpickler):
    """Unpickler that resolves the names of `_ALLOWED` only."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        """Return the stand-in of a name; raise UnsafePickleError if it has none."""
        if (module, name) not in _ALLOWED:
            raise UnsafePickleError(f"it asks for {module}.{name}, which a batch does not need")
        return _ALLOWED[module, name]


def _require_small_memo(file: IO[bytes]) -> None:
    """Check that memo indices are not larger than the pickle, which would exhaust memory."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > count:
            raise UnsafePickleError("it asks for more memory than it needs")


def load_batch(path: Path) -> dict[str, Any]:
    """Read a pickled dictionary of arrays, numbers, strings and lists.

    Args:
        path: a batch file written by Python 2 or 3, any protocol.

    Returns:
        The dictionary with string keys and read-only numpy arrays.

    Raises:
        UnsafePickleError: the pickle is damaged, not a dictionary, or asks for another name. No
            code of the pickle has run.
    """
    try:
        with open(path, "rb") as file:
            _require_small_memo(file)
            file.seek(0)
            batch = _BatchUnpickler(file, encoding="bytes").load()
    except UnsafePickleError:
        raise
    except (
        pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError,
        KeyError, LookupError, ImportError, MemoryError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        raise UnsafePickleError(f"it is not a complete pickle ({error})") from error
    if not isinstance(batch, dict):
        raise UnsafePickleError(f"it is a {type(batch).__name__}; expected a dictionary")
    return {
        key.decode("latin-1") if isinstance(key, bytes) else str(key): (
            value.value if isinstance(value, _ArrayStandIn) else value
        )
        for key, value in batch.items()
    }
