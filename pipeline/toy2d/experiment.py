"""Trains a flow on a two-dimensional point set, measures it and draws its pictures.

Reference: JKO-iFlow, the two-dimensional experiments.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from eval.mmd import mmd
from flows.flow import Flow
from flows.likelihood import log_prob
from flows.solving.solver import SolverConfig
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.runs.passes import labels
from pipeline.runs.run import Run, open_run
from pipeline.runtime.console import Progress
from pipeline.runtime.rng import generator
from pipeline.storage import atomic
from pipeline.storage.records import to_json
from pipeline.toy2d.figures import draw_all
from pipeline.toy2d.point_source import PointSource
from pipeline.training.train import train

#: kernel widths of the MMD: multiples of the median distance, and the paper's MMD-1
KERNELS: dict[str, dict[str, float]] = {
    "0.1*median": {"scale": 0.1},
    "median": {"scale": 1.0},
    "1": {"bandwidth": 1.0},
}
_ALPHA = 0.05
#: entries of each block in metrics.json
_BLOCK_KEYS = ("objective", "h", "gamma", "movement", "ter", "iterations", "seconds")


def run_experiment(
    config: Config, folder: Path, accelerator: Accelerator, progress: Progress, resume: bool
) -> dict[str, Any] | None:
    """Train an experiment, measure it and draw its pictures; return samples/metrics.json.

    With `resume` an unfinished run continues, and a finished one is only measured and drawn again.
    The result is None if `train.max_minutes` stopped the training.

    Raises:
        UserError: the configuration is invalid, there are several processes, or the folder holds a
            run and `resume` is False.
        JkoflowError: a block failed.
    """
    if accelerator.num_processes > 1:
        raise UserError(
            f"toy2d has {accelerator.num_processes} processes; expected 1; start it without a "
            "launcher"
        )
    source = PointSource(config)
    command = "jkoflow toy2d --run"
    outcome = train(config, folder, accelerator, progress, resume, source, command=command)
    if not outcome.complete:
        return None
    run = open_run(folder)
    flow = run.flow.to(accelerator.device)
    start = time.perf_counter()
    metrics = measure_flow(flow, source, accelerator.device)
    metrics |= {
        "data": to_json(run.manifest.data),
        "passes": measure_passes(run, source, accelerator.device),
        "blocks": [
            {key: row.report()[key] for key in _BLOCK_KEYS} for row in run.manifest.blocks
        ],
    }
    draw_all(run, source, folder / "samples", accelerator.device, progress)
    trained = [row for entry in run.manifest.passes for row in entry.blocks[entry.kept :]]
    metrics["seconds"] = {
        "train": round(sum(row.seconds for row in trained), 1),
        "measure": round(time.perf_counter() - start, 1),
    }
    atomic.write_json(folder / "samples" / "metrics.json", metrics)
    return metrics


@torch.no_grad()
def measure_flow(flow: Flow, source: PointSource, device: torch.device) -> dict[str, Any]:
    """Measure NLL and inversion error on new points, and the MMD of generated points.

    The NLL uses the exact divergence and dopri5. MMD² is the biased V-statistic of `eval.mmd`;
    its threshold is that of a permutation test at α = 0.05.
    """
    settings = source.settings
    test = source.sample("test", 0, settings.test)
    result = log_prob(flow, test.to(device), divergence="exact")
    value, error = (x.cpu().double() for x in (result.value, result.inversion_error))
    solver = SolverConfig(method="dopri5")
    noise_generator = generator(source.seed, "sample", 0)
    generated = flow.transport(flow.draw_noise(settings.compare, noise_generator), True, solver)
    samples = generated.z.cpu()
    points = source.sample("compare", 0, settings.compare)
    metrics: dict[str, Any] = {
        "nll_per_dim": result.nll_per_dim,
        "nll": {
            "n": settings.test,
            "unit": "nats per dimension, points",
            "point_error": float(value.std()) / settings.test**0.5 / result.dim,
            "divergence": "exact",
            "solver": "dopri5",
            "nfe": result.nfe,
        },
        "inversion_mse": float(error.square().mean()) / result.dim,
        "mmd": {"n": settings.compare, "alpha": _ALPHA},
        "nfe": generated.nfe,
        "seed": source.seed,
    }
    for name, kernel in KERNELS.items():
        found = mmd(points, samples, **kernel, alpha=_ALPHA, seed=source.seed)  # type: ignore[arg-type]
        metrics["mmd"][name] = dataclasses.asdict(found)
    if source.points.log_density is not None:
        true = source.points.log_density(test).double()
        inside = true.isfinite()  # float32 may round a point to outside the support
        metrics["entropy_per_dim"] = -float(true[inside].mean()) / 2
        # KL(data ‖ model) / 2; both terms on the same points, so that sampling noise cancels
        metrics["nll_gap_per_dim"] = float((true - value)[inside].mean()) / 2
    return metrics


def measure_passes(run: Run, source: PointSource, device: torch.device) -> list[dict[str, Any]]:
    """Measure NLL and movements of every complete pass on the same points; [] for one pass."""
    passes = run.manifest.passes
    rows: list[dict[str, Any]] = []
    for number, (name, entry) in enumerate(zip(labels(passes), passes, strict=True)):
        if entry.complete and len(passes) > 1:
            flow = open_run(run.folder, number=number).flow.to(device)
            test = source.sample("test", 0, source.settings.test).to(device)
            nll = log_prob(flow, test, divergence="exact").nll_per_dim
            movement = [row.movement for row in entry.blocks]
            rows.append({"name": name, "nll_per_dim": nll, "h": entry.steps, "movement": movement})
    return rows


def experiment_line(metrics: dict[str, Any]) -> str:
    """Return the metrics on one line."""
    nll = metrics["nll"]
    text = f"NLL {metrics['nll_per_dim']:.4f} ± {nll['point_error']:.4f} (points) {nll['unit']}, "
    text += f"n={nll['n']}"
    if "entropy_per_dim" in metrics:
        entropy, gap = metrics["entropy_per_dim"], metrics["nll_gap_per_dim"]
        text += f", entropy {entropy:.4f}, gap {gap:.4f}"
    for name in KERNELS:
        row = metrics["mmd"][name]
        sign = "<" if row["value"] < row["threshold"] else "≥"
        text += f"; MMD²({name}) {row['value']:.2e} {sign} τ {row['threshold']:.2e}"
    blocks, seconds = len(metrics["blocks"]), metrics["seconds"]["train"]
    text += f"; inversion MSE {metrics['inversion_mse']:.1e}; {blocks} blocks"
    return f"{text}, {metrics['nfe']} evaluations per sample; trained in {seconds:.0f} s"
