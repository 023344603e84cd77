"""Files at addresses of fsspec, such as those of an object store; an error is one sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from pipeline.errors import JkoflowError, UserError
from pipeline.integrity.limits import LimitError, require_size
from pipeline.integrity.reason import reason_of


def is_url(place: object) -> bool:
    """Return whether a place is an address of a file system of fsspec, such as `s3://bucket`."""
    return "://" in str(place)


@contextlib.contextmanager
def reading(what: str, *others: type[Exception]) -> Iterator[None]:
    """Turn the errors of a file system of fsspec into one sentence.

    Args:
        what: is read.
        others: kinds of errors that remain as they are.

    Raises:
        UserError: something cannot be read.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - file systems raise errors of many libraries
        if isinstance(error, (JkoflowError, *others)):
            raise
        if isinstance(error, LimitError):
            raise UserError(str(error)) from error
        reason = reason_of(error)
        raise UserError(
            f"{what} cannot be read ({reason}); check the address and the credentials, or "
            "install the file system's library (s3://: pip install s3fs)"
        ) from error


def exists(system: Any, path: str) -> bool:  # noqa: ANN401 - untyped library
    """Return whether a file exists; other errors than its absence are raised.

    `exists` of fsspec takes missing credentials for the absence of the file.
    """
    try:
        system.info(path)
    except FileNotFoundError:
        return False
    return True


def read_file(system: Any, path: str, part: int) -> bytes:  # noqa: ANN401 - untyped library
    """Read a file of at most `1 / part` of the limit."""
    require_size(int(system.info(path)["size"]), path, part)
    return bytes(system.cat_file(path))
