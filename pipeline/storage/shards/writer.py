"""Writer of stores: every shard is written atomically, and the manifest last.

A shard is recorded in the seal of its folder, and carries the key of its store; rank r of P writes
the shards r, r + P, …. An interrupted store resumes at its missing shards; one that differs from
the seal counts as missing. The content of a shard depends on its index alone, so any number of
processes writes the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.errors import UserError
from pipeline.storage import atomic, seal
from pipeline.storage.shards.manifest import (
    CACHE_RECIPE,
    FORMAT,
    MANIFEST,
    RECIPE,
    Shard,
    content_key,
    shard_name,
)
from pipeline.storage.shards.reader import StoreReader

_OWNER = "jkoflow.shard"


class StoreWriter:
    """Writer of a store of `count` samples: missing shards first, then the manifest.

    The JSON-ready identity describes the content and its inputs.

    Raises:
        UserError: a number is less than 1.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], count: int, shard_size: int
    ) -> None:
        if count < 1 or shard_size < 1:
            raise UserError(
                f"the store has {count} samples and shard size {shard_size}; expected at least 1; "
                "change the number of samples or shard_size"
            )
        self.folder, self.identity = Path(folder), identity
        self.count, self.shard_size = count, shard_size
        self.key = content_key(identity)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return math.ceil(self.count / self.shard_size)

    def bounds(self, index: int) -> tuple[int, int]:
        """Return the index of the first sample of a shard and the index after its last."""
        first = index * self.shard_size
        return first, min(first + self.shard_size, self.count)

    def adopt(self, other: StoreReader, usable: int) -> None:
        """Copy the shards of another store whose first `usable` samples are those of this store.

        One process calls it.
        """
        if not other.manifest["shards"]:
            return
        names = list(other.shard(0))
        for index in range(self.shards):
            first, last = self.bounds(index)
            if last > min(usable, len(other)):
                return
            if not self._is_complete(index):
                self.write(index, {name: other.read(name, first, last) for name in names})

    def missing(self, rank: int = 0, ranks: int = 1) -> list[int]:
        """Return the missing shards of this rank; remove temporary files of killed processes."""
        if rank == 0 and self.folder.is_dir():
            atomic.remove_temporaries(self.folder)
        return [i for i in range(rank, self.shards, ranks) if not self._is_complete(i)]

    def write(self, index: int, tensors: Shard) -> None:
        """Write one shard, tensors of shape (n, …).

        Raises:
            UserError: a tensor has another number of samples than the shard.
        """
        first, last = self.bounds(index)
        for name, tensor in tensors.items():
            if len(tensor) != last - first:
                raise UserError(
                    f"{name} of shard {index} has {len(tensor)} samples; expected {last - first}"
                )
        seal.start(self.folder)
        atomic.write_tensors(
            self.folder / shard_name(index), tensors, {_OWNER: self._owner(index)}
        )

    def finish(self, extra: Callable[[StoreReader], dict[str, Any]] | None = None) -> StoreReader:
        """Write the manifest after all shards; one process calls it.

        `extra` computes more entries of the manifest (such as mean and std) from the samples.

        Raises:
            UserError: a shard is missing.
        """
        rows = []
        for index in range(self.shards):
            path = self.folder / shard_name(index)
            sha256 = self._sha256(index)
            if sha256 is None:
                raise UserError(f"{path} is missing or damaged; run the same command again")
            first, last = self.bounds(index)
            rows.append({"file": path.name, "count": last - first, "sha256": sha256})
        manifest = {
            "format": FORMAT,
            "key": self.key,
            "identity": self.identity,
            "count": self.count,
            "shards": rows,
            "complete": True,
        }
        if extra is not None:
            manifest |= extra(StoreReader(self.folder, manifest))
        text = atomic.json_bytes(manifest)
        sums = {str(row["file"]): str(row["sha256"]) for row in rows}
        sums[MANIFEST] = hashlib.sha256(text).hexdigest()
        sums |= self._recipes()
        atomic.write_bytes(self.folder / seal.NAME, seal.lines(sums))
        atomic.write_bytes(self.folder / MANIFEST, text, sealed=False)  # its line is there
        return StoreReader(self.folder, manifest)

    def _recipes(self) -> dict[str, str]:
        """Return the sha256 of the recipes in the folder, by name."""
        known = seal.recorded(self.folder)
        names = [n for n in (RECIPE, CACHE_RECIPE) if n in known and (self.folder / n).is_file()]
        return {name: known[name][-1] for name in names}

    def _owner(self, index: int) -> str:
        """Return the metadata of a shard, which tells it from shards of other stores."""
        return f"{self.key}/{index}"

    def _is_complete(self, index: int) -> bool:
        return self._sha256(index) is not None

    def _sha256(self, index: int) -> str | None:
        """Return the sha256 of a shard that is as it was written; None if another must be.

        The shard belongs to this store, has its number of samples, and is in the seal.
        """
        path = self.folder / shard_name(index)
        if not path.is_file():
            return None
        first, last = self.bounds(index)
        with contextlib.suppress(SafetensorError, OSError, ValueError):
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
                sizes = {file.get_slice(name).get_shape()[0] for name in file.keys()}  # noqa: SIM118
            sha256 = atomic.sha256_file(path)
            if meta.get(_OWNER) == self._owner(index) and sizes == {last - first}:
                return sha256 if seal.is_whole(path, sha256) else None
        return None
