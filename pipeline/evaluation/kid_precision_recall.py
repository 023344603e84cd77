"""KID, precision and recall of generated images, against real images of the same data set.

Inception is slow on a CPU, so by default only features that are at hand are used: those that
`evaluate --kid N` or `reference --test N` once made of the test split (or of the training split),
under the data root. Where there are none, the numbers are left out.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.distances import kid, precision_recall
from pipeline.config.schema import DataConfig
from pipeline.data.datasets import ImageSet, load_images
from pipeline.data.image_folder import splits_of
from pipeline.errors import JkoflowError, UserError
from pipeline.runtime.rng import generator
from pipeline.storage import atomic
from pipeline.storage.paths import data_root
from pipeline.storage.shards import MANIFEST, StoreReader, open_store

#: most images of either set; 10 000 x 2 048 numbers are 80 MB, and the cost grows with the square
MOST = 10_000
#: fewest: a point has three nearest others
LEAST = 4


def test_images(data: DataConfig) -> ImageSet:
    """The test split, or the training split of a folder that is not split."""
    if data.name == "folder" and data.path and not splits_of(Path(data.path).expanduser()):
        return load_images(data.of_split(data.split))
    return load_images(data.of_split(data.test_split))


def held_out(data: DataConfig, n: int) -> ImageSet:
    """The test split, or the training split where that has fewer than n images."""
    test = test_images(data)
    return test if len(test) >= n else load_images(data.of_split(data.split))


def at_hand(data: DataConfig, extractor: dict[str, str]) -> tuple[ImageSet, StoreReader] | None:
    """Real images whose features lie under the data root: of the test split, else of the training.

    Args:
        data: the data set of a run.
        extractor: identity of the network that made the features.

    Returns:
        The images and the largest whole store of their features; None if there is none.
    """
    stored = _manifests()
    for split in dict.fromkeys((data.test_split, data.split)) if stored else ():
        try:
            images = load_images(data.of_split(split))
        except (JkoflowError, OSError):  # nothing else may need the images
            continue
        wanted = {"kind": "real", "data": images.fingerprint, **extractor}
        found = [(int(m["count"]), folder) for folder, m in stored if _is(m, wanted)]
        for count, folder in sorted(found, reverse=True):
            if count >= LEAST:
                try:
                    return images, open_store(folder, "feature store")
                except UserError:  # damaged; they are not needed
                    continue
    return None


def compare(images: ImageSet, real: StoreReader, generated: StoreReader) -> dict[str, Any]:
    """KID, precision and recall, on equally many images of either set.

    Args:
        images: the real images.
        real: their features (n, 2048).
        generated: features of generated images (m, 2048).

    Returns:
        The entries kid, precision and recall of metrics.json.

    Raises:
        ValueError: fewer than 4 images in a set.
    """
    count = min(len(real), len(generated), MOST)
    a, b = _rows(real, count), _rows(generated, count)
    distance, manifold = kid(a, b), precision_recall(a, b)
    return {
        "kid": {
            "value": distance.value,
            "standard_error": distance.standard_error,
            "subsets": distance.subsets,
            "subset_size": distance.subset_size,
            "n": count,
            "n_real": count,
            "against": f"{images.name} {images.split}",
        },
        "precision": manifold.precision,
        "recall": manifold.recall,
    }


def _rows(features: StoreReader, count: int) -> Tensor:
    """A fixed random choice of rows: a whole split lies in its own order, which may mean much."""
    if count == len(features):
        return features.field("features")
    order = torch.randperm(len(features), generator=generator(0, "rows"))
    return features.take("features", order[:count].sort().values)


def _manifests() -> list[tuple[Path, dict[str, Any]]]:
    """Folders and manifests of all features of real images; damaged ones are passed over."""
    found = []
    for path in sorted((data_root() / "features").glob(f"real-*/{MANIFEST}")):
        with contextlib.suppress(JkoflowError):
            manifest = atomic.read_json(path, "manifest of the features")
            if isinstance(manifest, dict):
                found.append((path.parent, manifest))
    return found


def _is(manifest: dict[str, Any], wanted: dict[str, str]) -> bool:
    identity = manifest.get("identity", {})
    return all(identity.get(key) == value for key, value in wanted.items())
