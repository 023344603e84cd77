"""The commands of docs/own-images.md for 64 pixels, as they are written, at toy size."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.runs.run import open_run
from tests.pipeline.glance import stand_in
from tests.pipeline.tiny import ROOT, say

#: settings that make a step of the recipe small; the sizes of images and latents stay
TOY = {
    "autoencoder train": ("architecture.width=32", "training.iterations=2",
                          "training.batch_size=4", "training.precision=fp32"),
    "train": ("velocity.width=[8,8,16]", "velocity.depth=1", "velocity.heads=2",
              "train.iterations=4", "train.batch_size=4", "train.precision=fp32",
              "fm.snapshot_every=2", "train.warmup=1", "evaluate.nll=2"),
}  # fmt: skip
TRANSFORMER = ("velocity.width=12", "velocity.depth=1", "train.iterations=2",
               "train.batch_size=4", "train.precision=fp32", "fm.snapshot_every=0")  # fmt: skip


def commands() -> Iterator[list[str]]:
    """The commands of the section, without the name of the program."""
    text = (ROOT / "docs" / "own-images.md").read_text()
    section = text.split("## 64 pixels")[1].split("\n## ")[0]
    lines = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    joined = "\n".join(lines).replace("\n--", " --")  # an option on a line of its own
    for line in joined.splitlines():
        program, *words = shlex.split(line)
        assert program == "jkoflow"
        yield words


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Twelve smooth pictures, none of them square or of 64 pixels."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        (tmp_path / "photographs" / split).mkdir(parents=True)
        for index in range(count):
            coarse = rng.integers(0, 256, (5, 7, 3), np.uint8)
            picture = Image.fromarray(coarse).resize((97, 80), Image.Resampling.BICUBIC)
            picture.save(tmp_path / "photographs" / split / f"{index}.jpg")
    return tmp_path / "photographs"


@pytest.mark.slow
def test_every_command_of_the_recipe_runs(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "home"))
    stand_in(monkeypatch)
    done = []
    for words in commands():
        name = " ".join(words[: 2 if words[0] == "autoencoder" else 1])
        words = [word.replace("=DIR", f"={photographs}") for word in words]
        if "-n" in words:
            words[words.index("-n") + 1] = "4"
        toy = TRANSFORMER if "velocity.kind=dit" in words else TOY.get(name, ())
        words += [word for setting in toy for word in ("--set", setting)]
        code, _, error = say(capsys, *words)
        assert code == 0, (words, error)
        done.append(name)
    assert done == [
        "reference", "autoencoder train", "autoencoder evaluate", "encode", "train", "generate",
        "evaluate", "train",
    ]  # fmt: skip
    run = open_run(tmp_path / "runs" / "folder-64")
    # latent channels without content are dropped after the training
    assert run.flow.shape[0] <= 4 and run.flow.shape[1:] == (16, 16)
    assert run.flow.specs[0].velocity.widths == (8, 8, 16)
    fid = json.loads((run.folder / "metrics.json").read_text())["fid"]
    assert math.isfinite(fid["value"]) and fid["n"] == 4
    assert Path(fid["reference"]).name == "folder-64.safetensors"
    other = open_run(tmp_path / "runs" / "folder-64-dit")
    assert other.flow.specs[0].velocity.kind == "dit"
    weights = load_file(tmp_path / "runs/autoencoder-folder-64-kl/autoencoder.safetensors")
    assert all(bool(value.isfinite().all()) for value in weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["folder-256", "imagenet256-sd-vae"])
def test_the_latents_of_stable_diffusion_at_a_quarter_of_the_side(
    name: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A random AutoencoderKL of the same factor 8: latents (4, 8, 8) of 64 pixels."""
    from tests.autoencoders.conversion.test_diffusers_layout import write

    write(tmp_path / "sd-vae-ft-mse", "stable diffusion")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "home"))
    classes = "imagenet" in name
    if classes:  # two classes instead of a thousand
        for split in ("train", "test"):
            for index, file in enumerate(sorted((photographs / split).iterdir())):
                (photographs / split / "ab"[index % 2]).mkdir(exist_ok=True)
                file.rename(photographs / split / "ab"[index % 2] / file.name)
    settings = [f"data.path={photographs}", "data.size=64", *(["velocity.classes=2"] * classes)]
    toy = ["velocity.width=16" if classes else "velocity.width=[8,8,8,16]", "velocity.depth=1",
           "velocity.heads=2", "train.iterations=2", "train.batch_size=4",
           "train.precision=fp32", "fm.snapshot_every=0", "sampler.steps=2"]  # fmt: skip
    both = [word for setting in settings for word in ("--set", setting)]
    small = [word for setting in toy for word in ("--set", setting)]
    for words in (
        ["autoencoder", "convert", "sd-vae-ft-mse", "sd-vae.safetensors",
         "--image-shape", "3,64,64"],
        ["encode", "--config", name, *both],
        ["train", "--config", name, *both, *small],
        ["generate", "--run", f"runs/{name}", "-n", "2", "--npz", "images.npz"],
    ):  # fmt: skip
        code, _, error = say(capsys, *words)
        assert code == 0, (words, error)
    run = open_run(tmp_path / "runs" / name)
    assert run.flow.shape == (4, 8, 8)
    # the scale is that of the latents, whatever the model's scaling_factor
    cache = sorted((tmp_path / "home" / "latents").glob("*/*.safetensors"))
    shards = [{k: v.double() for k, v in load_file(path).items()} for path in cache]
    mean, log_var = (torch.cat([shard[k] for shard in shards]) for k in ("mean", "log_var"))
    variance = mean.var((0, 2, 3), correction=0) + log_var.exp().mean((0, 2, 3))
    torch.testing.assert_close(
        run.standardisation.std.double(), variance.sqrt(), rtol=1e-2, atol=0
    )
    with np.load("images.npz") as images:
        assert images["arr_0"].shape == (2, 64, 64, 3) and images["arr_0"].std() > 0
