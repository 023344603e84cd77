"""KID, precision and recall of sampled images against real images of the same data set.

Features of real images are stored under the data root, so each image is evaluated once.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from eval.distances import kid
from eval.manifolds import manifold_metrics
from pipeline.data.image_set import ImageSet
from pipeline.runtime.rng import generator
from pipeline.storage.shards.reader import StoreReader

#: the most images of either set; 10 000 x 2 048 floats take 80 MB, and the cost is quadratic
MOST = 10_000
#: the fewest images, because a manifold's radius is a distance to the third neighbour
LEAST = 4


def kid_precision_recall(
    images: ImageSet, real: StoreReader, sampled: StoreReader
) -> dict[str, Any]:
    """Compute the entries kid, precision and recall of metrics.json, on equally many images.

    The features of the real and the sampled images are (n, 2048) and (m, 2048).

    Raises:
        ValueError: a set has fewer than 4 images.
    """
    count = min(len(real), len(sampled), MOST)
    a, b = _rows(real, count), _rows(sampled, count)
    distance, manifold = kid(a, b), manifold_metrics(a, b)
    return {
        "kid": {
            **asdict(distance),
            "n": count,
            "n_real": count,
            "against": f"{images.name} {images.split}",
        },
        "precision": manifold.precision,
        "recall": manifold.recall,
    }


def _rows(features: StoreReader, count: int) -> Tensor:
    """Choose rows at random, with a fixed seed: the order of a split may depend on the class."""
    if count == len(features):
        return features.field("features")
    order = torch.randperm(len(features), generator=generator(0, "rows"))
    return features.take("features", order[:count].sort().values)
