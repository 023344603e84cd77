"""Report of a run: report.html, one page that needs no other file.

It shows the configuration, the blocks, the pictures of samples/, metrics.json and
environment.json.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from eval.pictures import note_of
from pipeline.config.load import resolved_yaml
from pipeline.evaluation.tables import metric_rows
from pipeline.runs.directory import RunDirectory
from pipeline.runs.manifest import Manifest
from pipeline.runs.passes import BlockRow
from pipeline.storage import atomic

REPORT = "report.html"
#: the terms of a block's objective, by their names in flow.json
_TERMS = ("potential", "neg_log_det", "movement")
#: pictures of measurements; each has a JSON file of the same name in the run
_MEASUREMENTS = ("nfe", "curve", "likelihood")
#: the pictures that come first; the others follow by name
_FIRST = ("grid.png", "movement.png")

_PAGE = Template(
    """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title><style>
body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em }
table { border-collapse: collapse } td, th { padding: .2em .8em; border-bottom: 1px solid #ccc }
th { text-align: left } td { font-variant-numeric: tabular-nums }
img { max-width: 100%; image-rendering: pixelated } pre { background: #f4f4f4; padding: 1em }
</style></head><body>
<h1>$title</h1>
<p>$state</p>
$body
</body></html>
"""
)


def write_report(folder: Path) -> Path:
    """Write report.html into a run with at least one finished block; return its path.

    Raises:
        UserError: the folder holds no run, no block is finished, or a file is damaged.
    """
    directory = RunDirectory(folder)
    config, manifest = directory.config, directory.manifest
    points = manifest.autoencoder is None  # `jkoflow toy2d` writes metrics into samples/
    metrics = _read(folder / ("samples" if points else "") / "metrics.json", "metrics")
    rows = manifest.blocks
    parts = [_section("Blocks", _table(_HEAD, map(_block, range(len(rows)), rows)))]
    if metrics and not _is_current(_run_of(metrics), manifest):
        parts.insert(0, _section("Metrics", _OUTDATED))
    elif metrics:
        parts.insert(0, _section("Metrics", _table((), _metrics(metrics))))
    else:
        refines = any(row.spec.velocity.image_channels for row in rows)
        parts.insert(0, _section("Metrics", _REFINES if refines else _UNMEASURED))
    parts += [
        _section(path.stem, _origin(path, manifest) + _picture(path))
        for path in _pictures(folder / "samples")
    ]
    parts.append(
        _section("Environment", _table((), _flat(directory.environment)))
    )
    parts.append(_section("Configuration", f"<pre>{escape(resolved_yaml(config))}</pre>"))
    unfinished = f"unfinished; continue it with {directory.resume_command}"
    state = "finished" if manifest.complete else unfinished
    page = _PAGE.substitute(
        title=escape(f"jkoflow: {config.name}"),
        state=escape(f"{config.train.objective}, {len(rows)} blocks, {state}"),
        body="\n".join(parts),
    )
    atomic.write_bytes(folder / REPORT, page.encode())
    return folder / REPORT


_UNMEASURED = "<p>Not measured; run <code>jkoflow evaluate</code>.</p>"
_REFINES = (
    "<p>A refiner has no metrics of its own; give it to a run on the same autoencoder: "
    "<code>jkoflow evaluate --refiner</code>.</p>"
)
_OUTDATED = (
    "<p>These metrics are of other blocks than the run has now, or of some of its blocks; run "
    "<code>jkoflow evaluate</code>.</p>"
)


def _run_of(measured: dict[str, Any]) -> str | None:
    """Return the fingerprint of the run that a file or a picture was made of, if it has one."""
    fingerprint: str | None = measured.get("sampling", measured).get("run")
    return fingerprint


def _is_current(fingerprint: str | None, manifest: Manifest) -> bool:
    """Whether a fingerprint is that of all blocks of a run; None, as of points, passes."""
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
    return atomic.read_json(path, what) if path.is_file() else {}


def _pictures(samples: Path) -> list[Path]:
    first = [samples / name for name in _FIRST if (samples / name).is_file()]
    return first + sorted(path for path in samples.glob("*.png") if path not in first)


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(path.name)}" src="data:image/png;base64,{data}">'


def _origin(path: Path, manifest: Manifest) -> str:
    """Return a warning for a picture that shows samples of other blocks, else nothing."""
    note, file = note_of(path), path.parent.parent / f"{path.stem}.json"
    if path.stem in _MEASUREMENTS and file.is_file():
        fingerprint = _run_of(_read(file, "measurement"))
    elif note is not None:
        fingerprint = _run_of(json.loads(note))
    else:
        return ""
    if _is_current(fingerprint, manifest):
        return ""
    return "<p>Sampled from other blocks than the run has now, or from some of its blocks.</p>"


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_line("th", head)] if head else []
    lines += [_line("td", row) for row in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _line(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
