"""Checks that metrics and pictures were made with the weights and the plan of an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval.pictures import note_of
from pipeline.errors import UserError
from pipeline.sampling.sampling_plan import IN_DATA, SamplingPlan
from pipeline.storage import atomic
from pipeline.storage.records import well_formed


def metrics_of(plan: SamplingPlan) -> dict[str, Any] | None:
    """Read the metrics of a run, to be exported with it; None if it has none.

    Raises:
        UserError: the metrics are of other blocks, or of images that were sampled in another way.
    """
    path = plan.run.folder / "metrics.json"
    if not path.is_file():
        return None
    metrics: dict[str, Any] = atomic.read_json(path, "metrics")
    with well_formed(path):
        changed = plan.differences(metrics.get("sampling", {}))
    if "run" in changed:
        raise UserError(
            f"{path} was measured on other blocks than the run has now; evaluate it again, or "
            "delete the file"
        )
    if changed:
        key, (before, now) = next(iter(changed.items()))
        raise UserError(
            f"{path} was measured with {key} {before}, but the exported run samples with {key} "
            f"{now}; evaluate the run with {key} {now}, or delete the file"
        )
    metrics["sampling"] = plan.identity()
    metrics.pop("inputs", None)  # they identify data sets of this machine
    for key in ("fid", "rfid"):
        if "reference" in metrics.get(key, {}):
            metrics[key]["reference"] = reference_name(metrics[key]["reference"])
    return metrics


def shows_samples_of(path: Path, plan: SamplingPlan) -> bool:
    """Return whether a picture shows samples of a plan, or of all classes of its run."""
    note = note_of(path)
    if note is None:
        return False
    sampling = json.loads(note).get("sampling", {})
    changed = plan.differences(sampling)
    if set(changed) == {"classes"}:
        shown = sampling["classes"]
        return shown == IN_DATA or len(set(shown)) == plan.run.flow.classes
    return not changed


def reference_name(reference: str) -> str:
    """Return the name of a reference without its folder on this machine."""
    return Path(reference).name if Path(reference).is_absolute() else reference
