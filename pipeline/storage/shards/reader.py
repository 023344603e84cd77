"""Reader of stores: samples in order, or at random places of shards that stay mapped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pipeline.storage import atomic
from pipeline.storage.shards.manifest import Shard
from pipeline.storage.shards.memory_maps import map_tensors

#: shards that a reader keeps mapped; Linux allows a process 65 530 maps
_MOST_MAPS = 1 << 14
#: samples from which a batch is scattered: what the system reads ahead of a sample is of no use,
#: and a training reads the next batch ahead
SCATTERED = 1 << 20


class StoreReader:
    """Reader of a complete store by memory maps; `open_store` verifies it first."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = Path(folder), manifest
        self.starts = np.cumsum([0] + [row["count"] for row in manifest["shards"]])
        self._maps: dict[int, Shard] = {}
        self._mapping = threading.Lock()  # a training may read ahead in a thread

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
        with self._mapping:
            if index not in self._maps:
                if len(self._maps) >= _MOST_MAPS:
                    del self._maps[next(iter(self._maps))]
                path = self.folder / self.manifest["shards"][index]["file"]
                scattered = len(self) >= SCATTERED
                self._maps[index] = map_tensors(path) if scattered else load_file(path)
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
