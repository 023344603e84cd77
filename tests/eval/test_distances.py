from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from pytorch_fid import fid_score

from eval import distances
from eval.distances import frechet_distance, kid
from eval.gaussian import GaussianStats
from eval.manifolds import manifold_metrics
from tests.eval.moments import stats_from


def pytorch_fid_distance(a, b, monkeypatch):
    """pytorch-fid's function; scipy 1.18 dropped the argument it passes to `sqrtm`."""
    sqrtm = scipy.linalg.sqrtm
    monkeypatch.setattr(fid_score.linalg, "sqrtm",
                        lambda x, disp=True: sqrtm(x) if disp else (sqrtm(x), 0.0))  # fmt: skip
    return fid_score.calculate_frechet_distance(a.mean, a.cov, b.mean, b.cov)


def spread(n, d, seed, shift=0.0):
    """Features with eigenvalues from 1 to 1e-4, as Inception's."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(d, d)))[0]
    return (rng.normal(size=(n, d)) * np.logspace(0, -2, d)) @ basis + shift


@pytest.mark.parametrize(("last", "n"), [(0.25, 100), (0.0, 3)])  # 3 images: rank 2
def test_frechet_of_commuting_gaussians(last, n):
    s, t = np.array([4.0, 1.0, last]), np.array([1.0, 9.0, 2.0])
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    shift = np.array([1.0, -2.0, 0.5])
    a = GaussianStats.from_moments(np.zeros(3), basis * s @ basis.T, n)
    b = GaussianStats.from_moments(shift, basis * t @ basis.T, 100)
    expected = shift @ shift + ((np.sqrt(s) - np.sqrt(t)) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-12)
    assert frechet_distance(b, a) == pytest.approx(expected, abs=1e-12)


def test_frechet_of_gaussians_that_do_not_commute():
    s, t = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    a, b = (GaussianStats.from_moments(np.zeros(2), c, None) for c in (s, t))
    # For 2×2: (tr √M)² = tr M + 2 √det M.
    root = np.sqrt(np.trace(s @ t) + 2 * np.sqrt(np.linalg.det(s @ t)))
    expected = np.trace(s) + np.trace(t) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("n", "m"), [(900, 700), (40, 700), (700, 40), (30, 50)])
def test_frechet_equals_pytorch_fid(n, m, monkeypatch):
    a = stats_from(spread(n, 100, 2))
    b = stats_from(1.3 * spread(m, 100, 3, shift=0.1))
    expected = pytorch_fid_distance(a, b, monkeypatch)
    # sqrtm sums √noise over the null space, so it is the less exact of the two there.
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9 if n > 100 < m else 1e-5)
    unknown = [GaussianStats.from_moments(s.mean, s.cov, None) for s in (a, b)]
    assert frechet_distance(*unknown) == pytest.approx(frechet_distance(a, b), rel=1e-5)


def test_frechet_of_a_set_with_itself_is_zero():
    for n in (20, 300):
        a = stats_from(spread(n, 64, 0))
        assert 0 <= frechet_distance(a, a) < 1e-7


def test_frechet_of_other_dimensions_or_empty_sets_raises():
    with pytest.raises(ValueError, match="have 2 and 3 dimensions"):
        frechet_distance(GaussianStats(2), GaussianStats(3))
    with pytest.raises(ValueError, match="at least 2 images"):
        frechet_distance(GaussianStats(2), GaussianStats(2))


def test_kid_is_the_mean_of_brute_force_subsets():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 5)), rng.normal(size=(24, 5)) + 0.3
    actual = kid(x, y, subsets=3, subset_size=8, seed=4)
    generator, values = torch.Generator().manual_seed(4), []
    for _ in range(3):
        xs = x[torch.randperm(30, generator=generator)[:8].numpy()]
        ys = y[torch.randperm(24, generator=generator)[:8].numpy()]
        k = lambda a, b: (a @ b / 5 + 1) ** 3  # noqa: E731
        within = sum(k(s[i], s[j]) for s in (xs, ys) for i in range(8) for j in range(8) if i != j)
        across = sum(k(a, b) for a in xs for b in ys)
        values.append(within / 56 - 2 * across / 64)
    assert actual.value == pytest.approx(np.mean(values), rel=1e-12)
    assert actual.standard_error == pytest.approx(np.std(values, ddof=1) * (8 / 16) ** 0.5)
    assert (actual.subsets, actual.subset_size) == (3, 8)


def test_kid_is_unbiased_and_its_error_is_the_true_one():
    rng = np.random.default_rng(0)
    draws = [kid(rng.normal(size=(120, 4)), rng.normal(size=(120, 4)) + 0.5) for _ in range(150)]
    values = np.array([d.value for d in draws])
    x, y = np.random.default_rng(1).normal(size=(2, 500_000, 4))
    pairs = ((x, y), (x + 0.5, y + 0.5), (x, y + 0.5))
    mean = [(((a * b).sum(1) / 4 + 1) ** 3).mean() for a, b in pairs]
    expected = mean[0] + mean[1] - 2 * mean[2]
    assert values.mean() == pytest.approx(expected, abs=4 * values.std() / 150**0.5)
    claimed = np.mean([d.standard_error for d in draws])
    assert 0.7 < claimed / values.std(ddof=1) < 1.5


def test_bad_sets_are_named():
    x = np.zeros((10, 3))
    with pytest.raises(ValueError, match=r"shapes \(10, 3\) and \(10, 2\)"):
        kid(x, x[:, :2])
    with pytest.raises(ValueError, match="10 and 3 images; expected at least 4"):
        kid(x, x[:3])
    with pytest.raises(ValueError, match="subsets is 1 and subset_size 1000; expected at least 2"):
        kid(x, x, subsets=1)


def test_a_covariance_that_is_none_is_refused():
    rng = np.random.default_rng(0)
    good = stats_from(rng.normal(size=(400, 20)))
    negative, skew = good.cov, good.cov
    negative[3, 3] = -1.0
    skew[0, 1] += 0.5
    for cov, fault in ((negative, "has negative eigenvalues"), (skew, "is not symmetric")):
        for n in (400, 100):  # it is the first matrix and the second
            bad = GaussianStats.from_moments(good.mean, cov, n)
            for pair in ((bad, good), (good, bad)):
                with pytest.raises(ValueError, match=fault):
                    frechet_distance(*pair)


def test_an_n_below_the_rank_is_refused():
    good = stats_from(np.random.default_rng(0).normal(size=(400, 20)))
    few = GaussianStats.from_moments(good.mean, good.cov, 10)
    with pytest.raises(ValueError, match="n = 10 images has a higher rank than 9"):
        frechet_distance(few, good)


def test_a_distance_below_rounding_is_refused(monkeypatch):
    good = stats_from(np.random.default_rng(0).normal(size=(400, 20)))
    assert frechet_distance(good, good) < 1e-9
    real = distances._tr_root
    monkeypatch.setattr(distances, "_tr_root", lambda *a: real(*a) + 0.01)
    with pytest.raises(ValueError, match="the FID is -0.02; expected at least 0"):
        frechet_distance(good, good)


@pytest.mark.parametrize("measure", [kid, manifold_metrics])
def test_features_that_are_not_finite_are_refused(measure):
    good = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    for value in (float("nan"), float("inf")):
        bad = good.clone()
        bad[3, 1] = value
        for pair in ((good, bad), (bad, good)):
            with pytest.raises(ValueError, match="NaN or infinity"):
                measure(*pair)


def test_features_in_bfloat16_are_read():
    features = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    stats = GaussianStats(4)
    stats.update(features)
    expected = stats_from(features.double().numpy())
    assert np.array_equal(stats.cov, expected.cov)
    assert kid(features, features[:30]) == kid(features.float(), features[:30].float())
