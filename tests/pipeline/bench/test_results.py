"""Measures of a benchmark's models, and its tables."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math

import pytest
import torch

from flows.baselines.base import Decoded
from flows.baselines.cnf import FlowModel
from flows.baselines.ignn import Ignn, IgnnConfig
from flows.baselines.iresnet import IResNet, IResNetConfig
from flows.baselines.residual import FixedPoint
from flows.likelihood import log_prob
from flows.networks.config import VelocityConfig
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec
from pipeline.bench import measure as measure_module
from pipeline.bench.measure import Measured, measure
from pipeline.bench.problem import HeldOut, open_problem, problem_config
from pipeline.bench.results import Row, markdown, table_csv
from pipeline.evaluation.likelihood import PROBES, summarise
from pipeline.runtime.rng import generator
from pipeline.storage.atomic import json_bytes
from pipeline.storage.records import from_json, to_json
from tests.flows.problems import fresh_flow
from tests.pipeline.bench.test_bench import CPU, FEW, TINY


def identity(dim: int) -> FlowModel:
    """A flow that leaves its samples unchanged."""
    model = FlowModel(fresh_flow((dim,), []))
    model.flow.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    return model


def test_the_identity_measures_as_the_normal_distribution() -> None:
    problem = open_problem(problem_config("toy2d", "gaussian", (), 0), HeldOut(400, 500))
    model = identity(2)
    measured, samples = measure(model, problem, CPU)
    nll = problem.test.double().square().sum(1) / 2 + math.log(2 * math.pi)
    assert measured.nll == pytest.approx(float(nll.mean()), rel=1e-6)
    assert measured.nll_error == pytest.approx(float(nll.std()) / 20, rel=1e-5)
    assert len(samples) == 500 and measured.failures == 0
    assert measured.mmd_m > measured.thresholds[0] and measured.mmd_1 > measured.thresholds[1]
    scaled = dataclasses.replace(problem, log_scale=-3.5)
    assert measure(model, scaled, CPU)[0].nll == pytest.approx(measured.nll - 3.5)


def test_random_probes_have_their_part_of_the_error(monkeypatch) -> None:
    problem = open_problem(problem_config("toy2d", "gaussian", TINY, 0), FEW)
    network = VelocityConfig("mlp", 8, 1, autonomous=True, zero_init=False)
    spec = BlockSpec(network, SolverConfig("rk4", 2))
    flow = fresh_flow((2,), [spec])
    exact, _ = measure(FlowModel(flow), problem, CPU)
    assert exact.probe_error is None
    monkeypatch.setattr(measure_module, "EXACT_UP_TO", 1)
    measured, _ = measure(FlowModel(flow), problem, CPU)
    known = log_prob(flow, problem.test, "hutchinson", PROBES, generator=generator(
        0, "nll", "probes"))  # fmt: skip
    assert measured.probe_error == pytest.approx(summarise([known])["probe_error"] * 2)
    assert abs(measured.nll - exact.nll) < 5 * measured.probe_error + 1e-6


def test_samples_without_an_inverse_are_counted_and_left_out(monkeypatch) -> None:
    problem = open_problem(problem_config("toy2d", "gaussian", TINY, 0), FEW)
    model = Ignn(IgnnConfig(VelocityConfig("mlp", 8, 1, autonomous=True), 1), 2)
    whole, samples = measure(model, problem, CPU)

    def half(noise):
        keep = torch.arange(len(noise)) % 2 == 0
        return Decoded(torch.where(keep[:, None], noise, torch.nan), keep, 7)

    monkeypatch.setattr(model, "decode_checked", half)
    measured, found = measure(model, problem, CPU)
    assert whole.failures == 0 and measured.failures == 0.5
    torch.testing.assert_close(found, samples[::2])
    nothing = lambda noise: Decoded(noise, torch.zeros(len(noise), dtype=torch.bool), 7)  # noqa: E731
    monkeypatch.setattr(model, "decode_checked", nothing)
    measured, _ = measure(model, problem, CPU)
    assert measured.mmd_m is None and measured.mmd_1 is None and measured.failures == 1
    # one iteration is too few for any sample
    model = IResNet(IResNetConfig(8, blocks=2, fixed_point=FixedPoint(1e-9, 1)), 2)
    measured, _ = measure(model, problem, CPU)
    assert measured.mmd_m is None and measured.failures == 1 and math.isfinite(measured.nll)
    text = markdown([row("iresnet", 0, 1.0, measured=measured)], [])
    assert "i-ResNet, seed 0: the inverse of 100.00% of 40 samples was not found" in text
    assert "changes no coordinate by more than 1e-05; the median of ‖z − T⁻¹(T(z))‖ is" in text


def test_a_diverged_inverse_is_an_infinite_error(monkeypatch) -> None:
    problem = open_problem(problem_config("toy2d", "gaussian", TINY, 0), FEW)
    model = Ignn(IgnnConfig(VelocityConfig("mlp", 8, 1, autonomous=True), 1), 2)
    result = model.log_prob(problem.test)
    for diverged, known in ((1, True), (len(problem.test), False)):
        errors = torch.full_like(result.inversion_error, 0.5)
        errors[:diverged] = torch.nan
        given = dataclasses.replace(result, inversion_error=errors)
        monkeypatch.setattr(model, "log_prob", lambda *_, given=given: given)
        measured, _ = measure(model, problem, CPU)
        assert measured.inversion_error == (0.5 if known else None)
        again = from_json(Measured, json.loads(json_bytes(to_json(measured))), "row.json")
        assert again == measured
        text = markdown([row("ignn", 0, 1.0, measured=measured)], [])
        assert f"‖z − T⁻¹(T(z))‖ {'is 5.0e-01' if known else 'is not finite'}." in text


def row(model: str, seed: int, nll: float, **changes) -> Row:
    measured = Measured(nll, 0.25, 1e-3 * (seed + 1), None, [1e-3], 0.125, 0.0, 9, 60, 40)
    values = {"parameters": 1234, "seconds": 2.0, "batches": 4, "measured": measured}
    return Row("power", model, seed, "rows", **{**values, **changes})


def test_the_table_has_means_and_deviations() -> None:
    rows = [row("jko", 0, 1.0, overhead=0.5), row("jko", 1, 2.0), row("otflow", 0, 3.0),
            row("fm", 0, 0.0, measured=None, error="no luck")]  # fmt: skip
    text = markdown(rows, ["Settings."], published=True)
    line = "| JKO-iFlow | 1.500 ± 0.707 | 1.50e-03 ± 7.07e-04 | – | 1,234 | 2.0 + 0.2 | 4 |"
    assert line in text
    assert "| OT-Flow | 3.000 (± 0.250) | 1.00e-03 | – |" in text
    assert "| flow matching | failed |" in text and "seed 0: failed: no luck" in text
    assert "JKO-iFlow, seed 1: the inverse of 12.50% of 40 samples was not found" in text
    assert "| *JKO-iFlow, published* | -0.12 |" in text and "arXiv:2212.14424" in text
    assert "published" not in markdown(rows, []) and "fixed point" not in text
    noisy = dataclasses.replace(rows[0].measured, probe_error=0.0123)
    text = markdown([row("jko", 0, 1.0, measured=noisy)], [])
    assert "The random probes have at most 0.01 of the standard error" in text
    lines = list(csv.DictReader(io.StringIO(table_csv(rows))))
    assert lines[0]["seconds_per_batch"] == "0.5" and lines[3]["error"] == "no luck"
    assert lines[3]["nll"] == "" and lines[1]["failures"] == "0.125"
