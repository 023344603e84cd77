"""Several networks in one block, against chains of blocks with one network each."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from flows.block import Block
from flows.errors import FlowError, SolveError
from flows.flow import Flow
from flows.networks.config import VelocityConfig
from flows.networks.piecewise import PiecewiseVelocity, TimeSlice
from flows.networks.registry import KINDS, make_velocity
from flows.refinement import refine_blocks
from flows.solving.estimators import Exact, FiniteDifference, Hutchinson
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec
from tests.flows.problems import Coupled, Formula, affine, fresh_flow, points, rebuilt

MLP = VelocityConfig("mlp", width=16, depth=2, activation="tanh", zero_init=False)
FINE = SolverConfig("dopri5", rtol=1e-10, atol=1e-10)
DIVERGENCES = [Exact(), Hutchinson(probes=2), Hutchinson(mode="jvp"), FiniteDifference()]


def nets(count: int, shape: tuple[int, ...] = (3,)) -> list[Coupled]:
    return [Coupled(shape, seed) for seed in range(count)]


def chained(parts, z, reverse, divergence, eps, solver):
    """z, log-det and evaluations of a chain of blocks, each a network on its part of the time."""
    log_det, nfe, n = torch.zeros(()), 0, len(parts)
    slices = [TimeSlice(part, j / n, 1 / n) for j, part in enumerate(parts)]
    for part in slices[::-1] if reverse else slices:
        moved = Block(part, solver).transport(z, reverse, divergence, eps)
        z, log_det, nfe = moved.z, log_det + moved.log_det, nfe + moved.nfe
    return z, log_det, nfe


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_block_of_networks_is_a_chain_of_blocks(divergence, reverse, count, method):
    parts = nets(count)
    z = points(parts[0])
    eps = divergence.draw_probe(z, torch.Generator().manual_seed(0))
    each = SolverConfig(method, 4, rtol=1e-10, atol=1e-10)
    whole = Block(PiecewiseVelocity(parts), replace(each, steps=4 * count))
    moved = whole.transport(z, reverse, divergence, eps)
    end, log_det, nfe = chained(parts, z, reverse, divergence, eps, each)
    near = 1e-12 if method == "rk4" else 1e-7
    torch.testing.assert_close(moved.z, end, rtol=near, atol=near)
    torch.testing.assert_close(moved.log_det, log_det, rtol=near, atol=near)
    if method == "rk4":
        assert moved.nfe == nfe == 16 * count


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_gradients_are_those_of_the_chain(adjoint, method):
    divergence, gradients = Hutchinson(), []
    near = 1e-4 if adjoint or method == "dopri5" else 1e-9  # equal up to the solver's error
    for way in ("whole", "chain"):
        parts = nets(2)
        z = points(parts[0]).requires_grad_()
        eps = divergence.draw_probe(z.detach(), torch.Generator().manual_seed(0))
        solver = SolverConfig(method, 10, 1e-9, 1e-9, adjoint=adjoint and way == "whole")
        if way == "whole":
            moved = Block(PiecewiseVelocity(parts), replace(solver, steps=20)).transport(
                z, divergence=divergence, eps=eps
            )
            end, log_det = moved.z, moved.log_det
        else:
            end, log_det, _ = chained(parts, z, False, divergence, eps, solver)
        (end.square().sum() + log_det.sum()).backward()
        gradients.append([z.grad, *(p.grad for part in parts for p in part.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=near, atol=near)


def test_inverse():
    block = Block(PiecewiseVelocity(nets(3)), FINE)
    z = points(block.velocity)
    there = block.transport(z, divergence=Exact())
    back = block.transport(there.z, reverse=True, divergence=Exact())
    torch.testing.assert_close(back.z, z, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(back.log_det, -there.log_det, rtol=1e-7, atol=1e-8)


def shuttle() -> PiecewiseVelocity:
    """v = 1 in the first half and v = −1 in the second."""
    there, back = affine(2), affine(2)
    with torch.no_grad():
        for part, sign in ((there, 1.0), (back, -1.0)):
            part.matrix.zero_()
            part.offset.fill_(sign)
    return PiecewiseVelocity([there, back])


@pytest.mark.parametrize("reverse", [False, True])
def test_no_step_straddles_the_jump(reverse):
    """A field that is constant on each half: exact by Euler on two steps, easy for dopri5."""
    z = torch.zeros(1, 2, dtype=torch.float64)
    euler = Block(shuttle(), SolverConfig("euler", 2)).transport(z, reverse)
    assert euler.nfe == 2
    assert torch.equal(euler.z, z)
    adaptive = Block(shuttle(), SolverConfig("dopri5", rtol=1e-12, atol=1e-12))
    torch.testing.assert_close(adaptive.transport(z, reverse).z, z)
    alone = Block(affine(2), adaptive.solver)
    with torch.no_grad():
        alone.velocity.matrix.zero_()
    assert adaptive.transport(z, reverse).nfe <= 2 * alone.transport(z, reverse).nfe


@pytest.mark.parametrize(("count", "steps", "better"), [(2, 3, 4), (2, 1, 2), (3, 4, 6)])
def test_a_grid_that_straddles_a_jump_is_refused(count, steps, better):
    parts = nets(count)
    message = rf"a grid of {steps} steps .* take {better}, or an adaptive"
    with pytest.raises(FlowError, match=message):
        Block(PiecewiseVelocity(parts), SolverConfig("rk4", steps))
    block = Block(PiecewiseVelocity(parts), FINE)
    with pytest.raises(FlowError, match=f"take {better}"):
        block.transport(points(parts[0]), solver=SolverConfig("rk4", steps))


def test_failure_names_the_time_of_the_block():
    def field(t, z):
        return torch.where(t > 0.7, torch.full_like(z, float("nan")), z)

    block = Block(PiecewiseVelocity([affine(2), Formula(field)]), SolverConfig("euler", 20))
    with pytest.raises(SolveError, match="NaN") as failure:
        block.transport(torch.ones(1, 2, dtype=torch.float64))
    assert failure.value.t == pytest.approx(0.75)


def test_individual_times_agree_with_the_shared_time():
    field = PiecewiseVelocity(nets(3))
    z = points(field, batch=6)
    times = torch.tensor([0.0, 0.2, 0.4, 0.5, 0.9, 1.0], dtype=z.dtype)
    parts = list(field.nets)
    alone = torch.cat([field(time, z[k : k + 1]) for k, time in enumerate(times)])
    torch.testing.assert_close(field(times, z), alone)
    for row, part in enumerate((0, 0, 1, 1, 2, 2)):
        one = slice(row, row + 1)
        torch.testing.assert_close(alone[one], parts[part](times[row], z[one]))


@pytest.mark.parametrize("count", [2, 3])
def test_copies_of_a_network_are_its_field(count):
    one = Coupled((3,), 0)
    solver = SolverConfig("rk4", 4 * count)
    copies = [copy.deepcopy(one) for _ in range(count)]
    whole, z = Block(PiecewiseVelocity(copies), solver), points(one)
    for reverse in (False, True):
        actual = whole.transport(z, reverse, Exact(), solver=solver)
        expected = Block(one).transport(z, reverse, Exact(), solver=solver)
        torch.testing.assert_close(actual.z, expected.z, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(actual.log_det, expected.log_det, rtol=1e-12, atol=1e-12)


def test_the_pieces_are_the_networks():
    field = PiecewiseVelocity(nets(2))
    assert [(p.start, p.end) for p in field.smooth_pieces()] == [(0.0, 0.5), (0.5, 1.0)]
    assert [p.field for p in field.smooth_pieces()] == list(field.nets)


def test_a_batch_may_leave_a_network_without_a_sample():
    """Its gradient is zero, not missing: on many processes all must take the same step."""
    config = VelocityConfig("unet", width=8, depth=1, heads=2, nets=2, zero_init=False)
    field = make_velocity(config, (2, 8, 8), torch.Generator().manual_seed(0))
    z = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    field(torch.tensor([0.1, 0.2, 0.4]), z).square().sum().backward()
    sums = [sum(float(p.grad.abs().sum()) for p in net.parameters()) for net in field.nets]
    assert sums[0] > 0 and sums[1] == 0


def test_directional_derivatives():
    field = PiecewiseVelocity(nets(2))
    z, t = points(field), torch.tensor(0.7, dtype=torch.float64)
    tangents = torch.randn(2, *z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(0))
    v, moved = field.directional(t, z, tangents)
    torch.testing.assert_close(v, field(t, z))
    jacobian = field.nets[1].jacobian(0.7, z)
    torch.testing.assert_close(moved, torch.einsum("bij,nbj->nbi", jacobian, tangents))


def flow_of(count: int, steps: int, blocks: int = 1) -> Flow:
    spec = BlockSpec(replace(MLP, nets=count), SolverConfig("rk4", steps), h=0.5)
    flow = fresh_flow((2,), [spec] * blocks).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(1.5)
    return flow


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("count", "c"), [(2, 2), (2, 4), (3, 2), (2, 3), (4, 2)])
def test_refined_flow_is_the_parent_map_and_holds_no_idle_network(count, c):
    flow = flow_of(count, 12, blocks=2)
    refined = refine_blocks(flow, c)
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(refined.encode(z, FINE), flow.encode(z, FINE), rtol=1e-8, atol=1e-8)
    if 12 // c % count == 0 or c % count == 0:  # the same grid
        torch.testing.assert_close(refined.encode(z), flow.encode(z), rtol=1e-11, atol=1e-11)
    one = parameters(flow[0]) // count
    used = [{j for j in range(count) if j * c < (i + 1) * count and (j + 1) * c > i * count}
            for i in range(c)]  # fmt: skip
    assert [parameters(block) for block in refined] == [one * len(part) for part in used] * 2
    assert torch.equal(rebuilt(refined).encode(z), refined.encode(z))


def test_refinement_nests_and_rounds_the_grid_up():
    flow = flow_of(2, 6)
    twice = refine_blocks(refine_blocks(flow, 3), 2)
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(twice.encode(z, FINE), flow.encode(z, FINE), rtol=1e-8, atol=1e-8)
    # the middle third of two networks holds the switch in its middle
    odd = refine_blocks(flow_of(2, 4), 3)
    assert [spec.solver.steps for spec in odd.specs] == [2, 2, 2]
    assert [spec.solver.steps for spec in refine_blocks(flow_of(2, 2), 3).specs] == [1, 2, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_networks_start_apart_and_as_the_identity(kind):
    config = VelocityConfig(kind, width=8, depth=1, heads=2, nets=2)
    field = make_velocity(config, (2, 4, 4), torch.Generator().manual_seed(0))
    z = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(Block(field)(z), z)
    single = make_velocity(replace(config, nets=1), (2, 4, 4), torch.Generator().manual_seed(0))
    assert parameters(field) == 2 * parameters(single)
    if kind != "linear":  # whose weights all start at zero
        first, second = (torch.cat([p.flatten() for p in net.parameters()]) for net in field.nets)
        assert not torch.equal(first, second)


def test_the_weights_of_a_child_are_those_of_the_inner_network():
    names = set(refine_blocks(flow_of(1, 4), 2).state_dict())
    assert "blocks.1.velocity.inner.first.weight" in names


def test_slices_of_slices_are_slices():
    field = Coupled((3,))
    z, t = points(field), torch.tensor(0.3, dtype=torch.float64)
    twice = TimeSlice(TimeSlice(field, 0.5, 0.5), 0.5, 0.5)
    torch.testing.assert_close(twice(t, z), TimeSlice(field, 0.75, 0.25)(t, z))
    four = PiecewiseVelocity([copy.deepcopy(field) for _ in range(4)])
    pieces = TimeSlice(four, 0.125, 0.5).smooth_pieces()
    assert [(p.start, p.end) for p in pieces] == [(0, 0.25), (0.25, 0.75), (0.75, 1)]


def test_less_than_one_network_is_refused():
    with pytest.raises(FlowError, match="nets must be at least 1, not 0"):
        VelocityConfig(nets=0)
