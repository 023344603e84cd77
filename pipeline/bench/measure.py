"""Measures a model on held-out samples: NLL, MMD or the metrics of images, and the inverse."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.mmd import mmd
from flows.baselines.base import Decoded, DensityModel
from flows.baselines.cnf import FlowModel
from pipeline.bench.images import FEW, ImageMetrics
from pipeline.bench.problem import Problem
from pipeline.errors import JkoflowError
from pipeline.evaluation.likelihood import EXACT_UP_TO, PROBES
from pipeline.runtime.rng import generator
from pipeline.toy2d.figures import grid_centres

#: held-out vectors that measure a model in training
_QUICK = 500
#: vectors in memory together, and values of latents of images
_CHUNK, _VALUES = 1000, 12_000
#: cells of a density along each axis
_GRID = 40
#: samples that a run keeps for the picture
KEPT = 2000


@dataclass(frozen=True)
class Measured:
    """Metrics of a model.

    Attributes:
        nll: mean negative log-likelihood in nats per sample, in the units of the data; of images
            per dimension of their latents.
        nll_error: its standard error over the held-out samples.
        mmd_m: squared MMD with a kernel of the median distance; None without two samples.
        mmd_1: squared MMD with a kernel of width 1; likewise.
        thresholds: of a two-sample test with either kernel at α = 0.05; likewise.
        failures: share of the generated samples whose inverse was not found.
        inversion_error: median of ‖z_0 − T⁻¹(T(z_0))‖; None if the inverse of half of the samples
            or more diverges.
        nfe: network evaluations per generated sample.
        n: held-out samples of the likelihood.
        compare: samples that are generated.
        images: metrics of sampled images; None for vectors.
        probe_error: part of the standard error that random probes have; None for an exact NLL.
    """

    nll: float
    nll_error: float
    mmd_m: float | None
    mmd_1: float | None
    thresholds: list[float] | None
    failures: float
    inversion_error: float | None
    nfe: int
    n: int
    compare: int
    images: ImageMetrics | None = None
    probe_error: float | None = None


@torch.no_grad()
def measure(
    model: DensityModel, problem: Problem, device: torch.device, quick: bool = False
) -> tuple[Measured, Tensor]:
    """Measure a model.

    The likelihood is that of the exact log-determinant; an ODE in more than 128 dimensions has 16
    random probes. ODEs are solved by dopri5 at 1e-5, however they were trained. Samples whose
    inverse was not found are left out of MMD, FID and KID; `failures` counts them.

    Args:
        model: with its final weights.
        problem: the held-out samples.
        device: of the computation.
        quick: whether a part of the held-out samples will do.

    Returns:
        the metrics, and the generated samples whose inverse was found (k, D). Images are decoded,
        uint8 (k, C, H, W), and one without an inverse is white.

    Raises:
        JkoflowError: a likelihood is not finite.
        SolveError: an ODE cannot be solved.
    """
    most = (_QUICK if problem.unit == 1 else FEW) if quick else None
    test, count = problem.test[:most], min(problem.samples, most or problem.samples)
    nll, errors, probe_error = _likelihoods(model, problem, test, device)
    measured = Measured(
        nll=float(nll.mean()),
        nll_error=float(nll.std()) / math.sqrt(len(nll)),
        mmd_m=None,
        mmd_1=None,
        thresholds=None,
        failures=0.0,
        inversion_error=_median(errors),
        nfe=0,
        n=len(nll),
        compare=count,
        probe_error=probe_error,
    )
    if not count:
        return measured, problem.compare
    noise = model.draw_noise(count, generator(problem.config.train.seed, "bench", "samples"))
    decoded = _decoded(model, noise, count if problem.pictures is None else _chunk(problem))
    sound = decoded.converged & decoded.z.isfinite().all(dim=1)
    known: dict[str, Any] = {"failures": 1 - int(sound.sum()) / count, "nfe": decoded.nfe}
    if problem.pictures is not None:
        found = problem.pictures.decode(decoded.z[sound])
        images = found.new_full((count, *found.shape[1:]), 255)
        images[sound] = found
        metrics = problem.pictures.metrics(found, quick)
        return dataclasses.replace(measured, images=metrics, **known), images
    samples = problem.restored(decoded.z[sound])
    distances = [
        _mmd(problem.compare[:count], samples, **width) for width in ({}, {"bandwidth": 1.0})
    ]
    for name, distance in zip(("mmd_m", "mmd_1"), distances, strict=True):
        known[name] = None if distance is None else distance[0]
    known["thresholds"] = [distance[1] for distance in distances if distance is not None] or None
    return dataclasses.replace(measured, **known), samples


def _likelihoods(
    model: DensityModel, problem: Problem, test: Tensor, device: torch.device
) -> tuple[Tensor, Tensor, float | None]:
    """Return the NLL (n,) and the inversion error (n,) of held-out samples (n, D).

    The third is the standard error that random probes give the mean NLL; None without probes.

    Raises:
        JkoflowError: a likelihood is not finite.
    """
    if isinstance(model, FlowModel) and model.dim > EXACT_UP_TO:
        model.probes = PROBES
    probes, values, errors = generator(0, "nll", "probes"), list[Tensor](), list[Tensor]()
    squares: list[float] = []
    for part in test.split(_chunk(problem)):
        result = model.log_prob(part.to(device), probes)
        values.append(result.value.cpu().double())
        errors.append(result.inversion_error.cpu().double())
        if result.standard_error is not None:
            squares.append(float(result.standard_error.cpu().double().square().sum()))
    nll = (-torch.cat(values) + problem.log_scale) / problem.unit
    if not bool(nll.isfinite().all()):
        raise JkoflowError(
            f"the NLL of {int((~nll.isfinite()).sum())} of {len(nll)} held-out samples is not "
            "finite; train with a lower train.lr"
        )
    probe_error = math.sqrt(sum(squares)) / len(nll) / problem.unit if squares else None
    return nll, torch.cat(errors), probe_error


def _median(errors: Tensor) -> float | None:
    """Return the median of inversion errors (n,), of which NaN is infinite; None if it is, too."""
    median = float(errors.nan_to_num(nan=math.inf, posinf=math.inf).median())
    return median if math.isfinite(median) else None


def _decoded(model: DensityModel, noise: Tensor, size: int) -> Decoded:
    """Map noise (n, D) to samples on the CPU, some at a time."""
    parts = [model.decode_checked(part) for part in noise.split(size)]
    nfe = sum(part.nfe * len(part.z) for part in parts) / len(noise)
    z = torch.cat([part.z.cpu() for part in parts])
    return Decoded(z, torch.cat([part.converged for part in parts]), round(nfe))


def _chunk(problem: Problem) -> int:
    """Return the number of samples that are in memory together."""
    return _CHUNK if problem.unit == 1 else max(1, _VALUES // problem.dim)


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
