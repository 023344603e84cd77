"""Whose numbers are in a metrics.json: those of the run beside it, drawn as it draws, or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval.pictures import note_of
from pipeline.errors import UserError
from pipeline.runs.run import Run
from pipeline.sampling.sampling_plan import way_of
from pipeline.sampling.solvers import described, plain_solvers, solvers_of
from pipeline.storage import atomic


def metrics_of(run: Run) -> dict[str, Any] | None:
    """The numbers of a run, to be exported with it; None if it has none.

    Raises:
        UserError: they are of other blocks, or of images that were drawn otherwise.
    """
    path = run.folder / "metrics.json"
    if not path.is_file():
        return None
    metrics: dict[str, Any] = atomic.read_json(path, "metrics")
    # an exported run carries the numbers of its weights before they were rounded
    if metrics.get("run") not in run.origins:
        raise UserError(
            f"{path} was measured on other blocks than the run has now; evaluate it again, or "
            "delete the file"
        )
    metrics["run"] = run.fingerprint  # of what is exported now
    _drawn_alike(run, metrics.get("fid", {}), path)
    for key in ("fid", "rfid"):
        if "reference" in metrics.get(key, {}):
            metrics[key]["reference"] = named(metrics[key]["reference"])
    return metrics


def _drawn_alike(run: Run, fid: dict[str, Any], path: Path) -> None:
    """Refuse an FID of images that were drawn otherwise than the exported run draws its own."""
    way = way_of(run, run.config.generate)
    told = {**way.about(), "solvers": plain_solvers(solvers_of(run, run.config.generate))}
    told["classes"] = told.get("classes")
    if "solvers" not in fid:  # measured before they were noted
        del told["solvers"]
    theirs, ours = (_way(about) for about in (fid, told))
    if way.guide is not None and fid.get("guide", {}).get("run") in way.guide.origins:
        theirs = {**theirs, "guide": ours["guide"]}
    refined = fid.get("refiner", {}).get("run")
    if way.refiner is not None and refined in way.refiner.run.origins:
        theirs = {**theirs, "refiner": ours["refiner"]}
    for key in ours:
        if fid and theirs[key] != ours[key]:
            raise UserError(
                f"{path} was measured with {key} {theirs[key]}, but the exported run would sample "
                f"with {key} {ours[key]}; evaluate it so, or delete the file"
            )


def _way(about: dict[str, Any]) -> dict[str, Any]:
    """What decides how samples are drawn, of what is told beside a number."""
    guide, weight, refiner = about.get("guide"), about.get("guidance"), about.get("refiner")
    grid = ("method", "steps", "rtol", "atol")
    return {
        "guidance": 1.0 if weight is None else weight,
        "guide": guide and f"{guide['name']} ({guide['run']})",
        "refiner": f"{refiner['name']} ({refiner['run']})" if refiner else "none",
        "refiner's solver": refiner and {key: refiner[key] for key in grid if key in refiner},
        "classes": about.get("classes"),
        "solvers": about.get("solvers"),
        "sampled_in": about.get("sampled_in", "fp32"),
    }


def named(reference: str) -> str:
    """A reference by its name, not by its place on this machine."""
    return Path(reference).name if Path(reference).is_absolute() else reference


def shows(path: Path, run: Run) -> bool:
    """Whether a grid was drawn as a run draws now: the same blocks, solver, guide and refiner.

    Of a run with classes it shows all of them, or those that the run draws now.

    A picture that says nothing of its origin is taken for one.
    """
    note = note_of(path)
    if note is None:
        return path.is_file()
    identity = json.loads(note)
    way = way_of(run, run.config.generate)
    settings = run.config.generate
    solved = described(run, settings)
    alike = all(identity.get(k) == solved.get(k) for k in ("solver", "block_steps", "solvers"))
    alike = alike and identity.get("precision", "fp32") == settings.precision
    labels = identity.get("classes", {}).get("labels")
    if labels and len(set(labels)) < run.flow.classes:
        alike = alike and labels == settings.labels
    for key, other in (("guide", way.guide), ("refiner", way.refiner and way.refiner.run)):
        theirs, ours = identity.get(key), way.describe().get(key)
        if theirs and other and theirs["run"] in other.origins:
            theirs = {**theirs, "run": other.fingerprint}  # the same, before it was rounded
        alike = alike and theirs == ours
    return alike and identity.get("run") in run.origins
