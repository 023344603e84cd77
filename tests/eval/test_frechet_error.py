"""The standard error of FID against the spread of FID over repeated draws."""

from __future__ import annotations

import numpy as np
import pytest

from eval.distances import frechet_distance
from eval.frechet_error import frechet_error
from tests.eval.moments import stats_from

DIM = 12


def draw(rng, n, scale, shift):
    return rng.standard_t(8, size=(n, DIM)) * np.linspace(scale, 1, DIM) + shift


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("n", [200, 10])
def test_the_error_is_the_spread_of_repeated_draws(n, fixed):
    """Twelve dimensions; ten images have a singular covariance."""
    rng = np.random.default_rng(0)
    reference = draw(rng, 4000, 0.5, 0.3)
    values, errors = [], []
    for _ in range(200):
        a = draw(rng, n, 2, 0)
        b = None if fixed else draw(rng, 2 * n, 0.5, 0.3)
        stats = stats_from(a), stats_from(reference if b is None else b)
        values.append(frechet_distance(*stats))
        errors.append(frechet_error(a, b, *stats))
    assert 0.8 < np.mean(errors) / np.std(values, ddof=1) < 1.35


def test_the_error_shrinks_with_n_and_does_not_depend_on_the_order_of_the_sets():
    rng = np.random.default_rng(1)
    a, b = draw(rng, 3000, 2, 0), draw(rng, 2000, 0.5, 0.3)
    one = frechet_error(a, b, stats_from(a), stats_from(b))
    assert frechet_error(b, a, stats_from(b), stats_from(a)) == pytest.approx(one, rel=1e-6)
    few = frechet_error(a[:300], b[:200], stats_from(a[:300]), stats_from(b[:200]))
    assert 2 < few / one < 5  # 10 ** 0.5


def test_equal_images_have_no_error():
    a = np.ones((5, DIM))
    assert frechet_error(a, None, stats_from(a), stats_from(a)) == 0
