"""Training curve: the FID of a flow-matching run at the weights that it kept during training."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.config.sampling import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.evaluator import Evaluator
from pipeline.evaluation.studies.study import Study, study_heading
from pipeline.runs.snapshots import at_snapshot, snapshots_of
from pipeline.sampling.sampling_plan import SamplingPlan
from pipeline.sampling.solvers import solver_identity

FILE = "curve.json"
PICTURE = "samples/curve.png"


def measure_curve(
    plan: SamplingPlan, settings: EvaluateConfig, evaluator: Evaluator
) -> dict[str, Any]:
    """Measure FID at every snapshot of a run; writes curve.json and samples/curve.png into it.

    The rows have step, seen (training samples), seconds (of training), nfe and fid.

    Raises:
        UserError: n is below 2, or the run has no snapshots or several blocks.
    """
    run = plan.run
    if len(run.manifest.blocks) != 1:
        raise UserError(
            f"a training curve needs a flow of one block, but the run at {run.name} has "
            f"{len(run.manifest.blocks)}; train with train.objective=fm"
        )
    snapshots = snapshots_of(run.folder)
    if not snapshots:
        raise UserError(
            f"the run at {run.name} kept no weights during training; train with "
            "--set train.objective=fm --set fm.snapshot_every=1000"
        )
    study = Study(plan, settings, evaluator)
    rows = []
    for snapshot in snapshots:
        progress = {key: getattr(snapshot, key) for key in ("step", "seen", "seconds")}
        then = dataclasses.replace(plan, run=at_snapshot(run, snapshot))
        rows.append({**progress, **study.measure(then)})
    line = ([row["seen"] for row in rows], [row["fid"] for row in rows])
    return study.write(
        (FILE, PICTURE), rows, {f"n = {settings.n}": line}, "samples seen",
        solver=solver_identity(plan.solvers[0]),
    )  # fmt: skip


def curve_table(result: dict[str, Any]) -> str:
    """Format the rows as aligned text."""
    lines = [study_heading(result), f"{'step':>10}{'samples seen':>14}{'seconds':>9}{'FID':>9}"]
    for row in result["rows"]:
        lines.append(
            f"{row['step']:>10}{row['seen']:>14}{row['seconds']:>9.0f}{row['fid']:>9.2f}"
        )
    return "\n".join(lines)
