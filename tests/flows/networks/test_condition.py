"""Classes: every class has a flow of its own, with its own inverse, log-det and density."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.autograd.functional import jacobian

from flows.block import Block
from flows.errors import FlowError
from flows.likelihood import log_prob
from flows.networks.condition import ClassConditioned, Condition, bind
from flows.networks.config import VelocityConfig
from flows.networks.registry import KINDS, make_velocity
from flows.objectives.coupling import optimal_pairing
from flows.objectives.losses import jko_loss
from flows.solving.estimators import Exact, FiniteDifference, Hutchinson
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec
from tests.flows.problems import Affine, affine, fresh_flow, points, regression

SMALL = VelocityConfig(
    width=8, depth=2, time_features=4, heads=2, classes=3, zero_init=False
)
FINE = SolverConfig("dopri5", rtol=1e-9, atol=1e-9)
SHAPES = {"conv": (2, 4, 4), "unet": (2, 4, 4), "dit": (2, 4, 4)}
LABELS = torch.tensor([0, 2, 1, 2, 3, 0])  # 3 is no class


def build(kind="mlp", shape=None, **changes):
    shape = shape or SHAPES.get(kind, (3,))
    config = replace(SMALL, kind=kind, **changes)
    net = make_velocity(config, shape, torch.Generator().manual_seed(0)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "modulation" in name:  # zero at birth
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return net


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


T = torch.tensor(0.4, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_follows_the_field_of_its_class(kind):
    net = build(kind)
    z = points(net, batch=len(LABELS))
    together = net(T, z, LABELS)
    times = torch.linspace(0, 1, len(LABELS), dtype=torch.float64)
    apart = net(times, z, LABELS)
    for row, label in enumerate(LABELS):
        one = slice(row, row + 1)
        torch.testing.assert_close(together[one], net(T, z[one], label[None]))
        torch.testing.assert_close(apart[one], net(times[row], z[one], label[None]))
    same = z[:1].expand(4, *z.shape[1:])
    by_class = net(T, same, torch.arange(4)).flatten(1)
    assert torch.cdist(by_class, by_class)[~torch.eye(4).bool()].min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_without_classes_is_what_it_was(kind):
    plain = make_velocity(replace(SMALL, kind=kind, classes=0), SHAPES.get(kind, (3,)))
    assert not any("label" in name for name in plain.state_dict())
    zero = make_velocity(replace(SMALL, kind=kind, zero_init=True), SHAPES.get(kind, (3,)))
    z = points(zero).float()
    assert torch.equal(zero(T.float(), z, torch.zeros(len(z), dtype=torch.long)), 0 * z)


@pytest.mark.parametrize("w", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("kind", ["mlp", "resmlp"])
def test_guidance_extrapolates_the_field_and_its_derivatives(kind, w):
    net, z, tangents = build(kind), draw(6, 3), draw(2, 6, 3)
    field = bind(net, Condition(LABELS, w), z)
    null = torch.full_like(LABELS, 3)

    def expected(x):
        return net(T, x, null) + w * (net(T, x, LABELS) - net(T, x, null))

    torch.testing.assert_close(field(T, z), expected(z))
    v, moved = field.directional(T, z, tangents)
    torch.testing.assert_close(v, expected(z))
    rows = torch.stack([jacobian(expected, z)[i, :, i] for i in range(6)])
    torch.testing.assert_close(moved, torch.einsum("bij,nbj->nbi", rows, tangents))


@pytest.mark.parametrize("nets", [1, 2])
@pytest.mark.parametrize(
    "divergence",
    [Exact(), Hutchinson(probes=2), Hutchinson(mode="jvp"), FiniteDifference(0.02, 2)],
)
@pytest.mark.parametrize("w", [1.0, 1.5])
def test_classes_in_one_batch_are_as_each_alone(divergence, nets, w):
    block, z = Block(build(nets=nets), SolverConfig("rk4", 2)), draw(6, 3)
    eps = divergence.draw_probe(z, torch.Generator().manual_seed(2))
    moved = block.transport(z, False, divergence, eps, condition=Condition(LABELS, w))
    for row in range(6):
        one = slice(row, row + 1)
        probe = None if eps is None else eps[:, one]
        condition = Condition(LABELS, w).rows(row, row + 1)
        alone = block.transport(z[one], False, divergence, probe, condition=condition)
        torch.testing.assert_close(moved.z[one], alone.z)
        torch.testing.assert_close(moved.log_det[one], alone.log_det)


@pytest.mark.parametrize("w", [1.0, 1.5])
@pytest.mark.parametrize(("kind", "nets"), [("mlp", 1), ("mlp", 2), ("resmlp", 1)])
def test_inverse_and_log_det_of_each_class(kind, nets, w):
    block = Block(build(kind, nets=nets), SolverConfig("dopri5", rtol=1e-7, atol=1e-7))
    z, condition = draw(6, 3), Condition(LABELS, w)
    there = block.transport(z, divergence=Exact(), condition=condition)
    back = block.transport(there.z, True, Exact(), condition=condition)
    torch.testing.assert_close(back.z, z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back.log_det, -there.log_det, rtol=1e-5, atol=1e-5)
    for row in range(1, 4):
        own = condition.rows(row, row + 1)
        matrix = jacobian(lambda x, own=own: block(x[None], own)[0], z[row])
        log_det = torch.linalg.slogdet(matrix)[1]
        torch.testing.assert_close(there.log_det[row], log_det, rtol=1e-4, atol=1e-4)


def linear(shape=(3,)):
    """A block v = A z + b + e_y, and the exact problem of a label and a guidance."""
    net, problem = build("linear", shape), affine(shape[0])
    with torch.no_grad():
        net.affine.weight.copy_(problem.matrix)
        net.affine.bias.copy_(problem.offset)
    table = net.label.embedding.weight.detach()

    def exact(label, w):
        shift = table[3] + w * (table[label] - table[3])
        return Affine(problem.matrix.detach(), problem.offset.detach() + shift)

    return net, exact


@pytest.mark.parametrize("w", [1.0, 0.0, 3.0])
def test_a_linear_field_has_the_exact_map_of_each_class(w):
    net, exact = linear()
    z = draw(6, 3)
    moved = Block(net, FINE).transport(z, divergence=Exact(), condition=Condition(LABELS, w))
    for row, label in enumerate(LABELS.tolist()):
        expected = exact(label, w).exact(z[row : row + 1])
        torch.testing.assert_close(moved.z[row : row + 1], expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moved.log_det, exact(0, w).exact_log_det(z), rtol=1e-6, atol=1e-7)


def test_the_density_of_each_class_is_its_gaussian():
    net, exact = linear()
    flow = fresh_flow((3,), [BlockSpec(replace(SMALL, kind="linear"), FINE)] * 2).double()
    for block in flow:
        block.load_state_dict({f"velocity.{k}": v for k, v in net.state_dict().items()})
    assert flow.classes == 3
    z = draw(6, 3)
    actual = log_prob(flow, z, solver=FINE, chunk=4, condition=Condition(LABELS))
    for row, label in enumerate(LABELS.tolist()):
        step = exact(label, 1.0)
        z_1 = step.exact(z[row : row + 1])
        end, log_det = step.exact(z_1), 2 * step.exact_log_det(z_1)
        normal = torch.distributions.Normal(0.0, 1.0).log_prob(end).sum(dim=1)
        torch.testing.assert_close(actual.value[row : row + 1], normal + log_det)
        torch.testing.assert_close(
            flow.encode(z, FINE, 4, Condition(LABELS))[row : row + 1], end, rtol=1e-6, atol=1e-7
        )
    assert actual.inversion_error.max() < 1e-6


def test_losses_are_those_of_the_bound_field():
    net, z = build(), draw(6, 3)
    bound = ClassConditioned(net, LABELS)
    drawn = [torch.Generator().manual_seed(3) for _ in range(2)]
    given = regression(net, z, 0.3, drawn[0], labels=LABELS)
    torch.testing.assert_close(given, regression(bound, z, 0.3, drawn[1]))
    whole = jko_loss(Block(net), z, 0.5, Exact(), labels=LABELS).total
    parts = [
        jko_loss(Block(net), z[k : k + 1], 0.5, Exact(), labels=LABELS[k : k + 1]).total
        for k in range(6)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    whole.backward()
    assert (net.label.embedding.weight.grad.abs().sum(dim=1) > 0).all()


def test_pairs_stay_within_their_class():
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 2])
    z, target = draw(2, 7, 3)
    order = optimal_pairing(z, target, labels)
    assert torch.equal(order.sort().values, torch.arange(7))
    assert torch.equal(labels[order], labels)
    for label in range(3):
        rows = (labels == label).nonzero()[:, 0]
        assert torch.equal(
            target[order[rows]], target[rows][optimal_pairing(z[rows], target[rows])]
        )


def test_descriptions():
    plain = BlockSpec(replace(SMALL, classes=0, class_dropout=0.5))
    assert not {"classes", "class_dropout"} & set(plain.to_dict()["velocity"])
    spec = BlockSpec(replace(SMALL, class_dropout=0.25))
    again = BlockSpec.from_dict(spec.to_dict())
    assert again == spec and again.velocity.class_dropout == 0.25
    # the dropout is not of the network: weights fit whatever it was
    assert spec.velocity == SMALL and spec.velocity != plain.velocity


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda b, z: b.transport(z), "trained with 3 classes; give the class"),
        (
            lambda b, z: b.transport(z, condition=Condition(LABELS[:2])),
            "one int64 label for each sample",
        ),
        (lambda b, z: b.transport(z, condition=Condition(LABELS + 1)), "between 0 and 3"),
        (lambda b, z: b.transport(z, condition=Condition(LABELS - 1)), "found -1 to 2"),
        (lambda b, z: Condition(LABELS, -0.5), "not negative, found -0.5"),
        (lambda b, z: Condition(LABELS, float("nan")), "found nan"),
        (lambda b, z: b.velocity(T, z), "needs labels"),
        (lambda b, z: build(classes=0)(T, z, LABELS), "needs no labels"),
        (
            lambda b, z: Block(affine()).transport(z, condition=Condition(LABELS)),
            "trained without classes",
        ),
        (lambda b, z: VelocityConfig(classes=-1), "classes must be at least 0"),
        (lambda b, z: VelocityConfig(class_dropout=1.0), r"class_dropout must lie in \[0, 1\)"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(FlowError, match=words):
        call(Block(build()), draw(6, 3))


@pytest.mark.parametrize("labels", [9, 4])
def test_there_are_as_many_labels_as_samples(labels):
    """Also where both are cut into chunks: the first chunks of each would go together."""
    config = replace(SMALL, kind="mlp")
    flow = fresh_flow((3,), [BlockSpec(velocity=config)])
    z, condition = torch.randn(6, 3), Condition(torch.zeros(labels, dtype=torch.int64))
    for call in (flow.encode, partial(log_prob, flow)):
        with pytest.raises(FlowError, match=rf"each sample, \(6,\), found .* \({labels},\)"):
            call(z, chunk=2, condition=condition)
