"""Latent caches of many latents, as sparse files, or as real ones that are not in memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.data.standardisation import Standardisation
from pipeline.integrity.digests import sha256_file
from pipeline.storage import atomic, seal
from pipeline.storage.shards.manifest import FORMAT, MANIFEST, content_key, shard_name
from pipeline.storage.shards.opening import memory_file, open_store
from pipeline.storage.shards.writer import StoreWriter

SHARD = 10_000
#: seconds after which the hash of a new file is remembered
_SETTLED = 5.0


def write_sparse_cache(folder: Path, count: int, shape: tuple[int, ...]) -> None:
    """Write a stochastic cache whose shards are holes, and remember their verification."""
    identity = {
        "kind": "latents", "format": FORMAT, "data": "sparse", "dataset": "latents",
        "split": "train", "count": count, "latent_shape": list(shape), "stochastic": True,
        "shard_size": SHARD,
    }  # fmt: skip
    seal.start(folder)
    rows, states, sums = [], {}, {}
    for index in range(math.ceil(count / SHARD)):
        size = min(SHARD, count - index * SHARD)
        path = folder / shard_name(index)
        _write_hole(path, size, shape)
        if not index or size < SHARD:
            sha256 = sha256_file(path)
        state = os.stat(path)
        states[path.name] = [
            state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_dev, state.st_ino, sha256
        ]
        sums[path.name] = sha256
        rows.append({"file": path.name, "count": size, "sha256": sha256})
    channels = torch.zeros(shape[0])
    manifest = {
        "format": FORMAT, "key": content_key(identity), "identity": identity,
        "count": count, "shards": rows, "complete": True,
        "standardisation": Standardisation(channels, channels + 1).to_dict(),
        "classes": [[0, count]],
    }  # fmt: skip
    text = atomic.json_bytes(manifest)
    sums[MANIFEST] = hashlib.sha256(text).hexdigest()
    atomic.write_bytes(folder / seal.NAME, seal.lines(sums))
    atomic.write_bytes(folder / MANIFEST, text, sealed=False)
    atomic.write_bytes(memory_file(folder), json.dumps(states).encode(), sealed=False)


def _write_hole(path: Path, size: int, shape: tuple[int, ...]) -> None:
    """Write a safetensors file of zeros that takes no room: its header, and a hole."""
    header: dict[str, Any] = {}
    end = 0
    for name, kind, sides, width in (
        ("labels", "I64", [size], 8),
        ("log_var", "F32", [size, *shape], 4),
        ("mean", "F32", [size, *shape], 4),
    ):
        begin, end = end, end + width * math.prod(sides)
        header[name] = {"dtype": kind, "shape": sides, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_cold_cache(folder: Path, count: int, shape: tuple[int, ...]) -> None:
    """Write a stochastic cache of zeros that takes room, and drop its pages from memory."""
    identity = {
        "kind": "latents", "dataset": "latents", "data": "zeros", "split": "train",
        "count": count, "latent_shape": list(shape), "stochastic": True, "shard_size": SHARD,
    }  # fmt: skip
    writer = StoreWriter(folder, identity, count, SHARD)
    for index in writer.missing():
        first, last = writer.bounds(index)
        zeros = torch.zeros(last - first, *shape)
        labels = torch.zeros(last - first, dtype=torch.int64)
        writer.write(index, {"mean": zeros, "log_var": zeros.clone(), "labels": labels})
    channels = torch.zeros(shape[0])
    moments = Standardisation(channels, channels + 1).to_dict()
    writer.finish(lambda _: {"standardisation": moments, "classes": [[0, count]]})
    time.sleep(_SETTLED)
    open_store(folder, "latent cache")  # remembers that it is verified


def drop_pages(folder: Path) -> None:
    """Drop the pages of the files in a folder from memory."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
