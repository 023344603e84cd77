"""Tables, tar shards and remote folders give the bytes and the fingerprint of a folder."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from eval.sets.tables import Table
from pipeline.config.data import DataConfig
from pipeline.data.datasets import load_images
from pipeline.data.packed import index
from pipeline.errors import UserError
from pipeline.integrity.limits import VARIABLE
from pipeline.runs import verify
from tests.pipeline.hub_server import serving_hub

CLASSES = ("cat", "dog")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Two splits of pictures of several sizes in two classes."""
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "home"))
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 4)):
        for i in range(count):
            path = tmp_path / "folder" / split / CLASSES[i % 2] / f"{split}{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8 + i, 9, 3), np.uint8)).save(path)
    return tmp_path / "folder"


def pictures(folder: Path, split: str) -> list[Path]:
    return sorted((folder / split).rglob("*.png"), key=lambda path: path.name)


def tables(folder: Path, out: Path) -> Path:
    """Write the splits as the datasets library does, in two shards each."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    notes = {"info": {"features": {"label": {"names": list(CLASSES), "_type": "ClassLabel"}}}}
    (out / "data").mkdir(parents=True)
    for split in ("train", "test"):
        files = pictures(folder, split)
        for shard in (0, 1):
            part = files[shard::2]
            table = pa.table({
                "image": [{"bytes": f.read_bytes(), "path": f.name} for f in part],
                "label": [CLASSES.index(f.parent.name) for f in part],
            }).replace_schema_metadata({"huggingface": json.dumps(notes)})  # fmt: skip
            pq.write_table(table, out / "data" / f"{split}-0000{shard}-of-00002.parquet")
    return out


def shards(folder: Path, out: Path) -> Path:
    out.mkdir()
    for split in ("train", "test"):
        with tarfile.open(out / f"{split}-000.tar", "w") as archive:
            for file in pictures(folder, split):
                for ending, data in ((".png", file.read_bytes()),
                                     (".cls", file.parent.name.encode())):  # fmt: skip
                    info = tarfile.TarInfo(file.stem + ending)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return out


def check(name: str, path: str, folder: Path, **more: object) -> None:
    for split in ("train", "test"):
        data = DataConfig(name="folder", path=str(folder), size=8, split=split)
        expected = load_images(data)
        actual = load_images(DataConfig(name=name, path=path, size=8, split=split, **more))
        assert actual.fingerprint == expected.fingerprint
        assert actual.class_names == expected.class_names == CLASSES
        assert np.array_equal(actual.labels, expected.labels)
        everything = np.arange(len(expected))
        assert np.array_equal(actual.take(everything), expected.take(everything))


def check_tables(path: str, folder: Path, **more: object) -> list[str]:
    """Compare with the folder, image by image; return the fingerprints of the splits."""
    prints = []
    for split in ("train", "test"):
        expected = load_images(DataConfig(name="folder", path=str(folder), size=8, split=split))
        actual = load_images(DataConfig(name="hf", path=path, size=8, split=split, **more))
        assert actual.class_names == expected.class_names == CLASSES
        rows = [f"{file.parent.name}/{file.name}" for file in pictures(folder, split)]
        assert actual.pixels.names == (*rows[::2], *rows[1::2])  # the rows of two files
        order = [expected.pixels.names.index(name) for name in actual.pixels.names]
        assert np.array_equal(actual.labels, expected.labels[order])
        everything = np.arange(len(expected))
        assert np.array_equal(actual.take(everything), expected.take(everything)[order])
        assert np.array_equal(actual.read(2, 4), expected.take(everything)[order][2:4])
        prints.append(actual.fingerprint)
    return prints


def test_tables_are_the_folder(folder: Path, tmp_path: Path):
    out = tables(folder, tmp_path / "tables")
    prints = check_tables(str(out), folder)
    assert check_tables(str(out), folder, columns=["image", "label"]) == prints
    memory = fsspec.filesystem("memory")
    memory.put(str(out), "/tables", recursive=True)
    try:
        assert check_tables("memory://tables", folder) == prints
    finally:
        memory.rm("/tables", recursive=True)
    kept = sum(file.stat().st_size for file in (tmp_path / "home").rglob("*") if file.is_file())
    assert kept < 3 * 12 * 400  # the records of ten pictures, in three indices and of the folder


def test_a_group_of_rows_is_decoded_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Neighbours are kept within an eighth of the limit; large groups are not kept."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    content = [file.read_bytes() for file in pictures(folder, "train")] * 20
    content = [data + bytes(10_000) + str(i).encode() for i, data in enumerate(content)]
    pq.write_table(pa.table({"image": content}), tmp_path / "x.parquet", row_group_size=10)
    data = DataConfig(name="hf", path=str(tmp_path / "x.parquet"), size=8)
    expected = load_images(data).read(0, 120)
    decoded = []
    read = Table.group_pictures

    def count(self, group, column, rows):
        decoded.append((group, len(rows)))
        return read(self, group, column, rows)

    monkeypatch.setattr(Table, "group_pictures", count)
    for gib, most in ((2.0, 120), (2**-10, 13)):  # 1 MiB / 8 has room for 13 images of 10 kB
        monkeypatch.setenv(VARIABLE, repr(gib))
        decoded.clear()
        images = load_images(data)
        rows = [images.read(i, i + 4) for i in range(0, 120, 4)]
        assert np.array_equal(np.concatenate(rows), expected)
        assert decoded == [(group, 10) for group in range(12)]
        assert sum(len(group) for group in images.pixels._groups.values()) <= most
    monkeypatch.setenv(VARIABLE, repr(2**-11))  # less than a group: only the wanted rows
    decoded.clear()
    images = load_images(data)
    rows = [images.read(i, i + 4) for i in range(0, 120, 4)]
    assert np.array_equal(np.concatenate(rows), expected)
    assert max(count for _, count in decoded) <= 4 and not images.pixels._groups
    with pytest.raises(UserError, match=r"image x-00000003.png in .* \(it has changed since"):
        place = images.pixels.places[3]._replace(sha256="0" * 64)
        dataclasses.replace(images.pixels, places=(place,)).take(np.arange(1))


def test_a_data_set_of_the_hub_is_the_folder(folder: Path, tmp_path: Path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    out = tables(folder, tmp_path / "tables")
    with serving_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setattr("pipeline.integrity.hub._CACHE", tmp_path / "cache")
        assert hub.__version__
        server.repositories["me/pets"] = {
            f.relative_to(out).as_posix(): f.read_bytes() for f in out.rglob("*.parquet")
        }
        check_tables("me/pets", folder)


def test_tar_shards_are_the_folder(folder: Path, tmp_path: Path):
    check("webdataset", str(shards(folder, tmp_path / "shards")), folder)


def test_nothing_is_copied_and_the_index_is_made_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = shards(folder, tmp_path / "shards")
    check("webdataset", str(path), folder)
    home = tmp_path / "home"
    stored = sum(file.stat().st_size for file in home.rglob("*") if file.is_file())
    assert not (home / "unpacked").exists() and len(list((home / "packed").glob("*.json"))) == 1
    assert stored < 12 * 400  # the records of ten pictures, in the index of the folder too
    monkeypatch.setattr(index, "tar_places", None)
    data = DataConfig(name="webdataset", path=str(path), size=8)
    images = load_images(data)
    # other bytes of the same size in the place of a picture
    archive = path / "train-000.tar"
    content = bytearray(archive.read_bytes())
    content[content.index(b"PNG") + 200] ^= 1
    archive.write_bytes(content)
    with pytest.raises(UserError, match=r"train0.png in .* could not be read \(it has changed"):
        images.take(np.arange(6))


def test_a_broken_index_is_made_again(folder: Path, tmp_path: Path):
    """A changed letter of a class would be a class more."""
    data = DataConfig(name="webdataset", path=str(shards(folder, tmp_path / "shards")), size=8)
    whole = load_images(data)
    (index,) = (tmp_path / "home" / "packed").glob("*.json")
    content = index.read_bytes()
    index.write_bytes(content.replace(b"cat/train0", b"cap/train0"))
    assert index.read_bytes() != content and len(verify.verify(index.parent)) == 1
    images = load_images(data)
    assert (images.class_names, images.fingerprint) == (whole.class_names, whole.fingerprint)
    assert index.read_bytes() == content and verify.verify(index.parent) == []


def test_a_pipe_is_no_tar_file(folder: Path, tmp_path: Path):
    """Opening it would wait for a writer without end."""
    path = shards(folder, tmp_path / "shards")
    os.mkfifo(path / "x.tar")
    check("webdataset", str(path), folder)
    with pytest.raises(UserError, match="has no tar files"):
        load_images(DataConfig(name="webdataset", path=str(path / "x.tar"), size=8))


def test_remote_tar_shards_are_the_folder(folder: Path, tmp_path: Path):
    memory = fsspec.filesystem("memory")
    memory.put(str(shards(folder, tmp_path / "shards")), "/tars", recursive=True)
    try:
        check("webdataset", "memory://tars", folder)
    finally:
        memory.rm("/tars", recursive=True)


def test_a_tar_file_that_is_cut_short_is_refused(folder: Path, tmp_path: Path):
    """Also between two members, where the format has no other sign of its end."""
    whole = (shards(folder, tmp_path / "shards") / "train-000.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        starts = [member.offset for member in archive.getmembers()]
        end = archive.offset
    path = tmp_path / "cut.tar"
    for length in (*starts[1:], starts[3] + 100, starts[3] + 600, end, len(whole) // 2 + 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut.tar is not a complete tar file"):
            load_images(DataConfig(name="webdataset", path=str(path), size=8))


def test_a_remote_folder_is_the_folder(folder: Path):
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/pets", recursive=True)
    try:
        check("folder", "memory://pets", folder)
    finally:
        memory.rm("/pets", recursive=True)


def test_a_bucket_is_the_folder(folder: Path, s3):
    s3.mkdir("pets")
    s3.put(str(folder), "pets/images", recursive=True)
    check("folder", "s3://pets/images", folder)
    with pytest.raises(UserError, match="s3://pets/nothing, which has no images"):
        load_images(DataConfig(name="folder", path="s3://pets/nothing", size=8))


@pytest.mark.usefixtures("no_credentials")
@pytest.mark.parametrize("name", ["folder", "webdataset", "hf"])
def test_a_bucket_without_credentials_is_one_sentence(name: str) -> None:
    with pytest.raises(UserError, match=r"s3://bucket/x cannot be read \(.*; check the address"):
        load_images(DataConfig(name=name, path="s3://bucket/x", size=8))


def test_a_file_that_cannot_be_opened_is_one_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that lists its files, but refuses to send them."""

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("the server refuses")

    memory = fsspec.filesystem("memory")
    memory.put(str(shards(folder, tmp_path / "shards")), "/tars", recursive=True)
    try:
        monkeypatch.setattr(type(memory), "_open", refuse)
        with pytest.raises(UserError, match=r"memory://tars cannot be read \(the server refuses"):
            load_images(DataConfig(name="webdataset", path="memory://tars", size=8))
    finally:
        memory.rm("/tars", recursive=True)


def test_mistakes_are_named(folder: Path, tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def load(name: str, path: object, **more: object) -> None:
        load_images(DataConfig(name=name, path=str(path), size=8, **more))

    pq.write_table(pa.table({"label": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column of images"):
        load("hf", tmp_path / "a.parquet")
    out = tables(folder, tmp_path / "tables")
    with pytest.raises(ValueError, match="no images in the column 'label'"):
        load("hf", out, columns=["label"])
    with pytest.raises(ValueError, match="expected 'kind' among them"):
        load("hf", out, columns=["image", "kind"])
    with pytest.raises(UserError, match="has no tables; expected .parquet or .arrow"):
        load("hf", folder)
    with pytest.raises(UserError, match="has no images"):
        load("folder", "memory://nothing")
    (tmp_path / "x.tar").write_bytes(b"junk" * 200)
    with pytest.raises(UserError, match="is not a complete tar file"):
        load("webdataset", tmp_path / "x.tar")
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        info = tarfile.TarInfo("../../evil.png")
        archive.addfile(info, io.BytesIO())
    with pytest.raises(UserError, match="expected a relative path"):
        load("webdataset", tmp_path / "evil.tar")
    assert not list((tmp_path / "home").rglob("*.png"))


def test_an_archive_is_bounded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of a sample, cells that share a value, and batches that are compressed."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    monkeypatch.setenv(VARIABLE, str(2**-10))

    def load(name: str, path: Path) -> None:
        load_images(DataConfig(name=name, path=str(path), size=8))

    with tarfile.open(tmp_path / "parts.tar", "w") as archive:
        for ending in ("png", "a", "b"):
            info = tarfile.TarInfo(f"x.{ending}")
            info.size = 400_000
            archive.addfile(info, io.BytesIO(bytes(400_000)))
    with pytest.raises(ValueError, match=r"x\.b of .* claims 1200000 bytes"):
        load("webdataset", tmp_path / "parts.tar")
    value = np.random.default_rng(0).bytes(50_000)
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100, np.int32)), pa.array([value]))
    table = pa.table({"image": column})
    pq.write_table(table, tmp_path / "x.parquet", store_schema=False)
    assert (tmp_path / "x.parquet").stat().st_size < 60_000
    with pytest.raises(ValueError, match="the images of hf claims"):
        load("hf", tmp_path / "x.parquet")
    plain = pa.table({"image": [value] * 10})
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    for name, opened in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        with opened(tmp_path / f"{name}.arrow", plain.schema, options=options) as writer:
            writer.write_table(plain)
        with pytest.raises(ValueError, match="is a compressed table"):
            load("hf", tmp_path / f"{name}.arrow")
        with pytest.raises(UserError, match="is an arrow file at an address; expected parquet"):
            fsspec.filesystem("memory").pipe_file("/x.arrow", b"x")
            load("hf", "memory://x.arrow")
    assert not list((tmp_path / "home").rglob("*.png"))
