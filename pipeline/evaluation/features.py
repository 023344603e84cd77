"""Inception features of sampled, reconstructed and real images, in stores.

Features of sampled images lie in the run, all others under the data root, so that runs share them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoders.base import Autoencoder, to_float, to_uint8
from eval.distances import frechet_distance
from eval.features.inception import EXTRACTOR, FidInception
from eval.gaussian import GaussianStats
from eval.sets.sources import stats_of
from pipeline.assets.catalogue import ASSETS
from pipeline.assets.fetch import fetch_asset
from pipeline.data.image_set import ImageSet
from pipeline.data.one_writer import one_writer
from pipeline.data.standardisation import Standardisation
from pipeline.evaluation.real_images import ORDER, subset_indices
from pipeline.runtime.console import Progress, say
from pipeline.runtime.distributed import errors_on_all_ranks
from pipeline.runtime.rng import generator
from pipeline.sampling.refiner import Refiner
from pipeline.storage.paths import data_root
from pipeline.storage.shards.manifest import MANIFEST, content_key
from pipeline.storage.shards.opening import open_store
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.shards.writer import StoreWriter

#: images per shard of a store of features, and per batch of the network
SHARD = 250


def inception_weights(accelerator: Accelerator) -> Path:
    """Return the file of the FID network's weights; fetch it if it is absent."""
    return fetch_asset("inception", log=say if accelerator.is_main_process else str)


def load_inception(accelerator: Accelerator) -> FidInception:
    """Load the FID network on the accelerator's device."""
    return FidInception.from_weights(inception_weights(accelerator)).to(accelerator.device)


class FeatureExtractor:
    """Extractor of Inception features; it loads the network when it first needs it.

    Rank r makes shards r, r + P, ….
    """

    def __init__(self, accelerator: Accelerator, progress: Progress) -> None:
        self.accelerator, self.progress = accelerator, progress

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
        """Measure rFID(n) of an autoencoder on n images of a set (see `subset_indices`).

        Raises:
            UserError: the set has fewer than n images.
        """
        features = self.reconstructed_features(
            autoencoder, images, n, noise, standardisation, refiner
        )
        return fid_of(features, reference)

    def reconstructed_features(
        self,
        autoencoder: Autoencoder,
        images: ImageSet,
        n: int,
        noise: float = 0.0,
        standardisation: Standardisation | None = None,
        refiner: Refiner | None = None,
    ) -> StoreReader:
        """Extract the features of the reconstructions of n images of a set.

        Raises:
            UserError: the set has fewer than n images.
        """
        order = subset_indices(images, n)
        identity = reconstructed_identity(
            autoencoder, images, n, noise, standardisation, refiner
        )
        folder = features_folder(identity)
        autoencoder.to(self.accelerator.device)  # type: ignore[attr-defined]

        def make(first: int, last: int, index: int) -> Tensor:
            x = to_float(torch.from_numpy(images.take(order[first:last])))
            rng = generator(0, "floor", index)
            moments = autoencoder.encode(x.to(self.accelerator.device))
            z = moments.sample(rng)
            if noise > 0 and standardisation is not None and moments.log_var is None:
                spread = standardisation.undo(torch.ones_like(z)) - standardisation.undo(z * 0)
                z = z + noise * spread * torch.randn(z.shape, generator=rng).to(z.device)
            decoded = autoencoder.decode(z)
            return to_uint8(decoded if refiner is None else refiner.sample_detail(decoded, rng))

        return self.features(folder, identity, n, make, "reconstructed")

    def real_features(self, images: ImageSet, n: int) -> StoreReader:
        """Extract the features of n real images of a set, in the order of `subset_indices`."""
        order = subset_indices(images, n)
        identity = real_features_identity(images, n)

        def make(first: int, last: int, _: int) -> Tensor:
            return torch.from_numpy(images.take(order[first:last]))

        return self.features(features_folder(identity), identity, n, make, "real")

    def reference(self, name: str) -> GaussianStats:
        """Return the feature statistics of a shipped reference, a folder or a .npz."""
        return stats_of(name, lambda: self._network)

    def features_of(self, images: Tensor, what: str) -> Tensor:
        """Extract the features (n, 2048) of images uint8 (n, C, H, W), without a store.

        `what` names the images in the progress bar.
        """
        starts = range(0, len(images), SHARD)
        label = f"features of {len(images)} {what}"
        with torch.inference_mode():
            parts = [
                self._network.features(images[start : start + SHARD]).cpu()
                for start in self.progress(starts, len(starts), label)
            ]
        return torch.cat(parts)

    @cached_property
    def _network(self) -> FidInception:
        return load_inception(self.accelerator)

    def features(
        self,
        folder: Path,
        identity: dict[str, Any],
        count: int,
        make: Callable[[int, int, int], Tensor],
        what: str,
        begun: Sequence[tuple[StoreReader, int]] = (),
    ) -> StoreReader:
        """Extract the features of `count` images, or open the store that has them.

        `make` returns the images [first, last) of a shard, uint8 (B, C, H, W), from (first, last,
        shard). `begun` are stores with the same first features, each with their number. `what`
        names the images in the progress bar.
        """
        if not (folder / MANIFEST).is_file():
            with one_writer(folder, "feature store", self.accelerator, wait=True):
                if not (folder / MANIFEST).is_file():
                    self._extract(StoreWriter(folder, identity, count, SHARD), make, what, begun)
        return open_store(folder, "feature store", identity)

    def _extract(
        self,
        writer: StoreWriter,
        make: Callable[[int, int, int], Tensor],
        what: str,
        begun: Sequence[tuple[StoreReader, int]],
    ) -> None:
        """Write the missing shards of a store of features, and its manifest."""
        with errors_on_all_ranks(self.accelerator):
            if self.accelerator.is_main_process:
                for store, same in begun:
                    writer.adopt(store, same)
        ranks = self.accelerator.num_processes
        missing = writer.missing(self.accelerator.process_index, ranks)
        network = self._network
        with errors_on_all_ranks(self.accelerator), torch.inference_mode():
            label = f"features of {writer.count} {what}"
            for index in self.progress(missing, len(missing), label):
                images = make(*writer.bounds(index), index)
                writer.write(index, {"features": network.features(images)})
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            writer.finish()
        self.accelerator.wait_for_everyone()


def fid_of(features: StoreReader, reference: GaussianStats) -> float:
    """Compute the FID between features and a reference."""
    return frechet_distance(statistics_of(features), reference)


def statistics_of(features: StoreReader) -> GaussianStats:
    """Compute the mean and the covariance of features."""
    stats = GaussianStats()
    for start in range(0, len(features), SHARD):
        stats.update(features.read("features", start, min(start + SHARD, len(features))))
    return stats


def extractor_identity() -> dict[str, str]:
    """Return the name of the network and the sha256 of its weights, for the keys of stores."""
    return {"extractor": EXTRACTOR, "weights": ASSETS["inception"].sha256[:16]}


def features_folder(identity: dict[str, Any]) -> Path:
    """Return the folder of a store of features that runs share."""
    return data_root() / "features" / f"{identity['kind']}-{content_key(identity)}"


def reconstructed_identity(
    autoencoder: Autoencoder,
    images: ImageSet,
    n: int,
    noise: float = 0.0,
    standardisation: Standardisation | None = None,
    refiner: Refiner | None = None,
) -> dict[str, Any]:
    """Return the identity of the store of features of the reconstructions of n images."""
    identity: dict[str, Any] = {
        "kind": "floor",
        "autoencoder": autoencoder.fingerprint,
        "data": images.fingerprint,
        "n": n,
        "order": ORDER,
        **extractor_identity(),
    }
    if noise > 0 and standardisation is not None:
        identity |= {"noise": noise, "standardisation": standardisation.to_dict()}
    if refiner is not None:
        identity |= {"refiner": refiner.identity(), "precision": refiner.precision}
    return identity


def real_features_identity(images: ImageSet, n: int) -> dict[str, Any]:
    """Return the identity of the store of features of n real images."""
    content = {"kind": "real", "data": images.fingerprint, "n": n, "order": ORDER}
    return content | extractor_identity()
