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
        ("jko.h0=0", "jko.h0 is 0.0; expected above 0; change the value"),
        ("jko.h0=-1", "jko.h0 is -1.0; expected above 0"),
        ("jko.h0=nan", "jko.h0 is nan; expected above 0"),
        ("jko.h=[0.5,0]", "jko.h is [0.5, 0.0]; expected a list of one value per block"),
        ("schedule.rho=0", "schedule.rho is 0.0; expected above 0"),
        ("schedule.rho=-2", "schedule.rho is -2.0; expected above 0"),
        ("schedule.max_blocks=0", "schedule.max_blocks is 0; expected at least 1"),
        ("jko.solver.steps=0", "jko.solver.steps is 0; expected at least 1"),
        ("sampler.steps=0", "sampler.steps is 0; expected at least 1"),
        ("jko.solver.steps=[2,0]", "jko.solver.steps is [2, 0]; expected a list of one value"),
        ("jko.solver.method=leap", "jko.solver: unknown solver 'leap'; choose one of euler"),
        ("sampler.method=leap", "sampler: unknown solver 'leap'; choose one of euler, midpoint"),
        ("jko.divergence=guess", "jko.divergence is 'guess'; expected exact or hutchinson"),
        ("train.lr=nan", "train.lr is nan; expected above 0"),
        ("train.lr_final=-1", "train.lr_final is -1.0; expected at least 0 and at most 1"),
        ("train.max_minutes=-1", "train.max_minutes is -1.0; expected at least 0"),
        ("data.also=[mnist/test", "data.also=[mnist/test: its value is not readable YAML; close"),
        ("train.warmup=-1", "train.warmup is -1; expected at least 0"),
        ("velocity.nets=2", "solver.steps must be a multiple of velocity.nets = 2"),
    ],
)
def test_settings_out_of_range_are_user_errors(
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
def test_a_run_without_a_block_is_a_user_error(
    capsys: pytest.CaptureFixture[str], trained: World, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    run = Path(shutil.copytree(trained.root / "run", tmp_path / "run"))
    (run / "blocks" / "block-01.safetensors").unlink()
    code, _, last = say(capsys, verb[0], "--run", run, *verb[1:])
    assert code == 2
    assert last.startswith("error: the run at") and "lacks blocks/block-01.safetensors" in last


def test_infinite_latents_are_an_error(capsys: pytest.CaptureFixture[str], world: World) -> None:
    """An autoencoder that gives NaN, the only way to NaN from images of whole numbers."""
    model = random_autoencoder()
    model.encoder.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    path = world.root / "broken.safetensors"
    atomic.write_tensors(path, *to_tensors(model))
    config = world.config(autoencoder={"name": "pretrained", "weights": str(path)})
    code, _, last = say(capsys, "encode", "--config", config)
    assert code == 2
    assert last.startswith("error: latents of the autoencoder are not finite")
