"""Nearest training images of some samples, by pixels and by Inception features.

A memorised sample lies closer to one training image than a held-out image does. It lies also
closer to that image than to any other. So two measures of samples stand next to those of test
images. One is the median distance. The other is the smallest ratio of the distances to the
nearest and to the second nearest image.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from eval.pictures import image_grid, save_png
from pipeline.data.datasets import load_images
from pipeline.evaluation.features import SHARD, FeatureExtractor, load_inception
from pipeline.evaluation.real_images import held_out_images, require_images, subset_indices
from pipeline.runtime.console import Progress
from pipeline.sampling.generate import sample_batch
from pipeline.sampling.sampling_plan import SamplingPlan
from pipeline.storage import atomic

#: samples that are measured, and test images that they are compared with
MEASURED = 100
#: samples in the picture
SHOWN = 10


def nearest(queries: Tensor, parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Find the two nearest of n points to each query, by Euclidean distance.

    Args:
        queries: (q, D).
        parts: the points in parts (b, D), one after the other.

    Returns:
        distances (q, 2), the smaller first, infinite where n < 2; and the indices int64 (q,) of
        the nearest over all parts.
    """
    distances = torch.full((len(queries), 2), torch.inf)
    index, first = torch.zeros(len(queries), dtype=torch.int64), 0
    for part in parts:
        found = torch.cdist(queries, part, compute_mode="donot_use_mm_for_euclid_dist")
        near, where = found.min(1)
        index = torch.where(near < distances[:, 0], where + first, index)
        distances = torch.cat([distances, found], 1).topk(2, largest=False).values
        first += len(part)
    return distances, index


def ratios(distances: Tensor) -> Tensor:
    """Return the ratios (q,) of distances (q, 2): 1 where both are 0 or the second is infinite."""
    first, second = distances.unbind(1)
    return torch.where((second > 0) & second.isfinite(), first / second, 1.0)


def draw_neighbours(
    plan: SamplingPlan, n: int, accelerator: Accelerator, progress: Progress
) -> Path:
    """Write samples/neighbours.png and neighbours.json into the plan's run; return the picture.

    `MEASURED` samples are compared. The rows of the picture are the `SHOWN` samples with the
    smallest ratios by pixels, their nearest of n training images by pixels, and by features. The
    JSON file has the indices of the samples shown and of their neighbours. It has the medians and
    ratios of all samples and of as many test images, and null for data without a test split.

    Raises:
        UserError: the training split has fewer than n images.
    """
    run, seed = plan.run, plan.settings.seed
    images, held_out = load_images(run.config.data), held_out_images(run.config.data)
    require_images(images, n)
    plan.flow.to(accelerator.device)
    size, autoencoder = plan.settings.batch_size, run.autoencoder()
    samples = torch.cat(
        [
            sample_batch(plan, autoencoder, start, min(size, MEASURED - start), seed)
            for start in range(0, MEASURED, size)
        ]
    )
    own = load_images(run.config.data.of_split(run.config.data.split))  # without data.also
    count = min(MEASURED, len(held_out)) if held_out.fingerprint != own.fingerprint else 0
    test = torch.from_numpy(held_out.take(subset_indices(held_out, count)))
    order, starts = subset_indices(images, n), range(0, n, SHARD)
    pixels = (
        _flat(torch.from_numpy(images.take(order[start : min(start + SHARD, n)])))
        for start in progress(starts, len(starts), f"pixels of {n} images")
    )
    both = torch.cat([samples, test])
    by_pixels = nearest(_flat(both), pixels)
    store = FeatureExtractor(accelerator, progress).real_features(images, n)
    parts = (store.read("features", start, min(start + SHARD, n)) for start in starts)
    by_features = nearest(load_inception(accelerator).features(both).cpu(), parts)
    shown = ratios(by_pixels[0][:MEASURED]).argsort(stable=True)[:SHOWN]
    rows = [samples[shown]]
    result: dict[str, Any] = {"run": run.fingerprint, "n": n, "seed": seed}
    result["samples"] = shown.tolist()
    for name, (distances, indices) in (("pixels", by_pixels), ("features", by_features)):
        chosen = order[indices[shown].numpy()]
        rows.append(torch.cat([torch.from_numpy(images.read(k, k + 1)) for k in chosen]))
        result[name] = _summary(distances, chosen)
    picture = image_grid(torch.cat(rows), SHOWN, scale=2)
    path, note = run.folder / "samples" / "neighbours.png", {"run": run.fingerprint}
    atomic.write_with(path, partial(save_png, picture, note=json.dumps(note)))
    atomic.write_json(run.folder / "neighbours.json", result)
    return path


def _summary(distances: Tensor, chosen: np.ndarray) -> dict[str, Any]:
    """Summarise distances (q, 2) of samples, and of test images where q exceeds `MEASURED`."""
    result: dict[str, Any] = {"indices": chosen.tolist()}
    for suffix, part in (("", distances[:MEASURED]), ("_of_test_images", distances[MEASURED:])):
        measured = len(part) > 0
        result[f"median_distance{suffix}"] = float(part[:, 0].median()) if measured else None
        result[f"smallest_ratio{suffix}"] = float(ratios(part).min()) if measured else None
    return result


def _flat(images: Tensor) -> Tensor:
    """Return images uint8 (n, C, H, W) as vectors (n, D) in [0, 1]."""
    return images.flatten(1).float() / 255
