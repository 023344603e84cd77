"""Images → numbers: FID with its n, reference and reconstruction floor, and what stands beside it.

Features lie in stores (generated ones in the run, those of reconstructions and real images
under the data root), so that an evaluation resumes, is shared between runs with the same
autoencoder, and does not depend on the number of processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
from eval.references import load_reference
from flows.condition import Condition
from pipeline import assets, commit, quality
from pipeline.classes import choice_of, condition_of
from pipeline.config import DataConfig, EvaluateConfig, GenerateConfig
from pipeline.datasets import ImageSet, load_images
from pipeline.errors import UserError
from pipeline.generate import sample_images
from pipeline.latents import Progress, Standardisation
from pipeline.passes import readable
from pipeline.resources import peak_memory
from pipeline.runs import Run
from pipeline.seeds import generator
from pipeline.store import StoreReader, StoreWriter, key_of, open_store

SHARD = 250
#: largest D whose likelihood has the exact divergence, D directional derivatives an evaluation
EXACT_UP_TO = 128
#: probes a sample beyond it
PROBES = 16
_ORDER = "order of evaluation"


def load_inception(accelerator: Accelerator) -> FidInception:
    """The FID network, fetched when it is not at hand, on the accelerator's device."""
    return FidInception.from_weights(assets.fetch("inception")).to(accelerator.device)


class Evaluator:
    """Evaluates runs and autoencoders; holds the network once it is needed.

    Args:
        accelerator: device and processes; rank r makes shards r, r + P, ….
        progress: wraps loops.
    """

    def __init__(self, accelerator: Accelerator, progress: Progress) -> None:
        self.accelerator, self.progress = accelerator, progress
        self._inception: FidInception | None = None

    def evaluate(
        self, run: Run, settings: EvaluateConfig, sampling: GenerateConfig
    ) -> dict[str, Any]:
        """Measure a run; the result is committed as its metrics.json.

        Args:
            run: an open run.
            settings: what to measure.
            sampling: solver, batch size, classes, guidance; n and seed come from `settings`.

        Returns:
            The metrics, as in metrics.json.

        Raises:
            UserError: an n below 2, or larger than the split that the floor needs.
        """
        if settings.n < 2:
            raise UserError(f"FID needs at least 2 images, not {settings.n}; take 2000 or more")
        _check(run, settings)
        choice = choice_of(run, sampling)
        sampling = dataclasses.replace(sampling, n=settings.n, seed=settings.seed)
        reference = self.reference(settings.reference)
        images, features = self.generated(run, sampling)
        label = {"reference": settings.reference, "extractor": EXTRACTOR}
        metrics: dict[str, Any] = {
            "fid": {
                "value": fid_of(features, reference),
                "n": settings.n,
                "seed": settings.seed,
                **label,
            }
        }
        if choice is not None:
            metrics["fid"] |= {"guidance": choice.guidance, "classes": list(choice.labels) or None}
        if settings.floor:
            metrics["rfid"] = self.floor(run, settings, reference) | label
        metrics |= self._quality(run.config.data, features, settings.kid)
        if settings.nll:
            metrics |= self._likelihood(run, settings)
        metrics |= _about(run, images, settings)
        metrics["inputs"] = inputs_of(run, settings, sampling)
        if self.accelerator.is_main_process:
            commit.write_json(run.folder / "metrics.json", metrics)
        return metrics

    def generated(self, run: Run, sampling: GenerateConfig) -> tuple[StoreReader, StoreReader]:
        """Generated images of a run and their features, made where they are not there yet."""
        images = sample_images(run, sampling, self.accelerator, self.progress)
        folder = run.folder / "samples" / f"features-{images.manifest['key']}"
        identity = {"kind": "features", "images": images.manifest["key"], **_extractor()}
        features = self._features(
            folder, identity, len(images), lambda a, b, _: images.read("images", a, b), "generated"
        )
        return images, features

    def floor(
        self, run: Run, settings: EvaluateConfig, reference: GaussianStats
    ) -> dict[str, Any]:
        """FID of decoded latents of real images: what a perfect flow would score.

        The latents are posterior samples (or carry the known noise), as those that the flow
        trains on; the images are n of the test split (see `chosen`), or of the training split
        where the test split is smaller than n.
        """
        images, latents = quality.held_out(run.config.data, settings.n), run.config.latents
        value = self.reconstruction_fid(
            run.autoencoder(), images, settings.n, reference, latents.noise, run.standardisation
        )
        return {"value": value, "n": settings.n, "split": images.split}

    def reconstruction_fid(
        self,
        autoencoder: Autoencoder,
        images: ImageSet,
        n: int,
        reference: GaussianStats,
        noise: float = 0.0,
        standardisation: Standardisation | None = None,
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
            **_extractor(),
        }
        if noise > 0 and standardisation is not None:
            identity |= {"noise": noise, "standardisation": standardisation.to_dict()}
        folder = assets.data_root() / "features" / f"floor-{key_of(identity)}"
        autoencoder.to(self.accelerator.device)  # type: ignore[attr-defined]

        def make(first: int, last: int, index: int) -> Tensor:
            x = to_float(torch.from_numpy(images.take(order[first:last])))
            drawn = generator(0, "floor", index)
            moments = autoencoder.encode(x.to(self.accelerator.device))
            z = moments.sample(drawn)
            if noise > 0 and standardisation is not None and moments.log_var is None:
                spread = standardisation.undo(torch.ones_like(z)) - standardisation.undo(z * 0)
                z = z + noise * spread * torch.randn(z.shape, generator=drawn).to(z.device)
            return to_uint8(autoencoder.decode(z))

        features = self._features(folder, identity, n, make, "reconstructed")
        return fid_of(features, reference)

    def real_features(self, images: ImageSet, n: int) -> StoreReader:
        """Features of n real images of a set, in the order of `chosen`."""
        order = chosen(images, n)
        identity = {
            "kind": "real",
            "data": images.fingerprint,
            "n": n,
            "order": _ORDER,
            **_extractor(),
        }
        folder = assets.data_root() / "features" / f"real-{key_of(identity)}"
        return self._features(
            folder, identity, n, lambda a, b, _: torch.from_numpy(images.take(order[a:b])), "real"
        )

    def reference(self, name: str) -> GaussianStats:
        """Statistics to compare with: of a shipped reference, a folder or a .npz."""
        return stats_of(name, self._network)

    def _network(self) -> FidInception:
        if self._inception is None:
            self._inception = load_inception(self.accelerator)
        return self._inception

    def _features(
        self,
        folder: Path,
        identity: dict[str, Any],
        count: int,
        make: Callable[[int, int, int], Tensor],
        what: str,
    ) -> StoreReader:
        """Features of images that `make(first, last, shard)` gives; resumes by shard."""
        if (folder / "manifest.json").is_file():
            return open_store(folder, "features", identity)
        writer = StoreWriter(folder, identity, count, SHARD)
        ranks = self.accelerator.num_processes
        missing = writer.missing(self.accelerator.process_index, ranks)
        network = self._network()
        with torch.inference_mode():
            for index in self.progress(missing, len(missing), f"features of {count} {what}"):
                images = make(*writer.bounds(index), index)
                writer.write(index, {"features": network.features(images)})
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            writer.finish()
        self.accelerator.wait_for_everyone()
        return open_store(folder, "features", identity)

    def _quality(self, data: DataConfig, generated: StoreReader, n: int) -> dict[str, Any]:
        """KID, precision and recall against n real images, or for 0 those at hand, if any."""
        if n:
            images = quality.held_out(data, n)
            return quality.compare(images, self.real_features(images, n), generated)
        found = quality.at_hand(data, _extractor())
        if found is None or len(generated) < quality.LEAST:
            return {}
        return quality.compare(*found, generated)

    def _likelihood(self, run: Run, settings: EvaluateConfig) -> dict[str, Any]:
        """NLL of latents of the test split, given the class; adaptive, exact or many probes."""
        images = _test_images(run.config.data)
        _enough(images, settings.nll)
        autoencoder = run.autoencoder()
        drawn = generator(0, "nll")
        with torch.inference_mode():
            x = to_float(torch.from_numpy(images.read(0, settings.nll)))
            moments = autoencoder.encode(x)
            z = run.standardisation.apply(moments.sample(drawn))
        sigma = run.config.latents.noise
        if moments.log_var is None and sigma > 0:
            z = z + sigma * torch.randn(z.shape, generator=drawn)
        device = next(run.flow.parameters()).device
        of = _classes(run, images, settings.nll)
        kind = "exact" if run.flow.dim <= EXACT_UP_TO else "hutchinson"
        result = run.flow.log_prob(
            z.clone().to(device), divergence=kind, probes=PROBES, generator=drawn, chunk=SHARD,
            condition=of,
        )
        spread = result.standard_error
        noise = (
            {}
            if spread is None
            else {
                "probes": PROBES,
                "standard_error": float(spread.double().square().sum().sqrt())
                / len(z)
                / result.dim,
            }
        )
        error = result.inversion_error.double()
        return {
            "nll_per_dim": result.nll_per_dim,
            "nll": {
                "n": settings.nll,
                "split": images.split,
                "unit": "nats per latent dimension",
                "divergence": kind,
                **noise,
                "solver": "dopri5",
                "nfe": result.nfe,
                "inversion_mse": float((error**2).mean()) / result.dim,
                **({} if of is None else {"given": "class"}),
            },
        }


def fid_of(features: StoreReader, reference: GaussianStats) -> float:
    """FID of the images that features belong to."""
    stats = GaussianStats()
    for start in range(0, len(features), SHARD):
        stats.update(features.read("features", start, min(start + SHARD, len(features))))
    return float(np.float64(frechet_distance(stats, reference)))


def _extractor() -> dict[str, str]:
    return {"extractor": EXTRACTOR, "weights": assets.content_sha256("inception")[:16]}


def _check(run: Run, settings: EvaluateConfig) -> None:
    """Refuse what the data set cannot give, before hours are spent on images."""
    data = run.config.data
    if settings.floor:
        _enough(quality.held_out(data, settings.n), settings.n)
    if settings.kid:
        if min(settings.kid, settings.n) < quality.LEAST:
            raise UserError(
                f"KID, precision and recall need at least {quality.LEAST} images of either kind, "
                f"not --kid {settings.kid} of {settings.n} generated ones"
            )
        _enough(quality.held_out(data, settings.kid), settings.kid)
    if settings.nll:
        test = _test_images(data)
        _enough(test, settings.nll)
        _classes(run, test, settings.nll)


def _classes(run: Run, images: ImageSet, n: int) -> Condition | None:
    """The classes of the first n images of a set, for a class-conditional run."""
    classes = run.flow.classes
    return condition_of(images.labels if classes else None, classes, 0, n)


def _test_images(data: DataConfig) -> ImageSet:
    return load_images(dataclasses.replace(data, split=data.test_split))


def inputs_of(run: Run, settings: EvaluateConfig, sampling: GenerateConfig) -> str:
    """What an evaluation's numbers depend on, as a key: metrics of the same key are the same."""
    sampling = dataclasses.replace(sampling, n=settings.n, seed=settings.seed)
    generate = dataclasses.asdict(sampling)
    # without them the key is what it was before they came
    for later in ("labels", "guidance", "block_steps"):
        if generate[later] is None:
            del generate[later]
    parts = {
        "run": run.fingerprint,
        "evaluate": dataclasses.asdict(settings),
        "generate": generate,
        "data": run.manifest["data"],
        **_extractor(),
    }
    return key_of(parts)


def chosen(images: ImageSet, n: int) -> npt.NDArray[np.int64]:
    """N indices of a set: the start of one fixed random order of all of it.

    The first n images of a split need not be like the rest (MNIST's test digits come from two
    groups of writers, one after the other), so they are no fair sample of it. A whole set is
    taken as it lies.

    Raises:
        UserError: the set has fewer than n images.
    """
    _enough(images, n)
    if n == len(images):
        return np.arange(n)
    return torch.randperm(len(images), generator=generator(0, _ORDER))[:n].numpy()


def _enough(images: ImageSet, n: int) -> None:
    if n > len(images):
        raise UserError(
            f"{n} images were asked for, but {images.name} ({images.split}) has {len(images)}; "
            "ask for fewer"
        )


def _about(run: Run, images: StoreReader, settings: EvaluateConfig) -> dict[str, Any]:
    """What the numbers belong to."""
    keys = ("objective", "h", "gamma", "movement", "ter", "seconds", "iterations", "parameters")
    rows = run.manifest["blocks"][: len(run.flow)]
    try:
        card = load_reference(settings.reference).card
    except ValueError:
        card = {}
    real = card.get("test_split_fid", {}).get(str(settings.n))
    return {
        "real_test_fid": real,
        "nfe": images.manifest["nfe"],
        "blocks": [readable({key: row.get(key) for key in keys}) for row in rows],
        "train_seconds": sum(row["seconds"] for row in rows),
        "peak_memory_bytes": peak_memory(),
        "run": run.fingerprint,
    }
