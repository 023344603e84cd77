"""Cases: whole commands, each with one wrong word or one wrong file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.cli import main
from pipeline.config.autoencoder import AutoencoderConfig
from pipeline.config.keys import keys
from pipeline.config.schema import Config
from tests.faults.mistakes.files import configurations, pictures_of, places_of, runs_of, sets_of
from tests.pipeline.tiny import World


@dataclass(frozen=True)
class Case:
    """A command with one mistake.

    Attributes:
        verb: the command.
        mistake: in a few words.
        words: of the command line, as texts.
    """

    verb: str
    mistake: str
    words: tuple[str, ...]


def cases(root: Path, world: World, run: Path) -> Iterator[Case]:
    """All cases; their files lie in a new folder.

    Args:
        root: the folder.
        world: has a cache.
        run: a finished run of it.
    """
    root.mkdir(parents=True)
    runs, configs = runs_of(root / "runs", run), configurations(root / "configs", world)
    pictures, sets = pictures_of(root / "pictures"), sets_of(root / "sets")
    places, numbers = places_of(root / "places"), _numbers()
    image = str(sorted((world.root / "pictures" / "test").rglob("*.png"))[0])
    images = str(world.root / "pictures" / "test")
    c, r, new = ["-c", world.config()], ["-r", str(run)], str(root / "new")
    tensors = str(root / "new.safetensors")
    recipe = ["-c", str(root / "autoencoder.yaml")]
    Path(recipe[1]).write_text(yaml.safe_dump(_recipe(world)))
    #: verb → a right command without the options below
    right: dict[str, list[str]] = {
        "demo": ["--run", new], "fetch": ["mnist"], "plan": c, "encode": c,
        "train": [*c, "-r", new], "generate": [*r, "-n", "4"], "invert": [*r, "-n", "2"],
        "interpolate": [*r, image, image], "edit": [*r, "--to", "0"],
        "evaluate": [*r, "-n", "12", "--reference", images], "fid": [images, images],
        "metrics": [images, images], "reference": [tensors, *c], "likelihood": [*r, "-n", "2"],
        "export": [*r, "--out", new], "explore": r, "push": [str(run), "owner/name"],
        "verify": [], "report": r, "distill": [*r, "--out", new],
        "toy2d": ["-c", "gaussian", "-r", new], "bench": ["toy2d", "--budget", "100batches"],
        "autoencoder train": [*recipe, "--out", new],
        "autoencoder evaluate": [*recipe, "--out", new, "-n", "4"],
        "autoencoder convert": [tensors, tensors], "config show": ["mnist"],
        "config diff": ["mnist", "mnist"],
    }  # fmt: skip
    flags = {
        "-n": numbers, "--seed": ["x", "1.5"], "--steps": ["0", "-1", "x", "1,,2", "1.5"],
        "--method": ["leap", "", "rk4,,rk4"], "--nfe": ["0", "-3", "x"],
        "--guidance": ["nan", "inf", "x"], "--class": ["x", "-1", "99"],
        "--guide": ["/nowhere", "zoo:none", "a@b@c"], "--refiner": ["/nowhere", "zoo:none"],
        "--device": ["tpu9", "cuda:99", "", "cpu:x"], "--budget": ["", "0s", "-1batches", "nans"],
        "--max-minutes": ["nan", "-1", "x"], "--iterations": ["0", "-1", "x"],
        "--strength": ["0", "1.5", "nan"], "--probes": ["0", "-1"], "--columns": ["0", "-2"],
        "--divergence": ["guess"], "--kid": ["1", "-4"], "--nfe-study": ["", "x", "0"],
        "--seeds": ["0", "-1"], "--models": ["", "gan"], "--parameters": ["0", "-1"],
        "--tune": ["x", "0"], "--merge": ["0", "-1"], "--dtype": ["float7"],
        "--features": ["/nowhere", "vgg"], "--mode": ["bicubic"], "--port": ["-1", "99999"],
        "--images": ["x", "-1", "0", "nan"], "--gpus": ["0", "-1"], "--epochs": ["0", "nan"],
        "--utilisation": ["0", "2", "nan"], "--price-per-hour": ["-1", "nan"],
        "--refine": ["0", "-1"], "--reparameterize": ["-1"], "--image-shape": ["3", "a,b,c"],
        "--split": ["none"], "--test": ["0", "-1"], "--neighbours": ["-1"], "--add-blocks": ["-1"],
        "--init-from": ["/nowhere", "zoo:none"], "--from": ["/nowhere"], "--fit": ["stretch"],
        "--kind": ["gan"], "--weights": ["/nowhere", "none"], "--yaml": ["/nowhere"],
        "--device-throughput": ["x", "-1"], "--blocks": ["0", "-1", "99", "x", "0:99", "1:1"],
        "--autoencoder": ["none"], "--host": ["no such host"], "--none": [""],
        "--against": ["/nowhere"], "--folder": ["/nowhere"], "--data": ["none"],
    }  # fmt: skip
    for verb, words in right.items():
        known = _options(verb)
        for option, values in flags.items():
            here = places if option == "--images" and verb == "generate" else values
            if option in known or option == "--none":
                for value in here:
                    yield _case(verb, f"{option} {value}", [*words, option, value])
        if "--run" in known and verb not in ("train", "demo", "toy2d", "bench"):
            for mistake, bad in runs.items():
                yield _case(verb, mistake, _replaced(words, str(run), bad))
        if "-c" in words:
            at = words.index("-c") + 1
            for mistake, bad in configs.items():
                yield _case(verb, mistake, [*words[:at], bad, *words[at + 1 :]])
        if "--set" in known:
            for setting in ("x", "=1", "nope.x=1", "train=1", "train.iterations=[[", "data.name="):
                yield _case(verb, f"--set {setting}", [*words, "--set", setting])
        for option in {"--out", "--npz", "--animation"} & known:
            if verb in ("encode", "report", "autoencoder evaluate") or words[-2:-1] == ["--out"]:
                continue
            for bad in places:
                yield _case(verb, f"{option} {Path(bad).name}", [*words, option, bad])
    for mistake, bad in pictures.items():
        yield _case("invert", mistake, [*r, bad])
        yield _case("interpolate", mistake, [*r, bad, image])
        yield _case("likelihood", mistake, [*r, "--folder", bad])
    for mistake, bad in sets.items():
        yield _case("fid", mistake, [bad, images])
        yield _case("metrics", mistake, [images, bad])
        yield _case("evaluate", mistake, [*r, "-n", "12", "--reference", bad])
        yield _case("encode", f"data npz: {mistake}",
                    [*c, "--set", "data.name=npz", "--set", f"data.path={bad}"])  # fmt: skip
        for name in ("hf", "webdataset"):
            settings = ["--set", f"data.name={name}", "--set", f"data.path={bad}"]
            yield _case("encode", f"data {name}: {mistake}", [*c, *settings])
        yield _case("autoencoder convert", mistake, [bad, tensors])
        yield _case("train", f"weights: {mistake}",
                    [*c, "-r", new, "--set", f"autoencoder.weights={bad}"])  # fmt: skip
        if not Path(bad).is_file():  # which `verify` calls broken, with exit code 1
            yield _case("verify", mistake, [bad])
    for schema, verb in ((Config, "train"), (AutoencoderConfig, "autoencoder train")):
        words = right[verb]
        for name in keys(schema):
            for value in ("{x: 1}", "[[[]]]"):
                yield _case(verb, f"{name}={value}", [*words, "--set", f"{name}={value}"])


def _case(verb: str, mistake: str, words: Sequence[str]) -> Case:
    return Case(verb, mistake, (*verb.split(), *map(str, words)))


def _replaced(words: list[str], old: str, new: str) -> list[str]:
    return [new if word == old else word for word in words]


def _options(verb: str) -> set[str]:
    """The options of a command."""
    import inspect

    first, _, second = verb.partition(" ")
    command = main.GROUPS[first][1][second] if second else main.COMMANDS[first]
    found = {"--device"} if first not in main._WITHOUT_DEVICE and second != "convert" else set()
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        for note in getattr(parameter.annotation, "__metadata__", ()):
            declared = getattr(note, "param_decls", None) or ()
            found |= {*declared}
            if type(note).__name__ == "OptionInfo" and not declared:
                found.add("--" + parameter.name.replace("_", "-"))
    return found


def _numbers() -> list[str]:
    return ["0", "-1", "x", "1.5", "nan", "9" * 30]


def _recipe(world: World) -> dict[str, Any]:
    return {
        "data": world.settings["data"],
        "architecture": {"width_factors": [1], "patch": 4, "channels": 2},
        "training": {"iterations": 2, "batch_size": 8, "adversarial_start": 2},
    }
