"""Verification of a cache at an address of fsspec: its files are hashed, and none is kept.

The shards must have the sha256 of the manifest, and all other files one of the seal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

from pipeline.errors import UserError
from pipeline.integrity.limits import DOCUMENT, LIST
from pipeline.storage import seal
from pipeline.storage.remote_files import read_file, reading
from pipeline.storage.shards.manifest import MANIFEST, require_manifest
from pipeline.storage.shards.remote import FETCH_AGAIN

#: files that are read at once, and bytes of each in memory
_THREADS, _CHUNK = 8, 1 << 20
_WHAT = "the cache at"


def find_broken(url: str) -> Iterator[tuple[str, str]]:
    """Yield the broken files of a cache, by name, each with damaged or missing.

    Args:
        url: of the cache, such as `s3://bucket/latents/NAME`.

    Raises:
        UserError: it has no seal, the address cannot be read, or its manifest is of another
            format.
    """
    import fsspec

    with reading(f"{_WHAT} {url}"):
        system, root = fsspec.core.url_to_fs(url.rstrip("/"))
        text = _content(system, f"{root}/{seal.NAME}", LIST)
    if text is None:
        raise UserError(
            f"{_WHAT} {url} has no {seal.NAME}; expected the address of one cache; copy its whole "
            "folder there"
        )
    sums = {name: known for name, known in seal.parse(text).items() if _is_inside(name)}
    with reading(f"{MANIFEST} of {url}"):
        text = _content(system, f"{root}/{MANIFEST}", DOCUMENT)
    known = sums.pop(MANIFEST, [])
    needed: dict[str, Sequence[str]] = {}
    if text is None:
        yield MANIFEST, "missing"
    elif hashlib.sha256(text).hexdigest() not in known:
        yield MANIFEST, "damaged"
    else:
        rows = require_manifest(_json(text), url, _WHAT, FETCH_AGAIN)
        needed = {name: [sha256] for name, _, sha256 in rows}

    def digest(name: str) -> str | None:
        with reading(f"{name} of {url}"):
            return _sha256(system, f"{root}/{name}")

    expected = dict(sorted({**sums, **needed}.items()))
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for name, found in zip(expected, pool.map(digest, expected), strict=True):
            if found is None and name in needed:
                yield name, "missing"
            elif found is not None and found not in expected[name]:
                yield name, "damaged"
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, too


def _is_inside(name: str) -> bool:
    """Return whether a name of a seal, which may be foreign, lies in its folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "://" not in name


def _json(text: bytes) -> Any:  # noqa: ANN401 - JSON
    """Return the value of a JSON document; None if it is none, which no manifest is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _content(system: Any, path: str, part: int) -> bytes | None:  # noqa: ANN401 - untyped library
    """Read a small file; None if it is absent."""
    try:
        return read_file(system, path, part)
    except FileNotFoundError:
        return None


def _sha256(system: Any, path: str) -> str | None:  # noqa: ANN401
    """Return the sha256 of a file, of which one piece at a time is in memory; None if absent."""
    digest = hashlib.sha256()
    try:
        with system.open(path, "rb", cache_type="none") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except FileNotFoundError:
        return None
    return digest.hexdigest()
