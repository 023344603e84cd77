"""`jkoflow metrics` with a small TorchScript network in place of Inception."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from eval.distances import frechet_distance, kid
from eval.features import inception_weights
from eval.gaussian import GaussianStats
from eval.manifolds import manifold_metrics
from pipeline.assets import readers
from pipeline.evaluation.metrics import _inception_score, _subset
from tests.pipeline.tiny import say


class Glimpse(torch.nn.Module):
    """Nine features: the means of the channels in three stripes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        parts = [x[:, :, :2], x[:, :, 2:4], x[:, :, 4:]]
        return torch.cat([part.mean((2, 3)) for part in parts], 1) / 255


def pixels(seed, n):
    return np.random.default_rng(seed).integers(0, 200 + 20 * seed, (n, 6, 5, 3), np.uint8)


@pytest.fixture
def sets(tmp_path):
    torch.jit.script(Glimpse()).save(tmp_path / "glimpse.pt")
    (tmp_path / "a").mkdir()
    for i, image in enumerate(pixels(0, 40)):
        Image.fromarray(image).save(tmp_path / "a" / f"{i:02d}.png")
    np.savez(tmp_path / "b.npz", pixels(1, 60))
    return tmp_path


def features(seed, n):
    return Glimpse()(torch.from_numpy(pixels(seed, n).transpose(0, 3, 1, 2).copy()))


def measure(capsys, sets, b):
    code, out, error = say(
        capsys, "metrics", sets / "a", sets / b, "--features", sets / "glimpse.pt"
    )
    assert code == 0, error
    assert out.count("\n") == 1
    return json.loads(out)


def moments(x):
    stats = GaussianStats(x.shape[1])
    stats.update(x)
    return stats


def test_every_metric_is_that_of_the_features(sets, capsys):
    result = measure(capsys, sets, "b.npz")
    x, y = features(0, 40), features(1, 60)
    expected = {
        "fid": frechet_distance(moments(x), moments(y)), "kid": kid(x, y).value,
        **{name: getattr(manifold_metrics(y, x), name)
           for name in ("precision", "recall", "density", "coverage")},
    }  # fmt: skip
    for name, value in expected.items():
        assert result[name]["value"] == pytest.approx(value, rel=1e-5), name
        assert (result[name]["n"], result[name]["n_real"]) == (40, 60)
        assert 0 < result[name]["standard_error"] < 1 and result[name]["error_kind"]
    score = result["inception_score"]
    assert score["value"] is None and "not those of the Inception network" in score["reason"]
    assert result["features"].startswith("glimpse.pt@")


def test_an_absent_inception_score_has_its_reason():
    x, weights = torch.rand(12, 2048), torch.rand(1008, 2048)
    score = _inception_score(x, None, "inception")
    assert (score["value"], score["n"]) == (None, 12)
    assert "has no class weights, which pytorch-fid's own file pt_inception" in score["reason"]
    few = _inception_score(x[:9], weights, "inception")
    assert few["reason"] == "there are 9 images; expected at least 10"
    whole = _inception_score(x, weights, "inception")
    assert whole["value"] >= 1 and "reason" not in whole


def test_statistics_give_fid_alone_and_adms_batches_both(sets, capsys):
    stats = moments(features(1, 60))
    np.savez(sets / "s.npz", mu=stats.mean, sigma=stats.cov)
    np.savez(sets / "VIRTUAL.npz", pixels(1, 60), mu=stats.mean + 0.1, sigma=stats.cov)
    alone, both = measure(capsys, sets, "s.npz"), measure(capsys, sets, "VIRTUAL.npz")
    value = frechet_distance(moments(features(0, 40)), stats)
    assert alone["fid"]["value"] == pytest.approx(value, rel=1e-5)
    assert alone["fid"]["n_real"] is None and "kid" not in alone
    assert both["fid"]["value"] > value and both["kid"]["n_real"] == 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "b.npz", "--features", "glimpse.pt", "--mode", "clean"), "for inception alone"),
        (("s.npz", "a", "--features", "glimpse.pt"), "holds statistics alone; expected images"),
        (("a", "absent.npz", "--features", "glimpse.pt"), "neither a path nor a shipped"),
        (("a", "b.npz", "--features", "absent"), "no feature network at"),
        (("a", "mnist-train", "--features", "glimpse.pt"), "are those of inception-2015"),
        (("a", "s.npz", "--features", "glimpse.pt"), "9 and 3 dimensions"),
    ],
)
def test_mistakes_are_one_sentence(sets, capsys, monkeypatch, arguments, message):
    np.savez(sets / "s.npz", mu=np.zeros(3), sigma=np.eye(3))
    monkeypatch.chdir(sets)
    code, out, error = say(capsys, "metrics", *arguments)
    assert code == 2 and out == "" and message in error
    assert error.splitlines()[-1].startswith("error: ")


def test_an_unknown_mode_is_refused(sets, capsys):
    code, _, error = say(capsys, "metrics", sets / "a", sets / "b.npz", "--mode", "lanczos")
    assert code == 2 and "expected one of pytorch, clean, tensorflow" in error


def test_class_weights_come_from_the_authors_file_alone(tmp_path, monkeypatch):
    """The file of pytorch-fid is recognised by the first digits of its sha256."""
    state = {"x": torch.zeros(1), "fc.weight": torch.rand(1008, 2048)}
    path = tmp_path / readers.INCEPTION_PTH
    torch.save(state, path)
    monkeypatch.setattr(readers, "read_weights", lambda _: {"x": state["x"]})
    monkeypatch.setattr(readers, "weights_sha256", lambda _: "0")
    for digits, kept in (("6726825d", False), ("", True)):
        monkeypatch.setattr(readers, "_PTH_SHA256", digits)
        content = readers.read_inception(path, tmp_path)
        with (tmp_path / "out.safetensors").open("wb") as file:
            content.files[readers.INCEPTION_FILE](file)
        weights = inception_weights.read_classifier(tmp_path / "out.safetensors")
        assert (weights is not None and torch.equal(weights, state["fc.weight"])) == kept


def test_of_large_sets_rows_are_chosen_at_random_in_their_order(monkeypatch):
    """The first rows of a folder may be of one class."""
    monkeypatch.setattr("pipeline.evaluation.metrics.MOST", 20)
    rows = torch.arange(60.0)[:, None]
    chosen = _subset(rows)
    assert chosen.unique().tolist() == chosen.flatten().tolist() and len(chosen) == 20
    assert 20 < float(chosen.mean()) < 40
    assert torch.equal(_subset(rows), chosen) and torch.equal(_subset(chosen), chosen)


def test_statistics_together_with_images_count_as_exact(sets, capsys):
    stats = moments(features(1, 60))
    np.savez(sets / "s.npz", mu=stats.mean, sigma=stats.cov)
    np.savez(sets / "VIRTUAL.npz", pixels(1, 60), mu=stats.mean, sigma=stats.cov)
    alone, both, images = (
        measure(capsys, sets, name)["fid"]["standard_error"]
        for name in ("s.npz", "VIRTUAL.npz", "b.npz")
    )
    assert both == pytest.approx(alone, rel=1e-5) and images > 1.05 * alone
