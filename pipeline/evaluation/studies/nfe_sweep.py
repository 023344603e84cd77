"""NFE sweep: the FID of one run at several budgets of network evaluations per sample."""

from __future__ import annotations

import contextlib
from typing import Any

from pipeline.config.sampling import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.evaluator import Evaluator
from pipeline.evaluation.studies.study import Study, study_heading
from pipeline.sampling.sampling_plan import SamplingPlan, differences
from pipeline.sampling.solvers import method_of, whole_numbers
from pipeline.storage import atomic

FILE = "nfe.json"
PICTURE = "samples/nfe.png"


def sweep_nfe(
    plan: SamplingPlan, budgets: str, settings: EvaluateConfig, evaluator: Evaluator
) -> dict[str, Any]:
    """Measure FID at several budgets; writes nfe.json and samples/nfe.png into the run.

    The budgets are network evaluations per sample, separated by commas. Rows of an earlier sweep
    with other solvers stay in the file and in the plot.

    Raises:
        UserError: n is below 2, a budget is no whole number or too small for one step, or a solver
            is adaptive.
    """
    plans = [plan.within(nfe) for nfe in sorted(whole_numbers("--nfe-study", budgets))]
    study, method = Study(plan, settings, evaluator), method_of(plan.solvers)
    rows = {(row["method"], row["steps"]): row for row in _earlier_rows(study)}
    for each in plans:
        steps = each.solvers[0].steps
        rows[method, steps] = {"method": method, "steps": steps, **study.measure(each)}
    ordered = sorted(rows.values(), key=lambda row: (row["method"], row["nfe"]))
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for row in ordered:
        x, y = lines.setdefault(row["method"], ([], []))
        x.append(row["nfe"])
        y.append(row["fid"])
    return study.write((FILE, PICTURE), ordered, lines, "network evaluations a sample")


def nfe_table(result: dict[str, Any]) -> str:
    """Format the rows as aligned text."""
    wide = max(10, *(len(row["method"]) for row in result["rows"]))
    lines = [study_heading(result), f"{'solver':>{wide}}{'steps':>7}{'NFE':>6}{'FID':>9}"]
    for row in result["rows"]:
        lines.append(f"{row['method']:>{wide}}{row['steps']:>7}{row['nfe']:>6}{row['fid']:>9.2f}")
    return "\n".join(lines)


def _earlier_rows(study: Study) -> list[dict[str, Any]]:
    """Read the rows of an earlier sweep with the same identity."""
    path = study.folder / FILE
    if not path.is_file():
        return []
    earlier: Any = None
    with contextlib.suppress(UserError):  # of a damaged file, which is written again
        earlier = atomic.read_json(path, "study")
    if not isinstance(earlier, dict):
        return []
    rows: list[dict[str, Any]] = earlier.pop("rows", [])
    return [] if differences(earlier, study.identity) else rows
