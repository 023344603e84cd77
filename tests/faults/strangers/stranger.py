"""A malicious file: its kind, its name, and what writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stranger:
    """A malicious file.

    Attributes:
        kind: pickle, archive or picture.
        name: of the file, with its ending.
        make: writes it to a path.
    """

    kind: str
    name: str
    make: Callable[[Path], object]


def writer(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)
