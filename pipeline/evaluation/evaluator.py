"""Images → numbers: FID with its n, reference and reconstruction floor, and what stands beside it.

Features lie in stores (generated ones in the run, those of reconstructions and real images
under the data root), so that an evaluation resumes, is shared between runs with the same
autoencoder, and does not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import torch

from autoencoders.base import Moments, to_float
from eval.gaussian import GaussianStats
from eval.inception import EXTRACTOR
from eval.references import is_reference, load_reference
from flows.likelihood import log_prob
from pipeline.config.schema import DataConfig, EvaluateConfig, GenerateConfig
from pipeline.errors import UserError
from pipeline.evaluation.features import (
    SHARD,
    FeatureMaker,
    chosen,
    enough,
    extractor,
    fid_of,
    require_two,
)
from pipeline.evaluation.kid_precision_recall import LEAST, at_hand, compare, held_out, test_images
from pipeline.runs.passes import readable
from pipeline.runs.run import Run
from pipeline.runtime.rng import generator
from pipeline.runtime.system import peak_memory
from pipeline.sampling.class_labels import condition_of
from pipeline.sampling.generate import begun, sample_images
from pipeline.sampling.refiner import Refiner
from pipeline.sampling.sampling_plan import way_of
from pipeline.sampling.solvers import plain_solvers, solvers_of
from pipeline.storage import atomic
from pipeline.storage.shards import MANIFEST, StoreReader, content_key, open_store

#: largest D whose likelihood has the exact divergence, D directional derivatives an evaluation
EXACT_UP_TO = 128
#: probes a sample beyond it
PROBES = 16


class Evaluator(FeatureMaker):
    """Evaluates runs (see :class:`FeatureMaker` for its arguments)."""

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
        require_two(settings.n)
        way = way_of(run, sampling)  # refuses what cannot be drawn before any data are asked for
        _check(run, settings)
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
        metrics["fid"] |= way.about()
        metrics["fid"]["solvers"] = plain_solvers(solvers_of(run, sampling))
        if len(run.flow) < len(run.manifest["blocks"]):
            metrics["fid"]["first_blocks"] = len(run.flow)
        if settings.floor:
            metrics["rfid"] = self.floor(run, settings, reference, way.refiner) | label
        metrics |= self._quality(run.config.data, features, settings.kid)
        if settings.nll:
            metrics |= self._likelihood(run, settings)
        metrics |= _about(run, images, settings)
        metrics["inputs"] = inputs_of(run, settings, sampling)
        if self.accelerator.is_main_process:
            atomic.write_json(run.folder / "metrics.json", metrics)
        return metrics

    def generated(self, run: Run, sampling: GenerateConfig) -> tuple[StoreReader, StoreReader]:
        """Generated images of a run and their features, made where they are not there yet."""
        images = sample_images(run, sampling, self.accelerator, self.progress)
        place = run.folder / "samples"
        folder, identity = _features_of(place, images)
        made = [] if (folder / MANIFEST).is_file() else _begun(place, images)
        count = len(images)
        features = self.features(
            folder, identity, count, lambda a, b, _: images.read("images", a, b), "generated", made
        )
        return images, features

    def floor(
        self,
        run: Run,
        settings: EvaluateConfig,
        reference: GaussianStats,
        refiner: Refiner | None = None,
    ) -> dict[str, Any]:
        """FID of decoded (and refined) latents of real images: what a perfect flow would score.

        The latents are posterior samples (or carry the known noise), as those that the flow
        trains on; the images are n of the test split (see `chosen`), or of the training split
        where the test split is smaller than n.
        """
        images, latents = held_out(run.config.data, settings.n), run.config.latents
        scale = run.standardisation
        value = self.reconstruction_fid(
            run.autoencoder(), images, settings.n, reference, latents.noise, scale, refiner
        )
        return {"value": value, "n": settings.n, "split": images.split}

    def _quality(self, data: DataConfig, generated: StoreReader, n: int) -> dict[str, Any]:
        """KID, precision and recall against n real images, or for 0 those at hand, if any."""
        if n:
            images = held_out(data, n)
            return compare(images, self.real_features(images, n), generated)
        found = at_hand(data, extractor())
        if found is None or len(generated) < LEAST:
            return {}
        return compare(*found, generated)

    def _likelihood(self, run: Run, settings: EvaluateConfig) -> dict[str, Any]:
        """NLL of latents of the test split, given the class; adaptive, exact or many probes."""
        images = test_images(run.config.data)
        order = chosen(images, settings.nll)
        autoencoder = run.autoencoder()
        drawn = generator(0, "nll")
        with torch.inference_mode():
            parts = [
                autoencoder.encode(to_float(torch.from_numpy(images.take(order[a : a + SHARD]))))
                for a in range(0, len(order), SHARD)
            ]
            moments = _joined(parts)
            z = run.standardisation.apply(moments.sample(drawn))
        sigma = run.config.latents.noise
        if moments.log_var is None and sigma > 0:
            z = z + sigma * torch.randn(z.shape, generator=drawn)
        flow, device = run.flow.to(self.accelerator.device), self.accelerator.device
        of = condition_of(run, images, order)
        kind = "exact" if flow.dim <= EXACT_UP_TO else "hutchinson"
        result = log_prob(flow, z.clone().to(device),
            divergence=kind,
            probes=PROBES,
            generator=drawn,
            chunk=SHARD,
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


def _joined(parts: list[Moments]) -> Moments:
    """The moments of several batches as those of one."""
    log_var = [part.log_var for part in parts if part.log_var is not None]
    mean = torch.cat([part.mean for part in parts])
    return Moments(mean, torch.cat(log_var) if log_var else None)


def other_data(run: Run, reference: str) -> str | None:
    """A warning where a reference is of another data set than the run; None where it is not."""
    theirs, ours = _card(reference).get("dataset"), run.manifest["data"]["name"]
    if theirs is None or theirs == ours:
        return None
    return (
        f"warning: the reference {reference} is of {theirs}, but the run's images are {ours}; "
        "--reference takes a folder of images, or what `jkoflow reference` makes of them"
    )


def _card(reference: str) -> dict[str, Any]:
    """What the statistics of a shipped reference, or of a file, say of themselves."""
    if Path(reference).exists() and not is_reference(reference):  # images come first, see stats_of
        return {}
    try:
        return load_reference(reference).card
    except ValueError:
        return {}


def _features_of(place: Path, images: StoreReader) -> tuple[Path, dict[str, Any]]:
    """Folder and identity of the features of generated images."""
    key = images.manifest["key"]
    return place / f"features-{key}", {"kind": "features", "images": key, **extractor()}


def _begun(place: Path, images: StoreReader) -> list[tuple[StoreReader, int]]:
    """Features of images that begin with the same, and how many are the same."""
    found = []
    for other, same in begun(place, images.manifest["identity"]):
        with contextlib.suppress(UserError):  # none, or damaged
            folder, identity = _features_of(place, other)
            found.append((open_store(folder, "feature store", identity), same))
    return found


def _check(run: Run, settings: EvaluateConfig) -> None:
    """Refuse what the data set cannot give, before hours are spent on images."""
    data = run.config.data
    if settings.floor:
        held = held_out(data, settings.n)
        if settings.n > len(held):
            raise UserError(
                f"the reconstruction floor needs n = {settings.n} real images, but {held.name} "
                f"({held.split}) has {len(held)}; ask for fewer with -n, or leave it out with "
                "--set evaluate.floor=false"
            )
    if settings.kid:
        if min(settings.kid, settings.n) < LEAST:
            raise UserError(
                f"KID, precision and recall need at least {LEAST} images of either kind, "
                f"not --kid {settings.kid} of {settings.n} generated ones"
            )
        enough(held_out(data, settings.kid), settings.kid)
    if settings.nll < 0:
        raise UserError(f"evaluate.nll must be at least 0, not {settings.nll}; 0 leaves it out")
    if settings.nll:
        test = test_images(data)
        if settings.nll > len(test):
            raise UserError(
                f"evaluate.nll asks for the likelihood of {settings.nll} images, but {test.name} "
                f"({test.split}) has {len(test)}; take --set evaluate.nll={len(test)}, or 0 to "
                "leave it out"
            )
        condition_of(run, test, chosen(test, settings.nll))


def inputs_of(run: Run, settings: EvaluateConfig, sampling: GenerateConfig) -> str:
    """What an evaluation's numbers depend on, as a key: metrics of the same key are the same."""
    sampling = dataclasses.replace(sampling, n=settings.n, seed=settings.seed)
    generate = dataclasses.asdict(sampling)
    # where they say nothing the key is what it was before they came
    for later in (
        "labels", "guidance", "block_steps", "block_methods", "guide", "refiner", "precision",
    ):  # fmt: skip
        if generate[later] == getattr(GenerateConfig(), later):
            del generate[later]
    if sampling.guide is not None:
        generate["guide"] = way_of(run, sampling).describe()["guide"]  # whatever its place
    if sampling.refiner is not None:
        generate["refiner"] = way_of(run, sampling).describe()["refiner"]
    parts = {
        "run": run.fingerprint,
        "evaluate": dataclasses.asdict(settings),
        "generate": generate,
        "data": run.manifest["data"],
        **extractor(),
    }
    if settings.nll:
        parts["nll"] = "of images as chosen"  # it was of the first ones of the split
    return content_key(parts)


def _about(run: Run, images: StoreReader, settings: EvaluateConfig) -> dict[str, Any]:
    """What the numbers belong to."""
    keys = ("objective", "h", "gamma", "movement", "ter", "seconds", "iterations", "parameters")
    rows = run.manifest["blocks"][: len(run.flow)]
    card = _card(settings.reference)
    real = card.get("test_split_fid", {}).get(str(settings.n))
    content, own = card.get("content_sha256"), run.manifest["data"].get("fingerprint")
    unnamed = run.config.data.name in ("folder", "imagenet32") and content != own
    if unnamed or other_data(run, settings.reference):  # others' do not stand beside these
        real = None
    return {
        "real_test_fid": real,
        "nfe": images.manifest["nfe"],
        "blocks": [readable({key: row.get(key) for key in keys}) for row in rows],
        "train_seconds": sum(row["seconds"] for row in rows),
        "peak_memory_bytes": peak_memory(),
        "run": run.fingerprint,
    }
