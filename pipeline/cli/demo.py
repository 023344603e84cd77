"""`jkoflow demo`: the main job, start to finish; every step that is done is not done again."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from eval.references import reference_names
from pipeline.assets.fetch import ASSETS, fetch_asset
from pipeline.config.schema import Config, EvaluateConfig
from pipeline.data.latent_cache import encode
from pipeline.errors import UserError
from pipeline.evaluation.evaluator import Evaluator, inputs_of
from pipeline.evaluation.tables import metrics_line, metrics_table
from pipeline.runs.movement_plot import plot_movement
from pipeline.runs.run import open_run
from pipeline.runtime.console import Progress
from pipeline.sampling.generate import sample_images
from pipeline.sampling.image_files import write_grid
from pipeline.sampling.sampling_plan import SamplingPlan
from pipeline.storage import atomic
from pipeline.training.resume import enter
from pipeline.training.train import train

#: a step that takes less than this was found done
_INSTANT = 2.0


class _Clock:
    """Times the steps; remembers, beside the run, what they took when they were really done."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "seconds.json"
        self.seconds: dict[str, float] = {}
        if self.path.is_file():
            self.seconds = atomic.read_json(self.path, "timings of the demo")
        self.reused: set[str] = set()

    def step(self, name: str, work: Callable[[], Any]) -> Any:  # noqa: ANN401
        print(f"{name} …", flush=True)
        began = time.perf_counter()
        result = work()
        spent = time.perf_counter() - began
        if spent < _INSTANT and name in self.seconds:
            self.reused.add(name)
        else:
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            atomic.write_json(self.path, self.seconds)
        return result


def run_demo(config: Config, folder: Path, accelerator: Accelerator, progress: Progress) -> None:
    """Fetch, encode, train, generate, evaluate; print the table and the paths.

    Args:
        config: the demo's configuration.
        folder: the run directory; what is there is continued.
        accelerator: device and processes.
        progress: wraps loops.
    """
    if accelerator.num_processes > 1:
        raise UserError("the demo runs on one process; use the single verbs on several")
    enter(config, folder, accelerator, resume=True)
    clock = _Clock(folder)
    needed = ["inception"] + ([config.data.name] if config.data.name in ASSETS else [])
    for name in needed:
        clock.step(f"fetch {name}", partial(fetch_asset, name))
    cache = clock.step("encode", lambda: encode(config, accelerator, progress))
    print(f"  {len(cache)} latents of shape {tuple(cache.shape)}")
    outcome = clock.step(
        "train", lambda: train(config, folder, accelerator, progress, resume=True)
    )
    print(f"  {outcome.blocks} blocks")
    run = open_run(folder)
    plan, settings = SamplingPlan.open(run, config.generate), config.generate
    images = clock.step(
        "generate",
        lambda: sample_images(plan, settings.n, settings.seed, accelerator, progress),
    )
    grid = folder / "samples" / "grid.png"
    write_grid(images, grid, settings.columns**2, settings.columns)
    metrics = clock.step(
        "evaluate", lambda: _metrics(plan, config.evaluate, accelerator, progress)
    )
    plot = folder / "samples" / "movement.png"
    plot_movement(run.manifest, plot)
    metrics["seconds"] = clock.seconds
    atomic.write_json(folder / "metrics.json", metrics)
    print(f"\n{metrics_table(metrics, clock.seconds, clock.reused)}\n\n{metrics_line(metrics)}\n")
    for path in (grid, plot, folder / "metrics.json", folder / "log.jsonl"):
        print(path)


def _metrics(
    plan: SamplingPlan, settings: EvaluateConfig, accelerator: Accelerator, progress: Progress
) -> dict[str, Any]:
    """Read the run's metrics.json if it answers these settings, else evaluate the run."""
    path, name = plan.run.folder / "metrics.json", settings.reference
    if name in reference_names() and not Path(name).exists() and path.is_file():
        metrics: dict[str, Any] = atomic.read_json(path, "metrics")
        expected = {"sampling": plan.identity(), "inputs": inputs_of(plan, settings)}
        if all(metrics.get(key) == value for key, value in expected.items()):
            return metrics
    return Evaluator(accelerator, progress).evaluate(plan, settings)
