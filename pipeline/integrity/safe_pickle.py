"""Safe reader of the pickled batches of CIFAR-10 and ImageNet-32.

A pickle is a program that calls functions by name. This reader resolves only the names by which
numpy rebuilds arrays and numbers. Any other name raises an error before code of the pickle runs.
The work that a pickle may ask for is bounded (`pipeline.integrity.pickles`).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline.integrity.limits import require_size
from pipeline.integrity.pickles import BoundedUnpickler
from pipeline.integrity.reason import reason_of

#: numpy's functions in a pickled array, a pickled number, and an array of protocol 5
_RECONSTRUCT: Any = np.empty(0).__reduce__()[0]
_SCALAR: Any = np.float64().__reduce__()[0]
_FROM_BUFFER: Any = np.empty(1).__reduce_ex__(5)[0]
_LONGEST_CODE = 8


class UnsafePickleError(ValueError):
    """Error of a pickle that is damaged or holds other objects than arrays and containers."""


def _dtype(code: object, align: object = False, copy: object = False) -> np.dtype:
    """Return the dtype of a short text; numpy would parse nested tuples without end."""
    if not isinstance(code, (str, bytes)) or len(code) > _LONGEST_CODE:
        raise UnsafePickleError("a dtype is not of numpy's form")
    name = code.decode("ascii") if isinstance(code, bytes) else code
    return np.dtype(name, bool(align), bool(copy))


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
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): lambda *a: _dtype(*a),
            ("_codecs", "encode"): lambda text, encoding: _encode(text, encoding),
            ("builtins", "bytes"): lambda: b"",  # `bytes()` under protocol 2
            ("__builtin__", "bytes"): lambda: b"",
        }
        for core in ("numpy.core", "numpy._core"):  # before and after numpy 2
            self.known[f"{core}.multiarray", "_reconstruct"] = lambda *a: _RECONSTRUCT(*a)
            self.known[f"{core}.multiarray", "scalar"] = lambda *a: _SCALAR(*a)
            self.known[f"{core}.numeric", "_frombuffer"] = lambda *a: _FROM_BUFFER(*a)

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
        batch = _BatchUnpickler(io.BytesIO(path.read_bytes())).load()
    except UnsafePickleError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged pickle can raise any error
        raise UnsafePickleError(f"it is not a complete pickle ({reason_of(error)})") from error
    if not isinstance(batch, dict):
        raise UnsafePickleError(f"it is a {type(batch).__name__}; expected a dictionary")
    for value in batch.values():
        if isinstance(value, np.ndarray) and value.dtype.kind not in "biuf":
            raise UnsafePickleError(f"it holds dtype {value.dtype}; expected a numeric dtype")
    return {k.decode("latin-1") if isinstance(k, bytes) else str(k): v for k, v in batch.items()}
