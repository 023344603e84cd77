"""Steps of Muon and Adam, against PyTorch's optimisers and the singular values of the step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pipeline.optim import optimisers
from pipeline.optim.learning_rate import set_learning_rate
from pipeline.optim.optimisers import MuonAdam, make_optimizer

BETAS = (0.9, 0.99)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 16, 5),
    )  # fmt: skip


def steps(net: nn.Module, optimizer: torch.optim.Adam | MuonAdam, numbers: range) -> None:
    for number in numbers:
        x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()


@pytest.fixture(autouse=True, params=["bfloat16", "float32"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Muon on a processor with and without bfloat16."""
    monkeypatch.setattr(optimisers, "has_bfloat16", lambda device: request.param == "bfloat16")
    return str(request.param)


def test_weights_step_by_muon_and_the_rest_by_adam(precision: str) -> None:
    """Each group alone, by PyTorch's optimiser from the same gradients, moves alike."""
    start = network()
    net = copy.deepcopy(start)
    steps(net, MuonAdam(net, 0.01, BETAS), range(1))
    steps(start, torch.optim.SGD(start.parameters(), 0.0), range(1))  # the gradients alone
    for name, parameter in start.named_parameters():
        weight = name in ("0.weight", "4.weight")
        alone = nn.Parameter(parameter.detach().flatten(1) if weight else parameter.detach())
        assert parameter.grad is not None
        before = alone.detach().clone()
        alone.grad = parameter.grad.view_as(alone)
        if weight:
            adjusted = "match_rms_adamw"
            torch.optim.Muon([alone], 0.01, weight_decay=0.0, adjust_lr_fn=adjusted).step()
        else:
            torch.optim.Adam([alone], 0.01, BETAS).step()
        moved = net.get_parameter(name)
        if weight and precision == "float32":
            error = (moved.flatten(1) - alone).norm() / (alone - before).norm()
            assert 0 < error < 0.04, name  # PyTorch rounds to eight bits
        else:
            assert torch.equal(moved.flatten(), alone.flatten()), name


def test_a_step_of_muon_is_nearly_orthogonal() -> None:
    """The step of a (5, 128) matrix has singular values near 0.2 · lr · √128."""
    net = network()
    before = copy.deepcopy(net)
    steps(net, MuonAdam(net, 0.01, BETAS), range(1))
    last, old = net[4], before[4]
    assert isinstance(last, nn.Linear) and isinstance(old, nn.Linear)
    values = torch.linalg.svdvals(last.weight - old.weight) / (0.2 * 0.01 * 128**0.5)
    assert values.min() > 0.5 and values.max() < 1.4


def test_a_resumed_training_equals_an_uninterrupted_one() -> None:
    whole, half = network(), network()
    steps(whole, MuonAdam(whole, 0.01, BETAS), range(6))
    first = MuonAdam(half, 0.01, BETAS)
    steps(half, first, range(3))
    resumed = network()
    second = MuonAdam(resumed, 0.5, BETAS)
    resumed.load_state_dict(half.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(resumed, second, range(3, 6))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_frozen_parameters_do_not_change(kind: str) -> None:
    net = network()
    net[0].requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    steps(net, make_optimizer(kind, net, 0.01), range(2))
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("0."), name


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_a_learning_rate_of_zero_changes_nothing(kind: str) -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    optimizer = make_optimizer(kind, net, 0.01)
    set_learning_rate(optimizer, 0.0)
    steps(net, optimizer, range(2))
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_weights_that_are_not_contiguous_raise() -> None:
    net = network().to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="expected contiguous memory"):
        MuonAdam(net, 0.01, BETAS)


def test_an_unknown_kind_raises() -> None:
    with pytest.raises(ValueError, match="is 'sgd'; expected one of adam, muon"):
        make_optimizer("sgd", network(), 0.01)


def test_a_network_of_matrices_alone_or_of_none() -> None:
    """Muon moves what it has, and Adam the rest, where the other has nothing."""
    torch.manual_seed(0)
    for net in (nn.Linear(3, 3, bias=False), nn.LayerNorm(3)):
        before = [parameter.detach().clone() for parameter in net.parameters()]
        optimizer = MuonAdam(net, 0.01, BETAS)
        net(torch.randn(4, 3)).pow(3).sum().backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        moved = zip(net.parameters(), before, strict=True)
        assert not any(torch.equal(parameter, old) for parameter, old in moved)


def test_the_momentum_is_that_of_pytorch() -> None:
    """Several steps in float32 move a matrix as those of PyTorch, up to its rounding."""
    start = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    moved = []
    for kind in (torch.optim.Muon, optimisers.Float32Muon):
        weight, rng = nn.Parameter(start.clone()), torch.Generator().manual_seed(1)
        muon = kind([weight], 0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        for _ in range(4):
            weight.grad = torch.randn(6, 40, generator=rng)
            muon.step()
        moved.append(weight.detach() - start)
    assert (moved[1] - moved[0]).norm() < 0.04 * moved[0].norm()
