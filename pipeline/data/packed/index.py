"""Index of the images of tar shards, tables and remote folders, made in one pass over the data.

It holds their names, places and hashes and is stored under the data root.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from eval.sets.tables import SUFFIXES
from pipeline.config.data import DataConfig
from pipeline.data.image_folder import ENDINGS
from pipeline.data.packed.places import Place, split_folder
from pipeline.data.packed.tables import place_of_tables, table_places
from pipeline.data.packed.tar_shards import tar_places
from pipeline.errors import UserError
from pipeline.integrity.limits import require_size
from pipeline.runtime.console import say
from pipeline.storage import atomic, seal
from pipeline.storage.lock import locked
from pipeline.storage.paths import data_root
from pipeline.storage.remote_files import is_url, reading
from pipeline.storage.shards.manifest import content_key

#: files that are read at once
THREADS = 8


def index(data: DataConfig) -> tuple[str, list[Place]]:
    """Return the address and the places of all images, which are found and hashed once.

    Images of tables are in the order of their rows.

    The index is sealed; a broken one is made again.

    Raises:
        UserError: nothing is there, it cannot be read, or two images have one name.
    """
    if not data.path:
        raise UserError(f"data.path is null; set it to the images of data.name={data.name}")
    place = place_of_tables(data) if data.name == "hf" else data.path
    url = place if is_url(place) else str(Path(place).expanduser())
    if not is_url(url) and not Path(url).exists():
        raise UserError(f"data.path is {url}, which does not exist; check the path")
    endings = {"webdataset": (".tar",), "hf": SUFFIXES}.get(data.name, ENDINGS)
    system, files = _listing(url, endings)
    facts = [
        [name, info["size"], str(info.get("ETag") or info.get("mtime") or info.get("created"))]
        for name, info in files.items()
    ]
    where = url if is_url(url) else os.path.abspath(url)
    identity = {"format": 3, "name": data.name, "url": where, "files": facts}
    if data.name == "hf":
        identity["columns"] = data.columns
    path = data_root() / "packed" / f"{content_key(identity)}.json"
    if not seal.is_whole(path):
        with locked(path, "the index", say):
            if not seal.is_whole(path):  # no other process was faster
                with reading(f"data.path {url}", ValueError):  # of a damaged table
                    found = _found(data, system, files)
                seal.start(path.parent)
                atomic.write_bytes(path, json.dumps(found).encode())
    stored = atomic.read_json(path, "index of images", part=1)
    return url, [Place(*row) for row in stored]


def _found(data: DataConfig, system: Any, files: dict[str, dict[str, Any]]) -> list[Place]:  # noqa: ANN401
    """Return the places of all images of some files."""
    places: dict[str, Place] = {}
    if data.name == "hf":
        rows = table_places(system, files, data.columns)
    else:
        rows = (tar_places if data.name == "webdataset" else _file_places)(system, files)
    for place in rows:
        if place.name in places:
            raise UserError(f"two images are called {place.name}; expected one of a name")
        places[place.name] = place
    return list(places.values())


def _listing(url: str, endings: tuple[str, ...]) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Return a file system, and its files below an address by their names in it."""
    import fsspec

    kinds = " or ".join(endings[:2])
    with reading(f"data.path {url}"):
        system, root = fsspec.core.url_to_fs(url)
        listing = {p: _follow(p, f) for p, f in system.find(root, detail=True).items()}
    info = listing.get(root) or (system.info(root) if root in listing else {})
    if info.get("type") == "file":
        return system, {PurePosixPath(root).name: info | {"name": root}}
    files = {
        os.path.relpath(path, root): info | {"name": path}
        for path, info in sorted(listing.items())
        if path.lower().endswith(endings) and info.get("type", "file") == "file"
    }
    files = {n: info for n, info in files.items() if not f"/{n}".count("/.")}
    if not files:
        what = {ENDINGS: "images", SUFFIXES: "tables"}.get(endings, "tar files")
        raise UserError(f"data.path is {url}, which has no {what}; expected {kinds}, …")
    return system, files


def _follow(path: str, info: dict[str, Any]) -> dict[str, Any]:
    """Return the properties of the file that a local link points to; others are as they are."""
    if not info.get("islink") or not os.path.isfile(path):
        return info
    state = os.stat(path)
    return info | {"type": "file", "size": state.st_size, "mtime": state.st_mtime}


def _file_places(system: Any, files: dict[str, dict[str, Any]]) -> Iterator[Place]:  # noqa: ANN401
    """Yield the places of files of images, which are read to hash them."""

    def place(name: str) -> Place:
        path, size = files[name]["name"], files[name]["size"]
        require_size(size, path)
        sha256 = hashlib.sha256(system.cat_file(path)).hexdigest()
        return Place(name, path, 0, size, sha256, split_folder(name))

    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(place, files)
