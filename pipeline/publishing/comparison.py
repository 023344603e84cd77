"""Comparison of runs on one page that needs no other file: metrics, losses, samples, settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.plain import flat
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.evaluation.tables import metric_rows
from pipeline.publishing.page import curves, gallery, page, section, table
from pipeline.publishing.report import UNSAMPLED, is_current, previews_of, run_of
from pipeline.runs.directory import RunDirectory
from pipeline.runs.manifest import Manifest
from pipeline.runs.zoo import locate
from pipeline.storage import atomic
from pipeline.storage.records import well_formed
from pipeline.storage.training_log import rows_of

_MOST = 8
_ABSENT = "–"


@dataclass(frozen=True)
class _Run:
    """A run that is compared; `name` is the caller's name of it."""

    name: str
    folder: Path
    config: Config
    manifest: Manifest
    metrics: dict[str, Any]

    @property
    def values(self) -> dict[str, str]:
        """What the flow is and costs, and its metrics, by name."""
        rows = self.manifest.blocks
        facts = {
            "state": "finished" if self.manifest.complete else "unfinished",
            "objective": self.config.train.objective,
            "blocks": str(len(rows)),
            "parameters": f"{sum(row.parameters for row in rows):,}",
            "iterations": f"{sum(row.iterations for row in rows):,}",
            "seconds of training": f"{sum(row.seconds for row in rows):.0f}",
        }
        with well_formed(self.folder / "metrics.json"):
            measured = metric_rows(self.metrics) if "fid" in self.metrics else []
        return {**facts, **{name.strip(): value for name, value in measured}}

    @property
    def losses(self) -> list[tuple[float, float]]:
        """Total loss per dimension over the steps of all blocks and passes."""
        path, points, last, before = self.folder / "log.jsonl", [], (0, 0, 0), 0
        if not path.is_file():
            return []
        for row in rows_of(path):
            if "total" not in row:
                continue
            with well_formed(path):
                at = (row.get("pass", 0), row["block"], row["step"])
                before += last[2] if at[:2] != last[:2] else 0
                last = at
                points.append((float(before + row["step"]), float(row["total"])))
        return points


def write_comparison(runs: Sequence[str], out: Path) -> Path:
    """Write the comparison of runs, directories or zoo:NAME, to an HTML file; return its path.

    Raises:
        UserError: fewer than two runs or more than eight, one twice, or no finished block.
    """
    if not 2 <= len(runs) <= _MOST or len(set(runs)) < len(runs):
        raise UserError(
            f"the number of different runs is {len(set(runs))}; expected two to {_MOST}; name "
            "each once, or give a single run with --run"
        )
    opened = [_open(run) for run in runs]
    grids = [(run.name, run.folder / "samples" / "grid.png") for run in opened]
    grids = [pair for pair in grids if pair[1].is_file()]
    parts = [
        section("Metrics", _columns(opened, [run.values for run in opened])),
        section("Loss", curves([(run.name, run.losses) for run in opened], "loss per dimension")),
        section("Samples", gallery(grids) if grids else UNSAMPLED),
    ]
    for run in opened:
        previews = previews_of(run.folder)
        if previews:
            parts.append(section(f"Previews of {run.name}", gallery(previews)))
    parts.append(section("Differing settings", _differing(opened)))
    state = ", ".join(run.name for run in opened)
    atomic.write_bytes(out, page("jkoflow: comparison of runs", state, parts))
    return out


def _open(name: str) -> _Run:
    folder = locate(name)
    directory = RunDirectory(folder)
    path = folder / "metrics.json"
    with well_formed(path):
        metrics = {**atomic.read_json(path, "metrics")} if path.is_file() else {}
        if metrics and not is_current(run_of(metrics), directory.manifest):
            metrics = {}  # of other blocks than the run has now
    return _Run(name, folder, directory.config, directory.manifest, metrics)


def _columns(runs: Sequence[_Run], values: Sequence[dict[str, str]]) -> str:
    """Return a table with a column for each run."""
    names = dict.fromkeys(name for each in values for name in each)
    rows = ([name, *(each.get(name, _ABSENT) for each in values)] for name in names)
    return table(["", *(run.name for run in runs)], rows)


def _differing(runs: Sequence[_Run]) -> str:
    """Return a table of the settings that are not the same in all runs."""
    settings = [
        {name: value if isinstance(value, str) else json.dumps(value)
         for name, value in flat(run.config).items()}
        for run in runs
    ]
    names = dict.fromkeys(name for each in settings for name in each)
    differing = [name for name in names if len({each.get(name) for each in settings}) > 1]
    return _columns(runs, [{k: v for k, v in each.items() if k in differing} for each in settings])
