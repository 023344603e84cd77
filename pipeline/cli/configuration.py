"""`jkoflow plan`, and `jkoflow config list`, `show`, `keys` and `diff`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.options import ConfigOption, SetOption
from pipeline.cli.session import load_settings, make_accelerator
from pipeline.errors import UserError

NameArgument = Annotated[
    str,
    typer.Argument(
        help="A packaged name (mnist, autoencoders/rgb32-kl, toy2d/rose), a .yaml, or a run "
        "directory.",
    ),
]


def plan_command(
    config: ConfigOption,
    images: Annotated[
        str | None,
        typer.Option("--images", help="Number: 50000, 1.28M, 1B. Default: that of the data set."),
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Processes, with a GPU each.")] = 1,
    throughput: Annotated[
        str | None,
        typer.Option(
            "--device-throughput",
            help="A100, H100, H200, L40S, 'RTX 4090' or a peak in TFLOP/s. Default: this machine.",
        ),
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option("--utilisation", help="Share of the peak that is assumed to be reached."),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            "--epochs", help="Passes over the samples in a block, in place of train.iterations."
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price-per-hour", help="Price of a GPU for an hour.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    overrides: SetOption = None,
) -> None:
    """Estimate time, memory, disk and cost of every step from a short measurement here."""
    import json
    import math

    from pipeline.planning.devices import device_of
    from pipeline.planning.estimate import UTILISATION, Hardware, Work
    from pipeline.planning.measure import measure
    from pipeline.planning.report import parse_count, plan_json, plan_lines

    settings = load_settings(config, overrides)
    used = UTILISATION if utilisation is None else utilisation
    for name, value, most in (
        ("--utilisation", used, 1.0), ("--epochs", epochs, math.inf),
        ("--price-per-hour", price, math.inf),
    ):  # fmt: skip
        if value is not None and not (0 < value <= most and math.isfinite(value)):
            limit = " and at most 1" if most == 1 else ""
            limit = limit if math.isfinite(value) else f" and a finite one{limit}"
            raise UserError(f"{name} is {value:g}; expected a value above 0{limit}; change it")
    if images is None:
        from pipeline.config.data import LATENTS
        from pipeline.data.datasets import load_images
        from pipeline.data.latent_cache import open_cache

        given = settings.data.name == LATENTS
        count = len(open_cache(settings)) if given else len(load_images(settings.data))
    else:
        try:
            count = parse_count(images)
        except (ValueError, OverflowError) as error:
            raise UserError(
                f"--images is {images}; expected a number such as 50000, 1.28M or 1B; change it"
            ) from error
    device = None if throughput is None else device_of(throughput)
    hardware = Hardware(gpus, device, utilisation=used, price=price)
    work = Work(count, settings.evaluate.n, settings.evaluate.floor, epochs)
    measured = measure(settings, make_accelerator())
    if as_json:
        print(json.dumps(plan_json(measured, work, hardware), indent=2))
    else:
        print("\n".join(plan_lines(measured, work, hardware)))


def list_configurations() -> None:
    """List the packaged configurations with their purposes."""
    from pipeline.config import packaged

    for folder in packaged.FOLDERS:
        print(f"{folder} ({packaged.VERBS[folder]})")
        for name in packaged.available(folder):
            print(f"  {name:<22} {packaged.summary(name, folder)}")


def show_configuration(name: NameArgument, overrides: SetOption = None) -> None:
    """Print a whole configuration: defaults, the file's values, and overrides."""
    from pipeline.config.plain import resolved_yaml

    print(resolved_yaml(_load(name, overrides)), end="")


def list_keys(
    prefix: Annotated[
        str, typer.Argument(help="Show keys that begin with this, such as jko; default all.")
    ] = "",
) -> None:
    """Print every key with its type, default and meaning."""
    from pipeline.config.autoencoder import AutoencoderConfig
    from pipeline.config.keys import keys
    from pipeline.config.schema import Config

    schemas = (("flows and toy2d", Config), ("autoencoders", AutoencoderConfig))
    count = 0
    for title, schema in schemas:
        chosen = [key for name, key in keys(schema).items() if _begins(name, prefix)]
        if count and chosen:
            print()
        if chosen:
            print(f"# {title}")
        for key in chosen:
            print(f"{key.name}: {key.type_name}, default {key.plain_default}\n    {key.meaning}")
        count += len(chosen)
    if not count:
        raise UserError(f"no key begins with {prefix!r}; expected a section or a key, such as jko")


def compare_configurations(a: NameArgument, b: NameArgument) -> None:
    """Print the keys in which two configurations differ."""
    from pipeline.config.plain import differences

    one, other = _load(a, None), _load(b, None)
    if type(one) is not type(other):
        raise UserError(f"{a} and {b} differ in kind; compare two flows or two autoencoders")
    for name, (before, after) in differences(one, other).items():
        print(f"{name}: {_word(before)} -> {_word(after)}")


def _load(name: str, overrides: list[str] | None) -> Any:  # noqa: ANN401 - imported late
    """Read a packaged configuration of any folder, a file, or that of a run directory."""
    from pipeline.config import packaged
    from pipeline.config.autoencoder import AutoencoderConfig
    from pipeline.config.load import load
    from pipeline.config.schema import Config

    path, folder = Path(name), packaged.folder_of(name)
    if (path / "config.yaml").is_file():
        name = str(path / "config.yaml")
    if folder is None:
        folder = packaged.kind_of(Path(name))
    schema = AutoencoderConfig if folder == packaged.AUTOENCODERS else Config
    return load(schema, name, overrides or [], folder)


def _begins(name: str, prefix: str) -> bool:
    """Return whether a key is or begins with the prefix."""
    return not prefix or name == prefix or name.startswith((f"{prefix}.", prefix))


def _word(value: object) -> str:
    """Return a value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
