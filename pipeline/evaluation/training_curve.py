"""FID against samples seen: a flow-matching run, measured at the weights it kept on its way."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.config.schema import EvaluateConfig, GenerateConfig
from pipeline.errors import UserError
from pipeline.evaluation.evaluator import Evaluator
from pipeline.evaluation.study import Study, heading
from pipeline.runs.run import Run
from pipeline.runs.snapshots import at_snapshot, snapshots_of
from pipeline.sampling.solvers import solvers_of

FILE = "curve.json"
PICTURE = "samples/curve.png"


def measure(
    run: Run, settings: EvaluateConfig, sampling: GenerateConfig, evaluator: Evaluator
) -> dict[str, Any]:
    """Measure FID at every snapshot of a run; commits curve.json and samples/curve.png.

    Args:
        run: an open run of flow matching.
        settings: n, seed and reference.
        sampling: the solver.
        evaluator: holds the network.

    Returns:
        What curve.json holds: n, seed, reference, how samples were drawn, and the rows, each with
        step, seen (samples), seconds (of training), nfe and fid.

    Raises:
        UserError: n below 2, or the run kept no snapshots or has several blocks.
    """
    if len(run.manifest["blocks"]) != 1:
        raise UserError(
            f"a curve is of flows of one block, and the run at {run.folder} has "
            f"{len(run.manifest['blocks'])}"
        )
    listed = snapshots_of(run.folder, run.manifest["pass"])
    if not listed:
        raise UserError(
            f"the run at {run.folder} kept no weights on its way; train one with "
            "--set train.objective=fm --set train.snapshot_every=1000"
        )
    study = Study(run, settings, sampling, evaluator)
    rows = []
    for row in listed:
        told = {key: row[key] for key in ("step", "seen", "seconds")}
        rows.append({**told, **study.measure(at_snapshot(run, row), study.sampling)})
    line = ([row["seen"] for row in rows], [row["fid"] for row in rows])
    return study.finish(
        (FILE, PICTURE), rows, {f"n = {settings.n}": line}, "samples seen",
        solver=dataclasses.asdict(solvers_of(run, study.sampling)[0]),
    )  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The rows as aligned text."""
    lines = [heading(result), f"{'step':>10}{'samples seen':>14}{'seconds':>9}{'FID':>9}"]
    for row in result["rows"]:
        told = f"{row['step']:>10}{row['seen']:>14}{row['seconds']:>9.0f}{row['fid']:>9.2f}"
        lines.append(told)
    return "\n".join(lines)
