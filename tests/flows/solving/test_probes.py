"""Probes for every evaluation of a fixed grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flows.block import Block
from flows.errors import FlowError
from flows.networks.config import VelocityConfig
from flows.networks.registry import make_velocity
from flows.solving.estimators import Exact, FiniteDifference, make_divergence
from flows.solving.solver import FIXED_METHODS, SolverConfig
from tests.flows.problems import points

MLP = VelocityConfig("mlp", width=8, depth=2, autonomous=True, zero_init=False)


@pytest.mark.parametrize(
    ("method", "steps", "evaluations"),
    [
        ("rk4", 2, list(range(8))),
        ("midpoint", 3, [1, 3, 5]),
        ("heun2", 1, [0, 1]),
        ("heun3", 2, [0, 2, 3, 5]),
        ("euler", 2, [0, 1]),
    ],
)
def test_every_evaluation_with_a_weight_has_its_probes(method, steps, evaluations):
    """With the same probe each time the log-det is that of a held one, stage for stage."""
    block = Block(make_velocity(MLP, (3,)).double(), SolverConfig(method, steps=steps))
    z, divergence = points(block.velocity, batch=4), make_divergence("hutchinson")
    eps = divergence.draw_probe(z, torch.Generator().manual_seed(0))
    seen = []

    def draw(evaluation: int) -> Tensor:
        seen.append(evaluation)
        return eps

    fresh = block.transport(z, divergence=divergence, eps=draw)
    held = block.transport(z, divergence=divergence, eps=eps)
    assert torch.equal(fresh.log_det, held.log_det) and torch.equal(fresh.z, held.z)
    assert seen == evaluations and fresh.nfe == steps * FIXED_METHODS[method]


@pytest.mark.parametrize("method", ["midpoint", "heun3"])
def test_stages_without_weight_need_no_divergence(method, monkeypatch):
    block = Block(make_velocity(MLP, (3,)).double(), SolverConfig(method, steps=2))
    z = points(block.velocity, batch=4)
    fewer = block.transport(z, divergence=Exact()).log_det
    monkeypatch.setattr("flows.solving.solver.UNWEIGHTED_STAGES", {})
    torch.testing.assert_close(fewer, block.transport(z, divergence=Exact()).log_det)


def test_the_adjoint_method_needs_every_divergence():
    solver = SolverConfig("midpoint", steps=2, adjoint=True)
    assert all(solver.weights_divergence(evaluation) for evaluation in range(4))


def test_fresh_probes_are_unbiased():
    """For v = A z the mean of the log-det is tr A, and fresh probes have a smaller variance."""
    drawn = torch.Generator().manual_seed(0)
    block = Block(make_velocity(VelocityConfig("linear"), (4,)).double())
    block.solver = SolverConfig("rk4", steps=2)
    matrix = torch.randn((4, 4), generator=drawn, dtype=torch.float64) / 4
    block.velocity.affine.weight.data.copy_(matrix)
    z, divergence = torch.zeros((20000, 4), dtype=torch.float64), make_divergence("hutchinson")
    with torch.no_grad():
        held = block.transport(z, divergence=divergence, eps=divergence.draw_probe(z, drawn))
        fresh = block.transport(
            z, divergence=divergence, eps=lambda _: divergence.draw_probe(z, drawn)
        )
    for sample in (held.log_det, fresh.log_det):
        assert abs(sample.mean() - matrix.trace()) < 4 * sample.std() / 20000**0.5
    # weights 1/16, 3/16, 3/16, 1/16, twice: the sum of their squares is 5/32
    assert fresh.log_det.var() / held.log_det.var() == pytest.approx(5 / 32, rel=0.05)


@pytest.mark.parametrize("solver", [SolverConfig("dopri5"), SolverConfig("rk4", adjoint=True)])
def test_a_solver_that_must_repeat_itself_needs_a_held_probe(solver):
    block = Block(make_velocity(MLP, (3,)), solver)
    z, divergence = torch.zeros((2, 3)), make_divergence("hutchinson")
    with pytest.raises(FlowError, match="probes that are held"):
        block.transport(z, divergence=divergence, eps=lambda _: divergence.draw_probe(z))


def test_the_noise_of_finite_differences():
    z = torch.zeros((50, 3))
    assert set(FiniteDifference(noise="rademacher").draw_probe(z).unique().tolist()) == {-1.0, 1.0}
    assert len(FiniteDifference().draw_probe(z).unique()) > 2
    assert make_divergence("finite-difference") == FiniteDifference(noise="gaussian")
    with pytest.raises(FlowError, match="unknown noise 'uniform'"):
        FiniteDifference(noise="uniform")
