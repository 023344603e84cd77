"""Tables, tar shards and remote folders give the bytes and the fingerprint of a folder."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


def test_tables_are_the_folder(folder: Path, tmp_path: Path):
    out = tables(folder, tmp_path / "tables")
    check("hf", str(out), folder)
    check("hf", str(out), folder, columns=["image", "label"])


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
        check("hf", "me/pets", folder)


def test_tar_shards_are_the_folder(folder: Path, tmp_path: Path):
    check("webdataset", str(shards(folder, tmp_path / "shards")), folder)


def test_nothing_is_copied_and_the_index_is_made_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = shards(folder, tmp_path / "shards")
    check("webdataset", str(path), folder)
    home = tmp_path / "home"
    stored = sum(file.stat().st_size for file in home.rglob("*") if file.is_file())
    assert not (home / "unpacked").exists() and len(list((home / "packed").iterdir())) == 1
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


def test_a_pipe_is_no_tar_file(folder: Path, tmp_path: Path):
    """Opening it would wait for a writer without end."""
    path = shards(folder, tmp_path / "shards")
    os.mkfifo(path / "x.tar")
    check("webdataset", str(path), folder)
    with pytest.raises(UserError, match="has no tar files"):
        load_images(DataConfig(name="webdataset", path=str(path / "x.tar"), size=8))


def test_remote_tar_shards_are_the_folder(folder: Path, tmp_path: Path):
    import fsspec

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
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/pets", recursive=True)
    try:
        check("folder", "memory://pets", folder)
    finally:
        memory.rm("/pets", recursive=True)


def test_a_bucket_is_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A server of moto on this machine stands for s3."""
    s3fs = pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (("ENDPOINT_URL", f"http://{host}:{port}"), ("DEFAULT_REGION", "us-east-1"),
                        ("ACCESS_KEY_ID", "any"), ("SECRET_ACCESS_KEY", "any")):  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    try:
        bucket = s3fs.S3FileSystem(skip_instance_cache=True)
        bucket.mkdir("pets")
        bucket.put(str(folder), "pets/images", recursive=True)
        check("folder", "s3://pets/images", folder)
        with pytest.raises(UserError, match="s3://pets/nothing, which has no images"):
            load_images(DataConfig(name="folder", path="s3://pets/nothing", size=8))
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()


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
    with pytest.raises(UserError, match="has no .parquet or .arrow"):
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
    assert not list((tmp_path / "home" / "unpacked").iterdir())


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
    assert not list((tmp_path / "home" / "unpacked").iterdir())


def test_unpacked_images_are_sealed(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    load_images(DataConfig(name="hf", path=str(tables(folder, tmp_path / "t")), size=8))
    (unpacked,) = (tmp_path / "home" / "unpacked").iterdir()
    assert verify.verify(unpacked) == []
    picture = sorted(unpacked.rglob("*.png"))[0]
    picture.write_bytes(picture.read_bytes()[:-1])
    (fault,) = verify.verify(unpacked)
    assert fault.path == picture and f"remove {unpacked}" in str(fault)
