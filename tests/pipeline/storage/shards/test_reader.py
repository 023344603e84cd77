"""A reader returns the samples that were written, in any order."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.storage.shards.opening import open_store
from tests.pipeline.storage.shards.stores import COUNT, IDENTITY, rows


def test_a_store_is_read_back(folder: Path) -> None:
    store = open_store(folder, "store", IDENTITY)
    everything = rows(0, COUNT)
    assert len(store) == COUNT
    assert torch.equal(store.field("x"), everything)
    assert torch.equal(store.read("x", 3, 17), everything[3:17])
    assert torch.equal(store.read("x", 5, 10), everything[5:10])
    chosen = torch.tensor([22, 0, 4, 5, 5, 19, 0])
    assert torch.equal(store.take("x", chosen), everything[chosen])
    assert torch.equal(store.take("n", torch.tensor([7, 6])), torch.tensor([7, 6]))
    assert store.take("x", torch.empty(0, dtype=torch.long)).shape == (0, 2)
