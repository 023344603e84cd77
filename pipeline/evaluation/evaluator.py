"""Evaluation of a run: FID with its reconstruction floor, KID, precision, recall and NLL.

Features lie in stores, so an evaluation resumes, shares features with runs on the same
autoencoder, and does not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from eval.features.inception import EXTRACTOR
from eval.gaussian import GaussianStats
from eval.references import is_reference, load_reference
from pipeline.config.data import DataConfig
from pipeline.config.sampling import EvaluateConfig
from pipeline.data.packed.load import FOLDERS
from pipeline.errors import UserError
from pipeline.evaluation.features import FeatureExtractor, extractor_identity, fid_of
from pipeline.evaluation.kid_precision_recall import (
    LEAST,
    kid_precision_recall,
)
from pipeline.evaluation.likelihood import held_out_nll
from pipeline.evaluation.real_images import (
    at_least,
    held_out_images,
    require_fid_sample,
    require_images,
    subset_indices,
)
from pipeline.runs.run import Run
from pipeline.runtime.console import say
from pipeline.runtime.system import peak_memory
from pipeline.sampling.class_labels import condition_of
from pipeline.sampling.generate import sample_images, stores_to_reuse
from pipeline.sampling.image_recipe import recipe_of
from pipeline.sampling.sampling_plan import SamplingPlan
from pipeline.storage import atomic
from pipeline.storage.paths import absolute
from pipeline.storage.records import keep_recipe, to_json, well_formed
from pipeline.storage.shards.manifest import MANIFEST
from pipeline.storage.shards.opening import open_store
from pipeline.storage.shards.reader import StoreReader


class Evaluator(FeatureExtractor):
    """Evaluator of runs; its arguments are those of :class:`FeatureExtractor`.

    Attributes:
        file: that the latest evaluation wrote; None before it, and on ranks that do not write.
    """

    file: Path | None = None

    def evaluate(self, plan: SamplingPlan, settings: EvaluateConfig) -> dict[str, Any]:
        """Measure a run and write the result to its metrics.json, whose content is returned.

        If metrics.json has the FID of more images of the same sampling against the same
        reference, the file is metrics-N.json. The attribute `file` is its path afterwards.

        Raises:
            UserError: n is below 2, or a data set has fewer images than the settings ask for.
        """
        require_fid_sample(settings.n)
        run = plan.run
        _check_settings(run, settings)
        reference = self.reference(settings.reference)
        images, features = self.sample_features(plan, settings.n, plan.settings.seed)
        label = {"reference": settings.reference, "extractor": EXTRACTOR}
        metrics: dict[str, Any] = {
            "fid": {
                "value": fid_of(features, reference),
                "n": settings.n,
                "seed": plan.settings.seed,
                **label,
            },
            "sampling": plan.identity(),
        }
        if settings.floor:
            metrics["rfid"] = self.floor(plan, settings.n, reference) | label
        metrics |= self._kid_precision_recall(run.config.data, features, settings.kid)
        if settings.nll:
            metrics |= held_out_nll(run, settings.nll, self.accelerator)
        metrics |= {
            "real_test_fid": _real_test_fid(run, settings),
            "nfe": images.manifest["nfe"],
            **_training_cost(run),
            "peak_memory_bytes": peak_memory(),
            "inputs": inputs_of(plan, settings),
        }
        if run.training is not None:
            metrics["unfinished"] = dataclasses.asdict(run.training)
        if self.accelerator.is_main_process:
            path = self.file = _metrics_file(run, metrics)
            recipe = recipe_of(plan, settings.n, plan.settings.seed)
            recipe["evaluate"] = dataclasses.asdict(settings)
            recipe["reference"] = absolute(settings.reference)
            keep_recipe(recipe_file(path), recipe)
            atomic.write_json(path, metrics)
        return metrics

    def sample_features(
        self, plan: SamplingPlan, n: int, seed: int
    ) -> tuple[StoreReader, StoreReader]:
        """Sample n images and extract their features; stores that exist are opened."""
        images = sample_images(plan, n, seed, self.accelerator, self.progress)
        return images, self.stored_features(plan.run.folder / "samples", images)

    def stored_features(self, samples: Path, images: StoreReader) -> StoreReader:
        """Extract the features of a store of sampled images, or open the store that has them.

        `samples` is the folder of both stores.
        """
        folder, identity = _store_of_features(samples, images)
        begun = [] if (folder / MANIFEST).is_file() else _features_to_reuse(samples, images)
        return self.features(
            folder, identity, len(images), lambda a, b, _: images.read("images", a, b),
            "samples", begun,
        )  # fmt: skip

    def floor(self, plan: SamplingPlan, n: int, reference: GaussianStats) -> dict[str, Any]:
        """Measure the FID of decoded (and refined) latents of n real images.

        A perfect flow would reach this FID. The latents are posterior samples (or carry the
        configured noise), as in training. The split is that of `at_least`.
        """
        run = plan.run
        images = at_least(run.config.data, n)
        value = self.reconstruction_fid(
            run.autoencoder(),
            images,
            n,
            reference,
            run.config.latents.noise,
            run.standardisation,
            plan.refiner,
        )
        return {"value": value, "n": n, "split": images.split}

    def _kid_precision_recall(
        self, data: DataConfig, sampled: StoreReader, n: int
    ) -> dict[str, Any]:
        """Compare with n real images, or with none if n is 0."""
        if not n:
            return {}
        images = at_least(data, n)
        return kid_precision_recall(images, self.real_features(images, n), sampled)


def recipe_file(metrics: Path) -> Path:
    """Return the file with the recipe of metrics.json, or of metrics-N.json."""
    return metrics.parent / "samples" / f"{metrics.stem}.recipe.json"


def inputs_of(plan: SamplingPlan, settings: EvaluateConfig) -> dict[str, Any]:
    """Return what an evaluation depends on besides its sampling plan, as JSON values."""
    return {
        "evaluate": dataclasses.asdict(settings),
        "batch_size": plan.settings.batch_size,
        "data": to_json(plan.run.manifest.data),
        **extractor_identity(),
    }


def warn_of_other_data(run: Run, reference: str) -> str | None:
    """Return a warning if a reference is of another data set than the run; else None."""
    reference_data, run_data = _card(reference).get("dataset"), run.manifest.data.name
    if reference_data is None or reference_data == run_data:
        return None
    return (
        f"warning: the reference {reference} is of {reference_data}, but the run's images are "
        f"{run_data}; --reference takes a folder of images, or the file that `jkoflow reference` "
        "makes of them"
    )


def _check_settings(run: Run, settings: EvaluateConfig) -> None:
    """Refuse settings that ask for more images than a data set has, before anything is sampled."""
    data = run.config.data
    if settings.floor:
        advice = "ask for fewer, or leave the floor out with --set evaluate.floor=false"
        require_images(at_least(data, settings.n), settings.n, advice)
    if settings.kid:
        if min(settings.kid, settings.n) < LEAST:
            raise UserError(
                f"KID, precision and recall need at least {LEAST} images of either kind, "
                f"not --kid {settings.kid} and -n {settings.n}"
            )
        require_images(at_least(data, settings.kid), settings.kid)
    if settings.nll:
        images = held_out_images(data)
        advice = f"use --set evaluate.nll={len(images)}, or 0 to leave the likelihood out"
        require_images(images, settings.nll, advice)
        condition_of(run, images, subset_indices(images, settings.nll))


def _card(reference: str) -> dict[str, Any]:
    """Read the card of a shipped reference or of a file of statistics; empty for images."""
    if Path(reference).exists() and not is_reference(reference):  # as in open_source
        return {}
    try:
        return load_reference(reference).card
    except ValueError:
        return {}


def _metrics_file(run: Run, metrics: dict[str, Any]) -> Path:
    """Return metrics.json; another name where it holds the same run's FID of more images."""
    path, n = run.folder / "metrics.json", metrics["fid"]["n"]
    if path.is_file():
        earlier = atomic.read_json(path, "metrics")
        with well_formed(path):
            same = earlier.get("sampling") == metrics["sampling"]
            same = same and earlier["fid"]["reference"] == metrics["fid"]["reference"]
            larger = same and earlier["fid"]["n"] > n
        if larger:
            path = path.with_name(f"metrics-{n}.json")
            say(f"metrics.json keeps the FID of {earlier['fid']['n']} images; see {path.name}")
    return path


def _real_test_fid(run: Run, settings: EvaluateConfig) -> float | None:
    """Look up the FID of n real test images on the card of a reference of the run's data."""
    card = _card(settings.reference)
    same_content = card.get("content_sha256") == run.manifest.data.fingerprint
    named_only = run.config.data.name in (*FOLDERS, "imagenet32")  # one name for many data sets
    if (named_only and not same_content) or warn_of_other_data(run, settings.reference):
        return None
    value: float | None = card.get("test_split_fid", {}).get(str(settings.n))
    return value


def _training_cost(run: Run) -> dict[str, Any]:
    """Summarise the training of the blocks that are used."""
    keys = ("objective", "h", "gamma", "movement", "ter", "seconds", "iterations", "parameters")
    rows = run.manifest.blocks[: len(run.flow)]
    return {
        "blocks": [{key: row.report()[key] for key in keys} for row in rows],
        "train_seconds": sum(row.seconds for row in rows),
    }


def _store_of_features(samples: Path, images: StoreReader) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the identity of the features of sampled images."""
    key = images.manifest["key"]
    identity = {"kind": "features", "images": key, **extractor_identity()}
    return samples / f"features-{key}", identity


def _features_to_reuse(samples: Path, images: StoreReader) -> list[tuple[StoreReader, int]]:
    """Find features of stores that begin with the same images, each with their number."""
    stores = []
    for other, same in stores_to_reuse(samples, images.manifest["identity"]):
        with contextlib.suppress(UserError):  # absent or damaged features are extracted again
            folder, identity = _store_of_features(samples, other)
            stores.append((open_store(folder, "feature store", identity), same))
    return stores
