"""Optimal pairs against orders that are known."""

from __future__ import annotations

import itertools

import pytest
import torch

from flows.errors import FlowError
from flows.objectives.coupling import optimal_pairing


def test_a_permuted_set_is_paired_with_itself():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(64, 2, 3, 3, generator=generator)
    order = torch.randperm(64, generator=generator)
    shuffled = z[order]
    assert torch.equal(shuffled[optimal_pairing(z, shuffled)], z)
    # small moves, none as long as half the distance to a neighbour, change nothing
    moved = shuffled + 0.01 * torch.randn(shuffled.shape, generator=generator)
    assert torch.equal(optimal_pairing(z, moved), order.argsort())


def test_no_order_of_five_costs_less():
    generator = torch.Generator().manual_seed(1)
    z, target = torch.randn(2, 5, 3, generator=generator)

    def cost(order: tuple[int, ...] | list[int]) -> float:
        return (z - target[list(order)]).square().sum().item()

    least = min(cost(order) for order in itertools.permutations(range(5)))
    assert cost(optimal_pairing(z, target).tolist()) == pytest.approx(least)


def test_on_a_line_pairs_keep_their_order():
    """In one dimension the optimal map is monotone."""
    z, target = torch.randn(2, 200, 1, generator=torch.Generator().manual_seed(2))
    paired = target[optimal_pairing(z, target)]
    assert torch.equal(paired[z.flatten().argsort()].flatten(), target.flatten().sort().values)


def test_what_cannot_be_paired():
    z = torch.zeros(3, 2)
    with pytest.raises(FlowError, match="one shape"):
        optimal_pairing(z, torch.zeros(4, 2))
    with pytest.raises(FlowError, match="not finite"):
        optimal_pairing(z, torch.full((3, 2), float("nan")))
