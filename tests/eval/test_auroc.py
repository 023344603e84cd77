"""The AUROC against a count of all pairs, and its interval against resampling."""

from __future__ import annotations

import numpy as np
import pytest

from eval.auroc import auroc


def test_the_area_is_the_share_of_ordered_pairs() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 40), rng.integers(0, 5, 30)
    pairs = (a[:, None] > b).mean() + (a[:, None] == b).mean() / 2
    assert auroc(a, b).value == pytest.approx(pairs)
    assert auroc(b, a).value == pytest.approx(1 - pairs)


def test_the_interval_is_that_of_fresh_samples() -> None:
    """Its half length is 1.96 standard deviations of the area over fresh samples."""
    rng = np.random.default_rng(1)
    areas, halves = [], []
    for _ in range(2000):
        area = auroc(rng.normal(1, 1, 60), rng.normal(0, 1, 80))
        areas.append(area.value)
        halves.append((area.high - area.low) / 2)
    assert np.mean(halves) == pytest.approx(1.96 * np.std(areas), rel=0.1)


def test_separated_scores_have_area_one() -> None:
    area = auroc([3.0, 4.0], [1.0, 2.0])
    assert (area.value, area.low, area.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("outside", [[1.0], [1.0, float("nan")]])
def test_too_few_scores_are_refused(outside: list[float]) -> None:
    with pytest.raises(ValueError, match="expected at least 2 finite"):
        auroc([1.0, 2.0], outside)
