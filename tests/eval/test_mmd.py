from __future__ import annotations

import numpy as np
import pytest

from eval.mmd import median_distance, mmd


def test_equals_brute_force(monkeypatch):
    monkeypatch.setattr("eval.mmd._CHUNK", 5)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 2)), rng.normal(size=(12, 2)) + 1

    def mean_kernel(a, b, sigma):
        return np.mean([[np.exp(-((p - q) ** 2).sum() / (2 * sigma**2)) for q in b] for p in a])

    pool = np.concatenate([x, y])
    pairs = [np.linalg.norm(pool[i] - pool[j]) for i in range(21) for j in range(i)]
    for scale in (0.1, 1.0):
        actual = mmd(x, y, scale=scale)
        sigma = scale * np.median(pairs)
        assert actual.bandwidth == pytest.approx(sigma)
        expected = (mean_kernel(x, x, sigma) + mean_kernel(y, y, sigma)
                    - 2 * mean_kernel(x, y, sigma))  # fmt: skip
        assert actual.value == pytest.approx(expected, rel=1e-10)


def test_two_points_in_closed_form():
    # Samples {0, 0} and {1, 1}: MMD² = 2 - 2 exp(-1 / 2σ²), where the median distance is 1.
    actual = mmd(np.zeros((2, 1)), np.ones((2, 1)), scale=2.0)
    assert actual.value == pytest.approx(2 - 2 * np.exp(-1 / 8), rel=1e-12)
    actual = mmd(np.zeros((2, 1)), 3 * np.ones((2, 1)), bandwidth=1.0)
    assert actual.value == pytest.approx(2 - 2 * np.exp(-9 / 2), rel=1e-12)
    assert actual.bandwidth == 1


def test_median_of_three_points():
    import torch

    assert median_distance(torch.tensor([[0.0], [1.0], [5.0]]).double()) == 4.0


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_threshold_keeps_its_level_and_has_power(scale):
    rng = np.random.default_rng(2)
    same, apart = 0, 0
    for trial in range(100):
        x, y = rng.normal(size=(80, 2)), rng.normal(size=(60, 2))
        null = mmd(x, y, scale=scale, permutations=200, seed=trial)
        same += null.value > null.threshold
        far = mmd(x, 1.5 * y + 0.6, scale=scale, permutations=200, seed=trial)
        apart += far.value > far.threshold
    assert 1 <= same <= 12  # binomial(100, 0.05): outside with probability 1 %
    assert apart >= 90 if scale == 1 else apart >= 30


def test_bad_input_is_named():
    x = np.random.default_rng(0).normal(size=(5, 2))
    with pytest.raises(ValueError, match="the samples have the shapes"):
        mmd(x, x[:, :1])
    with pytest.raises(ValueError, match="bandwidth is 0.*; expected a positive number"):
        mmd(np.ones((5, 2)), np.ones((5, 2)))
    with pytest.raises(ValueError, match="expected 0 < alpha < 1"):
        mmd(x, x, alpha=1.0)


def test_the_bandwidth_of_many_points_is_that_of_both_samples(monkeypatch):
    monkeypatch.setattr("eval.mmd._MEDIAN_ROWS", 200)
    rng = np.random.default_rng(0)
    x, y = 0.01 * rng.normal(size=(300, 2)), 10 * rng.normal(size=(300, 2))
    bandwidths = [mmd(*pair, permutations=1).bandwidth for pair in ((x, y), (y, x))]
    assert bandwidths == pytest.approx([np.median(bandwidths)] * 2, rel=0.2)
    assert min(bandwidths) > 1  # that of the first sample alone is 0.01


def test_a_lower_level_has_a_higher_threshold():
    x, y = np.random.default_rng(0).normal(size=(2, 40, 2))
    low, usual, high = (mmd(x, y, alpha=alpha).threshold for alpha in (0.01, 0.05, 0.5))
    assert low > usual > high


def test_the_seed_decides_the_divisions():
    x, y = np.random.default_rng(0).normal(size=(2, 40, 2))
    first, again, other = (mmd(x, y, permutations=50, seed=seed) for seed in (1, 1, 2))
    assert first == again and other.value == first.value
    assert other.threshold != first.threshold
