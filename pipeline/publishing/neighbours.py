"""Nearest training images of some samples, by pixels and by Inception features.

A sample that a model has memorised lies much closer to a training image than a held-out image
does. So the distances of test images stand next to those of the samples.
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

#: samples, and test images that they are compared with
SHOWN = 10


def nearest(queries: Tensor, parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Find the nearest of n points to each query, by Euclidean distance.

    Args:
        queries: (q, D).
        parts: the points in parts (b, D), one after the other.

    Returns:
        distances (q,), and indices int64 (q,) over all parts.
    """
    distance = torch.full((len(queries),), torch.inf)
    index, first = torch.zeros(len(queries), dtype=torch.int64), 0
    for part in parts:
        found = torch.cdist(queries, part, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        closer = found.values < distance
        distance = torch.where(closer, found.values, distance)
        index = torch.where(closer, found.indices + first, index)
        first += len(part)
    return distance, index


def draw_neighbours(
    plan: SamplingPlan, n: int, accelerator: Accelerator, progress: Progress
) -> Path:
    """Write samples/neighbours.png and neighbours.json into the plan's run; return the picture.

    The rows of the picture are samples, their nearest of n training images by pixels, and by
    features. The JSON file has the indices, and the median distances of samples and test images.
    Data without a test split have null as the distance of test images.

    Raises:
        UserError: the training split has fewer than n images.
    """
    run = plan.run
    images, held_out = load_images(run.config.data), held_out_images(run.config.data)
    require_images(images, n)
    plan.flow.to(accelerator.device)
    samples = sample_batch(plan, run.autoencoder(), 0, SHOWN, plan.settings.seed)
    shown = min(SHOWN, len(held_out)) if held_out.fingerprint != images.fingerprint else 0
    test = torch.from_numpy(held_out.take(subset_indices(held_out, shown)))
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
    rows = [samples]
    result: dict[str, Any] = {"run": run.fingerprint, "n": n, "seed": plan.settings.seed}
    for name, (distances, indices) in (("pixels", by_pixels), ("features", by_features)):
        chosen = order[indices[: len(samples)].numpy()]
        rows.append(torch.cat([torch.from_numpy(images.read(k, k + 1)) for k in chosen]))
        result[name] = _summary(distances, chosen, len(samples))
    picture = image_grid(torch.cat(rows), SHOWN, scale=2)
    path, note = run.folder / "samples" / "neighbours.png", {"run": run.fingerprint}
    atomic.write_with(path, partial(save_png, picture, note=json.dumps(note)))
    atomic.write_json(run.folder / "neighbours.json", result)
    return path


def _summary(distances: Tensor, chosen: np.ndarray, count: int) -> dict[str, Any]:
    return {
        "indices": chosen.tolist(),
        "median_distance": float(distances[:count].median()),
        "median_distance_of_test_images": (
            float(distances[count:].median()) if len(distances) > count else None
        ),
    }


def _flat(images: Tensor) -> Tensor:
    """Return images uint8 (n, C, H, W) as vectors (n, D) in [0, 1]."""
    return images.flatten(1).float() / 255
