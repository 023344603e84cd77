"""`jkoflow demo`: the whole chain of commands on MNIST; finished steps are not repeated."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import ConfigOption, SetOption
from pipeline.cli.session import load_settings, make_accelerator
from pipeline.errors import UserError
from pipeline.runtime.console import progress_bar

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pipeline.config.sampling import EvaluateConfig
    from pipeline.config.schema import Config
    from pipeline.sampling.sampling_plan import SamplingPlan

#: a step that takes fewer seconds has only found its earlier result
_INSTANT = 2.0


def demo_command(
    run: Annotated[Path, typer.Option("--run", help="The run directory.")] = Path("runs/demo"),
    config: ConfigOption = "demo",
    overrides: SetOption = None,
) -> None:
    """Fetch, encode, train, generate and evaluate on MNIST; repeats no finished step."""
    from pipeline.data.one_writer import one_writer

    accelerator = make_accelerator()
    with one_writer(run, "the run at", accelerator):
        run_demo(load_settings(config, overrides), run, accelerator)


def run_demo(config: Config, folder: Path, accelerator: Accelerator) -> None:
    """Fetch, encode, train, generate and evaluate; print the table and the paths.

    Args:
        config: the demo's configuration.
        folder: the run directory; an unfinished run resumes.
        accelerator: device and ranks.

    Raises:
        UserError: there are several processes, or the folder holds another run.
    """
    from pipeline.assets.fetch import ASSETS, fetch_asset
    from pipeline.data.encoding import encode
    from pipeline.evaluation.tables import metrics_line, metrics_table
    from pipeline.runs.directory import ResumePolicy, RunDirectory
    from pipeline.runs.movement_plot import plot_movement
    from pipeline.runs.run import open_run
    from pipeline.sampling.generate import sample_images
    from pipeline.sampling.image_files import write_grid
    from pipeline.sampling.sampling_plan import SamplingPlan
    from pipeline.storage import atomic
    from pipeline.training.train import train

    if accelerator.num_processes > 1:
        raise UserError(
            f"the demo has {accelerator.num_processes} processes; expected 1; use the single "
            "commands on several"
        )
    RunDirectory.open_or_create(folder, config, ResumePolicy(resume=True), accelerator)
    timer = _StepTimer(folder / "seconds.json")
    for name in ["inception"] + ([config.data.name] if config.data.name in ASSETS else []):
        timer.run(f"fetch {name}", partial(fetch_asset, name))
    cache = timer.run("encode", lambda: encode(config, accelerator, progress_bar))
    print(f"  {len(cache)} latents of shape {tuple(cache.shape)}")
    outcome = timer.run(
        "train", lambda: train(config, folder, accelerator, progress_bar, resume=True)
    )
    print(f"  {outcome.blocks} blocks")
    run = open_run(folder)
    plan, settings = SamplingPlan.open(run, config.generate), config.generate
    images = timer.run(
        "generate",
        lambda: sample_images(plan, settings.n, settings.seed, accelerator, progress_bar),
    )
    grid = folder / "samples" / "grid.png"
    write_grid(images, grid, settings.columns**2, settings.columns)
    metrics, file = timer.run("evaluate", lambda: measure(plan, config.evaluate, accelerator))
    plot = folder / "samples" / "movement.png"
    plot_movement(run.manifest, plot)
    metrics["seconds"] = timer.seconds
    atomic.write_json(file, metrics)
    print(f"\n{metrics_table(metrics, timer.seconds, timer.reused)}\n\n{metrics_line(metrics)}\n")
    for path in (grid, plot, file, folder / "log.jsonl"):
        print(path)


class _StepTimer:
    """Timer of the steps, which adds up the seconds of every step over all calls.

    A call that only finds the result of a step does not count.

    Args:
        path: the JSON file of the seconds by step.
    """

    def __init__(self, path: Path) -> None:
        from pipeline.storage import atomic

        self.path = path
        self.seconds: dict[str, float] = {}
        if self.path.is_file():
            self.seconds = atomic.read_json(self.path, "timings of the demo")
        self.reused: set[str] = set()

    def run(self, name: str, work: Callable[[], Any]) -> Any:  # noqa: ANN401
        """Run a step and record its seconds; a step that found its result is marked reused."""
        from pipeline.storage import atomic

        print(f"{name} …", flush=True)
        start = time.perf_counter()
        result = work()
        spent = time.perf_counter() - start
        if spent < _INSTANT and name in self.seconds:
            self.reused.add(name)
        else:
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            atomic.write_json(self.path, self.seconds)
        return result


def measure(
    plan: SamplingPlan, settings: EvaluateConfig, accelerator: Accelerator
) -> tuple[dict[str, Any], Path]:
    """Read the run's metrics.json if it answers these settings, else evaluate the run.

    The metrics are returned with their file.
    """
    from eval.references import reference_names
    from pipeline.evaluation.evaluator import Evaluator, inputs_of
    from pipeline.storage import atomic

    path, name = plan.run.folder / "metrics.json", settings.reference
    if name in reference_names() and not Path(name).exists() and path.is_file():
        metrics: dict[str, Any] = atomic.read_json(path, "metrics")
        expected = {"sampling": plan.identity(), "inputs": inputs_of(plan, settings)}
        if all(metrics.get(key) == value for key, value in expected.items()):
            return metrics, path
    evaluator = Evaluator(accelerator, progress_bar)
    metrics = evaluator.evaluate(plan, settings)
    return metrics, evaluator.file or path
