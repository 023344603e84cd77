"""Index of the images of tar shards and remote folders, made in one pass over the data.

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

from pipeline.config.data import DataConfig
from pipeline.data.image_folder import ENDINGS
from pipeline.data.packed.places import Place
from pipeline.data.packed.tar_shards import tar_places
from pipeline.errors import UserError
from pipeline.integrity.limits import require_size
from pipeline.storage import atomic
from pipeline.storage.paths import data_root
from pipeline.storage.shards import content_key

#: files that are read at once
THREADS = 8


def index(data: DataConfig) -> list[Place]:
    """Return the places of all images; they are found and hashed in one pass, once.

    Raises:
        UserError: nothing is there, it cannot be read, or two images have one name.
    """
    url = str(data.path) if "://" in str(data.path) else str(Path(str(data.path)).expanduser())
    system, files = _listing(url, (".tar",) if data.name == "webdataset" else ENDINGS)
    facts = [
        [name, info["size"], str(info.get("ETag") or info.get("mtime") or info.get("created"))]
        for name, info in files.items()
    ]
    key = content_key({"name": data.name, "url": os.path.abspath(url) if "://" not in url else url,
                       "files": facts})  # fmt: skip
    path = data_root() / "packed" / f"{key}.json"
    if path.is_file():
        stored = atomic.read_json(path, "index of images", part=1)
        return [Place(*row) for row in stored]
    find = tar_places if data.name == "webdataset" else _file_places
    places: dict[str, Place] = {}
    for place in find(system, files):
        if place.name in places:
            raise UserError(f"two images are called {place.name}; expected one of a name")
        places[place.name] = place
    atomic.write_bytes(path, json.dumps(list(places.values())).encode(), sealed=False)
    return list(places.values())


def _listing(url: str, endings: tuple[str, ...]) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Return a file system, and its files below an address by their names in it."""
    import fsspec

    kinds = " or ".join(endings[:2])
    try:
        system, root = fsspec.core.url_to_fs(url)
        listing = system.find(root, detail=True)
    except Exception as error:  # noqa: BLE001 - file systems raise errors of many libraries
        raise UserError(
            f"data.path is {url}, which cannot be read ({' '.join(str(error).split())[:200]}); "
            "install the file system's library (s3://: pip install s3fs) or check the address"
        ) from error
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
        what = "images" if endings is ENDINGS else "tar files"
        raise UserError(f"data.path is {url}, which has no {what}; expected {kinds}, …")
    return system, files


def _file_places(system: Any, files: dict[str, dict[str, Any]]) -> Iterator[Place]:  # noqa: ANN401
    """Yield the places of files of images, which are read to hash them."""

    def place(name: str) -> Place:
        path, size = files[name]["name"], files[name]["size"]
        require_size(size, path)
        return Place(name, path, 0, size, hashlib.sha256(system.cat_file(path)).hexdigest())

    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(place, files)
