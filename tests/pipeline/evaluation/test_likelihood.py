"""Ranking by likelihood: values, order, standard errors, picture and mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from flows.likelihood import log_prob
from pipeline.data.datasets import load_images
from pipeline.evaluation.likelihood import latents_of
from pipeline.evaluation.ranking import LikelihoodSettings, rank_images
from pipeline.runs.run import Run, open_run
from pipeline.runtime.rng import generator
from tests.pipeline.gaussian_source import quiet
from tests.pipeline.tiny import SIDE, make_world, run_child, say, write_pictures


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    world = make_world(tmp_path_factory.mktemp("likelihood"))
    run_child("encode", "--config", world.config(), env=world.environment)
    folder = world.root / "run"
    run_child("train", "--config", world.config(), "--run", folder, env=world.environment)
    return open_run(folder)


def test_the_ranking_has_the_exact_likelihoods(run: Run) -> None:
    result = rank_images(run, LikelihoodSettings(n=20), Accelerator(), quiet)
    assert json.loads((run.folder / "likelihood.json").read_text()) == result
    images = load_images(replace(run.config.data, split="test"))
    noise = generator(0, "likelihood", "latents", 0)
    z = latents_of(run, images, np.arange(20), torch.device("cpu"), noise)
    exact = log_prob(run.flow, z, divergence="exact").value
    rows = result["ranking"]
    assert sorted(row["index"] for row in rows) == list(range(20))
    for row in rows:
        assert row["log_prob"] == pytest.approx(float(exact[row["index"]]), rel=1e-4)
    values = [row["log_prob"] for row in rows]
    assert values == sorted(values, reverse=True)
    assert result["nll_per_dim"] == pytest.approx(-sum(values) / 20 / 18)
    error = np.std(np.array(values), ddof=1) / np.sqrt(20) / 18
    assert result["image_error"] == pytest.approx(error, rel=1e-6)
    unit = "nats per dimension, standardised posterior samples of latents"
    assert result["unit"] in (unit, "nats per dimension, standardised latents")
    assert result["probe_error"] is None and result["inversion_mse"] < 1e-8
    picture = Image.open(run.folder / "samples" / "likelihood.png")
    assert picture.width > 2 * 10 * SIDE


def test_probes_give_a_standard_error_that_covers_the_exact_value(run: Run) -> None:
    exact = rank_images(run, LikelihoodSettings(n=20), Accelerator(), quiet)["nll_per_dim"]
    estimate = rank_images(run, LikelihoodSettings(n=20, divergence="hutchinson", probes=8),
                    Accelerator(), quiet)  # fmt: skip
    assert estimate["probes"] == 8 and estimate["probe_error"] > 0
    assert abs(estimate["nll_per_dim"] - exact) < 5 * estimate["probe_error"] + 1e-6
    assert all(row["standard_error"] > 0 for row in estimate["ranking"])


def test_a_folder_can_be_ranked(run: Run, tmp_path: Path) -> None:
    others = write_pictures(tmp_path / "others", 6, seed=9)
    result = rank_images(run, LikelihoodSettings(n=6, folder=others), Accelerator(), quiet)
    assert result["data"].startswith("folder") and len(result["ranking"]) == 6


def test_a_run_on_a_folder_without_splits_ranks_all_of_it(run: Run) -> None:
    whole = replace(run.config.data, path=str(Path(run.config.data.path or "") / "train"))
    result = rank_images(replace(run, config=replace(run.config, data=whole)),
                  LikelihoodSettings(n=40), Accelerator(), quiet)  # fmt: skip
    assert result["data"] == "folder train" and len(result["ranking"]) == 40


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["-n", "0"], "-n and --columns must be at least 1"),
        (["-n", "25"], "25 images were asked for, but folder (test) has 24"),
        (["--divergence", "guess"], "unknown divergence 'guess'"),
        (["--probes", "0"], "at least 1 probe, not 0"),
        (["--split", "test", "--folder", "x"], "both --split and --folder are given"),
    ],
)
def test_mistakes_are_one_sentence(
    run: Run, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    code, out, last = say(capsys, "likelihood", "--run", run.folder, *words)
    assert (code, out) == (2, "")
    assert last.startswith("error: ") and sentence in last


def test_the_ranking_records_run_and_blocks(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = tmp_path / "others"
    write_pictures(others / "test", 5, seed=9)
    words = ["-n", "5", "--blocks", "1", "--set", f"data.path={others}"]
    code, _, last = say(capsys, "likelihood", "--run", run.folder, *words)
    assert code == 0, last
    result = json.loads((run.folder / "likelihood.json").read_text())
    assert result["n"] == 5 and result["blocks"] == 1
    assert result["run"] == open_run(run.folder, blocks=1).fingerprint


def test_latents_are_standardised(run: Run) -> None:
    images = load_images(run.config.data)
    z = latents_of(run, images, np.arange(40), torch.device("cpu"), generator(0))
    assert z.shape == (40, *run.flow.shape) and z.dtype == torch.float32
    assert float(z.mean()) == pytest.approx(0, abs=0.2)
    assert float(z.std()) == pytest.approx(1, abs=0.2)
