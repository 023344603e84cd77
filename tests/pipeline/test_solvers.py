"""Which solver draws: its steps for each block, and what a budget of evaluations allows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from autoencoders.base import to_uint8
from pipeline.errors import UserError
from pipeline.runs import open_run
from pipeline.seeds import generator
from pipeline.solvers import within
from tests.pipeline.gaussian_source import tiny
from tests.pipeline.test_generate import images_of
from tests.pipeline.test_modes import TWO_NETS
from tests.pipeline.test_modes import run as train
from tests.pipeline.tiny import say


def test_every_block_has_its_own_steps(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    opened = open_run(run)
    code, _, last = say(
        capsys, "generate", "-r", run, "-n", "6", "--method", "euler", "--steps", "1,2,4",
        "--npz", run / "a.npz",
    )  # fmt: skip
    assert code == 0 and "7 network evaluations a sample" in last
    scale, model = opened.standardisation, opened.autoencoder()
    with torch.inference_mode():
        parts = []
        for batch, count in enumerate((4, 2)):
            z = torch.randn((count, 2, 3, 3), generator=generator(0, "sample", batch))
            for k in (2, 1, 0):
                for step in range(2**k, 0, -1):  # Euler's steps back from t = 1, by hand
                    z = z - opened.flow[k].velocity(torch.tensor(step / 2**k), z) / 2**k
            parts.append(to_uint8(model.decode(scale.undo(z))))
    found = torch.from_numpy(np.load(run / "a.npz")["arr_0"])[..., 0]
    assert (found.int() - torch.cat(parts)[:, 0].int()).abs().max() <= 1
    # an exported run may bring its steps along; an adaptive solver has no use for them
    words = ("--set", "generate.block_steps=[1,2,4]", "--method", "dopri5")
    assert say(capsys, "generate", "-r", run, "-n", "6", *words)[0] == 0
    one = images_of(opened, n=6, method="euler", steps=2)
    assert one.manifest["nfe"] == 6 and "block_steps" not in one.manifest["identity"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "1,2"], "one number a block, 3 for this run, not 2"),
        (["--steps", "0"], "--steps takes a whole number of at least 1"),
        (["--steps", "1,,2"], "not '1,,2'"),
        (["--steps", "1,2,4", "--method", "dopri5"], "need a fixed-step solver, not dopri5"),
        (["--method", "rk5"], "unknown solver 'rk5'"),
    ],
)
def test_steps_that_cannot_be(
    capsys: pytest.CaptureFixture[str], run: Path, words: list[str], said: str
) -> None:
    code, _, last = say(capsys, "generate", "-r", run, *words)
    assert code == 2 and last.startswith("error: ") and said in last, last


def test_a_budget_of_evaluations_is_spent_on_whole_networks(tmp_path: Path) -> None:
    train(tmp_path / "run", *TWO_NETS, "schedule.free_block=false")
    opened, settings = open_run(tmp_path / "run"), tiny().generate
    assert within(opened, settings, 8).steps == 2
    assert within(opened, settings, 15).steps == 2
    assert within(opened, settings, 16).steps == 4
    with pytest.raises(UserError, match=r"each of 1 blocks of 2 networks \(8\)"):
        within(opened, settings, 7)


def test_a_budget_is_spent_on_the_networks_of_the_guide_too(tmp_path: Path) -> None:
    train(tmp_path / "one", "schedule.free_block=false", "schedule.max_blocks=1")
    train(tmp_path / "two", *TWO_NETS, "schedule.free_block=false")
    opened, settings = open_run(tmp_path / "one"), tiny().generate
    settings = replace(settings, guide=str(tmp_path / "two"), guidance=2.0)
    assert within(opened, settings, 31).steps == 2  # three would not meet the guide's switch
    assert within(opened, settings, 32).steps == 4
    with pytest.raises(UserError, match=r"each of 1 blocks of 2 networks with guidance \(16\)"):
        within(opened, settings, 15)
