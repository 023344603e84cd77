"""Readers of files of unknown origin, each with a whole file that the fuzz tests damage."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save

from autoencoders.conversion.official import architecture_of
from autoencoders.conversion.official import read_yaml as read_model_yaml
from autoencoders.weights import DESCRIPTION, load_weights
from eval.features.inception_weights import read_weights
from eval.references import read_reference, reference_bytes
from eval.sets.sources import open_source
from pipeline.assets.archives import find_files, read_bytes
from pipeline.assets.readers import read_mnist
from pipeline.config.autoencoder import AutoencoderConfig
from pipeline.config.data import DataConfig
from pipeline.config.load import load, load_config
from pipeline.data.datasets import load_images
from pipeline.data.imagenet32 import read_batch
from pipeline.data.latent_cache import LatentCache
from pipeline.integrity.checkpoints import read_checkpoint
from pipeline.integrity.digests import BLANK, stamp
from pipeline.integrity.safe_pickle import load_batch
from pipeline.publishing.comparison import write_comparison
from pipeline.publishing.report import write_report
from pipeline.runs import verify
from pipeline.runs.directory import RunDirectory
from pipeline.runs.run import open_run
from pipeline.runs.snapshots import snapshots_of
from pipeline.storage import seal
from pipeline.storage.checkpoints import load_checkpoint, save_checkpoint
from pipeline.storage.lock import _read as read_lock
from pipeline.storage.shards import open_store
from pipeline.storage.trackers import Trackers
from pipeline.tabular.load import load_table
from pipeline.toy2d.picture_densities import PictureDensity
from tests.eval.moments import stats_from
from tests.faults.mutations import as_json, as_yaml
from tests.pipeline.tiny import World

RNG = np.random.default_rng(0)
PICTURES = ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm")


@dataclass(frozen=True)
class Reader:
    """A reader with a whole file.

    Attributes:
        name: of the reader.
        file: that it reads.
        content: of the file before `pack`: bytes, or a document of JSON or YAML.
        read: returns what the file holds, as containers of arrays and plain values.
        pack: makes the file's bytes of the content; mutations come before it.
        sealed: whether another content than the whole one must be an error.
        after: is called when the file was written.
        names: words of which an error names one, besides the file's name.
    """

    name: str
    file: Path
    content: Any
    read: Callable[[Path], Any]
    pack: Callable[[Any], bytes] = bytes
    sealed: bool = False
    after: Callable[[Path], object] = lambda path: None
    names: tuple[str, ...] = ()


def readers(root: Path, world: World, run: Path) -> Iterator[Reader]:
    """All readers; their files lie below a new folder.

    Args:
        root: the folder.
        world: its caches and its autoencoder are read.
        run: a finished run of it.
    """
    root.mkdir(parents=True)
    yield from _tensors(root, world)
    yield from _archives(root / "archives")
    yield from _pictures(root / "pictures")
    yield from _pickles(root / "pickles")
    yield from _tables(root / "tables")
    yield from _documents(root / "documents", world)
    yield from _runs(root / "runs", world, run)


# ------------------------------------------------------------------ tensors


def _state(path: Path) -> Any:
    model = load_weights(path)
    return dict(model.state_dict()), model.describe()


def _statistics(path: Path) -> Any:
    source = open_source(path)
    stats = source.stats
    batches = list(source.images.batches()) if source.images is not None else []
    return batches, (stats.n, stats.mean, stats.cov) if stats is not None else None


def _reference(path: Path) -> Any:
    reference = read_reference(path)
    return reference.stats.mean, reference.stats.cov, reference.card


def _restamped(notes: Any, tensors: dict[str, torch.Tensor], key: str) -> bytes:
    """A safetensors file whose digest is right, with other notes."""
    if isinstance(notes, dict):
        notes = {**notes, "seal": BLANK}
    return stamp(save(tensors, {key: json.dumps(notes)}))


def _tensors(root: Path, world: World) -> Iterator[Reader]:
    from safetensors import safe_open

    weights = world.root / "autoencoder.safetensors"
    yield Reader("autoencoder", root / "a.safetensors", weights.read_bytes(), _state, sealed=True)
    with safe_open(weights, "pt") as file:
        notes = json.loads(file.metadata()[DESCRIPTION])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    yield Reader(
        "autoencoder: description", root / "b.safetensors", notes, _state,
        pack=partial(_restamped, tensors=tensors, key=DESCRIPTION),
    )  # fmt: skip
    stats = stats_from(RNG.normal(size=(40, 8)))
    card = {"dataset": "d", "split": "train", "n": 40, "extractor": "e", "content_sha256": "0"}
    whole = reference_bytes(stats, card)
    yield Reader("reference", root / "c.safetensors", whole, _reference, sealed=True)
    upper = torch.from_numpy(stats.cov[np.triu_indices(8)].astype(np.float32))
    yield Reader(
        "reference: card", root / "d.safetensors", {**card, "format": 1}, _reference,
        pack=partial(
            _restamped, tensors={"mean": torch.from_numpy(stats.mean), "cov_upper": upper},
            key="card",
        ),
    )  # fmt: skip
    images = torch.from_numpy(RNG.integers(0, 256, (6, 3, 4, 4), np.uint8))
    yield Reader(
        "images in safetensors", root / "e.safetensors", save({"images": images}), _statistics
    )
    checkpoint = root / "f.safetensors"
    state = {"a": {"b": [torch.arange(6.0), 3, "x"]}, "step": 7}
    save_checkpoint(checkpoint, state)
    yield Reader(
        "checkpoint", checkpoint, checkpoint.read_bytes(), load_checkpoint, sealed=True
    )
    path = root / "g.safetensors"
    yield Reader("inception", path, save({"x": torch.zeros(3)}), read_weights,
                 names=("Inception",))  # fmt: skip


# ----------------------------------------------------------------- archives


def _npz(arrays: dict[str, np.ndarray], compressed: bool = False) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _rezipped(content: bytes, others: dict[str, bytes], name: str) -> bytes:
    """A zip archive whose checksums are right."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, value in others.items():
            archive.writestr(key, value)
        archive.writestr(name, content)
    return file.getvalue()


def _tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def _found(path: Path) -> Any:
    scratch = path.parent / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    files = find_files(path, ["wanted"], scratch)
    return {name: found.read_bytes() for name, found in files.items()}


def _mnist(path: Path) -> Any:
    return read_mnist(path.parent, path.parent / "scratch").sha256


def _images(name: str, path: Path, **options: Any) -> Any:
    data = load_images(DataConfig(name=name, path=str(path), **options))
    return data.read(0, len(data)), data.labels, data.class_names


def _archives(root: Path) -> Iterator[Reader]:
    pixels = RNG.integers(0, 256, (5, 4, 4, 3), np.uint8)
    arrays = {"arr_0": pixels, "labels": np.arange(5)}
    moments = {"mu": np.zeros(4), "sigma": np.eye(4), "n": np.array(9)}
    for name, content in (("stored", _npz(arrays)), ("deflated", _npz(arrays, True))):
        yield Reader(f"npz {name}", root / f"{name}.npz", content, _statistics)
        yield Reader(f"npz {name}: data", root / f"{name}-d.npz", content, partial(_images, "npz"))
    yield Reader("npz statistics", root / "m.npz", _npz(moments), _statistics)
    labels = {"labels.npy": _npy(np.arange(5))}
    for name, read in (("", _statistics), (": data", partial(_images, "npz"))):
        yield Reader(
            f"npy in npz{name}", root / f"arr{len(name)}.npz", _npy(pixels), read,
            pack=partial(_rezipped, others=labels, name="arr_0.npy"),
        )  # fmt: skip
    for key in ("mu", "sigma", "n"):
        others = {f"{k}.npy": _npy(v) for k, v in moments.items() if k != key}
        yield Reader(
            f"npy {key} in npz", root / f"{key}.npz", _npy(moments[key]), _statistics,
            pack=partial(_rezipped, others=others, name=f"{key}.npy"),
        )  # fmt: skip
    batch = {"data": RNG.integers(0, 256, (3, 3072), np.uint8), "labels": np.arange(1, 4)}
    yield Reader("ImageNet-32 npz", root / "train.npz", _npz(batch), read_batch)
    yield Reader("ImageNet-32 pickle", root / "train", pickle.dumps(batch), read_batch)
    for ending, mode in (("tar", "w"), ("tar.gz", "w:gz")):
        content = _tar({"x/other": b"o" * 700, "x/wanted": b"w" * 900}, mode)
        yield Reader(f"archive {ending}", root / "t" / f"a.{ending}", content, _found)
    content = _rezipped(b"w" * 900, {"x/other": b"o" * 700}, "x/wanted")
    yield Reader("archive zip", root / "z" / "a.zip", content, _found)
    idx = {
        f"{part}-{kind}-ubyte": bytes([0, 0, 8, 3]) + RNG.bytes(100)
        for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    }  # fmt: skip
    folder = root / "idx"
    folder.mkdir(parents=True)
    for name, data in idx.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(data))
    first = folder / "train-images-idx3-ubyte.gz"
    yield Reader("IDX gz", first, first.read_bytes(), _mnist)
    yield Reader("gz", root / "x.gz", gzip.compress(RNG.bytes(300)), read_bytes)


# ----------------------------------------------------------------- pictures


def _picture(kind: str, side: int = 9) -> bytes:
    file = io.BytesIO()
    mode = "L" if kind == "gif" else "RGB"
    pixels = RNG.integers(0, 256, (side, side) + (3,) * (mode == "RGB"), np.uint8)
    names = {"jpg": "jpeg", "tif": "tiff"}
    Image.fromarray(pixels).save(file, names.get(kind, kind))
    return file.getvalue()


def _checked_png(content: bytes) -> bytes:
    """Correct the checksums of a PNG's chunks, as far as they can be followed."""
    import zlib

    out, place = bytearray(content), 8
    while place + 12 <= len(out):
        end = place + 8 + int.from_bytes(out[place : place + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = zlib.crc32(out[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(out)


def _pictures(root: Path) -> Iterator[Reader]:
    for kind in PICTURES:
        folder = root / kind
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(_picture("png"))
        whole = _picture(kind)
        pack = _checked_png if kind == "png" else bytes
        for what, read in (
            ("set", lambda path: _statistics(path.parent)),
            ("data", lambda path: _images("folder", path.parent, size=8)),
            ("density", PictureDensity.from_file),
        ):
            if kind == "gif" and what == "set":
                continue  # pytorch-fid reads no GIF
            yield Reader(
                f"{kind}: {what}", folder / f"b.{kind}", whole, _without_object(read), pack
            )
    train, test = root / "bsds" / "train", root / "bsds" / "test"
    for folder in (train, test):
        folder.mkdir(parents=True)
        (folder / "a.jpg").write_bytes(_picture("jpg"))
    yield Reader(
        "photographs", train / "b.jpg", _picture("jpg"),
        lambda path: len(load_table(DataConfig(name="bsds300", path=str(root / "bsds"))).rows),
    )  # fmt: skip


def _without_object(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def plain(path: Path) -> Any:
        value = read(path)
        return value.weights if isinstance(value, PictureDensity) else value

    return plain


# ------------------------------------------------------------------ pickles


def _pickles(root: Path) -> Iterator[Reader]:
    batch = {b"data": RNG.integers(0, 256, (3, 30), np.uint8), b"labels": [1, 2, 3]}
    for protocol in (0, 2, 5):
        content = pickle.dumps(batch, protocol)
        yield Reader(f"pickle {protocol}", root / f"batch{protocol}", content, load_batch,
                     names=("it ",))  # fmt: skip
    moments = {"fid": {"mu": np.zeros(3), "sigma": np.eye(3)}}
    yield Reader("pickled statistics", root / "s.pkl", pickle.dumps(moments), _statistics)
    state = {"state_dict": {"w": torch.arange(6.0), "b": torch.zeros(2, 2)}, "epoch": 3}
    for name, zipped in (("zip", True), ("stream", False)):
        file = io.BytesIO()
        torch.save(state, file, _use_new_zipfile_serialization=zipped)
        yield Reader(f"checkpoint {name}", root / f"{name}.ckpt", file.getvalue(), read_checkpoint)
        yield Reader(f"inception {name}", root / f"{name}.pth", file.getvalue(), read_weights,
                     names=("Inception",))  # fmt: skip
    with zipfile.ZipFile(io.BytesIO(_saved(state))) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    for what, read in (("checkpoint", read_checkpoint), ("inception", read_weights)):
        yield Reader(
            f"{what} zip: pickle", root / f"p-{what}.pth", entries[name], read,
            pack=partial(_restored, entries=entries, name=name), names=("Inception",),
        )  # fmt: skip


def _saved(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _restored(content: bytes, entries: dict[str, bytes], name: str) -> bytes:
    """A checkpoint of torch.save with another pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for key, value in entries.items():
            archive.writestr(key, content if key == name else value)
    return file.getvalue()


# ------------------------------------------------------------------- tables


def _table(name: str, path: Path) -> Any:
    table = load_table(DataConfig(name=name, path=str(path)))
    return {split: rows.read(0, len(rows)) for split, rows in table.rows.items()}


def _packed(name: str, path: Path) -> Any:
    shutil.rmtree(Path(path.parent / "home"), ignore_errors=True)
    return _images(name, path, size=8)


def _tables(root: Path) -> Iterator[Reader]:
    gas, boone = RNG.normal(size=(120, 19)), RNG.normal(size=(120, 43))
    yield Reader("npy of GAS", root / "ethylene_CO.npy", _npy(gas), partial(_table, "gas"))
    yield Reader("npy of MINIBOONE", root / "data.npy", _npy(boone), partial(_table, "miniboone"))
    rows = "\n".join(" ".join(f"{x:.3f}" for x in row) for row in np.tile(gas, (4, 1)))
    text = f"head\n{rows}\n".encode()
    yield Reader("text of GAS", root / "ethylene_CO.txt", text, partial(_table, "gas"))
    samples = {f"{i}.{k}": v for i in range(3) for k, v in
               (("png", _picture("png")), ("cls", str(i).encode()))}  # fmt: skip
    yield Reader("webdataset", root / "w.tar", _tar(samples), partial(_packed, "webdataset"),
                 names=("image", "packed"))
    labels = {f"{i}.{k}": v for i in range(3) for k, v in
              (("png", _picture("png")), ("json", b'{"label": 1}'))}  # fmt: skip
    yield Reader("webdataset json", root / "v.tar", _tar(labels), partial(_packed, "webdataset"),
                 names=("image", "packed"))
    import importlib.util

    if importlib.util.find_spec("pyarrow") is None:
        return
    import pyarrow
    from pyarrow import parquet

    notes = {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
    table = pyarrow.table({
        "image": [{"bytes": _picture("png"), "path": f"{i}.png"} for i in range(3)],
        "label": [0, 1, 0],
    }).replace_schema_metadata({"huggingface": json.dumps(notes)})  # fmt: skip
    file = io.BytesIO()
    parquet.write_table(table, file)
    yield Reader("parquet", root / "x.parquet", file.getvalue(), partial(_packed, "hf"),
                 names=("packed", "image"))  # fmt: skip
    yield Reader("parquet set", root / "y.parquet", file.getvalue(), _statistics)
    for name, opened in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        sink = io.BytesIO()
        with opened(sink, table.schema) as writer:
            writer.write_table(table)
        yield Reader(
            f"arrow {name}", root / f"{name}.arrow", sink.getvalue(), partial(_packed, "hf"),
            names=("packed", "image"),
        )


# ---------------------------------------------------------------- documents


def _documents(root: Path, world: World) -> Iterator[Reader]:
    plain = yaml.safe_load(Path(world.config()).read_text())
    yield Reader(
        "configuration", root / "c.yaml", plain, lambda path: repr(load_config(str(path))),
        pack=as_yaml, names=tuple(plain),
    )  # fmt: skip
    yield Reader(
        "configuration as text", root / "d.yaml", as_yaml(plain),
        lambda path: repr(load_config(str(path))), names=tuple(plain),
    )  # fmt: skip
    recipe = {
        "data": plain["data"], "architecture": {"width_factors": [1, 2], "levels": [0, 255]},
        "training": {"iterations": 5, "batch_size": 4},
    }  # fmt: skip
    yield Reader(
        "autoencoder configuration", root / "e.yaml", recipe,
        lambda path: repr(_recipe(path)), pack=as_yaml, names=("ch_mult", "encoder", *recipe),
    )  # fmt: skip
    model = {"model": {"target": "taming.models.vqgan.VQModel", "params": {
        "embed_dim": 4, "n_embed": 8, "ddconfig": {
            "double_z": False, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3,
            "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [],
            "dropout": 0.0,
        }}}}  # fmt: skip
    yield Reader(
        "model.yaml", root / "m.yaml", model,
        lambda path: repr(architecture_of(read_model_yaml(path))), pack=as_yaml,
        names=("ddconfig", "params", "architecture", "ch_mult", "image_shape", "yaml", "n_embed"),
    )  # fmt: skip
    lock = {"host": "x", "pid": 1, "start": "1", "since": 1.0}
    yield Reader("lock", root / ".run.lock", lock, lambda path: repr(read_lock(path)),
                 pack=as_json)  # fmt: skip


def _recipe(path: Path) -> object:
    config = load(AutoencoderConfig, str(path), [], "autoencoders")
    return config.architecture.build((1, 12, 12))


# --------------------------------------------------------------------- runs


def _sampled(path: Path) -> Any:
    """Open the run above a file, sample it, and write its report and a comparison."""
    from pipeline.sampling.image_flow import ImageFlow
    from pipeline.sampling.sampling_plan import SamplingPlan

    folder = path.parent if path.parent.name.startswith("run") else path.parent.parent
    directory = RunDirectory(folder)
    run = open_run(folder, images=True)
    plan = SamplingPlan.open(run, run.config.generate)
    images = ImageFlow.open(plan).sample(2, 0)
    write_report(folder)
    return images, directory.resume_command, len(snapshots_of(folder))


def _compared(path: Path) -> Any:
    folder = path.parent
    write_comparison([str(folder), str(folder.with_name("other"))], folder / "c.html")
    return None


def _runs(root: Path, world: World, run: Path) -> Iterator[Reader]:
    root.mkdir(parents=True)
    documents = {
        "flow.json": as_json, "config.yaml": as_yaml, "environment.json": as_json,
        "metrics.json": as_json,
    }  # fmt: skip
    for number, (name, pack) in enumerate(documents.items()):
        folder = root / f"run-{number}"
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("stages", "checkpoints"))
        shutil.copytree(folder, root / "other", dirs_exist_ok=True)
        if name == "metrics.json":
            metrics = {"run": "x", "n": 12, "fid": {"value": 1.0, "reference": "r"}}
            (folder / name).write_text(json.dumps(metrics))
        text = (folder / name).read_text()
        content = json.loads(text) if name.endswith("json") else yaml.safe_load(text)
        names = (folder.name, "velocity", "train", "blocks", "--", *content)
        yield Reader(f"run, sealed again: {name}", folder / name, content, _sampled, pack,
                     after=_reseal, names=names)  # fmt: skip
        if name == "flow.json":
            yield Reader(f"run, sealed: {name}", folder / name, text.encode(), _sampled,
                         sealed=True, names=names)  # fmt: skip
            block = folder / "blocks" / "block-00.safetensors"
            yield Reader("run, sealed: block", block, block.read_bytes(), _sampled, sealed=True,
                         names=names)  # fmt: skip
        if name == "metrics.json":
            yield Reader("comparison: metrics", folder / name, content, _compared, pack,
                         after=_reseal, names=names)  # fmt: skip
    log = [{"pass": 0, "block": 0, "step": i, "total": 1.0, "time": 1.0} for i in range(4)]
    yield Reader("comparison: log", root / "run-0" / "log.jsonl", log, _compared,
                 pack=lambda rows: b"\n".join(map(as_json, rows if isinstance(rows, list)
                                                  else [rows])), names=("run-0",))  # fmt: skip
    sums = root / "run-0" / seal.NAME
    yield Reader("SHA256SUMS", sums, sums.read_bytes(),
                 lambda path: bool(verify.verify(path.parent)))  # fmt: skip
    cache = root / "cache"
    shutil.copytree(world.caches()[0], cache)
    manifest = json.loads((cache / "manifest.json").read_text())
    yield Reader("manifest.json, sealed again", cache / "manifest.json", manifest, _cache,
                 as_json, after=_reseal, names=("cache",))  # fmt: skip
    shard = cache / "shard-00000.safetensors"
    yield Reader("shard", shard, shard.read_bytes(), _cache, sealed=True, names=("cache",))
    trackers = root / "run-1" / "trackers.json"
    yield Reader(
        "trackers.json", trackers, {"id": "0123abcd"},
        lambda path: repr(Trackers(["tensorboard"], path.parent, {}, print).close()), as_json,
        after=_reseal,
    )  # fmt: skip
    listed = root / "run-2" / "snapshots" / "snapshots.json"
    row = {"file": "snapshots/x", "sha256": "0" * 64, "step": 1, "seen": 2, "seconds": 0.5}
    yield Reader("snapshots.json", listed, [row], _sampled, as_json, after=_reseal,
                 names=("run-2",))  # fmt: skip


def _cache(path: Path) -> Any:
    cache = LatentCache(open_store(path.parent, "latent cache"))
    z = cache.sample(0, len(cache), 0.0, torch.Generator().manual_seed(0))
    return z, cache.labels(), cache.key


def _reseal(path: Path) -> None:
    """Record the content of a file in the seal above it, as its author would have."""
    folder = seal.folder_of(path)
    assert folder is not None
    sums = {name: values[-1] for name, values in seal.recorded(folder).items()}
    name = path.relative_to(folder).as_posix()
    (folder / seal.NAME).write_bytes(
        seal.lines({**sums, name: hashlib.sha256(path.read_bytes()).hexdigest()})
    )


