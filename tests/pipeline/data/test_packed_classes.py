"""Classes of tables and tar shards: names, numbers, and names that splits have."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.data import DataConfig
from pipeline.data.datasets import load_images
from pipeline.errors import UserError


@pytest.fixture
def contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Six PNG files of different pictures."""
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "home"))
    rng, files = np.random.default_rng(0), []
    for _ in range(6):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 9, 3), np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    return files


def samples(path: Path, *parts: tuple[str, bytes]) -> Path:
    """Write a tar file of named parts."""
    with tarfile.open(path, "w") as archive:
        for name, data in parts:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_numbers_of_classes_sort_as_numbers(contents: list[bytes], tmp_path: Path) -> None:
    """Class 10 follows class 2, in a `.cls` as in a `.json`."""
    content = contents[0]
    samples(
        tmp_path / "x.tar", ("a.png", content), ("a.cls", b"10"), ("b.png", content),
        ("b.cls", b"2\n"), ("c.png", content), ("c.json", b'{"label": 2}'),
    )  # fmt: skip
    images = load_images(DataConfig(name="webdataset", path=str(tmp_path / "x.tar"), size=8))
    assert images.class_names == ("00002", "00010") and images.labels.tolist() == [0, 0, 1]


def test_other_columns_have_an_index_of_their_own(contents: list[bytes], tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    content = contents[:1] * 2
    table = pa.table({"image": content, "coarse": ["a", "b"], "fine": ["c", "d"]})
    pq.write_table(table, tmp_path / "x.parquet")
    for label, names in (("coarse", ("a", "b")), ("fine", ("c", "d"))):
        data = DataConfig(name="hf", path=str(tmp_path / "x.parquet"), size=8,
                          columns=["image", label])  # fmt: skip
        assert load_images(data).class_names == names


def test_a_class_called_train_is_no_split(contents: list[bytes], tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    names = ["bus", "train", "bus", "test", "train", "bus"]
    pq.write_table(pa.table({"image": contents, "label": names}), tmp_path / "x.parquet")
    parts = [
        part
        for i, (content, name) in enumerate(zip(contents, names, strict=True))
        for part in ((f"{i}.png", content), (f"{i}.cls", name.encode()))
    ]
    samples(tmp_path / "x.tar", *parts)
    for kind, file in (("hf", "x.parquet"), ("webdataset", "x.tar")):
        data = DataConfig(name=kind, path=str(tmp_path / file), size=8)
        images = load_images(data)
        assert len(images) == 6 and images.class_names == ("bus", "test", "train")
        assert sorted(images.labels.tolist()) == [0, 0, 0, 1, 2, 2]
        with pytest.raises(UserError, match="has no split 'test'"):
            load_images(data.of_split("test"))
    # folders in a tar file are splits
    samples(tmp_path / "y.tar", ("train/0.png", contents[0]), ("test/1.png", contents[1]))
    data = DataConfig(name="webdataset", path=str(tmp_path / "y.tar"), size=8)
    assert [len(load_images(data.of_split(split))) for split in ("train", "test")] == [1, 1]


def test_a_column_of_other_values_has_no_classes(contents: list[bytes], tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for values, classes in (
        ([[0], [1, 2], [], [0], [1], [2]], None),
        ([0.5] * 6, None),
        (pa.array(["a", "b"] * 3).dictionary_encode(), ("a", "b")),
        ([True, False] * 3, ("00000", "00001")),
    ):
        table = pa.table({"image": contents, "labels": values})
        pq.write_table(table, tmp_path / "x.parquet")
        data = DataConfig(name="hf", path=str(tmp_path / "x.parquet"), size=8)
        assert load_images(data).class_names == classes
        (tmp_path / "x.parquet").unlink()


def test_classes_beyond_the_limit_change_the_fingerprint(
    contents: list[bytes], tmp_path: Path
) -> None:
    """They number the classes within it, and a cache of latents has the numbers."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    data = DataConfig(name="hf", path=str(tmp_path / "tables"), size=8, limit=4)
    (tmp_path / "tables").mkdir()
    prints = []
    for file, name, label in (("a", "cat", 0), ("b", "dog", 0), ("c", "ant", 1)):
        table = pa.table({"image": contents, "label": [name] * 6})
        pq.write_table(table, tmp_path / "tables" / f"{file}.parquet")
        images = load_images(data)
        assert images.labels.tolist() == [label] * 4
        prints.append(images.fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_classes_that_are_no_plain_numbers(contents: list[bytes], tmp_path: Path) -> None:
    content = contents[0]
    samples(
        tmp_path / "x.tar", ("a.png", content), ("a.cls", b"-1"), ("b.png", content),
        ("b.json", b'{"label": -1}'), ("c.png", content), ("c.cls", "²".encode()),
    )  # fmt: skip
    images = load_images(DataConfig(name="webdataset", path=str(tmp_path / "x.tar"), size=8))
    assert images.class_names == ("-0001", "²")
