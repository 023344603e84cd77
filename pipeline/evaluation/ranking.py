"""Ranking of images by likelihood, and separation of two folders by likelihood (AUROC)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator

from eval.auroc import auroc
from eval.plots import before_after
from flows.likelihood import LogProb
from flows.solving.estimators import make_divergence
from pipeline.config.data import DataConfig
from pipeline.data.datasets import load_images
from pipeline.data.image_set import ImageSet
from pipeline.errors import UserError
from pipeline.evaluation.likelihood import SOLVER, joined, log_probs, summarise, unit
from pipeline.evaluation.real_images import held_out_images, require_images
from pipeline.runs.run import Run, require_latents
from pipeline.runtime.console import Progress
from pipeline.storage import atomic

#: rows of the picture
_ROWS = 2
#: fewest images of a folder whose spread can be estimated
_FEWEST = 2


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
        "unit": unit(run),
        **summarise(parts),
        "divergence": settings.divergence,
        "probes": 1 if settings.divergence == "exact" else settings.probes,
        "solver": f"{SOLVER.method} at {SOLVER.rtol:g}",
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
    folders = [
        _load(run.config.data, dataclasses.replace(settings, split=None, folder=folder), shape)
        for folder in (inside, outside)
    ]
    if min(settings.n, *map(len, folders)) < _FEWEST:
        raise UserError(
            f"-n is {settings.n}, and the folders have {len(folders[0])} and {len(folders[1])} "
            f"images; expected {_FEWEST} or more; use more images"
        )
    for images in folders:
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
    if not settings.folder.is_dir():
        raise UserError(
            f"{settings.folder} is no folder; expected a folder of images; change --folder or "
            "--against"
        )
    channels, height, _ = shape
    mode: Literal["L", "RGB"] = "L" if channels == 1 else "RGB"
    return load_images(
        DataConfig(name="folder", path=str(settings.folder), size=height, mode=mode)
    )


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
