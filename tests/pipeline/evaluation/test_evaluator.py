"""Evaluation with a small stand-in for Inception, and once with the real network."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from autoencoders.identity import IdentityAutoencoder
from eval.distances import kid
from eval.gaussian import GaussianStats
from pipeline.cli import demo
from pipeline.config.load import load_config
from pipeline.data.datasets import load_images
from pipeline.data.encoding import encode
from pipeline.data.standardisation import Standardisation
from pipeline.evaluation.evaluator import Evaluator, warn_of_other_data
from pipeline.evaluation.features import FeatureExtractor
from pipeline.evaluation.real_images import subset_indices
from pipeline.evaluation.tables import metrics_line
from pipeline.runs.run import open_run
from pipeline.runtime.rng import generator
from pipeline.sampling.generate import sample_images
from pipeline.training.train import train
from tests.pipeline.drawing import plan_of
from tests.pipeline.gaussian_source import quiet
from tests.pipeline.glance import Glance, stand_in
from tests.pipeline.tiny import World, pictures, say


@pytest.fixture(autouse=True)
def small_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace Inception by the stand-in, whose covariances are 6 x 6."""
    if "inception_weights" in request.fixturenames:
        return
    stand_in(monkeypatch)


def statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    features = Glance().features(torch.from_numpy(np.ascontiguousarray(images))).double().numpy()
    return features.mean(0), np.cov(features, rowvar=False)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Compute FID by scipy's square root of a matrix."""
    from scipy.linalg import sqrtm

    (mean_a, cov_a), (mean_b, cov_b) = statistics(a), statistics(b)
    root = np.real(sqrtm(cov_a @ cov_b))
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


def evaluate(folder: Path, reference: Path | str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    run = open_run(folder)
    settings = dataclasses.replace(run.config.evaluate, reference=str(reference), **changes)
    return Evaluator(Accelerator(), quiet).evaluate(plan_of(run, seed=seed), settings)


def test_metrics_equal_a_direct_computation(trained: World, folder: Path) -> None:
    reference = trained.root / "pictures" / "train"
    metrics = evaluate(folder, reference, n=20, seed=3, kid=15)
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    run = open_run(folder)
    images = sample_images(plan_of(run), 20, 3, Accelerator(), quiet).field("images").numpy()
    real = pictures(40, seed=1)[:, None]
    assert metrics["fid"]["value"] == pytest.approx(distance(images, real), rel=1e-4)
    assert {k: metrics["fid"][k] for k in ("n", "seed", "reference")} == {
        "n": 20, "seed": 3, "reference": str(reference),
    }  # fmt: skip
    assert metrics["fid"]["extractor"] and metrics["rfid"]["extractor"]
    assert (metrics["rfid"]["n"], metrics["rfid"]["split"]) == (20, "test")
    assert metrics["nfe"] == 24 and len(metrics["blocks"]) == 3
    assert [row["h"] for row in metrics["blocks"]] == [0.5, 0.75, None]
    assert {"movement", "ter", "seconds", "iterations", "parameters"} <= set(metrics["blocks"][0])
    assert metrics["kid"]["n"] == 15 and metrics["kid"]["against"] == "folder test"
    assert 0 <= metrics["precision"] <= 1 and 0 <= metrics["recall"] <= 1
    assert metrics["peak_memory_bytes"] > 1e6 and metrics["train_seconds"] > 0


def test_nll_equals_the_exact_change_of_variables(trained: World, folder: Path) -> None:
    """The expected value is the exact change of variables by autograd's Jacobian."""
    metrics = evaluate(folder, trained.root / "pictures" / "train", n=4, nll=3, floor=False)
    run = open_run(folder)
    from autoencoders.base import to_float

    order = subset_indices(load_images(run.config.data.of_split("test")), 3)
    x = to_float(torch.from_numpy(pictures(24, seed=2)[order, None]))
    with torch.inference_mode():
        moments = run.autoencoder().encode(x)
        z = run.standardisation.apply(moments.sample(generator(0, "nll")))
    z, flow = z.clone().double(), run.flow.double()
    solver = dataclasses.replace(run.config.sampler.of_block(0), steps=40)

    def carry(flat: torch.Tensor) -> torch.Tensor:
        point = flat.view(1, 2, 3, 3)
        for block in flow:
            point = block.transport(point, solver=solver).z
        return point.flatten()

    total = 0.0
    for point in z:
        flat = point.flatten()
        jacobian = torch.autograd.functional.jacobian(carry, flat)
        end = carry(flat)
        gaussian = -0.5 * float(end.square().sum()) - 9 * math.log(2 * math.pi)
        total -= gaussian + float(torch.linalg.slogdet(jacobian)[1])
    assert metrics["nll_per_dim"] == pytest.approx(total / 3 / 18, rel=1e-3)
    assert metrics["nll"]["n"] == 3 and metrics["nll"]["inversion_mse"] < 1e-4


def test_nll_in_many_dimensions_uses_probes(
    trained: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = trained.root / "pictures" / "train"
    exact = evaluate(folder, reference, n=4, nll=12, floor=False)
    assert exact["nll"]["divergence"] == "exact" and "probes" not in exact["nll"]
    monkeypatch.setattr("pipeline.evaluation.likelihood.EXACT_UP_TO", 17)  # D is 18
    probed = evaluate(folder, reference, n=4, nll=12, floor=False)
    assert (probed["nll"]["divergence"], probed["nll"]["probes"]) == ("hutchinson", 16)
    error = probed["nll"]["probe_error"]
    assert 0 < error < 0.05
    assert probed["nll"]["image_error"] > 0 and "probe_error" not in exact["nll"]
    assert probed["nll_per_dim"] == pytest.approx(exact["nll_per_dim"], abs=4 * error)
    assert probed["nll_per_dim"] != exact["nll_per_dim"]


def test_nfe_sweep(
    capsys: pytest.CaptureFixture[str], trained: World, folder: Path
) -> None:
    reference = trained.root / "pictures" / "train"
    words = ["evaluate", "--run", folder, "-n", "12", "--reference", reference]
    code, out, _ = say(capsys, *words, "--nfe-study", "24,12,25")
    assert code == 0 and out.strip() == str(folder / "nfe.json")
    study = json.loads((folder / "nfe.json").read_text())
    assert (study["n"], study["seed"], study["reference"]) == (12, 0, str(reference))
    assert [(r["method"], r["steps"], r["nfe"]) for r in study["rows"]] == [
        ("rk4", 1, 12), ("rk4", 2, 24),
    ]  # fmt: skip
    assert not (folder / "metrics.json").exists()
    run, real = open_run(folder), pictures(40, seed=1)[:, None]
    for row in study["rows"]:
        plan = plan_of(run, steps=row["steps"])
        images = sample_images(plan, 12, 0, Accelerator(), quiet).field("images").numpy()
        assert row["fid"] == pytest.approx(distance(images, real), rel=1e-4)
    assert (folder / "samples" / "nfe.png").stat().st_size > 1000
    # another solver joins the table; another n starts a new one
    assert say(capsys, *words, "--method", "euler", "--nfe-study", "3")[0] == 0
    rows = json.loads((folder / "nfe.json").read_text())["rows"]
    assert [(row["method"], row["nfe"]) for row in rows] == [
        ("euler", 3), ("rk4", 12), ("rk4", 24),
    ]  # fmt: skip
    assert rows[1:] == study["rows"]
    words[words.index("12")] = "10"
    assert say(capsys, *words, "--nfe-study", "12")[0] == 0
    assert len(json.loads((folder / "nfe.json").read_text())["rows"]) == 1
    # a damaged table is written again
    (folder / "nfe.json").write_text("{}")
    assert say(capsys, *words, "--nfe-study", "12")[0] == 0
    assert len(json.loads((folder / "nfe.json").read_text())["rows"]) == 1


def test_the_demo_keeps_the_fid_of_more_images(
    capsys: pytest.CaptureFixture[str], trained: World, folder: Path
) -> None:
    reference = str(trained.root / "pictures" / "train")
    words = ["evaluate", "--run", folder, "-n", "12", "--reference", reference]
    assert say(capsys, *words)[0] == 0
    before = (folder / "metrics.json").read_bytes()
    run = open_run(folder)
    settings = dataclasses.replace(run.config.evaluate, n=10, reference=reference)
    metrics, file = demo.measure(plan_of(run), settings, Accelerator())
    assert file.name == "metrics-10.json" and metrics["fid"]["n"] == 10
    assert (folder / "metrics.json").read_bytes() == before


def test_an_evaluation_uses_the_given_solver(
    capsys: pytest.CaptureFixture[str], trained: World, folder: Path
) -> None:
    words = ["evaluate", "--run", folder, "-n", "10", "--reference", trained.root / "pictures"]
    words += ["--set", "evaluate.floor=false", "--set", "evaluate.nll=0"]
    words[6] = words[6] / "train"
    code, _, last = say(capsys, *words, "--method", "euler", "--steps", "1,2,4")
    assert code == 0 and "; NFE a sample 7" in last
    code, _, last = say(capsys, *words, "--method", "midpoint", "--nfe", "14")
    assert code == 0 and "; NFE a sample 12" in last
    assert json.loads((folder / "metrics.json").read_text())["nfe"] == 12


def test_the_floor_of_the_identity_is_the_fid_of_the_real_images(
    world: World, accelerator: Accelerator
) -> None:
    path = world.config(
        autoencoder={"name": "identity", "weights": None}, train={"iterations": 1},
        schedule={"max_blocks": 1}, evaluate={"nll": 0},
    )  # fmt: skip
    config = load_config(path)
    encode(config, accelerator, quiet)
    train(config, world.root / "run", accelerator, quiet, resume=False)
    reference = world.root / "pictures" / "train"
    metrics = evaluate(world.root / "run", reference, n=24)
    real, test = pictures(40, seed=1)[:, None], pictures(24, seed=2)[:, None]
    assert metrics["rfid"]["value"] == pytest.approx(distance(test, real), rel=1e-4, abs=1e-7)
    # with the training split itself as the test split, and all of it, nothing is left
    other = dataclasses.replace(config.data, split="train", test_split="train")
    run = open_run(world.root / "run")
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, data=other))
    evaluator = Evaluator(accelerator, quiet)
    stats = GaussianStats.from_moments(*statistics(real), 40)
    assert evaluator.floor(plan_of(run), 40, stats)["value"] == pytest.approx(0, abs=1e-6)
    assert "nll_per_dim" not in metrics


def test_features_of_real_images_are_stored_once(
    trained: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KID, precision and recall equal brute force, and no real image is evaluated again."""
    reference = trained.root / "pictures" / "train"
    evaluate(folder, reference, n=20, nll=0, floor=False, kid=6)
    evaluate(folder, reference, n=20, nll=0, floor=False, kid=18)
    plain = evaluate(folder, reference, n=20, nll=0, floor=False)
    assert "kid" not in plain and "precision" not in plain  # whatever is stored
    seen, look = [], Glance.features
    monkeypatch.setattr(Glance, "features", lambda net, x: seen.append(len(x)) or look(net, x))
    metrics = evaluate(folder, reference, n=20, nll=0, floor=False, kid=18)
    assert sum(seen) == 40  # the reference's own images, given as a folder
    run = open_run(folder)
    images = sample_images(plan_of(run), 20, 0, Accelerator(), quiet).field("images")
    images = images[torch.randperm(20, generator=generator(0, "rows"))[:18].sort().values]
    order = torch.randperm(24, generator=generator(0, "order of evaluation"))[:18]
    real = look(Glance(), torch.from_numpy(pictures(24, seed=2)[order, None]))
    fake = look(Glance(), images)
    expected = kid(real, fake)
    assert metrics["kid"] == {
        "value": pytest.approx(expected.value, rel=1e-5),
        "standard_error": pytest.approx(expected.standard_error, rel=1e-5),
        "subsets": 50, "subset_size": 9, "n": 18, "n_real": 18, "against": "folder test",
    }  # fmt: skip
    distances = torch.cdist(real.double(), real.double())
    radius = distances.sort(dim=1).values[:, 3]  # the first is the point itself
    across = torch.cdist(fake.double(), real.double())
    inside = (across <= radius).any(dim=1).double().mean().item()
    assert metrics["precision"] == pytest.approx(inside)
    said = metrics_line(metrics)
    assert f"precision / recall {inside:.3f} / " in said and "(folder test, n=18)" in said


def test_the_floor_takes_the_larger_split(trained: World, folder: Path) -> None:
    reference = trained.root / "pictures" / "train"
    metrics = evaluate(folder, reference, n=30, nll=0)  # the test split has 24
    assert metrics["rfid"]["split"] == "train"


def test_features_are_extracted_once(
    trained: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = trained.root / "statistics.npz"
    mean, cov = statistics(pictures(40, seed=1)[:, None])
    np.savez(reference, mu=mean, sigma=cov)
    first = evaluate(folder, reference, n=12)
    monkeypatch.setattr(Glance, "features", None)
    again = evaluate(folder, reference, n=12)
    same = [key for key in first if key not in ("peak_memory_bytes",)]
    assert {key: again[key] for key in same} == {key: first[key] for key in same}


def test_a_larger_evaluation_reuses_a_smaller_one(
    trained: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = trained.root / "pictures" / "train"
    run = open_run(folder)
    fast = plan_of(run, batch_size=250, method="euler", steps=1)
    evaluator, seen, look = Evaluator(Accelerator(), quiet), [], Glance.features
    monkeypatch.setattr(Glance, "features", lambda net, x: seen.append(len(x)) or look(net, x))
    evaluator.reference(str(reference))
    for n, looked in ((550, [250, 250, 50]), (800, [250, 50])):
        seen.clear()
        _, features = evaluator.sample_features(fast, n, 0)
        assert seen == looked
    images, _ = evaluator.sample_features(fast, 800, 0)
    whole = torch.cat([look(Glance(), part) for part in images.field("images").split(250)])
    assert torch.equal(features.field("features"), whole)


def test_a_folder_has_priority_over_a_reference_of_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(folder)
    assert "is of cifar10" in str(warn_of_other_data(run, "cifar10-train"))
    (tmp_path / "cifar10-train").mkdir()
    monkeypatch.chdir(tmp_path)
    assert warn_of_other_data(run, "cifar10-train") is None  # whatever its images are


def test_metrics_record_the_number_of_blocks(trained: World, folder: Path) -> None:
    run = open_run(folder, blocks=2)
    settings = dataclasses.replace(
        run.config.evaluate, n=12, reference=str(trained.root / "pictures" / "train")
    )
    metrics = Evaluator(Accelerator(), quiet).evaluate(plan_of(run), settings)
    assert ", first 2 blocks only" in metrics_line(metrics)
    assert "blocks only" not in metrics_line(evaluate(folder, settings.reference, n=12))


def test_the_printed_line_has_n_and_the_reference(
    capsys: pytest.CaptureFixture[str], trained: World, folder: Path
) -> None:
    reference = trained.root / "pictures" / "train"
    words = ["evaluate", "--run", folder, "-n", "12", "--reference", reference, "--seed", "2"]
    code, out, last = say(capsys, *words)
    assert code == 0 and out.strip() == str(folder / "metrics.json")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert f"FID(n=12, {reference}) {metrics['fid']['value']:.2f} (seed 2" in last


def test_with_the_real_network(
    inception_weights: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expected value uses the features: tr (S_a S_b)^1/2 is a nuclear norm (n x m)."""
    from eval.features.inception import FidInception

    network = FidInception.from_weights(inception_weights)
    monkeypatch.setattr("pipeline.evaluation.features.load_inception", lambda _: network)
    real = network.features(torch.from_numpy(pictures(10, seed=2)[:, None])).double()
    np.savez(tmp_path / "real.npz", mu=real.mean(0).numpy(), sigma=real.T.cov().numpy())
    metrics = evaluate(folder, tmp_path / "real.npz", n=10, nll=0, floor=False)
    run = open_run(folder)
    images = sample_images(plan_of(run), 10, 0, Accelerator(), quiet).field("images")
    features = network.features(images).double()
    a, b = ((x - x.mean(0)) / 3 for x in (features, real))  # divided by the root of n - 1
    distance = (features.mean(0) - real.mean(0)).square().sum()
    distance += a.square().sum() + b.square().sum()
    distance -= 2 * torch.linalg.matrix_norm(a @ b.T, "nuc")
    assert metrics["fid"]["value"] == pytest.approx(distance.item(), rel=1e-3)
    assert metrics["fid"]["value"] > 1


def test_the_floor_has_the_noise_of_training(
    world: World, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in units of the standardised latents, here pixels of deviation ¼."""
    images = load_images(load_config(world.config()).data)
    scale = Standardisation(torch.tensor([0.3]), torch.tensor([0.25]))
    made: list[torch.Tensor] = []
    extractor = FeatureExtractor(accelerator, quiet)
    monkeypatch.setattr(
        extractor, "features", lambda _, __, n, make, ___: made.append(make(0, n, 0))
    )
    for noise in (0.0, 0.2):
        identity = IdentityAutoencoder(images.shape)
        extractor.reconstructed_features(identity, images, 40, noise, scale)
    grey = (made[0] > 64) & (made[0] < 192)  # which no noise takes out of the range
    change = (made[1].float() - made[0].float())[grey] / 127.5
    assert float(change.std()) == pytest.approx(0.2 * 0.25, rel=0.1)
