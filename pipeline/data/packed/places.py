"""Places of images in packed data sets, and their names, splits and classes."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, NamedTuple

from pipeline.errors import UserError

_SPLITS = {"train": "train", "training": "train", "test": "test", "val": "val",
           "valid": "val", "validation": "val"}  # fmt: skip
#: folders of splits
_FOLDERS = ("train", "test", "val")


class Place(NamedTuple):
    """Place of an image in a data set that is read in place.

    Attributes:
        name: relative path of the image, with its split in front if it has one.
        file: that holds it.
        offset: of its first byte.
        size: in bytes.
        sha256: of its content.
        split: that it belongs to; empty if it belongs to none.
    """

    name: str
    file: str
    offset: int
    size: int
    sha256: str
    split: str = ""


def split_names(places: list[Place]) -> set[str]:
    """Return the names of the splits that images belong to."""
    return {place.split for place in places} - {""}


def split_folder(name: str) -> str:
    """Return the first folder of a relative path if it is that of a split; else an empty text."""
    folder, slash, _ = name.partition("/")
    return folder if slash and folder in _FOLDERS else ""


def relative_name(name: str) -> PurePosixPath:
    """Return a relative path of a stranger's name.

    Raises:
        UserError: the name leads out of its folder.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise UserError(f"an image is called {name!r}; expected a relative path")
    return path


def split_of(name: str) -> str:
    """Return the split that a file's path names, or an empty text."""
    words = name.lower().replace("-", "/").replace("_", "/").replace(".", "/").split("/")
    return next((_SPLITS[word] for word in words if word in _SPLITS), "")


def class_name(value: Any, names: list[str] | None) -> str:  # noqa: ANN401 - a cell of a table
    """Return the name of a class; numbers without names have five digits, so that they sort.

    Raises:
        UserError: the value is neither an integer nor a text.
    """
    if isinstance(value, int):
        return names[value] if names and 0 <= value < len(names) else f"{value:05d}"
    if not isinstance(value, str):
        raise UserError(f"a class is {value!r}; expected an integer or a text")
    return value.replace("/", "-")
