"""FID against network evaluations a sample: one run, several budgets, a table and a plot."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.config.schema import EvaluateConfig, GenerateConfig
from pipeline.evaluation.evaluator import Evaluator
from pipeline.evaluation.study import Study, heading
from pipeline.runs.run import Run
from pipeline.sampling.solvers import method_of, solvers_of, whole_numbers, within
from pipeline.storage import atomic

FILE = "nfe.json"
PICTURE = "samples/nfe.png"


def study(
    run: Run,
    budgets: str,
    settings: EvaluateConfig,
    sampling: GenerateConfig,
    evaluator: Evaluator,
) -> dict[str, Any]:
    """Measure FID at several budgets; commits nfe.json and samples/nfe.png in the run directory.

    An earlier study with another solver stays in the file and in the plot.

    Args:
        run: an open run.
        budgets: evaluations a sample, separated by commas.
        settings: n, seed and reference.
        sampling: the solver, on a fixed grid.
        evaluator: holds the network.

    Returns:
        What nfe.json holds: n, seed, reference, classes, guidance, guide, and the rows, each
        with method, steps, nfe, fid.

    Raises:
        UserError: n below 2, budgets that are no numbers or below one step a block, or an
            adaptive solver.
    """
    sampling = dataclasses.replace(sampling, n=settings.n, seed=settings.seed)
    plans = [within(run, sampling, nfe) for nfe in sorted(whole_numbers("--nfe-study", budgets))]
    work, method = Study(run, settings, sampling, evaluator), method_of(solvers_of(run, plans[0]))
    rows = {(row["method"], row["steps"]): row for row in _before(run, work.about)}
    for plan in plans:
        told = {"method": method, "steps": plan.steps}
        rows[method, plan.steps] = {**told, **work.measure(run, plan)}
    ordered = sorted(rows.values(), key=lambda row: (row["method"], row["nfe"]))
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for row in ordered:
        x, y = lines.setdefault(row["method"], ([], []))
        x.append(row["nfe"])
        y.append(row["fid"])
    return work.finish((FILE, PICTURE), ordered, lines, "network evaluations a sample")


def table(result: dict[str, Any]) -> str:
    """The rows as aligned text."""
    wide = max(10, *(len(row["method"]) for row in result["rows"]))
    lines = [heading(result), f"{'solver':>{wide}}{'steps':>7}{'NFE':>6}{'FID':>9}"]
    for row in result["rows"]:
        lines.append(f"{row['method']:>{wide}}{row['steps']:>7}{row['nfe']:>6}{row['fid']:>9.2f}")
    return "\n".join(lines)


def _before(run: Run, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier study of the same about: blocks, images, classes, guidance, …."""
    path = run.folder / FILE
    if not path.is_file():
        return []
    found: dict[str, Any] = atomic.read_json(path, "study")
    same = isinstance(found, dict) and all(found.get(key) == about[key] for key in about)
    return found["rows"] if same else []
