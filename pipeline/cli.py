"""The command line: every verb stands on its own, and verbs are joined only by files."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.errors import JkoflowError, UserError

app = typer.Typer(
    name="jkoflow",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=(
        "Images in, a generator of images and its FID out: encode to latents, train a block-wise "
        "neural-ODE flow (JKO-iFlow), generate, evaluate. Try `jkoflow demo` first."
    ),
)
autoencoder_app = typer.Typer(
    no_args_is_help=True, help="Train an autoencoder, or measure how well one reconstructs."
)
app.add_typer(autoencoder_app, name="autoencoder")

ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help="A packaged configuration, or the path of a .yaml.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override: section.key=value; may be given several times."),
]
RunOption = Annotated[Path, typer.Option("--run", "-r", help="A run directory.")]
BlocksOption = Annotated[
    int | None, typer.Option("--blocks", help="Use only the first so many blocks.")
]


@app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.")
    ] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("jkoflow"))
        raise typer.Exit


@app.command()
def demo(
    run: Annotated[Path, typer.Option("--run", help="Where the run goes.")] = Path("runs/demo"),
    config: ConfigOption = "demo",
    overrides: SetOption = None,
) -> None:
    """The main job on MNIST, start to finish: latents, flow, grid, FID. Repeats nothing."""
    from pipeline.demo import run_demo

    run_demo(_load(config, overrides), run, _accelerator(), bar)


@app.command()
def fetch(
    assets: Annotated[list[str], typer.Argument(help="mnist, cifar10 or inception; several.")],
    source: Annotated[
        Path | None, typer.Option("--from", help="A file or folder that holds the asset.")
    ] = None,
) -> None:
    """Fetch assets, verify them, and print where they lie."""
    from pipeline import assets as store

    for name in assets:
        print(store.fetch(name, local=source, log=say))


@app.command()
def encode(config: ConfigOption, overrides: SetOption = None) -> None:
    """Encode a data set into the latent cache; resumes where it was interrupted."""
    from pipeline import latents

    accelerator = _accelerator()
    cache = latents.encode(_load(config, overrides), accelerator, bar)
    if accelerator.is_main_process:
        say(f"{len(cache)} latents of shape {tuple(cache.shape)}")
        print(cache.reader.folder)


@app.command()
def train(
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="A packaged name or a .yaml path.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", "-r", help="Run directory; default runs/NAME.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")] = False,
    max_minutes: Annotated[
        float | None, typer.Option("--max-minutes", help="Stop cleanly after so long.")
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Train the flow block by block: latent cache to run directory."""
    from pipeline import runs, training

    if config is None and (run is None or not resume):
        raise UserError("give --config, or --run with --resume to continue a run")
    if config is not None:
        settings = _load(config, overrides)
    else:
        assert run is not None
        settings = runs.read_config(run)
        if overrides:
            raise UserError("--set goes with --config; a resumed run keeps its configuration")
    if max_minutes is not None:
        settings = _with(settings, "train", max_minutes=max_minutes)
    folder = run if run is not None else Path("runs") / settings.name
    accelerator = _accelerator()
    outcome = training.train(settings, folder, accelerator, bar, resume)
    if accelerator.is_main_process:
        state = "finished" if outcome.complete else "stopped in time; continue with --resume"
        say(f"{outcome.blocks} blocks, {outcome.trained} of them now: {state}")
        print(folder)


@app.command()
def generate(
    run: RunOption,
    n: Annotated[int | None, typer.Option("-n", help="Images.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the noise.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Sub-intervals a block.")] = None,
    nfe: Annotated[
        int | None, typer.Option("--nfe", help="At most so many network evaluations a sample.")
    ] = None,
    blocks: BlocksOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where the grid (PNG) goes.")] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Also write every image as a PNG here.")
    ] = None,
    npz: Annotated[
        Path | None, typer.Option("--npz", help="Also write all images as one .npz (arr_0).")
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Generate images from a run; writes a grid, and on request all images."""
    from pipeline import generate as sampling
    from pipeline import runs

    opened = runs.open_run(run, blocks)
    settings = _override(opened.config, overrides, ("generate",)).generate
    settings = _replace(settings, n=n, seed=seed, steps=steps)
    if nfe is not None:
        settings = sampling.within(opened, settings, nfe)
    accelerator = _accelerator()
    made = sampling.sample_images(opened, settings, accelerator, bar)
    if not accelerator.is_main_process:
        return
    path = out or run / "samples" / "grid.png"
    sampling.write_grid(made, path, settings.columns**2, settings.columns)
    if images is not None:
        sampling.write_folder(made, images)
    if npz is not None:
        sampling.write_npz(made, npz)
    say(f"{len(made)} images, {made.manifest['nfe']} network evaluations a sample")
    print(path)


@app.command()
def evaluate(
    run: RunOption,
    n: Annotated[int | None, typer.Option("-n", help="Generated images.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the noise.")] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="A shipped name, a folder or a .npz.")
    ] = None,
    kid: Annotated[
        int | None, typer.Option("--kid", help="Real images for KID, precision and recall.")
    ] = None,
    blocks: BlocksOption = None,
    overrides: SetOption = None,
) -> None:
    """Measure a run: FID with its floor, likelihood, and what stands beside it (metrics.json)."""
    from pipeline import evaluate as evaluation
    from pipeline import runs
    from pipeline.summary import headline

    opened = runs.open_run(run, blocks)
    config = _override(opened.config, overrides, ("generate", "evaluate"))
    settings = _replace(config.evaluate, n=n, seed=seed, reference=reference, kid=kid)
    accelerator = _accelerator()
    metrics = evaluation.Evaluator(accelerator, bar).evaluate(opened, settings, config.generate)
    if accelerator.is_main_process:
        say(headline(metrics))
        print(run / "metrics.json")


@app.command()
def fid(
    a: Annotated[str, typer.Argument(help="A folder, a .npz, or a shipped reference.")],
    b: Annotated[str, typer.Argument(help="Another.")],
) -> None:
    """FID of two sets of images or statistics; the number alone on the last line of stdout."""
    from eval.references import available
    from pipeline.evaluate import fid_between

    say(f"shipped references: {', '.join(available()) or 'none'}")
    with Meter() as meter:
        value = fid_between(a, b, _accelerator(), meter.of)
    print(repr(value))


@autoencoder_app.command("train")
def autoencoder_train(
    config: ConfigOption,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; default runs/autoencoder-NAME.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what is there.")] = False,
    overrides: SetOption = None,
) -> None:
    """Train a small VQ or KL autoencoder (sections architecture and autoencoder_training)."""
    from pipeline import autoencoding

    settings = _load(config, overrides)
    folder = out or Path("runs") / f"autoencoder-{settings.name}"
    accelerator = _accelerator()
    path = autoencoding.train(settings, folder, accelerator, bar, resume)
    if accelerator.is_main_process:
        print(path)


@autoencoder_app.command("evaluate")
def autoencoder_evaluate(
    config: ConfigOption,
    n: Annotated[int, typer.Option("-n", help="Images of the test split.")] = 10000,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; default runs/autoencoder-NAME.")
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Measure an autoencoder: rFID, PSNR, SSIM, codebook use, and a before/after picture."""
    from pipeline import autoencoding

    settings = _load(config, overrides)
    folder = out or Path("runs") / f"autoencoder-{settings.name}"
    path = autoencoding.evaluate(settings, n, folder, _accelerator(), bar)
    print(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 2 the caller's mistake, 1 else)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    try:
        code = app(given, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return _fail("interrupted; what was finished is kept, run the same command again", 1)
    except Exception as error:  # noqa: BLE001 - the border: every error becomes one sentence
        if debug:
            traceback.print_exc()
        return _fail(*_explain(error))


def _explain(error: Exception) -> tuple[str, int]:
    if isinstance(error, typer.Abort):
        return "interrupted; what was finished is kept, run the same command again", 1
    if hasattr(error, "format_message"):  # typer's own errors, of whichever click it carries
        return f"{error.format_message()}; see --help", 2
    if isinstance(error, JkoflowError):
        return str(error), error.exit_code
    if isinstance(error, (ValueError, FileNotFoundError)):
        return str(error), 2
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}", 1
    return f"{type(error).__name__}: {error} (--debug shows where)", 1


def _fail(message: str, code: int) -> int:
    sentence = " ".join(message.split())
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    return code


def say(message: str) -> None:
    """Tell people; results that scripts read go to stdout instead."""
    print(message, file=sys.stderr, flush=True)


def bar(items: Any, total: int, label: str) -> Any:  # noqa: ANN401 - any iterable
    """Wrap an iterable in a progress bar with the time left, on the main process only."""
    from accelerate.state import PartialState
    from tqdm import tqdm

    quiet = total == 0 or not PartialState().is_main_process
    seconds = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(items, total=total, desc=label, disable=quiet, mininterval=seconds, leave=False)


class Meter:
    """A running count of images, for sets whose size is not known beforehand."""

    def __enter__(self) -> Meter:
        from tqdm import tqdm

        seconds = 0.2 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(unit=" images", mininterval=seconds, leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def of(self, name: str) -> Any:  # noqa: ANN401 - a callback
        """The callback that counts images of one set."""
        self._bar.set_description(name)
        return self._bar.update


def _load(config: str, overrides: list[str] | None) -> Any:  # noqa: ANN401 - imported late
    from pipeline.config_files import load_config

    return load_config(config, overrides or [])


def _override(config: Any, overrides: list[str] | None, sections: tuple[str, ...]) -> Any:  # noqa: ANN401
    from pipeline.config_files import overridden

    return overridden(config, overrides or [], sections)


def _with(config: Any, section: str, **values: Any) -> Any:  # noqa: ANN401
    import dataclasses

    changed = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: changed})


def _replace(settings: Any, **values: Any) -> Any:  # noqa: ANN401
    import dataclasses

    given = {key: value for key, value in values.items() if value is not None}
    return dataclasses.replace(settings, **given)


def _accelerator() -> Any:  # noqa: ANN401 - imported late, so that --help is quick
    import warnings

    from accelerate import Accelerator

    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    return Accelerator()
