"""Inception features of generated, reconstructed and real images, in stores.

Those of generated images lie in the run, those of reconstructions and real images
under the data root, so that an evaluation resumes, is shared between runs with the same
autoencoder, and does not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoders.base import Autoencoder, to_float, to_uint8
from eval.distances import frechet_distance
from eval.gaussian import GaussianStats
from eval.images import stats_of
from eval.inception import EXTRACTOR, FidInception
from pipeline.assets.fetch import asset_sha256, fetch_asset
from pipeline.data.datasets import ImageSet
from pipeline.data.standardisation import Standardisation
from pipeline.errors import UserError
from pipeline.runtime.console import Progress, say
from pipeline.runtime.distributed import errors_on_all_ranks
from pipeline.runtime.rng import generator
from pipeline.sampling.refiner import Refiner
from pipeline.storage.paths import data_root
from pipeline.storage.shards import StoreReader, StoreWriter, content_key, open_store

SHARD = 250
_ORDER = "order of evaluation"


def load_inception(accelerator: Accelerator) -> FidInception:
    """The FID network, fetched when it is not at hand, on the accelerator's device."""
    log = say if accelerator.is_main_process else str
    return FidInception.from_weights(fetch_asset("inception", log=log)).to(accelerator.device)


class FeatureMaker:
    """Makes features; holds the network once it is needed.

    Args:
        accelerator: device and processes; rank r makes shards r, r + P, ….
        progress: wraps loops.
    """

    def __init__(self, accelerator: Accelerator, progress: Progress) -> None:
        self.accelerator, self.progress = accelerator, progress
        self._inception: FidInception | None = None

    def reconstruction_fid(
        self,
        autoencoder: Autoencoder,
        images: ImageSet,
        n: int,
        reference: GaussianStats,
        noise: float = 0.0,
        standardisation: Standardisation | None = None,
        refiner: Refiner | None = None,
    ) -> float:
        """rFID(n) of an autoencoder on n images of a set (see `chosen`).

        Raises:
            UserError: the set has fewer than n images.
        """
        order = chosen(images, n)
        identity: dict[str, Any] = {
            "kind": "floor",
            "autoencoder": autoencoder.fingerprint,
            "data": images.fingerprint,
            "n": n,
            "order": _ORDER,
            **extractor(),
        }
        if noise > 0 and standardisation is not None:
            identity |= {"noise": noise, "standardisation": standardisation.to_dict()}
        if refiner is not None:
            half = {} if refiner.precision == "fp32" else {"precision": refiner.precision}
            identity["refiner"] = refiner.describe() | half
        folder = data_root() / "features" / f"floor-{content_key(identity)}"
        autoencoder.to(self.accelerator.device)  # type: ignore[attr-defined]

        def make(first: int, last: int, index: int) -> Tensor:
            x = to_float(torch.from_numpy(images.take(order[first:last])))
            drawn = generator(0, "floor", index)
            moments = autoencoder.encode(x.to(self.accelerator.device))
            z = moments.sample(drawn)
            if noise > 0 and standardisation is not None and moments.log_var is None:
                spread = standardisation.undo(torch.ones_like(z)) - standardisation.undo(z * 0)
                z = z + noise * spread * torch.randn(z.shape, generator=drawn).to(z.device)
            decoded = autoencoder.decode(z)
            return to_uint8(decoded if refiner is None else refiner.refine(decoded, drawn))

        features = self.features(folder, identity, n, make, "reconstructed")
        return fid_of(features, reference)

    def real_features(self, images: ImageSet, n: int) -> StoreReader:
        """Features of n real images of a set, in the order of `chosen`."""
        order = chosen(images, n)
        identity = {
            "kind": "real",
            "data": images.fingerprint,
            "n": n,
            "order": _ORDER,
            **extractor(),
        }
        folder = data_root() / "features" / f"real-{content_key(identity)}"
        return self.features(
            folder, identity, n, lambda a, b, _: torch.from_numpy(images.take(order[a:b])), "real"
        )

    def reference(self, name: str) -> GaussianStats:
        """Statistics to compare with: of a shipped reference, a folder or a .npz."""
        return stats_of(name, self._network)

    def _network(self) -> FidInception:
        if self._inception is None:
            self._inception = load_inception(self.accelerator)
        return self._inception

    def features(
        self,
        folder: Path,
        identity: dict[str, Any],
        count: int,
        make: Callable[[int, int, int], Tensor],
        what: str,
        begun: Sequence[tuple[StoreReader, int]] = (),
    ) -> StoreReader:
        """Features of images that `make(first, last, shard)` gives; resumes by shard.

        Those of stores in `begun` that are the same, so many from the first on, are not made anew.
        """
        if (folder / "manifest.json").is_file():
            return open_store(folder, "feature store", identity)
        writer = StoreWriter(folder, identity, count, SHARD)
        with errors_on_all_ranks(self.accelerator):
            if self.accelerator.is_main_process:
                for other, same in begun:
                    writer.adopt(other, same)
        ranks = self.accelerator.num_processes
        missing = writer.missing(self.accelerator.process_index, ranks)
        network = self._network()
        with errors_on_all_ranks(self.accelerator), torch.inference_mode():
            for index in self.progress(missing, len(missing), f"features of {count} {what}"):
                images = make(*writer.bounds(index), index)
                writer.write(index, {"features": network.features(images)})
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            writer.finish()
        self.accelerator.wait_for_everyone()
        return open_store(folder, "feature store", identity)


def fid_of(features: StoreReader, reference: GaussianStats) -> float:
    """FID of the images that features belong to."""
    return float(np.float64(frechet_distance(statistics_of(features), reference)))


def statistics_of(features: StoreReader) -> GaussianStats:
    """Mean and covariance of features."""
    stats = GaussianStats()
    for start in range(0, len(features), SHARD):
        stats.update(features.read("features", start, min(start + SHARD, len(features))))
    return stats


def extractor() -> dict[str, str]:
    """What features depend on besides the images, for the keys of stores."""
    return {"extractor": EXTRACTOR, "weights": asset_sha256("inception")[:16]}


def chosen(images: ImageSet, n: int) -> npt.NDArray[np.int64]:
    """N indices of a set: the start of one fixed random order of all of it.

    The first n images of a split need not be like the rest (MNIST's test digits come from two
    groups of writers, one after the other), so they are no fair sample of it. A whole set is
    taken as it lies.

    Raises:
        UserError: the set has fewer than n images.
    """
    enough(images, n)
    if n == len(images):
        return np.arange(n)
    return torch.randperm(len(images), generator=generator(0, _ORDER))[:n].numpy()


def enough(images: ImageSet, n: int) -> None:
    """Refuse more images than a set has."""
    if n > len(images):
        raise UserError(
            f"{n} images were asked for, but {images.name} ({images.split}) has {len(images)}; "
            "ask for fewer"
        )


def require_two(n: int) -> None:
    """Refuse an n that no FID can be had of."""
    if n < 2:
        raise UserError(f"FID needs at least 2 images, not {n}; take 2000 or more")
