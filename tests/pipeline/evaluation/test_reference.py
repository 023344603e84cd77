"""Reference statistics equal those of numpy over the same features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from eval.distances import frechet_distance
from eval.references import read_reference
from pipeline.cli.main import main
from pipeline.config.load import load_config
from pipeline.data.datasets import load_images
from pipeline.errors import UserError
from pipeline.evaluation.real_images import subset_indices
from pipeline.evaluation.reference import make_reference
from tests.eval.moments import stats_from
from tests.pipeline.gaussian_source import quiet
from tests.pipeline.glance import Glance, stand_in
from tests.pipeline.tiny import World


def test_statistics_and_card(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    config = load_config(str(world.config()))
    images = load_images(config.data)
    make_reference(config, tmp_path / "own.safetensors", [5], Accelerator(), quiet)
    actual = read_reference(tmp_path / "own.safetensors")
    features = Glance().features(torch.from_numpy(images.read(0, len(images)))).double().numpy()
    np.testing.assert_allclose(actual.stats.mean, features.mean(0), atol=1e-9)
    np.testing.assert_allclose(actual.stats.cov, np.cov(features, rowvar=False), rtol=1e-5)
    assert actual.card["n"] == len(images)
    assert actual.card["content_sha256"] == images.fingerprint
    held_out = load_images(config.data.__class__(**{**vars(config.data), "split": "test"}))
    test = Glance().features(torch.from_numpy(held_out.take(subset_indices(held_out, 5))))
    exact = frechet_distance(stats_from(test), actual.stats)
    assert actual.card["test_split_fid"]["5"] == pytest.approx(exact, rel=1e-4)


def test_the_fid_of_n_test_images_does_not_depend_on_other_n(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    config = load_config(str(world.config()))
    values = []
    for name, numbers in (("a", [5]), ("b", [5, 20]), ("c", [24, 5])):
        out = tmp_path / f"{name}.safetensors"
        make_reference(config, out, numbers, Accelerator(), quiet)
        values.append(read_reference(out).card["test_split_fid"])
    assert values[1]["5"] == pytest.approx(values[0]["5"], rel=1e-6)
    assert values[2]["5"] == pytest.approx(values[0]["5"], rel=1e-6)
    with pytest.raises(UserError, match="25 images were asked for"):
        make_reference(config, tmp_path / "d.safetensors", [25], Accelerator(), quiet)
    for few in (1, 0, -5):
        with pytest.raises(UserError, match=f"at least 2 images, not {few}"):
            make_reference(config, tmp_path / "d.safetensors", [5, few], Accelerator(), quiet)


def test_another_suffix_is_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reference", "--config", str(world.config()), "own.npz"]) == 2
    assert "error: the reference is called own.npz; expected" in capsys.readouterr().err
