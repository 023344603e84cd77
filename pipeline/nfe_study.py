"""FID against network evaluations a sample: one run, several budgets, a table and a plot."""

from __future__ import annotations

import dataclasses
from typing import Any

from eval.inception import EXTRACTOR
from eval.pictures import curves
from pipeline import commit
from pipeline.config import EvaluateConfig, GenerateConfig
from pipeline.errors import UserError
from pipeline.evaluate import Evaluator
from pipeline.features import fid_of
from pipeline.generate import solver_of, whole_numbers, within
from pipeline.runs import Run

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

    All budgets start from the same noise. Images and features are kept as those of an evaluation
    are, so that a study that was interrupted, or is extended, makes only what is missing. An
    earlier study with another solver stays in the file and in the plot.

    Args:
        run: an open run.
        budgets: evaluations a sample, separated by commas.
        settings: n, seed and reference.
        sampling: the solver, on a fixed grid.
        evaluator: holds the network.

    Returns:
        What nfe.json holds: n, seed, reference and the rows, each with method, steps, nfe, fid.

    Raises:
        UserError: n below 2, budgets that are no numbers or below one step a block, or an
            adaptive solver.
    """
    if settings.n < 2:
        raise UserError(f"FID needs at least 2 images, not {settings.n}; take 2000 or more")
    sampling = dataclasses.replace(sampling, n=settings.n, seed=settings.seed)
    plans = [within(run, sampling, nfe) for nfe in sorted(whole_numbers("--nfe-study", budgets))]
    reference = evaluator.reference(settings.reference)
    method = solver_of(run, sampling).method
    about = {
        "n": settings.n, "seed": settings.seed, "reference": settings.reference,
        "extractor": EXTRACTOR, "run": run.fingerprint,
    }  # fmt: skip
    rows = {(row["method"], row["steps"]): row for row in _before(run, about)}
    for plan in plans:
        images, features = evaluator.generated(run, plan)
        key = (method, plan.steps)
        rows[key] = {
            "method": method, "steps": plan.steps, "nfe": images.manifest["nfe"],
            "fid": fid_of(features, reference),
        }  # fmt: skip
    ordered = sorted(rows.values(), key=lambda row: (row["method"], row["nfe"]))
    result = {**about, "rows": ordered}
    if evaluator.accelerator.is_main_process:
        commit.write_json(run.folder / FILE, result)
        _plot(run, result)
    return result


def table(result: dict[str, Any]) -> str:
    """The rows as aligned text."""
    lines = [
        f"FID(n={result['n']}, {result['reference']}), seed {result['seed']}",
        f"{'solver':>10}{'steps':>7}{'NFE':>6}{'FID':>9}",
    ]
    for row in result["rows"]:
        lines.append(f"{row['method']:>10}{row['steps']:>7}{row['nfe']:>6}{row['fid']:>9.2f}")
    return "\n".join(lines)


def _before(run: Run, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier study of the same blocks, images and reference."""
    path = run.folder / FILE
    if not path.is_file():
        return []
    found: dict[str, Any] = commit.read_json(path, "study")
    same = isinstance(found, dict) and all(found.get(key) == about[key] for key in about)
    return found["rows"] if same else []


def _plot(run: Run, result: dict[str, Any]) -> None:
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for row in result["rows"]:
        x, y = lines.setdefault(row["method"], ([], []))
        x.append(row["nfe"])
        y.append(row["fid"])
    commit.write_with(
        run.folder / PICTURE,
        lambda file: curves(file, lines, x_label="network evaluations a sample", y_label="FID"),
    )
