"""`cifar10-ldm-vq-f4`: someone else's checkpoint through the whole chain, as its comments say.

The authors' weights cannot be had here: random ones in a narrower network of the same layout
stand for them, and a folder of pictures for CIFAR-10.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoders.adapt import Adaptation
from autoencoders.base import to_float, to_uint8
from autoencoders.registry import build_autoencoder
from eval.pictures import image_grid
from flows.solving.solver import SolverConfig
from pipeline.runs.run import open_run
from pipeline.runtime.rng import generator
from pipeline.storage.shards.opening import open_store
from tests.autoencoders.official_layout import Official, state_of, write_checkpoint, write_yaml
from tests.pipeline.evaluation.test_evaluator import distance
from tests.pipeline.glance import stand_in
from tests.pipeline.tiny import ROOT, pictures, say

CONFIG, LAYOUT = "cifar10-ldm-vq-f4", "ldm-vq-f4"
COUNT = 16
INSTEAD = ("--set", "data.name=folder", "--set", "data.path=pictures", "--set", "data.size=32")


def write_colours(folder: Path) -> torch.Tensor:
    """A picture of another blob in each channel, COUNT times; returns them as the network's x."""
    folder.mkdir()
    colours = pictures(3 * COUNT, seed=1, side=32).reshape(COUNT, 3, 32, 32)
    for index, colour in enumerate(colours):
        Image.fromarray(colour.transpose(1, 2, 0)).save(folder / f"{index:02d}.png")
    return to_float(torch.from_numpy(colours))


def official(x: torch.Tensor) -> Official:
    """Random weights, with a codebook where the latents of these images are."""
    model = Official(LAYOUT)
    entries = model.quantize.embedding.weight
    latents = model.prequant(x).permute(0, 2, 3, 1).flatten(0, 2)
    entries.copy_(latents[torch.randperm(len(latents))[: len(entries)]])
    return model


def test_a_checkpoint_of_vq_f4_becomes_a_generator(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    stand_in(monkeypatch)
    x = write_colours(tmp_path / "pictures")
    theirs = official(x)
    write_checkpoint(tmp_path / "model.ckpt", state_of(theirs))
    write_yaml(tmp_path / "config.yaml", LAYOUT)

    def done(*words: str) -> str:
        """What a command prints last."""
        code, out, last = say(capsys, *words)
        assert code == 0, last
        return out.splitlines()[-1]

    about = (ROOT / "configs" / "flows" / f"{CONFIG}.yaml").read_text()
    (told,) = re.findall(r"^# +jkoflow (autoencoder convert .*)$", about, re.MULTILINE)
    assert done(*told.split()) == "vq-f4.safetensors"

    cache = open_store(Path(done("encode", "--config", CONFIG, *INSTEAD)), "latent cache")
    latents = cache.field("mean")
    expected = torch.cat([theirs.prequant(x), theirs.prequant(x.flip(-1))])
    assert latents.shape == (2 * COUNT, 3, 8, 8)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=0)

    short = ("--set", "train.iterations=2")
    assert done("train", "--config", CONFIG, *INSTEAD, *short, "--run", "run") == "run"
    known = json.loads(Path("run/flow.json").read_text())["autoencoder"]
    assert (known["name"], known["weights"]) == ("pretrained", "vq-f4.safetensors")
    assert known["adaptation"]["fit"] == "native" and known["image_shape"] == [3, 32, 32]
    ours = build_autoencoder("pretrained", "vq-f4.safetensors", (3, 32, 32), Adaptation("native"))
    assert known["fingerprint"] == ours.fingerprint

    picture = done("generate", "--run", "run", "-n", "4", "--npz", "four.npz")
    assert picture == "run/samples/grid.png"
    four = np.load("four.npz")["arr_0"].transpose(0, 3, 1, 2)
    assert four.shape == (4, 3, 32, 32)
    z = torch.randn((4, 3, 8, 8), generator=generator(0, "sample", 0))
    (block,) = open_run(Path("run")).flow
    z = block.transport(z, reverse=True, solver=SolverConfig("rk4", steps=20)).z
    h = z * expected.std((0, 2, 3), correction=0, keepdim=True)
    h += expected.mean((0, 2, 3), keepdim=True)
    images = to_uint8(theirs.image(theirs.quantised(h))).numpy()
    assert np.abs(four.astype(int) - images).max() <= 1  # rounding
    assert four.std((2, 3)).min() > 1 and four.std(0).mean() > 1  # within each, and among them
    expected = image_grid(four, 4, scale=2)
    assert np.array_equal(np.asarray(Image.open(picture)), np.asarray(expected))

    few = ("-n", str(COUNT), "--set", "evaluate.nll=2", "--reference", "pictures")
    assert done("evaluate", "--run", "run", *few) == "run/metrics.json"
    metrics = json.loads(Path("run/metrics.json").read_text())
    again = to_uint8(theirs.image(theirs.quantised(theirs.prequant(x))))
    floor = distance(again.numpy(), to_uint8(x).numpy())
    assert metrics["rfid"]["value"] == pytest.approx(floor, rel=1e-3)
    assert metrics["fid"]["n"] == COUNT and metrics["nfe"] == 80
