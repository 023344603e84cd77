"""UNets of several levels and transformers through the commands, and sizes that do not fit."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.runs.directory import read_config
from pipeline.runs.run import open_run
from tests.pipeline.tiny import World, architecture, say, write_autoencoder

#: latents (2, 6, 6) of the pictures of the tiny world
FINE = {"patch": 2}
UNET = {"kind": "unet", "width": [8, 16], "depth": 1, "heads": 2, "time_features": 4}
DIT = {"kind": "dit", "width": 8, "depth": 1, "heads": 2, "patch": 2, "time_features": 4}


@pytest.fixture
def fine(world: World) -> World:
    assert architecture(**FINE).latent_shape == (2, 6, 6)
    write_autoencoder(world.root / "autoencoder.safetensors", **FINE)
    return world


@pytest.mark.parametrize("velocity", [UNET, DIT], ids=["unet", "dit"])
@pytest.mark.parametrize("objective", ["jko", "lfm", "fm"])
def test_a_network_trains_and_its_run_opens_again(
    fine: World, capsys: Any, velocity: dict[str, Any], objective: str
) -> None:
    config = fine.config("net", velocity=velocity, train={"objective": objective})
    run = fine.root / "run"
    for words in (
        ("encode", "--config", config),
        ("train", "--config", config, "--run", run),
        ("generate", "--run", run, "-n", "2", "--npz", fine.root / "images.npz"),
    ):
        code, _, error = say(capsys, *words)
        assert code == 0, error
    width = tuple(velocity["width"]) if velocity["kind"] == "unet" else velocity["width"]
    assert read_config(run).velocity.width == width
    flow = open_run(run).flow
    assert all(float(p.abs().max()) > 0 for p in flow[0].velocity.output.parameters())


@pytest.mark.parametrize(
    ("velocity", "words"),
    [
        ({**UNET, "width": [8, 8, 8]}, "has 3 levels on a grid of 6x6"),
        ({**UNET, "heads": 3}, "3 attention heads do not divide"),
        ({**DIT, "patch": 4}, "velocity.patch=4 does not divide a grid of 6x6"),
        ({**DIT, "heads": 3}, "velocity.width is 8 and velocity.heads 3 for a dit"),
        ({**DIT, "width": [8, 8]}, r"velocity.width is [8, 8] for the kind dit"),
        ({"kind": "conv", "width": 8, "heads": 2}, "velocity.heads=2 applies to"),
    ],
)
def test_a_size_that_does_not_fit_is_one_sentence_with_exit_code_2(
    fine: World, capsys: Any, velocity: dict[str, Any], words: str
) -> None:
    good = fine.config("good", train={"objective": "fm"})
    assert say(capsys, "encode", "--config", good)[0] == 0
    config = fine.config("net", velocity=velocity, train={"objective": "fm"})
    code, _, error = say(capsys, "train", "--config", config, "--run", fine.root / "run")
    assert (code, words in error) == (2, True), error
    assert error.startswith("error: ") and not (fine.root / "run" / "flow.json").exists()
