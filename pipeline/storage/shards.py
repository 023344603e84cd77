"""Arrays of many samples on disk: safetensors shards and a manifest, resumable and verified.

A store is written shard by shard, each through the commit protocol, each carrying the key of
the store it belongs to; rank r of P writes shards r, r + P, …; the manifest, written last by
one process, makes the store whole. An interrupted store resumes at its missing shards. What a
shard holds depends on its index alone, so any number of processes writes the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import UserError
from pipeline.storage import atomic

FORMAT = 1
MANIFEST = "manifest.json"
_OWNER = "jkoflow.shard"
Shard = dict[str, Tensor]


def content_key(identity: dict[str, Any]) -> str:
    """The content address of a store: 16 hex digits over a JSON-ready identity."""
    text = json.dumps(identity, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}.safetensors"


class StoreWriter:
    """Writes the shards of a store that are still missing, then its manifest.

    Args:
        folder: where the store lies.
        identity: JSON-ready description of what the store holds and what it was made from.
        count: number of samples.
        shard_size: samples a shard, at most.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], count: int, shard_size: int
    ) -> None:
        if count < 1 or shard_size < 1:
            raise UserError(
                f"a store needs at least one sample and a shard size of at least 1, not {count} "
                f"and {shard_size}"
            )
        self.folder, self.identity = Path(folder), identity
        self.count, self.shard_size = count, shard_size
        self.key = content_key(identity)

    @property
    def shards(self) -> int:
        """Number of shards in all."""
        return math.ceil(self.count / self.shard_size)

    def bounds(self, index: int) -> tuple[int, int]:
        """First and one-past-last sample of a shard."""
        first = index * self.shard_size
        return first, min(first + self.shard_size, self.count)

    def adopt(self, other: StoreReader, usable: int) -> None:
        """Write the shards that another store of the same samples has; one process calls it.

        Args:
            other: a whole store that begins with the samples of this one, and may end sooner.
            usable: how many of its samples, from the first on, are the same.
        """
        if not other.manifest["shards"]:
            return
        names = list(other.shard(0))
        for index in range(self.shards):
            first, last = self.bounds(index)
            if last > min(usable, len(other)):
                return
            if not self._whole(index):
                self.write(index, {name: other.read(name, first, last) for name in names})

    def missing(self, rank: int = 0, ranks: int = 1) -> list[int]:
        """Shards of this rank that are not whole yet; temporaries of the dead are removed."""
        if rank == 0 and self.folder.is_dir():
            atomic.sweep(self.folder)
        return [i for i in range(rank, self.shards, ranks) if not self._whole(i)]

    def write(self, index: int, tensors: Shard) -> None:
        """Commit one shard.

        Raises:
            UserError: a tensor has another number of samples than the shard.
        """
        first, last = self.bounds(index)
        for name, tensor in tensors.items():
            if len(tensor) != last - first:
                raise UserError(
                    f"shard {index} takes {last - first} samples, but {name} has {len(tensor)}"
                )
        atomic.write_tensors(
            self.folder / shard_name(index), tensors, {_OWNER: self._owner(index)}
        )

    def finish(self, extra: Callable[[StoreReader], dict[str, Any]] | None = None) -> StoreReader:
        """Commit the manifest, once every shard is there; one process calls it.

        Args:
            extra: computes further manifest entries (such as mean and std) from the samples.

        Raises:
            UserError: a shard is missing.
        """
        rows = []
        for index in range(self.shards):
            path = self.folder / shard_name(index)
            if not self._whole(index):
                raise UserError(f"{path} is missing or damaged; run the same command again")
            first, last = self.bounds(index)
            rows.append(
                {"file": path.name, "count": last - first, "sha256": atomic.sha256_file(path)}
            )
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
        atomic.write_json(self.folder / MANIFEST, manifest)
        return StoreReader(self.folder, manifest)

    def _owner(self, index: int) -> str:
        """What a shard says of itself, so that a foreign one is not taken for ours."""
        return f"{self.key}/{index}"

    def _whole(self, index: int) -> bool:
        path = self.folder / shard_name(index)
        if not path.is_file():
            return False
        first, last = self.bounds(index)
        with contextlib.suppress(SafetensorError, OSError, ValueError):
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
                sizes = {file.get_slice(name).get_shape()[0] for name in file.keys()}  # noqa: SIM118
            if meta.get(_OWNER) == self._owner(index):
                return sizes == {last - first}
        return False


class StoreReader:
    """A whole store, read by memory map.

    Args:
        folder: where it lies.
        manifest: its manifest; use `open_store` to read and verify one from the disk.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = Path(folder), manifest
        self.starts = np.cumsum([0] + [row["count"] for row in manifest["shards"]])
        self._maps: dict[tuple[str, int], Tensor] = {}

    def __len__(self) -> int:
        return int(self.manifest["count"])

    def shard(self, index: int) -> Shard:
        """The tensors of one shard (memory-mapped)."""
        return atomic.read_tensors(self.folder / self.manifest["shards"][index]["file"])

    def field(self, name: str) -> Tensor:
        """One field over all samples (n, …), in memory."""
        parts = [self.shard(i)[name] for i in range(len(self.manifest["shards"]))]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def take(self, name: str, indices: Tensor) -> Tensor:
        """Samples of a field at sorted or unsorted indices (m,), gathered from mapped shards."""
        if not len(indices):  # of a process whose networks get no sample of a batch
            return self._mapped(name, 0)[:0]
        shards = np.searchsorted(self.starts, indices.numpy(), side="right") - 1
        first = self._mapped(name, int(shards[0]))
        if (shards == shards[0]).all():
            return first[indices - int(self.starts[shards[0]])]
        out = first.new_empty((len(indices), *first.shape[1:]))
        for index in np.unique(shards):
            rows = torch.from_numpy(np.flatnonzero(shards == index))
            out[rows] = self._mapped(name, int(index))[indices[rows] - int(self.starts[index])]
        return out

    def _mapped(self, name: str, index: int) -> Tensor:
        """A field of a shard, kept mapped (not read) for the next call."""
        if (name, index) not in self._maps:
            path = self.folder / self.manifest["shards"][index]["file"]
            with safe_open(path, "pt") as file:
                self._maps[name, index] = file.get_tensor(name)
        return self._maps[name, index]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Samples [start, stop) of a field, touching only the shards they lie in."""
        parts = []
        for index in range(len(self.starts) - 1):
            low, high = int(self.starts[index]), int(self.starts[index + 1])
            if low < stop and high > start:
                rows = self.shard(index)[name][max(start - low, 0) : min(stop, high) - low]
                parts.append(rows)
        return torch.cat(parts) if len(parts) != 1 else parts[0]


def open_store(folder: Path, what: str, identity: dict[str, Any] | None = None) -> StoreReader:
    """Open a whole store; every shard is checked against its sha256.

    Args:
        folder: where it lies.
        what: what to call it in an error.
        identity: what it must hold; None takes what is there.

    Raises:
        UserError: absent, half-written, damaged, of another format or another identity.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no {what} at {folder}; make it first")
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"the {what} at {folder} is unfinished; run the command that makes it again"
        )
    manifest = atomic.read_json(folder / MANIFEST, f"manifest of the {what}")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(
            f"the {what} at {folder} is not of format {FORMAT}; delete it and make it again"
        )
    if identity is not None and manifest.get("key") != content_key(identity):
        raise UserError(
            f"the {what} at {folder} was made from {_differences(manifest, identity)}; delete it "
            "or point to another folder"
        )
    try:
        rows = [(row["file"], row["count"], row["sha256"]) for row in manifest["shards"]]
        whole = bool(rows) and manifest["count"] == sum(count for _, count, _ in rows)
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(
            f"the manifest of the {what} at {folder} is damaged; delete it and run the command "
            "that makes it again"
        )
    for name, _, sha256 in rows:
        try:
            atomic.verify_file(folder / name, sha256)
        except UserError as error:  # deleting the one file would not have it made again
            raise UserError(
                f"{name} of the {what} at {folder} is missing or damaged; delete this folder and "
                "run the command that makes it again"
            ) from error
    return StoreReader(folder, manifest)


def find_similar_stores(
    folder: Path, identity: dict[str, Any], varying: str, min_count: int = 1
) -> list[StoreReader]:
    """Return the whole stores whose identity differs in one key alone, the longest store first.

    A damaged store is left out.

    Args:
        folder: holds one folder for each store.
        identity: identity of the wanted store.
        varying: the key whose value must differ.
        min_count: smallest number of samples.
    """
    stores = []
    for path in sorted(Path(folder).glob(f"*/{MANIFEST}")):
        with contextlib.suppress(UserError, OSError, TypeError, AttributeError):  # damaged
            manifest = atomic.read_json(path, "manifest")
            other = dict(manifest.get("identity"))
            if other.get(varying) == identity.get(varying) or manifest.get("count") < min_count:
                continue
            if {**other, varying: identity.get(varying)} == identity:
                stores.append(open_store(path.parent, "store"))
    return sorted(stores, key=len, reverse=True)


def _differences(manifest: dict[str, Any], identity: dict[str, Any]) -> str:
    found = manifest.get("identity", {})
    names = [k for k in sorted({*found, *identity}) if found.get(k) != identity.get(k)]
    return "other " + ", ".join(names) if names else "other contents"
