"""`jkoflow encode --out`: the latents of a cache as .npz and .parquet."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.load import load_config
from pipeline.data import latent_file
from pipeline.data.latent_cache import open_cache
from tests.pipeline.tiny import World, say, write_pictures


@pytest.fixture
def config(world: World, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of two classes with mirror images; batches are smaller than its shards."""
    monkeypatch.setattr(latent_file, "_BATCH", 7)
    for index, name in enumerate(("a", "b")):
        write_pictures(world.root / "two" / "train" / name, 10, seed=index)
    return world.config(data={"path": str(world.root / "two")}, latents={"mirror": True})


def test_an_npz_has_posteriors_labels_and_standardisation(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert say(capsys, "encode", "-c", config, "--out", tmp_path / "z.npz")[0] == 0
    cache = open_cache(load_config(config))
    with np.load(tmp_path / "z.npz") as file:
        arrays = dict(file)
    assert set(arrays) == {"mean", "std", "labels", "channel_mean", "channel_std"}
    assert np.array_equal(arrays["mean"], cache.reader.field("mean").numpy())
    log_var = cache.reader.field("log_var").numpy()
    np.testing.assert_allclose(2 * np.log(arrays["std"]), log_var, atol=1e-5)
    assert arrays["labels"].tolist() == ([0] * 10 + [1] * 10) * 2
    scaled = (arrays["mean"] - arrays["channel_mean"][:, None, None]) / (
        arrays["channel_std"][:, None, None]
    )
    expected = cache.standardisation.apply(torch.from_numpy(arrays["mean"]))
    np.testing.assert_allclose(scaled, expected, atol=1e-6)


def test_a_parquet_has_the_same_rows(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for ending in ("npz", "parquet"):
        assert say(capsys, "encode", "-c", config, "--out", tmp_path / f"z.{ending}")[0] == 0
    arrays = np.load(tmp_path / "z.npz")
    table = parquet.read_table(tmp_path / "z.parquet")
    note = json.loads(table.schema.metadata[b"jkoflow"])
    assert table.column_names == ["mean", "std", "label"] and note["split"] == "train"
    for name in ("mean", "std"):
        values = np.array(table[name].to_pylist(), np.float32).reshape(-1, *note["shape"])
        assert np.array_equal(values, arrays[name])
    assert table["label"].to_pylist() == arrays["labels"].tolist()
    assert np.array_equal(np.float32(note["channel_std"]), arrays["channel_std"])


def test_mistakes_are_named_before_anything_is_encoded(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    code, _, error = say(capsys, "encode", "-c", world.config(), "--out", tmp_path / "z.csv")
    assert code == 2 and error.endswith("z.csv; expected .npz or .parquet; change the ending")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, error = say(capsys, "encode", "-c", world.config(), "--out", tmp_path / "z.parquet")
    assert code == 2 and "pip install 'jkoflow[data]'" in error
    assert not list(world.home.glob("latents/*"))
