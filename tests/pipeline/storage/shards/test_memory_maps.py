"""Memory maps of safetensors files hold what safetensors reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.storage.shards import reader
from pipeline.storage.shards.memory_maps import map_tensors
from pipeline.storage.shards.writer import StoreWriter

KINDS = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")


def test_maps_are_what_safetensors_reads(tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(0)
    tensors = {
        kind: (100 * torch.rand((3, 5), generator=source)).to(getattr(torch, kind))
        for kind in KINDS
    }
    tensors |= {"bool": torch.tensor([True, False]), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "file", metadata={"key": "value"})
    mapped, expected = map_tensors(tmp_path / "file"), load_file(tmp_path / "file")
    assert mapped.keys() == expected.keys()
    for name, tensor in expected.items():
        assert mapped[name].dtype == tensor.dtype and torch.equal(mapped[name], tensor), name


def test_many_shards_are_read_with_few_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the limit the oldest map is closed, and what is read stays the same."""
    monkeypatch.setattr(reader, "SCATTERED", 1)
    monkeypatch.setattr(reader, "_MOST_MAPS", 3)
    writer = StoreWriter(tmp_path, {"kind": "test"}, 95, 10)
    for index in writer.missing():
        writer.write(index, {"x": torch.arange(*writer.bounds(index))})
    store = writer.finish()
    order = torch.randperm(95, generator=torch.Generator().manual_seed(0))
    for part in (order, order.flip(0), torch.tensor([94, 0, 94])):
        assert torch.equal(store.take("x", part), part)
    assert len(store._maps) == 3
    for start, stop in ((0, 95), (0, 10), (10, 10), (9, 11), (0, 0), (95, 95), (37, 73)):
        assert store.read("x", start, stop).tolist() == list(range(start, stop))
