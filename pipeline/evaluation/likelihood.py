"""Ranks images by the likelihood of their latents: which are typical for a run, which odd.

A likelihood is that of the standardised latents (posterior samples, or with the known noise, as
the flow was trained on), given the class if the run is class-conditional, in nats; with the exact
divergence, or with several probes and their standard error, by an adaptive solver, beside the
inversion error ‖z_0 − T⁻¹(T(z_0))‖.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoders.base import to_float
from eval.plots import before_after
from flows.block import SolverConfig
from flows.likelihood import LogProb, log_prob
from flows.solving.divergence import make_divergence
from pipeline.config.schema import DataConfig
from pipeline.data.datasets import ImageSet, load_images
from pipeline.errors import UserError
from pipeline.evaluation.kid_precision_recall import test_images
from pipeline.runs.run import Run, require_latents
from pipeline.runtime.console import Progress
from pipeline.runtime.rng import generator
from pipeline.sampling.class_labels import condition_of
from pipeline.storage import atomic

_CHUNK = 50
_ROWS = 2
_SOLVER = SolverConfig(method="dopri5")


@dataclass(frozen=True)
class LikelihoodSettings:
    """What is ranked, and how.

    Attributes:
        n: first so many images.
        split: of the run's data set; None takes its data.test_split, or all of a folder that is
            not split.
        folder: a folder of images instead of a split; they are resized and cropped to fit.
        divergence: exact, hutchinson or finite-difference.
        probes: of a random estimator; from 2 on there is a standard error.
        columns: images a row of the picture.
    """

    n: int = 200
    split: str | None = None
    folder: Path | None = None
    divergence: str = "exact"
    probes: int = 1
    columns: int = 10


def rank(
    run: Run, settings: LikelihoodSettings, accelerator: Accelerator, progress: Progress
) -> dict[str, Any]:
    """Rank images; commits likelihood.json and samples/likelihood.png in the run directory.

    Args:
        run: an open run.
        settings: what is ranked, and how.
        accelerator: device.
        progress: wraps the loop over chunks.

    Returns:
        What likelihood.json holds: the summary, and all images from typical to odd.

    Raises:
        UserError: n or columns below 1, more images than there are, both a split and a folder,
            images without a class for a class-conditional run, or a refiner.
        FlowError: an unknown estimator, or fewer than one probe.
        SolveError: the flow cannot be followed.
    """
    require_latents(run)
    if settings.n < 1 or settings.columns < 1:
        raise UserError(
            f"-n and --columns must be at least 1, not {settings.n} and {settings.columns}"
        )
    divergence = make_divergence(settings.divergence, probes=settings.probes)
    images = _images(run.config.data, settings, run.manifest["autoencoder"]["image_shape"])
    if settings.n > len(images):
        raise UserError(
            f"{settings.n} images were asked for, but {images.name} ({images.split}) has "
            f"{len(images)}; ask for fewer with -n"
        )
    flow = run.flow.to(accelerator.device)
    drawn = generator(0, "likelihood", "probes")
    starts, parts = range(0, settings.n, _CHUNK), []
    for start in progress(starts, len(starts), f"likelihood of {settings.n} images"):
        stop = min(start + _CHUNK, settings.n)
        z = latents_of(run, images, start, stop, accelerator).to(accelerator.device)
        of = condition_of(run, images, np.arange(start, stop))
        parts.append(log_prob(flow, z, divergence, 1, _SOLVER, drawn, _CHUNK, of))
    result = {"run": run.fingerprint, "blocks": len(run.flow)} | _collect(parts, images, settings)
    if accelerator.is_main_process:
        _draw(result, images, settings.columns, run.folder / "samples" / "likelihood.png")
        atomic.write_json(run.folder / "likelihood.json", result)
    return result


@torch.inference_mode()
def latents_of(
    run: Run, images: ImageSet, start: int, stop: int, accelerator: Accelerator
) -> Tensor:
    """Standardised latents of images [start, stop), as the run's flow was trained on.

    Returns:
        float32 (stop − start, *shape).
    """
    autoencoder: Any = run.autoencoder()
    autoencoder.to(accelerator.device)
    x = to_float(torch.from_numpy(images.read(start, stop)))
    moments = autoencoder.encode(x.to(accelerator.device))
    drawn = generator(0, "likelihood", "latents", start)
    z = run.standardisation.apply(moments.sample(drawn).cpu())
    noise = run.config.latents.noise
    if moments.log_var is None and noise > 0:
        z = z + noise * torch.randn(z.shape, generator=drawn)
    return z.clone()


def headline(result: dict[str, Any]) -> str:
    """The mean with all that is needed to trust it, on one line."""
    text = f"NLL(n={result['n']}, {result['data']}) = {result['nll_per_dim']:.4f} nats a dimension"
    if result["standard_error"] is not None:
        text += f" ± {result['standard_error'] / result['dim']:.4f} (probes)"
    return (
        f"{text}; {result['divergence']} divergence, {result['solver']}, "
        f"{result['nfe']} evaluations a sample, inversion MSE {result['inversion_mse']:.1e}"
    )


def _images(data: DataConfig, settings: LikelihoodSettings, shape: list[int]) -> ImageSet:
    if settings.split is not None and settings.folder is not None:
        raise UserError("give either --split or --folder, not both")
    if settings.split is not None:
        return load_images(data.of_split(settings.split))
    if settings.folder is None:
        return test_images(data)
    channels, height, _ = shape
    mode = "L" if channels == 1 else "RGB"
    return load_images(
        DataConfig(name="folder", path=str(settings.folder), size=height, mode=mode)
    )


def _collect(
    parts: list[LogProb], images: ImageSet, settings: LikelihoodSettings
) -> dict[str, Any]:
    """All images from the most typical to the most odd, and their summary."""
    value = torch.cat([part.value for part in parts]).double().cpu()
    inversion = torch.cat([part.inversion_error for part in parts]).double().cpu()
    errors = [p.standard_error.double().cpu() for p in parts if p.standard_error is not None]
    spread = torch.cat(errors) if errors else None
    dim, n = parts[0].dim, len(value)
    rows = []
    for index in value.argsort(descending=True, stable=True).tolist():
        row = {
            "index": index,
            "log_prob": float(value[index]),
            "per_dim": float(value[index]) / dim,
            "inversion_error": float(inversion[index]),
        }
        if images.labels is not None:
            label = int(images.labels[index])
            row["label"] = label if images.class_names is None else images.class_names[label]
        if spread is not None:
            row["standard_error"] = float(spread[index])
        rows.append(row)
    return {
        "n": n,
        "data": f"{images.name} {images.split}",
        "unit": "nats, standardised latents",
        "dim": dim,
        "nll_per_dim": -float(value.mean()) / dim,
        "standard_error": None if spread is None else float(spread.square().sum().sqrt()) / n,
        "divergence": settings.divergence,
        "probes": 1 if settings.divergence == "exact" else settings.probes,
        "solver": f"{_SOLVER.method} at {_SOLVER.rtol:g}",
        "nfe": round(sum(part.nfe * len(part.value) for part in parts) / n),
        "inversion_mse": float(inversion.square().mean()) / dim,
        "ranking": rows,
    }


def _draw(result: dict[str, Any], images: ImageSet, columns: int, path: Path) -> None:
    """The most typical images on the left, the most odd ones (oddest first) on the right."""
    order = [row["index"] for row in result["ranking"]]
    count = min(_ROWS * columns, max(1, len(order) // 2))
    chosen = [order[:count], order[::-1][:count]]
    typical, odd = (
        torch.cat([torch.from_numpy(images.read(i, i + 1)) for i in half]) for half in chosen
    )
    titles = ("most typical", "most odd")
    atomic.write_with(
        path, lambda file: before_after(file, typical, odd, columns=columns, titles=titles)
    )
