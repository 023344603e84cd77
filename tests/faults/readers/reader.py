"""A reader with a whole file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Reader:
    """A reader with a whole file.

    Attributes:
        name: of the reader.
        file: that it reads.
        content: of the file before `pack`: bytes, or a document of JSON or YAML.
        read: returns what the file holds, as containers of arrays and plain values.
        pack: makes the file's bytes of the content; mutations come before it.
        sealed: whether another content than the whole one must be an error.
        after: is called when the file was written.
        names: words of which an error names one, besides the file's name.
    """

    name: str
    file: Path
    content: Any
    read: Callable[[Path], Any]
    pack: Callable[[Any], bytes] = bytes
    sealed: bool = False
    after: Callable[[Path], object] = lambda path: None
    names: tuple[str, ...] = ()
