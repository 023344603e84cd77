"""Local flow matching and flow matching of Gaussian data, whose path to noise is known."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from flows.likelihood import log_prob
from flows.objectives.losses import ou_target
from pipeline.errors import JkoflowError, UserError
from pipeline.evaluation.tables import metrics_table
from pipeline.runs.directory import read_manifest
from pipeline.runs.passes import Pass
from pipeline.runs.run import load_blocks, open_run
from pipeline.runtime.rng import generator
from pipeline.sampling.solvers import solvers_of
from pipeline.storage.shards.opening import open_store
from pipeline.training.batches.matching_loss import batch_loss, logit_normal, stratified_times
from pipeline.training.stages import stage_folder
from pipeline.training.train import Outcome, train
from tests.flows.closed_form import kl_to_standard
from tests.pipeline.gaussian_source import COVARIANCE, GaussianSource, quiet, tiny
from tests.pipeline.killing import assert_same_content, kill_at
from tests.pipeline.records import block_row
from tests.pipeline.tiny import World, say

GAMMAS = (0.2, 0.4)
LFM = ("train.objective=lfm", f"lfm.gamma={list(GAMMAS)}", "train.ema=0.9")
FM = ("train.objective=fm", "train.ema=0.9")
#: a network that sees the time
CURVED = ("velocity.kind=mlp", "velocity.width=32", "velocity.depth=1",
          "velocity.activation=tanh", "sampler.steps=6", "train.lr=0.01", "train.iterations=400",
          "train.warmup=10")  # fmt: skip


def run(folder: Path, *overrides: str, resume: bool = True, **request: int) -> Outcome:
    config, accelerator = tiny(*overrides), Accelerator(cpu=True)
    return train(config, folder, accelerator, quiet, resume, GaussianSource(), **request)


def stage(folder: Path, index: int) -> Tensor:
    return open_store(stage_folder(folder, index), "stage").field("z").double()


def noise(folder: Path) -> Tensor:
    """Encode the data of a finished run; it stores no samples after the last block."""
    opened = open_run(folder)
    with torch.no_grad():
        return opened.flow.encode(stage(folder, 0).float(), solvers_of(opened)).double()


def best_matrix(z: Tensor, gamma: float | None, interpolant: str) -> Tensor:
    """Compute A of the velocity A z with the least regression loss, from the samples' covariance.

    Per eigenvector with variance λ, with a = e^{−γ} and V the variance of the target:
    the mean over t of Cov(slope, I_t) over that of Var(I_t).
    """
    variance, axes = torch.linalg.eigh(z.T.cov(correction=0))
    a = 0.0 if gamma is None else math.exp(-gamma)
    after = a**2 * variance + 1 - a**2
    if interpolant == "linear":
        spread = (variance + a * variance + after) / 3
    else:
        spread = (variance + after) / 2 + 2 / math.pi * a * variance
    return axes @ torch.diag((after - variance) / 2 / spread) @ axes.T


@pytest.mark.parametrize("interpolant", ["linear", "trigonometric"])
@pytest.mark.parametrize("objective", [LFM, FM])
def test_a_linear_field_reaches_the_best_regression(
    tmp_path: Path, objective: tuple[str, ...], interpolant: str
) -> None:
    run(tmp_path, *objective, f"matching.interpolant={interpolant}", "train.iterations=150")
    rows = read_manifest(tmp_path).blocks
    for index, block in enumerate(load_blocks(tmp_path, read_manifest(tmp_path))):
        expected = best_matrix(stage(tmp_path, index), rows[index].gamma, interpolant)
        affine: Any = block.velocity
        torch.testing.assert_close(
            affine.affine.weight.double(), expected, rtol=0, atol=0.04, check_dtype=False
        )
        assert affine.affine.bias.abs().max() < 0.1


@pytest.fixture(scope="module")
def diffused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks with a time and a free one."""
    folder = tmp_path_factory.mktemp("lfm") / "run"
    outcome = run(folder, *LFM, *CURVED, "schedule.free_block=true", resume=False)
    assert outcome == Outcome(3, True, 3, 1)
    return folder


def test_every_block_carries_the_data_as_far_as_the_diffusion(diffused: Path) -> None:
    """N(0, Σ) becomes N(0, e^{−2γ} Σ + (1 − e^{−2γ}) I), block after block; then N(0, I)."""
    rows = read_manifest(diffused).blocks
    assert [row.gamma for row in rows] == [*GAMMAS, None]
    assert [row.h for row in rows] == [None] * 3
    assert {row.objective for row in rows} == {"lfm"}
    covariance, time = stage(diffused, 0).T.cov(correction=0), 0.0
    identity = torch.eye(2, dtype=torch.float64)
    for index, gamma in enumerate([*GAMMAS, math.inf]):
        time += gamma
        shrink = math.exp(-2 * time)
        expected = shrink * covariance + (1 - shrink) * identity
        actual = stage(diffused, index + 1) if gamma < math.inf else noise(diffused)
        torch.testing.assert_close(actual.T.cov(correction=0), expected, rtol=0, atol=0.1)
        assert actual.mean(dim=0).abs().max() < 0.1


def entropy(covariance: Any = COVARIANCE) -> float:
    """Compute the entropy of N(0, Σ) in nats, the least NLL."""
    determinant = torch.tensor(covariance, dtype=torch.float64).det().item()
    return 0.5 * math.log(determinant) + 1 + math.log(2 * math.pi)


def test_flow_matching_is_one_block_to_the_standard_normal(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(folder, *FM, *CURVED).blocks == 1
    (row,) = read_manifest(folder).blocks
    assert (row.h, row.gamma, row.objective) == (None, None, "lfm")
    assert not stage_folder(folder, 1).exists()
    end = noise(folder)
    assert kl_to_standard(end.mean(0), end.T.cov(correction=0)) < 0.02
    moved = (end - stage(folder, 0)).square().sum(1).mean().sqrt().item()
    assert row.movement == pytest.approx(moved, rel=0.05)  # of some of the samples
    # terms, the summary of the pass, and the exact likelihood agree with the entropy
    summary = read_manifest(folder).passes[0].summary
    assert summary.nll == pytest.approx(row.terms["total"] + math.log(2 * math.pi))
    assert summary.nll == pytest.approx(entropy(), abs=0.06)
    result = log_prob(open_run(folder).flow, stage(folder, 0).float())
    density = torch.distributions.MultivariateNormal(torch.zeros(2), torch.tensor(COVARIANCE))
    gap = density.log_prob(stage(folder, 0).float()) - result.value
    assert abs(gap.mean().item()) < 0.05 and gap.abs().median().item() < 0.2
    assert result.inversion_error.max() < 1e-2


def test_optimal_pairs_lower_the_variance_of_the_regression(diffused: Path) -> None:
    """The least loss of a velocity is the variance left in the slope; ot pairs lower it."""
    first = open_store(stage_folder(diffused, 0), "stage")
    block = load_blocks(diffused, read_manifest(diffused))[0]

    def loss(coupling: str) -> float:
        recipe = tiny(*LFM, f"matching.coupling={coupling}").matching
        drawn = generator("pairs")
        loss_of_batch = batch_loss(block.velocity, first, torch.arange(400), 0.2, recipe, drawn)  # type: ignore[union-attr]
        return loss_of_batch.total.item()

    assert loss("ot") < 0.9 * loss("independent")


def test_optimal_pairs_lead_to_the_same_noise(tmp_path: Path) -> None:
    run(
        tmp_path, *FM, *CURVED, "matching.coupling=ot", "train.iterations=150",
        "train.batch_size=100",
    )  # fmt: skip
    end = noise(tmp_path)
    assert kl_to_standard(end.mean(0), end.T.cov(correction=0)) < 0.05


def test_times_are_uniform_and_spread() -> None:
    t = stratified_times(1000, generator(0))
    assert torch.equal((t * 1000).floor(), torch.arange(1000.0))
    inside = t * 1000 - torch.arange(1000)
    assert inside.mean().item() == pytest.approx(0.5, abs=0.03)


def test_logit_normal_times_have_a_normal_logit() -> None:
    t = logit_normal(stratified_times(4000, generator(0)))
    assert t.dtype == torch.float32 and bool((t > 0).all()) and bool((t < 1).all())
    logit = torch.logit(t.double())
    assert logit.mean().item() == pytest.approx(0, abs=0.01)
    assert logit.std().item() == pytest.approx(1, abs=0.01)
    ends = torch.tensor([0.0, 1.0])
    assert bool(torch.isfinite(torch.logit(logit_normal(ends).double())).all())


def test_a_batch_is_trained_at_the_times_asked_for(diffused: Path) -> None:
    first = open_store(stage_folder(diffused, 0), "stage")
    seen: list[Tensor] = []
    field = load_blocks(diffused, read_manifest(diffused))[0].velocity
    field.register_forward_pre_hook(lambda module, given: seen.append(given[0]))  # type: ignore[union-attr,operator]
    for times in ("uniform", "logit-normal"):
        recipe = tiny(*LFM, f"matching.times={times}").matching
        batch_loss(field, first, torch.arange(400), 0.2, recipe, generator("times"))  # type: ignore[arg-type]
    torch.testing.assert_close(seen[1], logit_normal(seen[0]))
    assert not torch.equal(seen[0], seen[1])


def test_logit_normal_times_lead_to_the_same_noise(tmp_path: Path) -> None:
    run(tmp_path, *FM, *CURVED, "matching.times=logit-normal")
    begin, end = (
        kl_to_standard(z.mean(0), z.T.cov(correction=0))
        for z in (stage(tmp_path, 0), noise(tmp_path))
    )
    assert end < 0.1 < 0.25 * begin


def test_the_target_of_the_free_block_is_the_noise() -> None:
    z, noise = torch.randn(2, 5, 2)
    assert torch.equal(ou_target(z, None, noise), noise)


# ------------------------------------------------------------------------------ passes, resuming


def test_the_rule_compares_movement_per_time() -> None:
    def after(ter: float, gamma: float | None, h: float | None = None) -> bool:
        row = block_row(h=h, gamma=gamma, ter=ter)
        plan = Pass("ordinary", [], True, 0.01, [], [], [], gamma=[0.1, 0.2], objective="lfm")
        return plan.with_block(row).stopped

    assert not after(0.009, 0.1) and not after(1.1e-4, 0.1)
    assert after(0.9e-4, 0.1)
    assert after(0.009, 3.0) and not after(0.011, 3.0)
    assert after(0.009, None, h=1.0) and not after(0.009, None, h=0.1)  # JKO steps


def test_the_rule_ends_a_training(tmp_path: Path) -> None:
    quick = ("train.objective=lfm", "train.iterations=2", "lfm.gamma1=0.5")
    rows = run(tmp_path, *quick, "schedule.tolerance=1e3", "schedule.free_block=true").blocks
    assert rows == 2
    assert [row.step for row in read_manifest(tmp_path).blocks] == [0.5, None]


def test_blocks_are_added_with_longer_times(diffused: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(diffused, tmp_path / "run"))
    quick = (*LFM, *CURVED, "schedule.free_block=true", "train.iterations=3", "schedule.rho=1.5")
    assert run(folder, *quick, add_blocks=1) == Outcome(4, True, 2, 2)
    rows = read_manifest(folder).blocks
    assert [row.gamma for row in rows] == [0.2, 0.4, pytest.approx(0.6), None]
    before = read_manifest(diffused).blocks
    assert [row.sha256 for row in rows[:2]] == [row.sha256 for row in before[:2]]


OFTEN = (*LFM, "train.iterations=5", "train.checkpoint_seconds=0", "schedule.free_block=true",
         "matching.coupling=ot", "train.batch_size=32")  # fmt: skip


def _resume(folder: str) -> None:
    run(Path(folder), *OFTEN)


def test_killed_and_resumed_ends_in_the_same_bytes(tmp_path: Path) -> None:
    run(tmp_path / "whole", *OFTEN)
    killed = tmp_path / "killed"
    kill_at((9, 14), _resume, str(killed))
    assert not read_manifest(killed).complete
    run(killed, *OFTEN)
    assert_same_content(killed, tmp_path / "whole")


# ------------------------------------------------------------------------- mistakes, command line


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("train.objective=lfm", "lfm.gamma=[0.1,-1]"), r"lfm.gamma is \[0.1, -1.0\]"),
        (("train.objective=lfm", "lfm.gamma1=0"), "lfm.gamma1 is 0.0; expected above 0"),
        (("train.objective=lfm", "matching.interpolant=cubic"), "expected linear or"),
        (("train.objective=fm", "matching.coupling=best"), "matching.coupling is 'best'"),
        (("train.objective=fm", "matching.times=late"), "matching.times is 'late'; expected"),
        (("train.objective=fm", "lfm.gamma=[1.0]"), "applies to train.objective=lfm; this"),
        (("train.objective=lfm", "jko.refine=2"), "jko.refine=2 applies to train.objective=jko"),
        (("matching.times=uniform",), "applies to train.objective=lfm or fm; this"),
    ],
)
def test_invalid_settings_are_errors_before_anything_is_written(
    tmp_path: Path, overrides: tuple[str, ...], named: str
) -> None:
    with pytest.raises((UserError, ValueError), match=named):
        run(tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_a_diverging_regression_names_block_and_step(tmp_path: Path) -> None:
    with pytest.raises(
        JkoflowError, match=r"block 0 failed at step \d+: .*; lower train\.lr, then"
    ):
        mlp = ("velocity.kind=mlp", "velocity.width=8", "velocity.depth=3")
        run(tmp_path / "run", *LFM, *mlp, "train.lr=1e12", "train.iterations=30")


def test_people_read_times_without_rounding_errors(tmp_path: Path) -> None:
    """0.1 ρ^k is not exact in binary; flow.json has all its digits."""
    quick = ("train.objective=lfm", "lfm.gamma1=0.1", "schedule.max_blocks=1")
    run(tmp_path, *quick, "train.iterations=1")
    (row,) = read_manifest(tmp_path).blocks
    assert repr(row.gamma) == "0.10000000000000002"
    lines = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    (told,) = (line for line in lines if line.get("event") == "finished")
    assert repr(told["gamma"]) == "0.1" and told["h"] is None
    report = block_row(h=1 / 3, gamma=None, ter=0.0).report()
    assert (report["h"], report["gamma"]) == (0.333333333333, None)


def test_the_chain_from_pictures(
    trained: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train, generate with a budget, truncate and evaluate, as for a JKO run."""
    section, folder = {"gamma": [0.3]}, tmp_path
    config = trained.config("lfm", train={"objective": "lfm"}, lfm=section)
    adaptive = ("--set", "sampler.method=dopri5", "--set", "sampler.steps=4")
    assert say(capsys, "train", "-c", config, "-r", folder / "a", *adaptive)[0] == 0
    # an adaptive solver pushes; a budget needs a grid
    assert say(capsys, "generate", "-r", folder / "a", "--nfe", "16")[2].startswith("error: --nfe")
    grid = ("--set", "sampler.method=rk4", "--nfe", "16")
    code, _, said = say(capsys, "generate", "-r", folder / "a", *grid)
    assert code == 0 and "16 network evaluations" in said
    assert say(capsys, "generate", "-r", folder / "a", "--blocks", "1", *grid)[0] == 0
    code, out, said = say(capsys, "likelihood", "-r", folder / "a", "-n", "4")
    assert code == 0 and "likelihood.json" in out and "NLL(n=4" in said


def test_the_table_shows_the_times() -> None:
    row = {"objective": "lfm", "h": None, "movement": 1.0, "ter": 0.1, "seconds": 1.0,
           "parameters": 5}  # fmt: skip
    metrics = {
        "blocks": [row | {"gamma": 0.125}, row | {"gamma": None}],
        "fid": {"n": 2, "reference": "r", "value": 1.0, "seed": 0},
        "sampling": {**dict.fromkeys(("classes", "guide", "refiner", "first_blocks")),
                     "precision": "fp32"},
        "nfe": 1,
        "peak_memory_bytes": 1,
        "real_test_fid": None,
    }  # fmt: skip
    lines = metrics_table(metrics, {}, set()).splitlines()
    assert lines[0].split()[:2] == ["block", "γ"]
    assert lines[1].split()[:2] == ["0", "0.125"] and lines[2].split()[:2] == ["1", "free"]
