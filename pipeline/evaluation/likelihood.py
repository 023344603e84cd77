"""Likelihoods of images: the NLL that `evaluate` reports, and the ranking of `likelihood`.

A likelihood is the density of an image's standardised latent under the flow, in nats, given the
class if the run is class-conditional. A latent is a posterior sample, or carries the configured
noise, as in training. The inversion error ‖z_0 − T⁻¹(T(z_0))‖ measures the solver.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoders.base import Moments, to_float
from eval.auroc import auroc
from flows.likelihood import LogProb, log_prob
from flows.solving.divergence import Divergence
from flows.solving.estimators import make_divergence
from flows.solving.solver import SolverConfig
from pipeline.config.data import DataConfig
from pipeline.data.datasets import load_images
from pipeline.data.image_set import ImageSet
from pipeline.errors import UserError
from pipeline.evaluation.features import SHARD
from pipeline.evaluation.real_images import held_out_images, require_images, subset_indices
from pipeline.runs.run import Run, require_latents
from pipeline.runtime.console import Progress
from pipeline.runtime.rng import generator
from pipeline.sampling.class_labels import condition_of, null_condition
from pipeline.storage import atomic

#: the largest D whose divergence `evaluate` computes exactly, by D directional derivatives
EXACT_UP_TO = 128
#: random probes per sample for a larger D
PROBES = 16
_CHUNK = 50
_ROWS = 2
_SOLVER = SolverConfig(method="dopri5")


def held_out_nll(run: Run, n: int, accelerator: Accelerator) -> dict[str, Any]:
    """Measure the entries nll_per_dim and nll of metrics.json on n images of the test split."""
    images = held_out_images(run.config.data)
    indices = subset_indices(images, n)
    kind = "exact" if run.flow.dim <= EXACT_UP_TO else "hutchinson"
    rng, divergence = generator(0, "nll"), make_divergence(kind, probes=PROBES)
    result = log_prob_of_images(
        run, images, indices, divergence, accelerator.device, (rng, rng), chunk=SHARD
    )
    summary = _summary([result])
    random = {} if kind == "exact" else {"probes": PROBES, "probe_error": summary["probe_error"]}
    return {
        "nll_per_dim": summary["nll_per_dim"],
        "nll": {
            "n": n,
            "split": images.split,
            "image_error": summary["image_error"],
            "unit": _unit(run),
            "divergence": kind,
            **random,
            "solver": _SOLVER.method,
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
    return log_prob(flow, z, divergence, 1, _SOLVER, rngs[1], chunk, condition)


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
    starts, parts = range(0, n, _CHUNK), []
    for start in progress(starts, len(starts), f"likelihood of {n} images"):
        indices = np.arange(start, min(start + _CHUNK, n))
        rngs = (generator(0, "likelihood", "latents", start), probes)
        part = log_prob_of_images(
            run, images, indices, divergence, device, rngs, _CHUNK, by_class=by_class
        )
        parts.append(part)
    return parts


@torch.inference_mode()
def _encoded(
    run: Run, images: ImageSet, indices: npt.NDArray[np.int64], device: torch.device
) -> Moments:
    autoencoder: Any = run.autoencoder()
    autoencoder.to(device)
    parts = []
    for start in range(0, len(indices), SHARD):
        x = to_float(torch.from_numpy(images.take(indices[start : start + SHARD])))
        parts.append(autoencoder.encode(x.to(device)))
    log_vars = [part.log_var for part in parts if part.log_var is not None]
    mean = torch.cat([part.mean for part in parts])
    return Moments(mean, torch.cat(log_vars) if log_vars else None)


def latents_of(
    run: Run,
    images: ImageSet,
    indices: npt.NDArray[np.int64],
    device: torch.device,
    rng: torch.Generator,
) -> Tensor:
    """Encode images to standardised latents float32 (n, *shape), with the noise of training."""
    moments = _encoded(run, images, indices, device)
    z = run.standardisation.apply(moments.sample(rng).cpu())
    noise = run.config.latents.noise
    if moments.log_var is None and noise > 0:
        z = z + noise * torch.randn(z.shape, generator=rng)
    return z.clone()


@dataclass(frozen=True)
class LikelihoodSettings:
    """Settings of a ranking.

    Attributes:
        n: the number of images, from the first of the set on.
        split: a split of the run's data set; None takes its data.test_split, or all of a folder
            that is not split.
        folder: a folder of images instead of a split; they are resized and cropped to fit.
        divergence: exact, hutchinson or finite-difference.
        probes: probes of a random estimator; 2 or more give a standard error.
        columns: images per row of the picture.
    """

    n: int = 200
    split: str | None = None
    folder: Path | None = None
    divergence: str = "exact"
    probes: int = 1
    columns: int = 10


def rank_images(
    run: Run, settings: LikelihoodSettings, accelerator: Accelerator, progress: Progress
) -> dict[str, Any]:
    """Rank images by likelihood; writes likelihood.json and samples/likelihood.png into the run.

    The content of likelihood.json is returned: the summary, and all images, the most likely first.

    Raises:
        UserError: n or columns is below 1, the set has fewer images, both a split and a folder are
            given, images lack a class for a class-conditional run, or the run is a refiner.
        FlowError: an unknown estimator, or fewer than one probe.
        SolveError: the solver fails.
    """
    require_latents(run)
    if settings.n < 1 or settings.columns < 1:
        raise UserError(
            f"-n and --columns must be at least 1, not {settings.n} and {settings.columns}"
        )
    divergence = make_divergence(settings.divergence, probes=settings.probes)
    images = _load(run.config.data, settings, run.manifest.require_autoencoder().image_shape)
    require_images(images, settings.n)
    parts = log_probs(run, images, settings.n, divergence, accelerator.device, progress)
    result = {
        "run": run.fingerprint,
        "blocks": len(run.flow),
        "n": settings.n,
        "data": f"{images.name} {images.split}",
        "unit": _unit(run),
        **_summary(parts),
        "divergence": settings.divergence,
        "probes": 1 if settings.divergence == "exact" else settings.probes,
        "solver": f"{_SOLVER.method} at {_SOLVER.rtol:g}",
        "ranking": _ranking(parts, images),
    }
    if accelerator.is_main_process:
        _draw(result, images, settings.columns, run.folder / "samples" / "likelihood.png")
        atomic.write_json(run.folder / "likelihood.json", result)
    return result


def separate_folders(
    run: Run,
    inside: Path,
    outside: Path,
    settings: LikelihoodSettings,
    accelerator: Accelerator,
    progress: Progress,
) -> dict[str, Any]:
    """Measure how well log p(z) separates a folder inside the distribution from one outside.

    At most n images of each folder are used. The score of a class-conditional run is log p(z | ∅).
    The result has the AUROC with its 95 % interval; it is written to auroc.json in the run.

    Raises:
        UserError: n is below 2, a folder has no images, or the run has no null label.
        FlowError: an unknown estimator, or fewer than one probe.
        SolveError: the solver fails.
    """
    require_latents(run)
    divergence = make_divergence(settings.divergence, probes=settings.probes)
    shape = run.manifest.require_autoencoder().image_shape
    scores, errors = [], []
    for folder in (inside, outside):
        chosen = dataclasses.replace(settings, split=None, folder=folder)
        images = _load(run.config.data, chosen, shape)
        n = min(settings.n, len(images))
        parts = log_probs(run, images, n, divergence, accelerator.device, progress, by_class=False)
        values, inversions, _ = joined(parts)
        scores.append(values)
        errors.append(float(inversions.square().mean()) / run.flow.dim)
    try:
        area = auroc(scores[0].numpy(), scores[1].numpy())
    except ValueError as error:
        raise UserError(str(error)) from error
    result = {
        "run": run.fingerprint,
        "auroc": area.value,
        "interval": [area.low, area.high],
        "n": [len(values) for values in scores],
        "inside": str(inside),
        "outside": str(outside),
        "divergence": settings.divergence,
        "probes": 1 if settings.divergence == "exact" else settings.probes,
        "inversion_mse": errors,
    }
    if accelerator.is_main_process:
        atomic.write_json(run.folder / "auroc.json", result)
    return result


def auroc_line(result: dict[str, Any]) -> str:
    """Format an AUROC with its interval and its numbers of images, on one line."""
    low, high = result["interval"]
    inside, outside = result["n"]
    return (
        f"AUROC({inside} inside, {outside} outside) = {result['auroc']:.4f}, 95 % interval "
        f"[{low:.4f}, {high:.4f}]; {result['divergence']} divergence, inversion MSE "
        f"{max(result['inversion_mse']):.1e}"
    )


def _unit(run: Run) -> str:
    """Return what a NLL per dimension is of."""
    what = "latents"
    if run.manifest.latents is not None and run.manifest.latents.stochastic:
        what = "posterior samples of latents"
    elif run.config.latents.noise > 0:
        what = f"latents with noise {run.config.latents.noise:g}"
    return f"nats per dimension, standardised {what}"


def likelihood_line(result: dict[str, Any]) -> str:
    """Format the mean with its error, the solver and the data, on one line."""
    text = f"NLL(n={result['n']}, {result['data']}) = {result['nll_per_dim']:.4f}"
    if result["image_error"] is not None:
        text += f" ± {result['image_error']:.4f} (images)"
    if result["probe_error"] is not None:
        text += f" ± {result['probe_error']:.4f} (probes)"
    return (
        f"{text} {result['unit']}; {result['divergence']} divergence, {result['solver']}, "
        f"{result['nfe']} evaluations a sample, inversion MSE {result['inversion_mse']:.1e}"
    )


def _load(data: DataConfig, settings: LikelihoodSettings, shape: tuple[int, ...]) -> ImageSet:
    if settings.split is not None and settings.folder is not None:
        raise UserError("both --split and --folder are given; leave one of them out")
    if settings.split is not None:
        return load_images(data.of_split(settings.split))
    if settings.folder is None:
        return held_out_images(data)
    channels, height, _ = shape
    mode: Literal["L", "RGB"] = "L" if channels == 1 else "RGB"
    return load_images(
        DataConfig(name="folder", path=str(settings.folder), size=height, mode=mode)
    )


def joined(parts: Sequence[LogProb]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Join log-likelihoods, inversion errors and standard errors, float64 (n,), of chunks."""
    values = torch.cat([part.value for part in parts]).double().cpu()
    inversions = torch.cat([part.inversion_error for part in parts]).double().cpu()
    errors = [p.standard_error.double().cpu() for p in parts if p.standard_error is not None]
    return values, inversions, torch.cat(errors) if errors else None


def _summary(parts: Sequence[LogProb]) -> dict[str, Any]:
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


def _ranking(parts: Sequence[LogProb], images: ImageSet) -> list[dict[str, Any]]:
    """List all images, the most likely first."""
    values, inversions, errors = joined(parts)
    rows = []
    for index in values.argsort(descending=True, stable=True).tolist():
        row = {
            "index": index,
            "log_prob": float(values[index]),
            "per_dim": float(values[index]) / parts[0].dim,
            "inversion_error": float(inversions[index]),
        }
        if images.labels is not None:
            label = int(images.labels[index])
            row["label"] = label if images.class_names is None else images.class_names[label]
        if errors is not None:
            row["standard_error"] = float(errors[index])
        rows.append(row)
    return rows


def _draw(result: dict[str, Any], images: ImageSet, columns: int, path: Path) -> None:
    """Draw the most likely images on the left, and the least likely ones on the right."""
    from eval.plots import before_after  # matplotlib is slow to import

    order = [row["index"] for row in result["ranking"]]
    count = min(_ROWS * columns, max(1, len(order) // 2))
    halves = [order[:count], order[::-1][:count]]
    likely, unlikely = (
        torch.cat([torch.from_numpy(images.read(i, i + 1)) for i in half]) for half in halves
    )
    titles = ("most likely", "least likely")
    atomic.write_with(
        path, lambda file: before_after(file, likely, unlikely, columns=columns, titles=titles)
    )
