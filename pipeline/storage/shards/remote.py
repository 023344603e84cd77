"""Stores on an object store, read through local copies of a bounded size.

A shard is copied when a sample of it is first needed. Its sha256 is compared with the manifest's
when it is copied, and when a process uses a copy for the first time. The oldest copies are removed
before all copies together would exceed the bound.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from pipeline.errors import JkoflowError, UserError
from pipeline.integrity.digests import sha256_file
from pipeline.integrity.limits import DOCUMENT, LIST
from pipeline.storage import atomic, seal
from pipeline.storage.remote_files import exists, read_file, reading
from pipeline.storage.shards.local_copies import BOUND, alone, bound, copies_folder, make_room
from pipeline.storage.shards.manifest import MANIFEST, Shard, require_manifest
from pipeline.storage.shards.memory_maps import map_tensors
from pipeline.storage.shards.reader import StoreReader

#: shards that are copied at once
_THREADS = 8
_CHUNK = 1 << 20
#: copies that other processes may remove in a row before this one has read them
_ATTEMPTS = 100
FETCH_AGAIN = "copy the folder of the cache to that address again"


class RemoteStoreReader(StoreReader):
    """Reader of a complete store at an address; `open_remote_store` verifies its manifest first.

    A removed copy that this process still maps keeps its room until the tensors are freed.
    """

    def __init__(
        self, url: str, system: Any, root: str, folder: Path, manifest: dict[str, Any]  # noqa: ANN401
    ) -> None:
        super().__init__(folder, manifest)
        self.url, self._system, self._root = url, system, root
        self._seen: dict[int, tuple[int, int, int]] = {}
        self._check: Callable[[int], None] = lambda index: None

    @property
    def place(self) -> str:
        """Address of the store."""
        return self.url

    def check_shards(self, check: Callable[[int], None]) -> None:
        """Call `check` with the index of every shard when this process first uses it."""
        self._check = check

    def shard(self, index: int) -> Shard:
        """Return the memory-mapped tensors of a shard, (n, …) by name; copy it where needed.

        Raises:
            UserError: the shard is missing or damaged, or exceeds the bound.
            JkoflowError: it cannot be copied.
        """
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                if self._is_whole(index):
                    return map_tensors(self._path(index))
            self._fetch([index])
        raise JkoflowError(
            f"{self._path(index)} was removed by other processes before it was read; expected "
            f"room for the shards of every process; raise {BOUND}"
        )

    def take(self, name: str, indices: Tensor) -> Tensor:
        """Return the samples (m, …) of a field at indices (m,) in any order."""
        shards = np.unique(np.searchsorted(self.starts, indices.numpy(), side="right") - 1)
        self._fetch(int(index) for index in shards)
        return super().take(name, indices)

    def _mapped(self, name: str, index: int) -> Tensor:
        """Return a field of a shard as a memory map, which is not kept."""
        return self.shard(index)[name]

    def _path(self, index: int) -> Path:
        """Return the place of the copy of a shard."""
        return self.folder / str(self.manifest["shards"][index]["file"])

    def _is_whole(self, index: int) -> bool:
        """Return whether the copy of a shard exists with the content of the manifest."""
        path = self._path(index)
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            state = (found.st_ino, found.st_size, found.st_mtime_ns)
            if self._seen.get(index) == state:
                return True
            if sha256_file(path) == self.manifest["shards"][index]["sha256"]:
                self._require_fields(index)
                self._seen[index] = state
                return True
        return False

    def _require_fields(self, index: int) -> None:
        """Check the fields of a whole shard; a ValueError of the check becomes a UserError."""
        try:
            self._check(index)
        except (ValueError, KeyError) as error:
            raise UserError(
                f"the manifest of {self.url} does not describe its shards ({error}); "
                f"{FETCH_AGAIN}"
            ) from error

    def _fetch(self, indices: Iterable[int]) -> None:
        """Copy those shards that have no whole copy, as many of the first ones as have room."""
        wanted = list(indices)
        if all(self._is_whole(index) for index in wanted):
            return
        with alone(self.folder.parent):
            missing = [index for index in wanted if not self._is_whole(index)]
            with ThreadPoolExecutor(_THREADS) as pool:
                sizes = dict(zip(missing, pool.map(self._size, missing), strict=True))
                some, total = list[int](), 0
                for index, size in sizes.items():
                    if total + size > bound():
                        break
                    some, total = [*some, index], total + size
                if missing and not some:
                    raise UserError(
                        f"{BOUND} is {bound() / 2**30:g}; expected room for a shard of "
                        f"{sizes[missing[0]] / 2**30:g} GiB; raise it"
                    )
                make_room(self.folder.parent, total, {self._path(index) for index in wanted})
                list(pool.map(self._copy, some))

    def _size(self, index: int) -> int:
        """Return the bytes of a shard at the address."""
        with self._reading(index):
            return int(self._system.info(self._remote(index))["size"])

    def _copy(self, index: int) -> None:
        """Copy a shard, and verify its sha256."""

        def fill(file: IO[bytes]) -> None:
            with contextlib.ExitStack() as stack:
                with self._reading(index):
                    source = stack.enter_context(self._system.open(self._remote(index), "rb"))
                while True:
                    with self._reading(index):
                        chunk = source.read(_CHUNK)
                    if not chunk:
                        return
                    file.write(chunk)

        row = self.manifest["shards"][index]
        if atomic.write_with(self._path(index), fill, sealed=False) != row["sha256"]:
            self._path(index).unlink(missing_ok=True)
            raise UserError(
                f"{row['file']} of {self.url} is damaged; expected the sha256 of its manifest; "
                f"{FETCH_AGAIN}"
            )

    def _remote(self, index: int) -> str:
        """Return the name of a shard in the file system of the address."""
        return f"{self._root}/{self.manifest['shards'][index]['file']}"

    def _reading(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Turn the errors of the file system into one sentence about a shard."""
        return reading(f"{self.manifest['shards'][index]['file']} of {self.url}")


def open_remote_store(url: str, what: str) -> RemoteStoreReader:
    """Open a complete store at an address of fsspec; its shards are verified at their first use.

    `what` names the store in messages.

    Raises:
        UserError: the store is absent, incomplete or of another format, the address cannot be
            read, or the bound of the copies is invalid.
    """
    reader = find_remote_store(url, what)
    if reader is None:
        raise UserError(
            f"{what} {url} is absent or incomplete; expected {MANIFEST} and {seal.NAME} there; "
            "copy the whole folder of a cache to that address"
        )
    return reader


def find_remote_store(url: str, what: str) -> RemoteStoreReader | None:
    """Open a store as `open_remote_store` does; None if it is absent or incomplete.

    Raises:
        UserError: the address cannot be read, or the store is damaged or of another format.
    """
    import fsspec

    bound()
    with reading(f"{what} {url}"):
        system, root = fsspec.core.url_to_fs(url.rstrip("/"))
        if not (exists(system, f"{root}/{MANIFEST}") and exists(system, f"{root}/{seal.NAME}")):
            return None
        sums = read_file(system, f"{root}/{seal.NAME}", LIST)
        text = read_file(system, f"{root}/{MANIFEST}", DOCUMENT)
    if f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}" not in sums.decode(errors="replace"):
        raise UserError(
            f"{MANIFEST} of {what} {url} is damaged or foreign; expected a sha256 of "
            f"{seal.NAME}; {FETCH_AGAIN}"
        )
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{MANIFEST} of {what} {url} is not JSON ({error}); {FETCH_AGAIN}"
        ) from error
    require_manifest(manifest, url, what, FETCH_AGAIN)
    name = hashlib.sha256(f"{url} {manifest.get('key')}".encode()).hexdigest()[:16]
    return RemoteStoreReader(url, system, root, copies_folder() / name, manifest)
