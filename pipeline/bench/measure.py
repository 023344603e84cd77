"""Measures a model on held-out samples: NLL, MMD and the inverse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.mmd import mmd
from flows.baselines.base import DensityModel
from pipeline.bench.problem import Problem
from pipeline.errors import JkoflowError
from pipeline.runtime.rng import generator
from pipeline.toy2d.figures import grid_centres

#: held-out samples that measure a model in training
_QUICK = 500
#: samples in memory together
_CHUNK = 1000
#: cells of a density along each axis
_GRID = 40
#: samples that a run keeps for the picture
KEPT = 2000


@dataclass(frozen=True)
class Measured:
    """Metrics of a model.

    Attributes:
        nll: mean negative log-likelihood in nats per sample, in the units of the data.
        nll_error: its standard error over the held-out samples.
        mmd_m: squared MMD with a kernel of the median distance; None without two samples.
        mmd_1: squared MMD with a kernel of width 1; likewise.
        thresholds: of a two-sample test with either kernel at α = 0.05; likewise.
        failures: share of the generated samples whose inverse was not found.
        inversion_error: median of ‖z_0 − T⁻¹(T(z_0))‖.
        nfe: network evaluations per generated sample.
        n: held-out samples of the likelihood.
        compare: samples of the MMD.
    """

    nll: float
    nll_error: float
    mmd_m: float | None
    mmd_1: float | None
    thresholds: list[float] | None
    failures: float
    inversion_error: float
    nfe: int
    n: int
    compare: int


@torch.no_grad()
def measure(
    model: DensityModel, problem: Problem, device: torch.device, quick: bool = False
) -> tuple[Measured, Tensor]:
    """Measure a model.

    The likelihood is that of the exact log-determinant. ODEs are solved by dopri5 at 1e-5, however
    they were trained. The MMD leaves out samples whose inverse was not found; `failures` counts
    them.

    Args:
        model: with its final weights.
        problem: the held-out samples.
        device: of the computation.
        quick: whether a part of the held-out samples will do.

    Returns:
        the metrics, and the generated samples whose inverse was found (k, D).

    Raises:
        JkoflowError: a likelihood is not finite.
        SolveError: an ODE cannot be solved.
    """
    most = _QUICK if quick else max(len(problem.test), len(problem.compare))
    test, compare = problem.test[:most], problem.compare[:most]
    values, errors = [], []
    for part in test.split(_CHUNK):
        result = model.log_prob(part.to(device))
        values.append(result.value.double().cpu())
        errors.append(result.inversion_error.double().cpu())
    nll = -torch.cat(values) + problem.log_scale
    if not bool(nll.isfinite().all()):
        raise JkoflowError(
            f"the NLL of {int((~nll.isfinite()).sum())} of {len(nll)} held-out samples is not "
            "finite; train with a lower train.lr"
        )
    noise_source = generator(problem.config.train.seed, "bench", "samples")
    noise = model.draw_noise(len(compare), noise_source)
    decoded = model.decode_checked(noise)
    sound = decoded.converged & decoded.z.isfinite().all(dim=1).cpu()
    samples = decoded.z.cpu()[sound]
    distances = [_mmd(compare, samples, **width) for width in ({}, {"bandwidth": 1.0})]
    known = [distance for distance in distances if distance is not None]
    measured = Measured(
        nll=float(nll.mean()),
        nll_error=float(nll.std()) / math.sqrt(len(nll)),
        mmd_m=None if distances[0] is None else distances[0][0],
        mmd_1=None if distances[1] is None else distances[1][0],
        thresholds=[threshold for _, threshold in known] or None,
        failures=1 - len(samples) / len(compare),
        inversion_error=float(torch.cat(errors).median()),
        nfe=decoded.nfe,
        n=len(test),
        compare=len(compare),
    )
    return measured, samples


@torch.no_grad()
def log_density(model: DensityModel, limits: tuple[float, float], device: torch.device) -> Tensor:
    """Compute log p of a model of the plane at the centres of a grid of a square window.

    Args:
        model: with its final weights.
        limits: (low, high) of both axes.
        device: of the computation.

    Returns:
        log p in nats, (G, G) with G = 40, the lowest row first.

    Raises:
        SolveError: an ODE cannot be solved.
    """
    centres = grid_centres(_GRID, limits).to(device)
    values = [model.log_prob(part).value.cpu() for part in centres.split(_CHUNK)]
    return torch.cat(values).view(_GRID, _GRID)


def _mmd(x: Tensor, y: Tensor, **width: Any) -> tuple[float, float] | None:  # noqa: ANN401
    """Return the squared MMD of x (n, D) and y (m, D) with its threshold; None if m < 2."""
    if len(y) < 2:
        return None
    result = mmd(x, y, **width)
    return result.value, result.threshold
