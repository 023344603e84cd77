"""KID, precision and recall of sampled images against real images of the same data set.

Inception is slow on a CPU, so by default only stored features of real images are used. `evaluate
--kid N` and `reference --test N` extract and store them under the data root.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.distances import kid, precision_recall
from pipeline.config.data import DataConfig
from pipeline.data.datasets import load_images
from pipeline.data.image_set import ImageSet
from pipeline.errors import JkoflowError, UserError
from pipeline.runtime.rng import generator
from pipeline.storage import atomic
from pipeline.storage.paths import data_root
from pipeline.storage.shards import MANIFEST, StoreReader, open_store

#: the most images of either set; 10 000 x 2 048 floats take 80 MB, and the cost is quadratic
MOST = 10_000
#: the fewest images, because a manifold's radius is a distance to the third neighbour
LEAST = 4


def stored_real_features(
    data: DataConfig, extractor: dict[str, str]
) -> tuple[ImageSet, StoreReader] | None:
    """Find real images with the largest complete store of their features, or None.

    They are of the test split or else of the training split, and of the given network.
    """
    stored = _manifests()
    for split in dict.fromkeys((data.test_split, data.split)) if stored else ():
        try:
            images = load_images(data.of_split(split))
        except (JkoflowError, OSError):  # these metrics are optional
            continue
        wanted = {"kind": "real", "data": images.fingerprint, **extractor}
        stores = [(int(m["count"]), folder) for folder, m in stored if _agrees(m, wanted)]
        for count, folder in sorted(stores, reverse=True):
            if count >= LEAST:
                try:
                    return images, open_store(folder, "features")
                except UserError:  # a damaged store is passed over
                    continue
    return None


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
    distance, manifold = kid(a, b), precision_recall(a, b)
    return {
        "kid": {
            **asdict(distance),
            "n": count,
            "n_real": count,
            "against": f"{images.name} {images.split}",
        },
        **asdict(manifold),
    }


def _rows(features: StoreReader, count: int) -> Tensor:
    """Choose rows at random, with a fixed seed: the order of a split may depend on the class."""
    if count == len(features):
        return features.field("features")
    order = torch.randperm(len(features), generator=generator(0, "rows"))
    return features.take("features", order[:count].sort().values)


def _manifests() -> list[tuple[Path, dict[str, Any]]]:
    """List the stores of features of real images, with manifests; damaged ones are left out."""
    stores = []
    for path in sorted((data_root() / "features").glob(f"real-*/{MANIFEST}")):
        with contextlib.suppress(JkoflowError):
            manifest = atomic.read_json(path, "manifest of the features")
            if isinstance(manifest, dict):
                stores.append((path.parent, manifest))
    return stores


def _agrees(manifest: dict[str, Any], wanted: dict[str, str]) -> bool:
    identity = manifest.get("identity", {})
    return all(identity.get(key) == value for key, value in wanted.items())
