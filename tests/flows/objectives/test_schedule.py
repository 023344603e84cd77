"""Step sizes, stopping, reparameterization and refinement: hand-computed values and invariants."""

from __future__ import annotations

import math

import pytest

from flows.errors import FlowError
from flows.objectives.schedule import (
    gammas,
    refined_steps,
    reparameterize,
    step_sizes,
    stopping_ratio,
)


def test_geometric_steps_are_capped():
    assert step_sizes(0.25, 1.4, 0.6, 5) == pytest.approx([0.25, 0.35, 0.49, 0.6, 0.6])
    assert step_sizes(1.0, 0.5, math.inf, 3) == pytest.approx([1, 0.5, 0.25])
    assert step_sizes(1.0, 2.0, 8.0, 5000)[-1] == 8.0  # 2⁴⁹⁹⁹ would overflow


def test_gammas_end_with_the_free_block():
    assert gammas(0.1, 1.5, 4) == [
        pytest.approx(0.1),
        pytest.approx(0.15),
        pytest.approx(0.225),
        None,
    ]
    assert gammas(0.1, 1.5, 2, free_last=False) == pytest.approx([0.1, 0.15])
    assert gammas(0.1, 1.5, 1) == [None]


def test_stopping_ratio():
    assert stopping_ratio(0.02, 4.0) == pytest.approx(0.005)
    assert stopping_ratio(0.0, 4.0) == 0


def test_reparameterize_by_hand():
    """h = (1, 1), S = (3, 1): half of the arc length, 2, is reached at time ⅔."""
    assert reparameterize([1, 1], [3, 1], eta=1.0) == pytest.approx([2 / 3, 4 / 3])
    assert reparameterize([1, 1], [3, 1], eta=0.5) == pytest.approx([5 / 6, 7 / 6])
    assert reparameterize([1, 1], [3, 1], eta=1.0, h_max=1.2) == pytest.approx([2 / 3, 1.2])


def test_reparameterize_keeps_what_is_already_even():
    h = [0.2, 0.3, 0.7]
    assert reparameterize(h, [2.0, 2.0, 2.0]) == pytest.approx(h)
    assert reparameterize(h, [0.0, 0.0, 0.0]) == pytest.approx(h)
    assert sum(reparameterize(h, [3.0, 1.0, 0.1])) == pytest.approx(sum(h))


def test_reparameterize_converges_to_even_movements_on_a_known_path():
    """Along a path of arc length 1 − e^{−τ} the movements even out, geometrically fast."""
    h = [0.5 * 1.2**k for k in range(6)]
    total = sum(h)

    def movements(steps):
        knots = [sum(steps[:k]) for k in range(len(steps) + 1)]
        return [math.exp(-a) - math.exp(-b) for a, b in zip(knots, knots[1:], strict=False)]

    spreads = []
    for _ in range(25):
        S = movements(h)
        spreads.append(max(S) / min(S))
        h = reparameterize(h, S)
    assert spreads[0] > 5
    assert all(later < earlier for earlier, later in zip(spreads, spreads[1:8], strict=False))
    assert spreads[-1] == pytest.approx(1, abs=1e-3)
    assert sum(h) == pytest.approx(total)


def test_reparameterize_survives_a_block_that_does_not_move():
    new = reparameterize([1.0, 1.0, 1.0], [1.0, 0.0, 1.0], eta=1.0)
    assert all(step > 0 for step in new)
    assert sum(new) == pytest.approx(3)


def test_refine_divides_the_steps():
    assert refined_steps([0.3, 0.8], 2) == pytest.approx([0.15, 0.15, 0.4, 0.4])
    assert refined_steps([0.3], 1) == [0.3]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: step_sizes(0, 1.4, 1, 3), "h0 must be positive"),
        (lambda: step_sizes(0.1, -1, 1, 3), "rho must be positive"),
        (lambda: step_sizes(0.1, 1.4, 0, 3), "h_max must be positive"),
        (lambda: step_sizes(0.1, 1.4, math.nan, 3), "h_max must be positive"),
        (lambda: step_sizes(0.1, 1.4, 1, 0), "blocks must be at least 1"),
        (lambda: step_sizes(0.1, 10.0, math.inf, 1000), "of 1000 steps overflows; .* h_max"),
        (lambda: gammas(0.1, 10.0, 1000), "the last of 999 times γ overflows"),
        (lambda: gammas(0, 1.5, 3), "gamma1 must be positive"),
        (lambda: gammas(0.1, 1.5, 0), "blocks must be at least 1"),
        (lambda: stopping_ratio(-1, 1), "must not be negative"),
        (lambda: stopping_ratio(1, 0), "squared norm must be positive"),
        (lambda: stopping_ratio(math.nan, 1), "must not be negative"),
        (lambda: reparameterize([1.0], [1.0, 2.0]), "1 steps, 2 movements"),
        (lambda: reparameterize([], []), "one movement for each step"),
        (lambda: reparameterize([1.0], [-1.0]), "must not be negative"),
        (lambda: reparameterize([0.0], [1.0]), "h must be positive"),
        (lambda: reparameterize([1.0], [1.0], eta=0), "eta must lie"),
        (lambda: refined_steps([1.0], 0), "c must be at least 1"),
        (lambda: refined_steps([-1.0], 2), "h must be positive"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(FlowError, match=words):
        call()
