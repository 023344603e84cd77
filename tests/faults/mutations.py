"""Mutations of files, and the bounds of time and memory within which a reader must answer."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import resource
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hypothesis import strategies as st
from torch import Tensor

from pipeline.assets.download import DamagedError
from pipeline.errors import JkoflowError

SECONDS = 10.0
BYTES = 2 << 30
KINDS = ("flip", "cut", "duplicate", "insert", "fill", "delete")
#: values that replace a leaf of a JSON or YAML document
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 2, 10**6, 10**12, 10**30, 1e308, float("nan"), float("inf"), "", "x",
    "../x", "/etc/passwd", "\0", [], [[]], {}, {"x": 1}, [None], ["x"] * 3, [10**9] * 3,
)  # fmt: skip

#: kind, place and length as fractions of the content, and a byte
Edit = tuple[str, float, float, int]
edits: st.SearchStrategy[list[Edit]] = st.lists(
    st.tuples(
        st.sampled_from(KINDS), st.floats(0, 1), st.floats(0, 1), st.integers(0, 255)
    ),
    min_size=1, max_size=3,
)  # fmt: skip
#: which leaf of a document, what becomes of it, and the odd value
Change = tuple[float, str, int]
changes: st.SearchStrategy[list[Change]] = st.lists(
    st.tuples(
        st.floats(0, 1), st.sampled_from(("set", "remove", "add", "repeat")),
        st.integers(0, len(ODD) - 1),
    ),
    min_size=1, max_size=2,
)  # fmt: skip


class HangError(BaseException):
    """Error of a reader that takes too long."""


def edited(data: bytes, how: list[Edit]) -> bytes:
    """Apply edits to the content of a file."""
    for kind, where, much, value in how:
        place = min(int(where * len(data)), max(len(data) - 1, 0))
        end = place + 1 + int(much**4 * min(len(data), 256))  # most slices are short
        if kind == "flip" and data:
            flipped = bytearray(data)
            flipped[place] ^= 1 << value % 8
            data = bytes(flipped)
        elif kind == "cut":
            data = data[:place]
        elif kind == "duplicate":
            data = data[:end] + data[place:]
        elif kind == "insert":
            data = data[:place] + bytes([value]) * (end - place) + data[place:]
        elif kind == "fill":
            data = data[:place] + bytes([value]) * (min(end, len(data)) - place) + data[end:]
        elif kind == "delete":
            data = data[:place] + data[end:]
    return data


def changed(document: Any, how: list[Change]) -> Any:
    """Apply changes to some parts of a document of JSON or YAML."""
    document = json.loads(json.dumps(document))
    for where, what, which in how:
        places, odd = list(_places(document)), copy.deepcopy(ODD[which])  # it may change later
        if not places:
            return odd
        parent, key = places[min(int(where * len(places)), len(places) - 1)]
        if what == "set":
            parent[key] = odd
        elif what == "remove":
            del parent[key]
        elif what == "add" and isinstance(parent, dict):
            parent["added"] = odd
        elif isinstance(parent, list):
            parent.extend(parent)
    return document


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    items: Any = ()
    if isinstance(document, dict):
        items = list(document.items())
    elif isinstance(document, list):
        items = list(enumerate(document))
    for key, value in items:
        yield document, key
        yield from _places(value)


def as_json(document: Any) -> bytes:
    return json.dumps(document).encode()


def as_yaml(document: Any) -> bytes:
    return yaml.safe_dump(document).encode()


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, size: int = BYTES) -> Iterator[None]:
    """Bound time and memory of what runs inside.

    Raises:
        HangError: it takes longer.
    """

    def stop(*_: object) -> None:
        raise HangError

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before, begun = signal.signal(signal.SIGALRM, stop), time.monotonic()
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)
    if time.monotonic() - begun > seconds:
        raise HangError


def is_sentence(error: Exception, *names: str) -> bool:
    """Whether an error is one that the command line prints as a sentence about a file."""
    if isinstance(error, (UnicodeError, json.JSONDecodeError)):
        return False  # they do not name the file
    known = isinstance(error, (JkoflowError, ValueError, FileNotFoundError, DamagedError)) or (
        isinstance(error, OSError) and error.strerror
    )
    return bool(known) and len(str(error)) < 2000 and any(name in str(error) for name in names)


def digest(value: Any) -> str:
    """The sha256 of what a reader returned: arrays, tensors, and their containers."""
    total = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            part = part.detach().numpy()
        if isinstance(part, np.ndarray):
            total.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
        elif isinstance(part, Mapping):
            for key in part:
                add(key)
                add(part[key])
        elif isinstance(part, (list, tuple)):
            for item in part:
                add(item)
        else:
            total.update(repr(part).encode())

    add(value)
    return total.hexdigest()
