"""Safe reader of the pickled batches of CIFAR-10 and ImageNet-32.

A pickle is a program that calls functions by name. This reader resolves only the names by which
numpy rebuilds arrays and numbers, and binds them to stand-ins. Numpy's own code trusts the state
that a pickle gives it, and may crash. Any other name raises an error before code of the pickle
runs. The work that a pickle may ask for is bounded (`pipeline.integrity.pickles`).
"""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline.integrity.limits import require_size
from pipeline.integrity.pickles import BoundedUnpickler
from pipeline.integrity.reason import reason_of

#: codes of booleans, integers and floating-point numbers
_CODE = re.compile(r"b1|[iu][1248]|f[248]")
_MOST_AXES = 32
#: containers within each other
_DEPTH = 50


class UnsafePickleError(ValueError):
    """Error of a pickle that is damaged or holds other objects than arrays and containers."""


def _shown(value: object) -> str:
    """Return the start of a text, or the type of another value, whose text may have no end."""
    return repr(value[:20]) if isinstance(value, str) else f"of type {type(value).__name__}"


class _DType:
    """Stand-in of a numeric dtype, as numpy describes it: a code such as u1, and a byte order."""

    def __init__(self, code: object = None, *_: object) -> None:
        name = code.decode("latin-1") if isinstance(code, bytes) else code
        if not isinstance(name, str) or not _CODE.fullmatch(name):
            raise UnsafePickleError(f"it holds dtype {_shown(name)}; expected a numeric dtype")
        self.code, self.known = name, np.dtype(name)

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or state[2:5] != (None, None, None):
            raise UnsafePickleError("it has a dtype with fields, or not of numpy's form")
        order = state[1].decode("latin-1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "="):
            raise UnsafePickleError(f"it has a dtype of byte order {_shown(order)}")
        self.known = np.dtype(order + self.code)


class _Array:
    """Stand-in of an array, whose content follows as its state."""

    values: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise UnsafePickleError("it has an array that is not of numpy's form")
        _, shape, dtype, fortran, data = state
        self.values = _array(data, dtype, shape, bool(fortran))


def _array(data: object, dtype: object, shape: object, fortran: bool) -> np.ndarray[Any, Any]:
    """Return the array of some bytes, which must have its size."""
    if isinstance(data, str):  # the bytes of protocol 0
        data = data.encode("latin-1")
    if not isinstance(data, (bytes, bytearray)) or not isinstance(dtype, _DType):
        raise UnsafePickleError("it has an array that is not of bytes and a numeric dtype")
    sides = (shape,) if type(shape) is int else shape
    if not isinstance(sides, tuple) or not all(type(n) is int and n >= 0 for n in sides):
        raise UnsafePickleError("it has an array whose shape is not of numpy's form")
    if len(sides) > _MOST_AXES or math.prod(sides) * dtype.known.itemsize != len(data):
        raise UnsafePickleError(f"it has an array of {len(data)} bytes that claims another size")
    values = np.frombuffer(data, dtype.known)
    return values.reshape(sides, order="F" if fortran else "C").copy(order="K")


def _from_buffer(data: object, dtype: object, shape: object, order: object) -> _Array:
    """Return an array of protocol 5."""
    if order not in ("C", "F"):
        raise UnsafePickleError("it has an array whose order is not of numpy's form")
    array = _Array()
    array.values = _array(data, dtype, shape, order == "F")
    return array


def _scalar(dtype: object, data: object) -> Any:  # noqa: ANN401 - numpy's scalars
    """Return a number."""
    return _array(data, dtype, (), False)[()]


def _finished(value: Any, known: dict[int, Any], depth: int = 0) -> Any:  # noqa: ANN401
    """Return arrays in place of their stand-ins, in containers, too.

    Args:
        value: what was unpickled.
        known: results by the identity of the container, because containers may be shared.
        depth: containers around the value.
    """
    if id(value) in known:
        return known[id(value)]
    if depth > _DEPTH:
        raise UnsafePickleError(f"it is nested deeper than {_DEPTH}")
    if isinstance(value, _Array):
        if value.values is None:
            raise UnsafePickleError("it has an array without content")
        return value.values
    if isinstance(value, dict):
        result: Any = {key: _finished(part, known, depth + 1) for key, part in value.items()}
    elif isinstance(value, (list, tuple)):
        result = type(value)(_finished(part, known, depth + 1) for part in value)
    else:
        return value
    known[id(value)] = result
    return result


def _encode(text: str, encoding: str) -> bytes:
    """Return the bytes that Python 3 writes as text under protocol 2."""
    if encoding not in ("latin1", "latin-1"):
        raise UnsafePickleError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin-1")


class _BatchUnpickler(BoundedUnpickler):
    """Unpickler of arrays, numbers, strings and containers."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="bytes")
        # functions of this object, so that a pickle cannot change those of numpy
        self.known: dict[tuple[str, str], object] = {
            ("numpy", "ndarray"): None,
            ("numpy", "dtype"): lambda *a: _DType(*a),
            ("_codecs", "encode"): lambda text, encoding: _encode(text, encoding),
            ("builtins", "bytes"): lambda: b"",  # `bytes()` under protocol 2
            ("__builtin__", "bytes"): lambda: b"",
        }
        for core in ("numpy.core", "numpy._core"):  # before and after numpy 2
            self.known[f"{core}.multiarray", "_reconstruct"] = lambda *_: _Array()
            self.known[f"{core}.multiarray", "scalar"] = lambda *a: _scalar(*a)
            self.known[f"{core}.numeric", "_frombuffer"] = lambda *a: _from_buffer(*a)

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        """Return the object of a name; raise UnsafePickleError if it is not known."""
        if (module, name) not in self.known:
            raise UnsafePickleError(f"it asks for {module}.{name}, which a batch does not need")
        return self.known[module, name]


def load_batch(path: Path) -> dict[str, Any]:
    """Read a pickled dictionary of numeric arrays, numbers, strings and lists.

    The file was written by Python 2 or 3, with any protocol. Keys become strings.

    Raises:
        UnsafePickleError: the pickle is damaged, not a dictionary, asks for another name, or for
            more work than an array needs. No code of the pickle has run.
    """
    try:
        require_size(path.stat().st_size, path)
        batch = _finished(_BatchUnpickler(io.BytesIO(path.read_bytes())).load(), {})
    except UnsafePickleError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged pickle can raise any error
        raise UnsafePickleError(f"it is not a complete pickle ({reason_of(error)})") from error
    if not isinstance(batch, dict):
        raise UnsafePickleError(f"it is a {type(batch).__name__}; expected a dictionary")
    return {k.decode("latin-1") if isinstance(k, bytes) else str(k): v for k, v in batch.items()}
