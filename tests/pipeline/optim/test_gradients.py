"""Averaged gradients against the gradient of the whole batch."""

from __future__ import annotations

import copy

import torch
from torch import nn

from pipeline.optim.gradients import average_gradients, fill_gradients
from tests.ranks import Rank, mean_of


def test_uneven_ranks_give_the_gradient_of_the_whole_batch() -> None:
    """Five samples on two ranks; what the ranks reduce has the whole batch's values as mean."""
    torch.manual_seed(0)
    whole, x = nn.Linear(3, 2), torch.randn(5, 3)
    loss = whole(x).square().mean()
    ranks = [Rank(0, 2), Rank(1, 2)]
    for rank in ranks:
        own, share = copy.deepcopy(whole), x[rank.process_index :: 2]
        part = own(share).square().mean()
        part.backward()
        weight = 2 * len(share) / 5
        average_gradients(rank, own.parameters(), weight, part.detach()[None])  # type: ignore[arg-type]
    loss.backward()
    gradients = [p.grad.flatten() for p in whole.parameters() if p.grad is not None]
    torch.testing.assert_close(mean_of(ranks), torch.cat([*gradients, loss.detach()[None]]))


def test_a_parameter_without_a_gradient_counts_as_zero_and_stays_without() -> None:
    layer = nn.Linear(2, 1)
    layer.bias.requires_grad_(False)
    layer(torch.ones(1, 2)).sum().backward()
    rank = Rank(0, 2)
    average_gradients(rank, layer.parameters(), 1.0, torch.ones(1))  # type: ignore[arg-type]
    assert layer.bias.grad is None
    assert torch.equal(mean_of([rank]), torch.tensor([1.0, 1.0, 0.0, 1.0]))


def test_the_reduced_values_become_the_gradients() -> None:
    class Doubling(Rank):
        def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
            return 2 * super().reduce(tensor, reduction)

    layer = nn.Linear(2, 1, bias=False)
    layer(torch.ones(1, 2)).sum().backward()
    loss = average_gradients(Doubling(0, 2), layer.parameters(), 0.5, torch.full((1,), 3.0))  # type: ignore[arg-type]
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, torch.ones(1, 2)) and loss.item() == 3.0


def test_gradients_that_only_other_ranks_have_become_zero() -> None:
    layers = [nn.Linear(2, 1, bias=False) for _ in range(3)]
    layers[0](torch.ones(1, 2)).sum().backward()
    parameters = [layer.weight for layer in layers]
    fill_gradients(Rank(0, 2, [True, True, False]), parameters)  # type: ignore[arg-type]
    own, missing, of_none = (parameter.grad for parameter in parameters)
    assert own is not None and torch.equal(own, torch.ones(1, 2))
    assert missing is not None and torch.equal(missing, torch.zeros(1, 2))
    assert of_none is None
