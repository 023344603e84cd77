"""Repairs of what was made from a run: sampled images, their features, metrics and pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config.sampling import EvaluateConfig
from pipeline.data.one_writer import one_writer
from pipeline.errors import JkoflowError, UserError
from pipeline.evaluation.evaluator import Evaluator, recipe_file
from pipeline.publishing.report import REPORT, write_report
from pipeline.repair.tools import Tools, removed, reopened
from pipeline.runs.directory import RunDirectory
from pipeline.runs.movement_plot import plot_movement
from pipeline.runs.run import open_run
from pipeline.runs.verify import Fault
from pipeline.runtime.console import say
from pipeline.sampling.generate import images_folder, sample_images
from pipeline.sampling.image_files import write_grid
from pipeline.sampling.image_recipe import open_recipe, recipe_of
from pipeline.sampling.sampling_plan import SamplingPlan
from pipeline.storage import atomic
from pipeline.storage.paths import absolute
from pipeline.storage.records import keep_recipe, read_recipe_values, well_formed
from pipeline.storage.shards.manifest import MANIFEST, RECIPE
from pipeline.storage.shards.opening import open_store
from pipeline.toy2d.experiment import run_experiment

_IMAGES, _FEATURES = "images-", "features-"


def sample_again(store: Path, tools: Tools) -> bool:
    """Make the broken shards or the manifest of a store of sampled images or of features again.

    Returns:
        whether the plan of the images is known.

    Raises:
        JkoflowError: the run is broken, or a solver fails.
    """
    if store.name.startswith(_FEATURES):
        images = open_store(
            store.with_name(_IMAGES + store.name.removeprefix(_FEATURES)), "image store"
        )
        say(f"extracting features of {len(images)} images: broken shards of {store}")
        with reopened(store):
            Evaluator(tools.accelerator, tools.progress).stored_features(store.parent, images)
        return True
    for plan, n, seed in _plans(store):
        if images_folder(plan, n, seed).name == store.name:
            say(f"sampling {n} images: broken shards of {store}")
            with reopened(store):
                sample_images(plan, n, seed, tools.accelerator, tools.progress)
            return True
    return False


def _plans(store: Path) -> Iterator[tuple[SamplingPlan, int, int]]:
    """Yield plans that may have made a store of images: its recipe's, and that of the run."""
    run = store.parents[1]
    recipe = read_recipe_values(store / RECIPE)
    if recipe:
        yield open_recipe(run, recipe, store / RECIPE)
    opened = open_run(run, images=True)
    settings, identity = opened.config.generate, dict[str, Any]()
    with contextlib.suppress(JkoflowError, TypeError, AttributeError, KeyError):
        identity = dict(atomic.read_json(store / MANIFEST, "manifest")["identity"])
    with well_formed(store / MANIFEST):
        settings = dataclasses.replace(
            settings,
            n=int(identity.get("n", settings.n)),
            seed=int(identity.get("seed", settings.seed)),
            batch_size=int(identity.get("batch_size", settings.batch_size)),
        )
    yield SamplingPlan.open(opened, settings), settings.n, settings.seed


def write_recipe_again(fault: Fault) -> bool:
    """Write the recipe of images or of metrics again; return whether its content is known.

    The images and the metrics of one evaluation have almost the same recipe.
    """
    samples = next((p for p in fault.path.parents if p.name == "samples"), fault.path.parent)
    known = [read_recipe_values(path) for path in sorted(samples.rglob(f"*{RECIPE}"))]
    if fault.path.parent != samples:
        with contextlib.suppress(JkoflowError):
            known += [recipe_of(*plan) for plan in _plans(fault.path.parent)]
    measured = []
    for path in samples.parent.glob("metrics*.json"):
        with contextlib.suppress(JkoflowError, LookupError, TypeError):
            measured.append(atomic.read_json(path, "metrics")["inputs"]["evaluate"])
    for recipe in known:
        own = ("evaluate", "reference")
        plain = {key: value for key, value in recipe.items() if key not in own}
        evaluated = [
            {**plain, "evaluate": settings, "reference": absolute(settings["reference"])}
            for settings in measured
        ]
        for values in (plain, *evaluated):
            data = atomic.json_bytes(values)
            if hashlib.sha256(data).hexdigest() in fault.expected:
                keep_recipe(fault.path, data)
                return True
    return False


def result_again(fault: Fault, tools: Tools) -> bool:
    """Make metrics, a report or a picture of a run again.

    Returns:
        whether it is known how the file was made.

    Raises:
        JkoflowError: the run is broken, or what was measured is gone.
    """
    run, path = fault.owner, fault.path
    directory = RunDirectory(run)
    if directory.config.points is not None:
        say(f"measuring and drawing {run} again")
        with one_writer(run, "the run at", tools.accelerator), removed(path):
            run_experiment(directory.config, run, tools.accelerator, tools.progress, True)
        return path.is_file()
    if path.name == REPORT:
        write_report(run)
        return True
    if path.parent == run and path.name.startswith("metrics"):
        return _evaluate_again(run, path, tools)
    with atomic.scratch_folder() as scratch:
        for drawn in _drawings(run, path.name, scratch / path.name):
            if hashlib.sha256(drawn).hexdigest() in fault.expected:
                atomic.write_bytes(path, drawn)
                return True
    return False


def _evaluate_again(run: Path, path: Path, tools: Tools) -> bool:
    """Measure a run as its metrics were measured; return whether their recipe is known."""
    recipe = read_recipe_values(recipe_file(path))
    if not recipe:
        return False
    plan = open_recipe(run, recipe, recipe_file(path))[0]
    with well_formed(recipe_file(path)):
        settings, place = EvaluateConfig(**recipe["evaluate"]), str(recipe["reference"])
    if Path(place).exists() and not Path(settings.reference).exists():  # in another folder
        settings = dataclasses.replace(settings, reference=place)
    say(f"evaluating {run} again with {settings.n} images")
    with removed(path):
        Evaluator(tools.accelerator, tools.progress).evaluate(plan, settings)
    return path.is_file()


def _drawings(run: Path, name: str, scratch: Path) -> Iterator[bytes]:
    """Yield the pictures that a file of samples/ may have been, drawn to a scratch file."""
    if name == "movement.png":
        plot_movement(RunDirectory(run).manifest, scratch)
        yield scratch.read_bytes()
    for store in sorted((run / "samples").glob(f"{_IMAGES}*")) if name == "grid.png" else []:
        recipe = read_recipe_values(store / RECIPE)
        with contextlib.suppress(UserError, KeyError, TypeError):  # of a broken store
            settings = recipe["generate"]
            columns, labels = int(settings["columns"]), settings["labels"] or []
            images = open_store(store, "image store")
            write_grid(images, scratch, columns**2, columns, len(labels))
            yield scratch.read_bytes()
