"""Report of a run: report.html, one page that needs no other file.

It shows the configuration, the blocks, the pictures of samples/, some of previews/, metrics.json
and environment.json. `pipeline.publishing.comparison` compares runs.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from eval.pictures import note_of
from pipeline.config.plain import resolved_yaml
from pipeline.evaluation.tables import metric_rows
from pipeline.publishing.page import gallery, page, picture, section, table
from pipeline.runs.directory import RunDirectory
from pipeline.runs.manifest import Manifest
from pipeline.runs.passes import BlockRow
from pipeline.storage import atomic
from pipeline.storage.records import well_formed

REPORT = "report.html"
#: the terms of a block's objective, by their names in flow.json
_TERMS = ("potential", "neg_log_det", "movement")
#: pictures of measurements; each has a JSON file of the same name in the run
_MEASUREMENTS = ("nfe", "curve", "likelihood")
#: the pictures that come first; the others follow by name
_FIRST = ("grid.png", "movement.png")

#: most previews on a page
_PREVIEWS = 12


def write_report(folder: Path) -> Path:
    """Write report.html into a run with at least one finished block; return its path.

    Raises:
        UserError: the folder holds no run, no block is finished, or a file is damaged.
    """
    directory = RunDirectory(folder)
    config, manifest = directory.config, directory.manifest
    points = manifest.autoencoder is None  # `jkoflow toy2d` writes metrics into samples/
    measured = folder / ("samples" if points else "") / "metrics.json"
    metrics = _read(measured, "metrics")
    rows = manifest.blocks
    parts = [section("Blocks", table(_HEAD, map(_block, range(len(rows)), rows)))]
    with well_formed(measured):
        if metrics and not is_current(run_of(metrics), manifest):
            parts.insert(0, section("Metrics", _OUTDATED))
        elif metrics:
            parts.insert(0, section("Metrics", table((), _metrics(metrics))))
        else:
            refines = any(row.spec.velocity.image_channels for row in rows)
            parts.insert(0, section("Metrics", _REFINES if refines else _UNMEASURED))
    pictures = _pictures(folder / "samples")
    parts += [section(path.stem, _origin(path, manifest) + picture(path)) for path in pictures]
    if not pictures and not points:
        parts.append(section("Samples", UNSAMPLED))
    previews = previews_of(folder)
    if previews:
        parts.append(section("Previews", gallery(previews)))
    environment = [row for row in _flat(directory.environment) if row[0] != "command"]
    if environment:
        parts.append(section("Environment", table((), environment)))
    parts.append(section("Configuration", f"<pre>{escape(resolved_yaml(config))}</pre>"))
    unfinished = f"unfinished; continue it with {directory.resume_command}"
    state = "finished" if manifest.complete else unfinished
    state = f"{config.train.objective}, {len(rows)} blocks, {state}"
    atomic.write_bytes(folder / REPORT, page(f"jkoflow: {config.name}", state, parts))
    return folder / REPORT


UNSAMPLED = "<p>No samples yet; run <code>jkoflow generate</code>.</p>"
_UNMEASURED = "<p>Not measured; run <code>jkoflow evaluate</code>.</p>"
_REFINES = (
    "<p>A refiner has no metrics of its own; give it to a run on the same autoencoder: "
    "<code>jkoflow evaluate --refiner</code>.</p>"
)
_OUTDATED = (
    "<p>These metrics are of other blocks than the run has now, or of some of its blocks; run "
    "<code>jkoflow evaluate</code>.</p>"
)


def run_of(measured: dict[str, Any]) -> str | None:
    """Return the fingerprint of the run that a file or a picture was made of, if it has one."""
    fingerprint: str | None = measured.get("sampling", measured).get("run")
    return fingerprint


def is_current(fingerprint: str | None, manifest: Manifest) -> bool:
    """Return whether a fingerprint is that of all blocks of a run; None, as of points, passes."""
    if fingerprint is None or fingerprint in manifest.origins:
        return True
    return fingerprint == manifest.fingerprint()


_HEAD = ("block", "step", "movement (W2)", "Ter(k)", *(f"{name}, nats" for name in _TERMS),
         "iterations", "parameters", "seconds")  # fmt: skip


def _block(index: int, row: BlockRow) -> list[str]:
    step, terms = row.step, row.terms or {}
    symbol = "h" if row.gamma is None else "γ"
    return [
        str(index),
        "free" if step is None else f"{symbol} = {step:.4g}",
        *("" if value is None else f"{value:.4f}" for value in (row.movement, row.ter)),
        *(f"{terms[name]:.4f}" if name in terms else "" for name in _TERMS),
        str(row.iterations),
        f"{row.parameters:,}",
        f"{row.seconds:.1f}",
    ]


def _metrics(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """List names and values; metrics without an FID are listed as they are in the file."""
    if "fid" not in metrics:
        return _flat({key: value for key, value in metrics.items() if key != "blocks"})
    rows = [(name.strip(), value) for name, value in metric_rows(metrics)]
    rows.append(("extractor", str(metrics["fid"].get("extractor", "unknown"))))
    if metrics.get("peak_memory_bytes"):
        rows.append(("peak memory", f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB"))
    seconds = metrics.get("seconds") or {"training": metrics.get("train_seconds", 0.0)}
    return rows + [(f"seconds, {step}", f"{spent:.1f}") for step, spent in seconds.items()]


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows


def _read(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with well_formed(path):
        return {**atomic.read_json(path, what)}


def previews_of(folder: Path) -> list[tuple[str, Path]]:
    """Return captions and files of at most 12 previews, the first and the last included."""
    paths = sorted((folder / "previews").glob("*.png"), key=lambda path: _order(path.stem))
    if len(paths) > _PREVIEWS:
        stride = (len(paths) - 1) / (_PREVIEWS - 1)
        paths = [paths[round(index * stride)] for index in range(_PREVIEWS)]
    return [(_caption(path.stem), path) for path in paths]


def _caption(stem: str) -> str:
    """Return `block 0, step 500` for block-00-step-00000500; a pass comes first."""
    words = [part.lstrip("0") or "0" for part in stem.split("-")]
    return ", ".join(" ".join(words[i : i + 2]) for i in range(0, len(words), 2))


def _order(stem: str) -> str:
    """Return what previews are sorted by; those of the first pass have no number."""
    return stem if stem.startswith("pass") else f"pass-00-{stem}"


def _pictures(samples: Path) -> list[Path]:
    first = [samples / name for name in _FIRST if (samples / name).is_file()]
    return first + sorted(path for path in samples.glob("*.png") if path not in first)


def _origin(path: Path, manifest: Manifest) -> str:
    """Return a warning for a picture that shows samples of other blocks, else nothing."""
    note, file = note_of(path), path.parent.parent / f"{path.stem}.json"
    if path.stem in _MEASUREMENTS and file.is_file():
        fingerprint = run_of(_read(file, "measurement"))
    elif note is not None:
        try:
            fingerprint = run_of(json.loads(note))
        except (ValueError, AttributeError, RecursionError):  # of another program
            return ""
    else:
        return ""
    if is_current(fingerprint, manifest):
        return ""
    return "<p>Sampled from other blocks than the run has now, or from some of its blocks.</p>"
