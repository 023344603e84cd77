"""Likelihoods of images: log p(z) of the images of a set, and the NLL that `evaluate` reports.

A likelihood is the density of an image's standardised latent under the flow, in nats, given the
class if the run is class-conditional. A latent is a posterior sample, or has the configured
noise added, as in training. The inversion error ‖z_0 − T⁻¹(T(z_0))‖ measures the solver.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import Tensor

from flows.likelihood import LogProb, log_prob
from flows.solving.divergence import Divergence
from flows.solving.estimators import make_divergence
from flows.solving.solver import SolverConfig
from pipeline.data.encoding import standardised_latents
from pipeline.data.image_set import ImageSet
from pipeline.evaluation.features import SHARD
from pipeline.evaluation.real_images import held_out_images, subset_indices
from pipeline.runs.run import Run
from pipeline.runtime.console import Progress
from pipeline.runtime.rng import generator
from pipeline.sampling.class_labels import condition_of, null_condition

#: the largest D whose divergence `evaluate` computes exactly, by D directional derivatives
EXACT_UP_TO = 128
#: random probes per sample for a larger D
PROBES = 16
CHUNK = 50
#: solver of all likelihoods
SOLVER = SolverConfig(method="dopri5")


def held_out_nll(run: Run, n: int, accelerator: Accelerator) -> dict[str, Any]:
    """Measure the entries nll_per_dim and nll of metrics.json on n images of the test split."""
    images = held_out_images(run.config.data)
    indices = subset_indices(images, n)
    kind = "exact" if run.flow.dim <= EXACT_UP_TO else "hutchinson"
    rng, divergence = generator(0, "nll"), make_divergence(kind, probes=PROBES)
    result = log_prob_of_images(
        run, images, indices, divergence, accelerator.device, (rng, rng), chunk=SHARD
    )
    summary = summarise([result])
    random = {} if kind == "exact" else {"probes": PROBES, "probe_error": summary["probe_error"]}
    return {
        "nll_per_dim": summary["nll_per_dim"],
        "nll": {
            "n": n,
            "split": images.split,
            "image_error": summary["image_error"],
            "unit": unit(run),
            "divergence": kind,
            **random,
            "solver": SOLVER.method,
            "nfe": summary["nfe"],
            "inversion_mse": summary["inversion_mse"],
            **({"given": "class"} if run.flow.classes else {}),
        },
    }


def log_prob_of_images(
    run: Run,
    images: ImageSet,
    indices: npt.NDArray[np.int64],
    divergence: Divergence,
    device: torch.device,
    rngs: tuple[torch.Generator, torch.Generator],
    chunk: int,
    by_class: bool = True,
) -> LogProb:
    """Compute log p(z) of images (n,) of a set, or log p(z | y) for a class-conditional run.

    `by_class` = false takes log p(z | ∅) of a class-conditional run, whose images need no class.

    The generators are the sources of the latents' noise and of the probes. `chunk` samples are
    integrated together.

    Raises:
        UserError: images have no class that the run knows, see `condition_of`.
        SolveError: the solver fails.
    """
    if by_class:
        condition = condition_of(run, images, indices)
    else:
        condition = null_condition(run, len(indices))
    z = latents_of(run, images, indices, device, rngs[0]).to(device)
    flow = run.flow.to(device)
    return log_prob(flow, z, divergence, 1, SOLVER, rngs[1], chunk, condition)


def log_probs(
    run: Run,
    images: ImageSet,
    n: int,
    divergence: Divergence,
    device: torch.device,
    progress: Progress,
    by_class: bool = True,
) -> list[LogProb]:
    """Compute log p(z) of the first n images of a set in chunks, with fixed random numbers.

    A class-conditional run computes log p(z | y), or log p(z | ∅) if `by_class` is false.

    Raises:
        UserError: images have no class that the run knows, see `condition_of`.
        SolveError: the solver fails.
    """
    probes = generator(0, "likelihood", "probes")
    starts, parts = range(0, n, CHUNK), []
    for start in progress(starts, len(starts), f"likelihood of {n} images"):
        indices = np.arange(start, min(start + CHUNK, n))
        rngs = (generator(0, "likelihood", "latents", start), probes)
        part = log_prob_of_images(
            run, images, indices, divergence, device, rngs, CHUNK, by_class=by_class
        )
        parts.append(part)
    return parts


def latents_of(
    run: Run,
    images: ImageSet,
    indices: npt.NDArray[np.int64],
    device: torch.device,
    rng: torch.Generator,
) -> Tensor:
    """Encode images to standardised latents float32 (n, *shape), with the noise of training."""
    noise = run.config.latents.noise
    encoder = (run.autoencoder(), run.standardisation, noise)
    return standardised_latents(*encoder, images, indices, device, rng)


def unit(run: Run) -> str:
    """Return the unit of an NLL per dimension, with the latents that it is of."""
    what = "latents"
    if run.manifest.latents is not None and run.manifest.latents.stochastic:
        what = "posterior samples of latents"
    elif run.config.latents.noise > 0:
        what = f"latents with noise {run.config.latents.noise:g}"
    return f"nats per dimension, standardised {what}"


def joined(parts: Sequence[LogProb]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Join log-likelihoods, inversion errors and standard errors, float64 (n,), of chunks."""
    values = torch.cat([part.value for part in parts]).cpu().double()
    inversions = torch.cat([part.inversion_error for part in parts]).cpu().double()
    errors = [p.standard_error.cpu().double() for p in parts if p.standard_error is not None]
    return values, inversions, torch.cat(errors) if errors else None


def summarise(parts: Sequence[LogProb]) -> dict[str, Any]:
    """Average over images; the errors are standard errors of nll_per_dim.

    The error over images is that of the mean of these n images as an estimate for all images, with
    the probes' part in it. The error over probes is that part alone.
    """
    values, inversions, errors = joined(parts)
    n, dim = len(values), parts[0].dim
    spread = None if errors is None else float(errors.square().sum().sqrt()) / n / dim
    return {
        "dim": dim,
        "nll_per_dim": -float(values.mean()) / dim,
        "image_error": float(values.std()) / math.sqrt(n) / dim if n > 1 else None,
        "probe_error": spread,
        "nfe": round(sum(part.nfe * len(part.value) for part in parts) / n),
        "inversion_mse": float(inversions.square().mean()) / dim,
    }
