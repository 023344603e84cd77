"""Readers of runs, logs, seals and caches."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline.data.latent_cache import LatentCache
from pipeline.publishing.comparison import write_comparison
from pipeline.publishing.report import write_report
from pipeline.runs import verify
from pipeline.runs.directory import RunDirectory
from pipeline.runs.run import open_run
from pipeline.runs.snapshots import snapshots_of
from pipeline.storage import seal
from pipeline.storage.shards.opening import open_store
from pipeline.storage.trackers import Trackers
from tests.faults.mutations import as_json, as_yaml
from tests.faults.readers.reader import Reader
from tests.pipeline.tiny import World


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


def run_readers(root: Path, world: World, run: Path) -> Iterator[Reader]:
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
