"""Stores: arrays of many samples as safetensors shards with a manifest.

Every shard is written atomically, is recorded in the seal of its folder, and carries the key of
its store; rank r of P writes the shards r, r + P, …. The manifest comes last and makes the store
complete. An interrupted store resumes at its missing shards; one that differs from the seal counts
as missing. The content of a shard depends on its index alone, so any number of processes writes
the same bytes.
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
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import JkoflowError, UserError
from pipeline.integrity.digests import remember, remembered
from pipeline.storage import atomic, seal
from pipeline.storage.memory_maps import map_tensors
from pipeline.storage.paths import data_root

FORMAT = 1
MANIFEST = "manifest.json"
#: recipes of a store of images, and of a latent cache, for which it is a configuration
RECIPE, CACHE_RECIPE = "recipe.json", "recipe.yaml"
#: bytes from which the verification of a store is remembered; fewer are hashed in a moment
WORTH_REMEMBERING = 1 << 26
#: shards that a reader keeps mapped; Linux allows a process 65 530 maps
_MOST_MAPS = 1 << 14
#: samples from which a batch is scattered, so that what is read ahead of a sample is of no use
_SCATTERED = 1 << 20
_OWNER = "jkoflow.shard"
Shard = dict[str, Tensor]


def content_key(identity: dict[str, Any]) -> str:
    """Return the key of a store: 16 hex digits of the sha256 of its JSON-ready identity."""
    text = json.dumps(identity, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shard_name(index: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{index:05d}.safetensors"


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


class StoreReader:
    """Reader of a complete store by memory maps; `open_store` verifies it first."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = Path(folder), manifest
        self.starts = np.cumsum([0] + [row["count"] for row in manifest["shards"]])
        self._maps: dict[int, Shard] = {}

    def __len__(self) -> int:
        return int(self.manifest["count"])

    @property
    def place(self) -> str:
        """Place of the store: its folder."""
        return str(self.folder)

    def check_shards(self, check: Callable[[int], None]) -> None:
        """Call `check` with the index of every shard."""
        for index in range(len(self.manifest["shards"])):
            check(index)

    def shard(self, index: int) -> Shard:
        """Return the memory-mapped tensors of a shard, (n, …) by name."""
        return atomic.read_tensors(self.folder / self.manifest["shards"][index]["file"])

    def shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the fields of a shard; no tensor is read."""
        with safe_open(self.folder / self.manifest["shards"][index]["file"], "pt") as file:
            names = file.keys()
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}

    def field(self, name: str) -> Tensor:
        """Return one field of all samples (n, …), in memory."""
        return self.read(name, 0, len(self))

    def take(self, name: str, indices: Tensor) -> Tensor:
        """Return the samples (m, …) of a field at indices (m,) in any order."""
        if not len(indices):  # a rank whose networks get no sample of a batch
            return self._mapped(name, 0)[:0]
        shards = np.searchsorted(self.starts, indices.numpy(), side="right") - 1
        first = self._mapped(name, int(shards[0]))
        if (shards == shards[0]).all():
            return first[indices - int(self.starts[shards[0]])]
        out = first.new_empty((len(indices), *first.shape[1:]))
        order = np.argsort(shards, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            rows, index = torch.from_numpy(part), int(shards[part[0]])
            out[rows] = self._mapped(name, index)[indices[rows] - int(self.starts[index])]
        return out

    def _mapped(self, name: str, index: int) -> Tensor:
        """Return a field of a shard as a memory map, kept for later calls."""
        if index not in self._maps:
            if len(self._maps) >= _MOST_MAPS:
                del self._maps[next(iter(self._maps))]
            path = self.folder / self.manifest["shards"][index]["file"]
            self._maps[index] = map_tensors(path) if len(self) >= _SCATTERED else load_file(path)
        return self._maps[index][name]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the samples [start, stop) of a field, (n, …); only their shards are read."""
        parts, shards = [], len(self.starts) - 1
        first = min(int(np.searchsorted(self.starts, start, side="right")) - 1, shards - 1)
        last = max(int(np.searchsorted(self.starts, stop, side="left")), first + 1)
        for index in range(first, last):
            low, high = int(self.starts[index]), int(self.starts[index + 1])
            rows = self.shard(index)[name][max(start - low, 0) : min(stop, high) - low]
            parts.append(rows)
        return torch.cat(parts) if len(parts) != 1 else parts[0]


def open_store(folder: Path, what: str, identity: dict[str, Any] | None = None) -> StoreReader:
    """Open a complete store and verify the sha256 of every shard.

    The data root keeps size, times and inode of the verified shards of a large store. A shard that
    still has them is not hashed again, also by another process. `jkoflow verify` hashes all.

    `what` names the store in messages. An identity of None accepts any.

    Raises:
        UserError: the store is absent, incomplete, damaged, or of another format or identity.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{what} {folder} does not exist; make it first")
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{what} {folder} is incomplete; run the command that makes it again"
        )
    seal.require(folder, what)
    manifest = atomic.read_json(folder / MANIFEST, f"manifest of {what}")
    mend = f"make it again by `jkoflow verify {folder} --repair`"
    rows = require_manifest(manifest, folder, what, mend)
    if identity is not None:
        require_identity(manifest, identity, folder, what)
    known = _recall(folder)
    for name, _, sha256 in rows:
        try:
            atomic.verify_file(folder / name, sha256)
        except UserError as error:  # a deleted shard alone would not be made again
            raise UserError(
                f"{name} of {what} {folder} is missing or damaged; make it again by `jkoflow "
                f"verify {folder} --repair`"
            ) from error
    states = {name: state for name, _, _ in rows if (state := remembered(folder / name))}
    if states != known and sum(int(state[0]) for state in states.values()) >= WORTH_REMEMBERING:
        with contextlib.suppress(JkoflowError):  # a data root that this process cannot write
            atomic.write_bytes(_memory(folder), json.dumps(states).encode(), sealed=False)
    return StoreReader(folder, manifest)


def require_manifest(
    manifest: Any,  # noqa: ANN401 - JSON
    place: Path | str,
    what: str,
    mend: str,
) -> list[tuple[str, int, str]]:
    """Return name, number of samples and sha256 of every shard of a store, by its manifest.

    Args:
        manifest: of the store.
        place: of the store, in messages.
        what: name of the store in messages.
        mend: what to do about a damaged manifest.

    Raises:
        UserError: the manifest is damaged or has another format.
    """
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(
            f"{what} {place} has another format; expected {FORMAT}; delete it and make it again"
        )
    try:
        rows = [(row["file"], row["count"], str(row["sha256"])) for row in manifest["shards"]]
        described = isinstance(manifest["key"], str) and isinstance(manifest["identity"], dict)
        total = sum(count for _, count, _ in rows)
        complete = described and bool(rows) and manifest["count"] == total
        complete = complete and all(type(count) is int and count > 0 for _, count, _ in rows)
        names = [shard_name(index) for index in range(len(rows))]
        complete = complete and [name for name, _, _ in rows] == names
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise UserError(f"manifest of {what} {place} is damaged; {mend}")
    return rows


def require_identity(
    manifest: dict[str, Any], identity: dict[str, Any], folder: Path | str, what: str
) -> None:
    """Raise UserError unless the manifest of a store, which `what` names, has an identity."""
    if not isinstance(manifest, dict) or manifest.get("key") != content_key(identity):
        raise UserError(
            f"{what} {folder} was made from {_differences(manifest, identity)}; delete it or "
            "choose another folder"
        )


def _memory(folder: Path) -> Path:
    """Return the file under the data root with the states of a store's verified shards."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return data_root() / "verified" / f"{name}.json"


def _recall(folder: Path) -> dict[str, list[int | str]]:
    """Take over the hashes of earlier processes; those of files that have changed do not count."""
    try:
        states: dict[str, list[int | str]] = json.loads(_memory(folder).read_text())
        for name, state in states.items():
            remember(folder / name, state)
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return states


def find_similar_stores(
    folder: Path, identity: dict[str, Any], varying: str, min_count: int = 1
) -> list[StoreReader]:
    """Return the whole stores in a folder whose identity differs in one key alone, longest first.

    Stores that are damaged or have fewer than `min_count` samples are left out.
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
    """Name the keys in which the identity of a manifest differs."""
    stored = manifest.get("identity", {})
    names = [k for k in sorted({*stored, *identity}) if stored.get(k) != identity.get(k)]
    return "other " + ", ".join(names) if names else "other contents"
