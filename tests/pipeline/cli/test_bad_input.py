"""What a flow cannot be trained or used with is one sentence on the command line, and exit 2."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from autoencoders.weights import to_tensors
from pipeline.storage import atomic
from tests.pipeline.tiny import World, random_autoencoder, say


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("schedule.h0=0", "h0 must be positive and finite, found 0"),
        ("schedule.h0=-1", "h0 must be positive and finite, found -1"),
        ("schedule.h0=nan", "h0 must be positive and finite, found nan"),
        ("schedule.h=[0.5,0]", "schedule.h needs one positive step a block, not [0.5, 0.0]"),
        ("schedule.rho=0", "rho must be positive and finite, found 0"),
        ("schedule.rho=-2", "rho must be positive and finite, found -2"),
        ("schedule.max_blocks=0", "schedule.max_blocks must be at least 1, not 0"),
        ("solver.steps=0", "steps must be at least 1, not 0"),
        ("push.steps=0", "push.steps must be at least 1, not 0"),
        ("schedule.substeps=[2,0]", "schedule.substeps needs one value a block, each at least 1"),
        ("solver.method=leap", "unknown solver 'leap'; choose one of euler, midpoint"),
        ("push.method=leap", "unknown solver 'leap'; choose one of euler, midpoint"),
        ("train.probes=0", "train.probes must be at least 1, not 0"),
        ("train.divergence=guess", "unknown divergence 'guess'; choose exact, hutchinson"),
        ("train.lr=nan", "train.lr must be positive, not nan"),
        ("train.lr_final=-1", "train.lr_final must lie in [0, 1], not -1"),
        ("train.max_minutes=-1", "train.max_minutes must be at least 0, not -1"),
        ("data.also=[mnist/test", "data.also=[mnist/test: its value is not readable YAML; close"),
        ("train.warmup=-1", "train.warmup must be at least 0, not -1"),
        ("velocity.nets=2", "solver.steps must be a multiple of velocity.nets = 2"),
    ],
)
def test_settings_out_of_range(
    capsys: pytest.CaptureFixture[str],
    trained: World,
    tmp_path: Path,
    override: str,
    sentence: str,
) -> None:
    run = tmp_path / "run"
    words = ("train", "--config", trained.config(), "--run", run, "--set", override)
    code, out, last = say(capsys, *words)
    assert (code, out) == (2, "")
    assert last.startswith("error: ") and sentence in last
    assert not run.exists()


@pytest.mark.parametrize(
    "verb", [("generate", "-n", "4"), ("likelihood", "-n", "4"), ("evaluate", "-n", "4"),
             ("train", "--add-blocks", "1")],
)  # fmt: skip
def test_a_run_that_lacks_a_block(
    capsys: pytest.CaptureFixture[str], trained: World, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    run = Path(shutil.copytree(trained.root / "run", tmp_path / "run"))
    (run / "blocks" / "block-01.safetensors").unlink()
    code, _, last = say(capsys, verb[0], "--run", run, *verb[1:])
    assert code == 2
    assert last.startswith("error: the run at") and "lacks blocks/block-01.safetensors" in last


def test_latents_that_are_not_numbers(capsys: pytest.CaptureFixture[str], world: World) -> None:
    """An autoencoder that gives NaN, the only way to NaN from images of whole numbers."""
    model = random_autoencoder()
    model.encoder.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    path = world.root / "broken.safetensors"
    atomic.write_tensors(path, *to_tensors(model))
    config = world.config(autoencoder={"name": "pretrained", "weights": str(path)})
    code, _, last = say(capsys, "encode", "--config", config)
    assert code == 2
    assert last.startswith("error: the autoencoder gave latents that are not finite")
