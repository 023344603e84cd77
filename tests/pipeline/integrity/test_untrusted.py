"""Files of unknown origin: each is refused in a sentence, in little time and memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from autoencoders.weights import DESCRIPTION, load_weights
from eval.gaussian import GaussianStats
from eval.sets.images import FolderImages, NpzImages
from flows.errors import FlowError
from flows.networks.config import VelocityConfig
from pipeline.assets.archives import find_files, read_bytes
from pipeline.assets.download import DamagedError
from pipeline.config.yaml_files import read_yaml
from pipeline.data.image_folder import load_folder
from pipeline.errors import UserError
from pipeline.integrity import pickles
from pipeline.integrity.checkpoints import read_checkpoint
from pipeline.integrity.digests import BLANK, stamp
from pipeline.integrity.limits import VARIABLE
from pipeline.integrity.pictures import open_picture
from pipeline.integrity.safe_pickle import UnsafePickleError, load_batch
from pipeline.runs.manifest import Manifest
from pipeline.storage import atomic
from tests.autoencoders.models import config as architecture
from tests.pipeline.records import block_row, synthetic_manifest

MIB = str(2**-10)
#: a tuple of two tuples of two tuples …, 40 deep, in 87 bytes
NESTED = b"\x80\x02)q\x00" + b"0h\x00h\x00\x86q\x00" * 40
#: what needs more work than data do
PICKLES = {
    "nested key": b"\x80\x02}" + NESTED[2:] + b"K\x01s.",
    "nested keys": b"\x80\x02}(" + NESTED[2:] + b"K\x01u.",
    "nested element": b"\x80\x04\x8f(" + NESTED[2:] + b"\x90.",
    "frozen set": b"\x80\x04(" + NESTED[2:] + b"\x91.",
    "dictionary": b"\x80\x02(" + NESTED[2:] + b"K\x01d.",
    "deep": b"\x80\x02" + b"(" * 5000 + b".",
    "extension": b"\x80\x02\x82\x01.",
}


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, MIB)


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_has_budgets(name: str, tmp_path: Path) -> None:
    path = tmp_path / "batch"
    path.write_bytes(PICKLES[name])
    begun = time.thread_time()
    with pytest.raises(UnsafePickleError):
        load_batch(path)
    with pytest.raises(ValueError, match="cannot be used"):
        read_checkpoint(_checkpoint(tmp_path, PICKLES[name]))
    assert time.thread_time() - begun < 2


def _checkpoint(folder: Path, pickled: bytes) -> Path:
    path = folder / "x.ckpt"
    torch.save({"w": torch.zeros(5)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else data)
    return path


def test_an_ordered_dictionary_has_small_keys(tmp_path: Path) -> None:
    """torch hashes the keys of its pairs when it calls it."""
    call = b"\x80\x02ccollections\nOrderedDict\n](" + NESTED[2:] + b"K\x01\x86e\x85R."
    with pytest.raises(ValueError, match="a key of more than 1000 parts"):
        read_checkpoint(_checkpoint(tmp_path, call))


def test_a_tensor_is_no_larger_than_its_file(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"w": torch.zeros(1).expand(10**9)}, path)
    with pytest.raises(ValueError, match="exceeds its storage"):
        read_checkpoint(path)


def test_a_dtype_is_a_word(tmp_path: Path) -> None:
    (tmp_path / "batch").write_bytes(b"\x80\x02cnumpy\ndtype\n" + NESTED[2:] + b"\x85R.")
    with pytest.raises(UnsafePickleError, match="it holds dtype of type tuple"):
        load_batch(tmp_path / "batch")


def test_a_pickle_may_copy_few_bytes(tmp_path: Path, small_limit: None) -> None:
    text = b"X" + (10**5).to_bytes(4, "little") + b"a" * 10**5
    call = b"0c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86Rq\x01" * 20
    (tmp_path / "batch").write_bytes(b"\x80\x02" + text + b"q\x00" + call + b".")
    with pytest.raises(UnsafePickleError, match="claims .* bytes; expected at most 1048576"):
        load_batch(tmp_path / "batch")


def test_a_pickle_has_little_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pickles, "MAX_SECONDS", 0.0)
    (tmp_path / "batch").write_bytes(pickle.dumps({"data": list(range(5000))}))
    with pytest.raises(UnsafePickleError, match="longer than 0 seconds"):
        load_batch(tmp_path / "batch")
    monkeypatch.setattr(pickles, "MAX_SECONDS", 20.0)
    monkeypatch.setattr(pickles, "MAX_OPCODES", 1000)
    with pytest.raises(UnsafePickleError, match="more than 1000 operations"):
        load_batch(tmp_path / "batch")


def test_programs_and_pipes_are_no_images(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 8)).save(folder / name)
    os.mkfifo(folder / "pipe.png")
    assert len(load_folder(folder, "train", 8, "L", None)) == 2
    (folder / "c.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(UserError, match=r"c\.png could not be read"):
        load_folder(folder, "train", 8, "L", None).read(0, 3)
    with pytest.raises(ValueError, match=r"cannot read the image .*c\.png"):
        list(FolderImages(folder).batches())
    with pytest.raises(OSError, match="not a regular file"):
        open_picture(folder / "pipe.png")


def test_a_picture_has_few_pixels(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.new("L", (8, 8)).save(data, "PNG")
    for side in (12_000, 60_000):  # of the header alone
        whole = bytearray(data.getvalue())
        whole[16:24] = side.to_bytes(4, "big") * 2
        whole[29:33] = zlib.crc32(whole[12:29]).to_bytes(4, "big")
        (tmp_path / "x.png").write_bytes(whole)
        with pytest.raises(ValueError, match="claims|exceeds limit"):
            open_picture(tmp_path / "x.png")


def test_an_npz_is_small_and_open(tmp_path: Path, small_limit: None) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, mu=np.zeros(500), sigma=np.zeros((500, 500)))
    with pytest.raises(ValueError, match="is not an .npz of statistics"):
        GaussianStats.load(path)
    np.savez_compressed(path, arr_0=np.zeros((50, 200, 200, 3), np.uint8))
    with pytest.raises(ValueError, match="claims 6000000 bytes"):
        list(NpzImages(path).batches())
    np.savez(path, arr_0=np.zeros((4, 0, 2, 3), np.uint8))
    with pytest.raises(ValueError, match="expected uint8"):
        NpzImages(path)
    np.savez(path, arr_0=np.zeros((4, 2, 2, 3), np.uint8))
    data = bytearray(path.read_bytes())
    data[6] |= 1  # the flag of an encrypted member
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged or encrypted"):
        NpzImages(path)


def test_an_archive_is_small(tmp_path: Path, small_limit: None) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(bytes(3 << 20)))
    with pytest.raises(DamagedError, match="claims"):
        read_bytes(tmp_path / "x.gz")
    raw = tmp_path / "raw"
    raw.mkdir()
    with zipfile.ZipFile(raw / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("wanted", bytes(3 << 20))
    with pytest.raises(DamagedError, match="claims"):
        find_files(raw, ["wanted"], tmp_path)
    (raw / "x.zip").unlink()
    with tarfile.open(raw / "x.tar.gz", "w:gz") as tar:
        for name in ("other", "wanted"):
            member = tarfile.TarInfo(name)
            member.size = 3 << 20
            tar.addfile(member, io.BytesIO(bytes(3 << 20)))
    with pytest.raises(DamagedError, match="claims"):
        find_files(raw, ["wanted"], tmp_path)


def test_weights_cannot_claim_a_network_of_any_size(tmp_path: Path) -> None:
    described = architecture().to_dict() | {"ch": 8192, "ch_mult": [64, 64]}
    for changes in ({}, {"ch": 2**40}, {"ch": 32.0}, {"num_res_blocks": 10**9}, {"ch_mult": []}):
        notes = {"architecture": described | changes, "seal": BLANK}
        data = save({"x": torch.zeros(1)}, {DESCRIPTION: json.dumps(notes)})
        (tmp_path / "x.safetensors").write_bytes(stamp(data))
        begun = time.thread_time()
        with pytest.raises(ValueError):
            load_weights(tmp_path / "x.safetensors")
        assert time.thread_time() - begun < 2
    for wrong in ({"width": 2**40}, {"depth": 10**9}, {"width": 32.0}, {"nets": True}):
        with pytest.raises(FlowError):
            VelocityConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "", "~/x", "a\\..\\x"])
@pytest.mark.parametrize("key", ["stage", "file"])
def test_no_path_leads_out_of_a_run(path: str, key: str) -> None:
    plain = json.loads(json.dumps(_manifest().to_json()))
    plain["passes"][0]["blocks"][0][key] = path
    with pytest.raises(UserError, match="may lead out of the run"):
        Manifest.from_json(plain)


def _manifest() -> Manifest:
    from pipeline.runs.passes import Pass

    plan = Pass("ordinary", [0.5], False, None, [1], [2], [0.1])
    row = block_row(h=0.5, gamma=None)
    return synthetic_manifest("tiny", (2,)).with_passes([plan.with_block(row)])


def test_only_regular_files_are_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("pipe", "folder", "link"):
        with pytest.raises(UserError, match="is not a regular file"):
            atomic.write_bytes(tmp_path / name, b"x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "pipe").is_fifo()


def test_yaml_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    rows = ["a0: &a0 {x: 1}"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)
    ]
    for text in ("\n".join(rows), "a: &a [*a]", "[" * 5000, "a: ["):
        path.write_text(text)
        with pytest.raises(UserError, match="not readable YAML"):
            read_yaml(path)
    path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(UserError, match="not readable YAML"):
        read_yaml(path)
    path.write_text("a: &a {x: 1}\nb: *a\nname: ${oc.env:HOME}\n")
    assert read_yaml(path) == {"a": {"x": 1}, "b": {"x": 1}, "name": "${oc.env:HOME}"}


def test_texts_are_small_and_regular(tmp_path: Path) -> None:
    """Documents take many times their size in memory."""
    path = tmp_path / "x.yaml"
    path.write_text("#" * (1 << 21))
    with pytest.raises(UserError, match="has 2097152 bytes; expected at most 1048576"):
        read_yaml(path)
    path.write_text("#" * 1000 + "\nname: x")
    assert read_yaml(path) == {"name": "x"}
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(1 << 27)
    with pytest.raises(UserError, match="has 134217728 bytes; expected at most 67108864"):
        atomic.read_json(tmp_path / "x.json", "manifest")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is not a regular file"):
        atomic.read_json(tmp_path / "pipe", "manifest")
