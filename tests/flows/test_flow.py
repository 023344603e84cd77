"""The flow: composition, likelihood, inverse, refinement, truncation, configuration."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from flows.block import Block
from flows.errors import FlowError, SolveError
from flows.flow import Flow
from flows.likelihood import log_normal, log_prob
from flows.networks.config import VelocityConfig
from flows.refinement import refine_blocks
from flows.solving.estimators import Hutchinson
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec
from tests.flows.problems import Formula, fresh_flow, points, rebuilt

MLP = VelocityConfig("mlp", width=16, depth=2, activation="tanh", zero_init=False)
SPEC = BlockSpec(MLP, SolverConfig("rk4", 4), h=0.5)
FINE = SolverConfig("dopri5", rtol=1e-9, atol=1e-9)


def make(blocks: int = 3, shape: tuple[int, ...] = (2,), **changes) -> Flow:
    spec = replace(SPEC, **changes)
    flow = fresh_flow(shape, [spec] * blocks).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(1.5)
    return flow


def linear_flow(matrices: list[torch.Tensor]) -> Flow:
    """A flow of blocks v = A_k z."""
    dim = len(matrices[0])
    spec = BlockSpec(VelocityConfig("linear"), SolverConfig("rk4", 4))
    flow = fresh_flow((dim,), [spec] * len(matrices)).double()
    with torch.no_grad():
        for block, matrix in zip(flow, matrices, strict=True):
            block.velocity.affine.weight.copy_(matrix)
    return flow


def test_decode_inverts_encode_and_chunks_do_not_matter():
    flow = make()
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    there = flow.encode(z, FINE)
    torch.testing.assert_close(flow.decode(there, FINE), z, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(flow.encode(z, chunk=7), flow.encode(z))
    assert not torch.allclose(there, z, atol=0.1)


def test_every_block_may_have_its_own_solver():
    flow = make()
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solvers = [SolverConfig("euler", 1), SolverConfig("midpoint", 2), SolverConfig("rk4", 3)]
    expected = z
    for block, solver in zip(flow, solvers, strict=True):
        expected = block.transport(expected, solver=solver).z
    moved = flow.transport(z, solver=solvers)
    assert torch.equal(moved.z, expected) and moved.nfe == 1 + 4 + 12
    back = flow.transport(moved.z, reverse=True, solver=solvers)
    assert back.nfe == 1 + 4 + 12
    with pytest.raises(FlowError, match="has 3 blocks and 2 solvers"):
        flow.encode(z, solvers[:2])


def test_encode_is_the_composition_of_the_blocks_in_order():
    first, second = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    flow = linear_flow([first, second])
    z = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    product = torch.linalg.matrix_exp(second) @ torch.linalg.matrix_exp(first)
    torch.testing.assert_close(flow.encode(z, FINE), z @ product.T, rtol=1e-6, atol=1e-7)
    steps = list(flow.trajectory(z, solver=FINE))
    assert len(steps) == 3
    middle = z @ torch.linalg.matrix_exp(first).T
    torch.testing.assert_close(steps[1], middle, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(steps[2], flow.encode(z, FINE))


def test_log_prob_of_a_linear_flow_is_the_gaussian_density():
    matrices = list(torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)).double() / 2)
    flow = linear_flow(matrices)
    product = torch.linalg.matrix_exp(matrices[1]) @ torch.linalg.matrix_exp(matrices[0])
    z = torch.randn(20, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    precision = product.T @ product
    normal = torch.distributions.MultivariateNormal(
        torch.zeros(3, dtype=torch.float64), precision_matrix=precision
    )
    result = log_prob(flow, z, solver=FINE, chunk=7)
    torch.testing.assert_close(result.value, normal.log_prob(z), rtol=1e-6, atol=1e-7)
    assert result.standard_error is None
    assert result.inversion_error.max() < 1e-7
    assert result.nll_per_dim == pytest.approx(-normal.log_prob(z).mean().item() / 3)
    assert log_prob(flow, z, solver=SolverConfig("rk4", 3), chunk=7).nfe == 2 * 4 * 3


def test_log_prob_integrates_to_one_on_a_nonlinear_flow():
    flow = make()
    side = torch.linspace(-8, 8, 97, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    density = log_prob(flow, grid, solver=SolverConfig("rk4", 4), chunk=40_000).value.exp()
    assert density.sum().item() * (side[1] - side[0]).item() ** 2 == pytest.approx(1, abs=2e-3)


def test_standard_error_covers_the_exact_value():
    flow = make(shape=(4,))
    z = torch.randn(300, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = log_prob(flow, z, solver=FINE).value
    generator = torch.Generator().manual_seed(2)
    estimate = log_prob(flow, z, "hutchinson", probes=16, solver=FINE, generator=generator)
    score = (estimate.value - exact) / estimate.standard_error
    assert 0.8 < score.std() < 1.5
    assert abs(score.mean()) < 0.3
    single = log_prob(flow, z[:2], Hutchinson(), generator=generator)
    assert single.standard_error is None
    drawn = torch.Generator().manual_seed(2)
    again = log_prob(flow, z, "hutchinson", probes=16, solver=FINE, generator=drawn)
    assert torch.equal(again.value, estimate.value)


def test_log_normal():
    z = torch.randn(4, 2, 3, dtype=torch.float64)
    target = torch.distributions.Normal(0, 1).log_prob(z).sum(dim=(1, 2))
    torch.testing.assert_close(log_normal(z), target)


def test_samples_follow_the_density():
    """Samples of a linear flow have the covariance (BᵀB)⁻¹ of its density."""
    matrix = torch.tensor([[0.5, 0.4], [0.0, -0.3]], dtype=torch.float64)
    flow = linear_flow([matrix])
    z = flow.sample(100_000, torch.Generator().manual_seed(0))
    full = torch.linalg.matrix_exp(matrix)
    torch.testing.assert_close(torch.cov(z.T), torch.inverse(full.T @ full), rtol=0.03, atol=0.03)
    few = flow.sample(10, torch.Generator().manual_seed(3), chunk=3)
    torch.testing.assert_close(few, flow.sample(10, torch.Generator().manual_seed(3)))


def test_nfe_is_counted_and_the_solver_can_be_overridden():
    flow = make()
    z = torch.zeros(10, 2, dtype=torch.float64)
    assert flow.transport(z, chunk=3).nfe == 3 * 4 * 4
    assert flow.transport(z, True, SolverConfig("midpoint", 2)).nfe == 3 * 2 * 2


def test_truncated_flow_shares_the_blocks():
    flow = make()
    part = flow[:2]
    z = torch.randn(5, 2, dtype=torch.float64)
    steps = list(flow.trajectory(z))
    torch.testing.assert_close(part.encode(z), steps[2])
    assert len(part) == 2
    assert part[0] is flow[0]
    assert part.specs == flow.specs[:2]


@pytest.mark.parametrize("c", [1, 2, 4])
def test_refined_flow_is_the_parent_map(c):
    """c divides S, so that even the discretised maps agree to rounding."""
    flow = make(blocks=2)
    flow.specs[1] = replace(SPEC, h=0.8)
    refined = refine_blocks(flow, c)
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert [spec.h for spec in refined.specs] == pytest.approx([0.5 / c] * c + [0.8 / c] * c)
    torch.testing.assert_close(refined.encode(z), flow.encode(z), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        log_prob(refined, z, solver=FINE).value,
        log_prob(flow, z, solver=FINE).value,
        rtol=1e-7,
        atol=1e-7,
    )


def test_refinement_nests_and_children_train_apart():
    flow = make(blocks=1)
    twice = refine_blocks(refine_blocks(flow, 2), 2)
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(twice.encode(z), flow.encode(z), rtol=1e-12, atol=1e-12)
    assert [spec.start for spec in twice.specs] == [0, 0.25, 0.5, 0.75]
    before = flow.encode(z)
    with torch.no_grad():
        for parameter in twice[1].parameters():
            parameter.add_(0.1)
    assert torch.equal(flow.encode(z), before)
    assert not torch.allclose(twice.encode(z), before, atol=1e-3)


def test_refined_flow_is_rebuilt_from_its_specifications():
    refined = refine_blocks(make(blocks=2), 3)
    again = rebuilt(refined)
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(again.encode(z), refined.encode(z))
    assert again.specs == refined.specs


def test_free_block_stays_whole():
    flow = make(blocks=2)
    flow.specs[1] = replace(SPEC, h=None)
    refined = refine_blocks(flow, 2)
    assert [spec.h for spec in refined.specs] == [0.25, 0.25, None]
    assert refined.specs[2].solver == SPEC.solver
    assert refine_blocks(flow, 2, steps=9).specs[0].solver.steps == 9


def test_failures_name_the_block():
    flow = make(blocks=2)
    bad = Formula(lambda t, z: torch.where(t > 0.7, torch.full_like(z, math.nan), z))
    flow.blocks[1] = Block(bad, SPEC.solver)
    z = torch.zeros(3, 2, dtype=torch.float64)
    with pytest.raises(SolveError, match="in block 1 at t = 0.75") as failure:
        flow.encode(z)
    assert failure.value.block == 1
    with pytest.raises(SolveError, match="in block 1"):
        log_prob(flow, z)


def test_specification_round_trip_and_strictness():
    flow = make(blocks=2, shape=(2, 2, 2))
    again = rebuilt(flow)
    assert again.specs == flow.specs and again.shape == flow.shape
    names = [name for name, _ in again.named_parameters()]
    assert names == [name for name, _ in flow.named_parameters()]
    with pytest.raises(FlowError, match="unknown key depht in the velocity"):
        BlockSpec.from_dict({"velocity": {"depht": 3}})
    with pytest.raises(FlowError, match="unknown key step in the block"):
        BlockSpec.from_dict({"step": 3})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda flow: flow.sample(0), "at least 1 sample"),
        (lambda flow: flow.encode(torch.zeros(3, 5)), r"\(n, 2\).*found \(3, 5\)"),
        (lambda flow: flow.encode(torch.zeros(0, 2)), "n ≥ 1"),
        (lambda flow: log_prob(flow, torch.zeros(3, 2), "guess"), "unknown divergence"),
        (lambda flow: refine_blocks(flow, 0), "at least 1"),
        (lambda flow: replace(SPEC, h=-1.0), "h must be positive"),
        (lambda flow: replace(SPEC, objective="gan"), "unknown objective"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(FlowError, match=words):
        call(make(blocks=1))


def test_no_gradient_is_recorded():
    flow = make(blocks=1)
    assert isinstance(flow, nn.Module)
    z = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    assert not flow.encode(z).requires_grad
    assert not log_prob(flow, points(flow[0].velocity)).value.requires_grad
