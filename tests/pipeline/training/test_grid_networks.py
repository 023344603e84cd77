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


@pytest.mark.parametrize("velocity", [UNET, DIT], ids=["unet", "dit"])
def test_a_longer_training_goes_on_and_other_levels_are_refused(
    fine: World, capsys: Any, velocity: dict[str, Any]
) -> None:
    """A run stopped at its first step ends with the bytes of one that was not stopped."""
    config = fine.config("net", velocity=velocity, train={"objective": "fm"})
    assert say(capsys, "encode", "--config", config)[0] == 0
    blocks = []
    for name in ("whole", "parts"):
        words = ["train", "--config", config, "--run", fine.root / name]
        if name == "parts":
            stop = ("--set", "train.max_minutes=1e-6", "--set", "train.checkpoint_seconds=0")
            assert say(capsys, *words, *stop)[0] in (0, 3)
            assert not (fine.root / name / "blocks").exists()
            wider = ("--set", "velocity.width=[8,32]" if velocity is UNET else "velocity.width=16")
            code, _, error = say(capsys, *words, *wider, "--resume")
            assert code == 2 and "velocity.width" in error, error
            words.append("--resume")
        code, _, error = say(capsys, *words)
        assert code == 0, error
        blocks.append(next((fine.root / name / "blocks").iterdir()).read_bytes())
    assert blocks[0] == blocks[1]


def test_a_wider_transformer_does_not_start_from_a_narrow_one(fine: World, capsys: Any) -> None:
    config = fine.config("net", velocity=DIT, train={"objective": "fm"})
    assert say(capsys, "encode", "--config", config)[0] == 0
    assert say(capsys, "train", "--config", config, "--run", fine.root / "narrow")[0] == 0
    words = ("train", "--config", config, "--run", fine.root / "wide", "--init-from",
             fine.root / "narrow")  # fmt: skip
    code, _, error = say(capsys, *words, "--set", "velocity.width=16")
    assert code == 2 and "another velocity network: velocity.width (8, not 16)" in error, error
    code, _, error = say(capsys, *words)
    assert code == 0, error
