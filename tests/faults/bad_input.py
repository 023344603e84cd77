"""Mistakes on the command line: each ends with exit code 2 and one sentence, soon.

A case is a whole command with one wrong word or one wrong file. It runs in a child that has
imported everything, in an empty working directory, where it may leave no file.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tqdm import tqdm

from pipeline.cli import main
from pipeline.config.autoencoder import AutoencoderConfig
from pipeline.config.keys import keys
from pipeline.config.schema import Config
from tests.faults.table import Table
from tests.pipeline.glance import stand_in
from tests.pipeline.tiny import _SERVER, World

#: of the processor, after the imports
SECONDS = 5.0
RESULTS = (
    "one sentence",
    "accepted",
    "other exit code",
    "other words",
    "too slow",
    "leaves files",
)


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
    runs, configs = _runs(root / "runs", run), _configurations(root / "configs", world)
    pictures, sets = _pictures(root / "pictures"), _sets(root / "sets")
    places, numbers = _places(root / "places"), _numbers()
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
        "--tune": ["x", "0"], "--pairs": ["0", "-1"], "--dtype": ["float7"],
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


def _runs(root: Path, run: Path) -> dict[str, str]:
    """Folders and names that are no runs, by what is wrong."""
    root.mkdir()
    bad = {"no such run": root / "none", "a file": root / "file", "empty folder": root / "empty",
           "no seal": root / "unsealed", "no blocks": root / "blocks"}  # fmt: skip
    bad["file"] = bad.pop("a file")
    bad["file"].write_text("x")
    bad["empty folder"].mkdir()
    for name in ("no seal", "no blocks"):
        shutil.copytree(run, bad[name], ignore=shutil.ignore_patterns("stages"))
    (bad["no seal"] / "SHA256SUMS").unlink()
    shutil.rmtree(bad["no blocks"] / "blocks")
    for name, content in {
        "flow.json is empty": b"", "flow.json is a list": b"[]", "flow.json is null": b"null",
        "flow.json is binary": bytes(range(256)), "flow.json is deep": b"[" * 100_000,
        "config.yaml is cut": None,
    }.items():  # fmt: skip
        bad[name] = root / name.replace(" ", "-")
        shutil.copytree(run, bad[name], ignore=shutil.ignore_patterns("stages"))
        if content is None:
            text = (bad[name] / "config.yaml").read_text()
            (bad[name] / "config.yaml").write_text(text[: text.index("\n", len(text) // 2) + 1])
        else:
            (bad[name] / "flow.json").write_bytes(content)
    names = {"no shipped run": "zoo:none", "no name of the hub": "hf://../x", "empty name": ""}
    return {name: str(path) for name, path in bad.items()} | names


def _configurations(root: Path, world: World) -> dict[str, str]:
    """Files that are no configurations, by what is wrong."""
    root.mkdir()
    aliases = "\n".join(["a0: &a0 {x: 1}"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)
    ])  # fmt: skip
    texts: dict[str, bytes] = {
        "a list": b"[1]",
        "a text": b"hello",
        "not UTF-8": b"a: \xff\xfe",
        "binary": bytes(range(256)),
        "UTF-16": "data: {}".encode("utf-16"),
        "cut": b"train: {iterations: [1, ",
        "deep": b"[" * 9000,
        "aliases": aliases.encode(),
        "unknown section": b"nope: {x: 1}",
        "no section": b"train: 3",
        "an object": b"a: !!python/object/apply:os.system ['true']",
        "numbers as keys": b"1: 2",
        "a date": b"train: {iterations: 2020-01-01}",
        "twice": b"data: &a {also: *a}",
    }
    for name, text in texts.items():
        (root / f"{name}.yaml").write_bytes(text)
    found = {name: str(root / f"{name}.yaml") for name in texts}
    return {**found, "no such file": str(root / "none.yaml"), "a folder": str(root),
            "no packaged name": "mnits", "empty": ""}  # fmt: skip


def _pictures(root: Path) -> dict[str, str]:
    """Files that are no pictures, by what is wrong."""
    root.mkdir()
    (root / "text.png").write_text("no picture")
    (root / "empty.png").write_bytes(b"")
    (root / "program.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n"
    )
    os.mkfifo(root / "pipe.png")
    whole = io.BytesIO()
    Image.new("RGB", (40, 40)).save(whole, "PNG")
    (root / "cut.png").write_bytes(whole.getvalue()[:60])
    found = {path.stem: str(path) for path in sorted(root.iterdir())}
    (root / "folder").mkdir()
    return {
        **found,
        "no such picture": str(root / "none.png"),
        "empty folder": str(root / "folder"),
    }


def _sets(root: Path) -> dict[str, str]:
    """Files that are no sets of images and no weights, by what is wrong."""
    root.mkdir()
    np.savez(root / "no-images.npz", x=np.zeros(3))
    np.savez(root / "floats.npz", arr_0=np.zeros((4, 8, 8, 3)))
    np.savez(root / "empty-images.npz", arr_0=np.zeros((4, 0, 0, 3), np.uint8))
    np.savez(root / "objects.npz", arr_0=np.array([{}], dtype=object))
    np.savez(root / "asymmetric.npz", mu=np.zeros(2048), sigma=np.triu(np.ones((2048, 2048))))
    np.savez(root / "encrypted.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    data = bytearray((root / "encrypted.npz").read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (root / "encrypted.npz").write_bytes(data)
    with zipfile.ZipFile(root / "texts.npz", "w") as archive:
        archive.writestr("arr_0.npy", "no array")
    for name in ("text.npz", "text.safetensors", "text.parquet", "text.arrow", "text.pkl",
                 "text.tar", "text.ckpt", "text.npy"):  # fmt: skip
        (root / name).write_text("neither tensors nor a table")
    torch.save({"x": object}, root / "class.ckpt")
    (root / "huge.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    found = {path.name: str(path) for path in sorted(root.iterdir())}
    (root / "one").mkdir()
    Image.new("RGB", (8, 8)).save(root / "one" / "a.png")
    return {**found, "no such file": str(root / "none.npz"), "one image": str(root / "one")}


def _places(root: Path) -> list[str]:
    """Places where no file can be written."""
    root.mkdir()
    (root / "folder.png").mkdir()
    (root / "folder.png" / "x").write_text("x")
    (root / "file").write_text("x")
    os.mkfifo(root / "pipe.png")
    (root / "device.png").symlink_to("/dev/null")
    names = ("folder.png", "file/x.png", "pipe.png", "device.png", "x" * 300 + ".png")
    return [str(root / name) for name in names]


def try_all(
    every: Sequence[Case], world: World, root: Path, table: Table, say: Any = print
) -> None:
    """Run the cases; count their ends by verb."""
    before = {path: path.stat().st_mtime_ns for path in world.root.rglob("*") if path.is_file()}
    for number, case in enumerate(every):
        here = root / f"here-{number}"
        here.mkdir(parents=True)
        said = root / "said"
        said.write_text("")
        process: Any = _SERVER.Process(
            target=_run, args=(case.words, world.environment, here, said)
        )
        process.start()
        process.join(20 * SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        result, reason = _judge(
            process.exitcode,
            said.read_text(),
            [path for path in here.rglob("*") if path.is_file()],
        )
        table.add(case.verb, result)
        table.add(case.verb, "commands")
        if result != "one sentence":
            say(f"{result}: {' '.join(case.words)} ({case.mistake}): {reason}")
        shutil.rmtree(here)
    after = {path: path.stat().st_mtime_ns for path in world.root.rglob("*") if path.is_file()}
    for path in sorted({*before, *after}):
        if before.get(path) != after.get(path) and "file-index" not in path.parts:
            say(f"changed: {path}")


def _judge(code: int | None, said: str, left: list[Path]) -> tuple[str, str]:
    lines = said.splitlines()
    seconds = float(lines[0]) if lines else float("inf")
    errors = [line for line in lines if line.startswith("error: ")]
    if seconds > SECONDS:
        return "too slow", f"{seconds:.1f} s, {code}"
    if code == 0:
        return "accepted", ""
    if code != 2:
        return "other exit code", f"{code} {said[-300:]}"
    if (
        len(errors) != 1
        or lines[-1] != errors[0]
        or "Traceback" in said
        or not 20 < len(errors[0]) < 2000
    ):
        return "other words", said[-300:]
    if left:
        return "leaves files", str(left[:3])
    return "one sentence", errors[0]


def _run(words: Sequence[str], env: dict[str, str], here: Path, said: Path) -> None:
    """Run a command in this child; write its seconds of the processor and its errors."""
    os.environ.update(env, HF_HUB_OFFLINE="1")
    os.chdir(here)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    stand_in(pytest.MonkeyPatch())
    errors, begun = io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = main.main(words)
    said.write_text(f"{time.process_time() - begun:.2f}\n{errors.getvalue()}")
    os._exit(code)


def mistake(root: Path, count: int, seed: int, world: World, run: Path, table: Table) -> None:
    """Run some cases, chosen by a seed; all if there are fewer.

    Args:
        root: a new folder.
        count: number of cases.
        seed: of the choice.
        world: has a cache.
        run: a finished run of it.
        table: gets the counts.
    """
    every = list(cases(root / "files", world, run))
    chosen = every if count >= len(every) else random.Random(seed).sample(every, count)
    try_all(chosen, world, root, table)
