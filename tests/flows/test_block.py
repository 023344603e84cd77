"""The ODE block against exact flows: map, inverse, log-det, order, counting, failures."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
import torch
from torch.autograd.functional import jacobian

from flows.block import Block
from flows.errors import FlowError, SolveError
from flows.networks.config import VelocityConfig
from flows.networks.registry import make_velocity
from flows.solving.estimators import Exact, FiniteDifference, Hutchinson
from flows.solving.solver import FIXED_METHODS, SolverConfig
from tests.flows.problems import (
    PROBLEMS,
    Coupled,
    Cubic,
    Formula,
    Tangent,
    affine,
    block_of,
    points,
)

FINE = {"method": "dopri5", "rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("solver", [FINE, {"method": "rk4", "steps": 60}])
def test_forward_map_and_log_det_are_the_exact_ones(name, solver):
    problem = PROBLEMS[name]()
    z = points(problem)
    moved = block_of(problem, **solver).transport(z, divergence=Exact())
    torch.testing.assert_close(moved.z, problem.exact(z), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moved.log_det, problem.exact_log_det(z), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", PROBLEMS)
def test_reverse_is_the_inverse_and_its_log_det_the_negative(name):
    problem = PROBLEMS[name]()
    z = points(problem)
    block = block_of(problem, **FINE)
    there = block.transport(z, divergence=Exact())
    back = block.transport(there.z, reverse=True, divergence=Exact())
    torch.testing.assert_close(back.z, z, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(back.log_det, -there.log_det, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2)])
def test_log_det_is_that_of_the_map_by_autograd(shape):
    block = block_of(Coupled(shape), **FINE)
    z = points(block.velocity, batch=3)
    moved = block.transport(z, divergence=Exact())
    for index in range(3):
        derivative = jacobian(lambda x: block(x[None])[0], z[index])
        matrix = derivative.reshape(block.velocity.dim, block.velocity.dim)
        sign, log_det = torch.linalg.slogdet(matrix)
        assert sign > 0
        torch.testing.assert_close(moved.log_det[index], log_det, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4)]
)
@pytest.mark.parametrize("reverse", [False, True])
def test_convergence_order_by_regression(method, order, reverse):
    """The slope of log error on log S, of the samples and of the log-det."""
    errors = []
    problem = Tangent()
    z = points(problem, scale=0.4)
    target = problem.exact(z)
    start, end = (target, z) if reverse else (z, target)
    log_det = problem.exact_log_det(z) * (-1 if reverse else 1)
    steps = torch.tensor([4, 6, 8, 12, 16])
    for count in steps.tolist():
        with torch.no_grad():
            moved = block_of(problem, method, count).transport(start, reverse, Exact())
        errors.append(torch.stack([(moved.z - end).norm(), (moved.log_det - log_det).norm()]))
    x, y = steps.double().log(), torch.stack(errors).log()
    x = (x - x.mean())[:, None]
    slope = (x * y).sum(dim=0) / x.square().sum()
    assert (-slope).tolist() == pytest.approx([order, order], abs=0.2)


@pytest.mark.parametrize(("method", "stages"), FIXED_METHODS.items())
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reverse", [False, True])
def test_exactly_s_sub_intervals_are_taken(method, stages, steps, dtype, reverse):
    times = []

    def field(t, z):
        times.append(float(t))
        return -z

    z = torch.ones(1, 2, dtype=dtype)
    moved = block_of(Formula(field), method, steps).transport(z, reverse=reverse)
    assert moved.nfe == len(times) == stages * steps
    starts = sorted(times[::stages], reverse=reverse)
    exact = [(1 - k / steps) if reverse else k / steps for k in range(steps)]
    assert starts == pytest.approx(exact, abs=1e-6)


def test_adaptive_solver_counts_and_never_leaves_the_block():
    times = []

    def field(t, z):
        times.append(float(t))
        return -z

    for reverse in (False, True):
        times.clear()
        moved = block_of(Formula(field), "dopri5").transport(torch.ones(1, 2), reverse=reverse)
        assert moved.nfe == len(times)
        assert min(times) >= 0
        assert max(times) <= 1 + 1e-6
        factor = math.exp(1.0 if reverse else -1.0)
        assert moved.z.flatten().tolist() == pytest.approx([factor] * 2, rel=1e-4)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_adjoint_never_leaves_the_block(reverse):
    times = []

    def field(t, z):
        times.append(t.item())
        return -z

    block = block_of(Formula(field), "dopri5", adjoint=True)
    z = torch.ones(1, 2, requires_grad=True)
    moved = block.transport(z, reverse=reverse)
    times.clear()
    moved.z.sum().backward()
    assert len(times) > 6
    assert min(times) >= -1e-6
    assert max(times) <= 1 + 1e-6


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(), FiniteDifference(probes=2)])
@pytest.mark.parametrize(
    ("reverse", "solver"),
    [(False, {"steps": 20}), (True, {"method": "dopri5", "rtol": 1e-8, "atol": 1e-8})],
)
def test_adjoint_gradients_agree_with_backpropagation(divergence, reverse, solver):
    gradients = []
    for adjoint in (False, True):
        velocity = Coupled((3,))
        block = block_of(velocity, **solver, adjoint=adjoint)
        z = points(velocity).requires_grad_()
        eps = divergence.draw_probe(z.detach(), torch.Generator().manual_seed(3))
        moved = block.transport(z, reverse, divergence, eps)
        (moved.z.square().sum() + moved.log_det.sum()).backward()
        gradients.append([z.grad, velocity.inner.grad, velocity.outer.grad])
    for direct, adjoint in zip(*gradients, strict=True):
        torch.testing.assert_close(direct, adjoint, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_log_det_gradient_against_finite_differences(mode):
    velocity = Coupled((3,))
    z = points(velocity)
    divergence = Hutchinson(mode=mode)
    eps = divergence.draw_probe(z, torch.Generator().manual_seed(0))
    block = block_of(velocity, steps=2)

    def log_det() -> torch.Tensor:
        return block.transport(z, divergence=divergence, eps=eps).log_det.sum()

    log_det().backward()
    step = 1e-6
    for index in [(0, 0), (1, 2)]:
        with torch.no_grad():
            velocity.inner[index] += step
            above = log_det()
            velocity.inner[index] -= 2 * step
            below = log_det()
            velocity.inner[index] += step
        slope = (above - below) / (2 * step)
        torch.testing.assert_close(velocity.inner.grad[index], slope, rtol=1e-6, atol=1e-8)


def test_probe_is_held_through_the_solve():
    """With one probe, log det of a linear field is εᵀAε to rounding, whatever the solver does."""
    problem = affine()
    z = points(problem)
    divergence = Hutchinson(noise="gaussian")
    eps = divergence.draw_probe(z, torch.Generator().manual_seed(5))
    moved = block_of(problem, **FINE).transport(z, divergence=divergence, eps=eps)
    exact = torch.einsum("bi,ij,bj->b", eps[0], problem.matrix, eps[0])
    torch.testing.assert_close(moved.log_det, exact)


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
def test_nan_is_reported_with_its_time(method):
    def field(t, z):
        return torch.where(t > 0.4, torch.full_like(z, float("nan")), -z)

    with pytest.raises(SolveError, match="NaN") as failure:
        block_of(Formula(field), method, 10).transport(torch.ones(3, 2))
    # The first evaluation beyond 0.4; an adaptive step may begin before it.
    assert 0.4 < failure.value.t <= 1
    if method == "euler":
        assert failure.value.t == pytest.approx(0.5)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_blow_up_is_reported(method):
    """dz/dt = z² from 2 is infinite at t = ½."""
    solver = {"method": method, "steps": 64, "blow_up": 1e4}
    with pytest.raises(SolveError, match="blows up") as failure:
        block_of(Formula(lambda t, z: z**2), **solver).transport(torch.full((1, 2), 2.0))
    assert 0.45 < failure.value.t < 0.6


def test_divergence_that_is_not_finite_is_reported():
    field = Formula(lambda t, z: z.abs().sqrt())
    with pytest.raises(SolveError, match="divergence is not finite"):
        block_of(field, "euler", 1).transport(torch.zeros(1, 2), divergence=Exact())


def test_nan_in_the_data_is_reported():
    z = torch.tensor([[0.0, float("nan")]])
    with pytest.raises(SolveError, match="the state is NaN") as failure:
        block_of(affine(2).float()).transport(z)
    assert failure.value.t == 0


_HOPELESS = """
import torch
from flows.block import Block
from flows.solving.solver import SolverConfig
from flows.errors import SolveError
from flows.flow import Flow
from flows.likelihood import log_prob
from flows.networks.base import Velocity
from flows.spec import BlockSpec

assert False, "asserts must be off"
FIELDS = {
    "stiff": lambda t, z: -1e5 * (z - torch.cos(t)),
    "singular": lambda t, z: z.sign() / (0.5 - t),
    "nan": lambda t, z: z * float("nan"),
}

class Field(Velocity):
    def __init__(self, formula):
        super().__init__((2,))
        self.formula = formula

    def forward(self, t, z):
        return self.formula(t, z)

for name, formula in FIELDS.items():
    block = Block(Field(formula), SolverConfig(method="dopri5", max_evaluations=500))
    try:
        block.transport(torch.full((1, 2), 2.0))
    except SolveError as failure:
        print(name, failure.evaluations, failure, sep=" | ")

fields = (lambda t, z: 0 * z, lambda t, z: torch.exp(9 * z))
blocks = [(BlockSpec(), Block(Field(field), SolverConfig(steps=8))) for field in fields]
flow = Flow.from_blocks((2,), blocks)
for way in (flow.encode, lambda z: log_prob(flow, z, solver=SolverConfig("dopri5"))):
    try:
        way(torch.full((3, 2), 2.0))
    except SolveError as failure:
        print(failure)
"""


def test_hopeless_fields_end_in_a_typed_error_with_asserts_off(pytestconfig):
    """torchdiffeq guards itself with asserts, which ``python -O`` removes."""
    run = subprocess.run(
        [sys.executable, "-O", "-c", _HOPELESS],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=pytestconfig.rootpath,
    )
    assert run.returncode == 0, run.stderr
    stiff, singular, nan, *flow = (line.split(" | ") for line in run.stdout.splitlines())
    assert stiff[:2] == ["stiff", "500"]
    assert "more than 500 evaluations" in stiff[2]
    assert re.search(r"at t = 0\.(499\d*|5): the velocity blows up", singular[2])
    assert nan[:2] == ["nan", "1"]
    assert "at t = 0: the velocity is NaN" in nan[2]
    assert len(flow) == 2
    for (line,) in flow:
        assert re.search(r"in block 1 at t = 0(\.\d+)?: the (state|velocity) blows up", line)


def test_float32_tolerances_below_rounding_still_finish():
    block = block_of(Cubic().float(), "dopri5", rtol=1e-12, atol=1e-12)
    z = points(block.velocity).float()
    torch.testing.assert_close(block(z), block.velocity.exact(z), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "rk5"}, "unknown solver 'rk5'"),
        ({"steps": 0}, "steps is 0; expected at least 1"),
        ({"rtol": 0.0}, "rtol is 0.0; expected a positive value"),
        ({"atol": float("nan")}, "atol is nan; expected a positive value"),
        ({"max_evaluations": 0}, "max_evaluations is 0; expected at least 1"),
        ({"steps": 501}, "steps=501 of rk4 takes 2004 evaluations; expected at most 2000"),
    ],
)
def test_solver_settings_out_of_range(changes, words):
    with pytest.raises(FlowError, match=words):
        SolverConfig(**changes)


def test_samples_of_another_shape_are_refused():
    block = Block(make_velocity(VelocityConfig(width=8, depth=1), (3,)))
    with pytest.raises(FlowError, match=r"\(B, 3\).*found \(5, 4\)"):
        block.transport(torch.zeros(5, 4))
    with pytest.raises(FlowError, match="needs its probe"):
        block.transport(torch.zeros(5, 3), divergence=Hutchinson())
