from __future__ import annotations

import numpy as np
import pytest
import torch

from eval.gaussian import GaussianStats
from tests.eval.moments import stats_from


@pytest.fixture
def rows():
    """More than two blocks of correlated float32 rows, far from the origin."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(2500, 7)) @ rng.normal(size=(7, 7)) + 100).astype(np.float32)


def test_equals_numpy(rows):
    stats = stats_from(torch.from_numpy(rows))
    wide = rows.astype(np.float64)
    assert stats.n == 2500
    np.testing.assert_allclose(stats.mean, wide.mean(0), rtol=1e-13)
    np.testing.assert_allclose(stats.cov, np.cov(wide, rowvar=False), rtol=1e-11)


@pytest.mark.parametrize("split", [1, 50, 999, 1024, 1025])
def test_bits_do_not_depend_on_the_split(rows, split):
    whole = stats_from(rows)
    parts = GaussianStats(7)
    for start in range(0, len(rows), split):
        parts.update(rows[start : start + split])
    parts.update(rows[:0])
    assert np.array_equal(parts.mean, whole.mean) and np.array_equal(parts.cov, whole.cov)


def test_the_caller_may_reuse_its_buffer(rows):
    stats, buffer = GaussianStats(7), np.empty((50, 7), np.float64)
    for start in range(0, len(rows), 50):
        buffer[:] = rows[start : start + 50]
        stats.update(buffer)
    np.testing.assert_array_equal(stats.mean, stats_from(rows).mean)


def test_rows_after_a_reading_count(rows):
    stats = stats_from(rows[:300])
    assert stats.cov.shape == (7, 7)
    stats.update(rows[300:])
    np.testing.assert_allclose(stats.cov, np.cov(rows.astype(float), rowvar=False), rtol=1e-10)


def test_files_are_interchangeable_with_pytorch_fid(rows, tmp_path):
    stats = stats_from(rows)
    np.savez(tmp_path / "ours.npz", mu=stats.mean, sigma=stats.cov, n=stats.n)
    again = GaussianStats.load(tmp_path / "ours.npz")
    assert again.n == 2500
    again.update(rows)  # n is known, so rows can be added
    both = np.concatenate([rows, rows]).astype(float)
    np.testing.assert_allclose(again.cov, np.cov(both, rowvar=False), rtol=1e-10)

    np.savez_compressed(tmp_path / "theirs.npz", mu=stats.mean, sigma=stats.cov)
    theirs = GaussianStats.load(tmp_path / "theirs.npz")
    assert theirs.n is None
    np.testing.assert_array_equal(theirs.cov, stats.cov)
    with pytest.raises(ValueError, match="unknown number"):
        theirs.update(rows)


def test_bad_input_is_named(rows, tmp_path):
    stats = GaussianStats(7)
    with pytest.raises(ValueError, match=r"shape \(2500, 3\); expected \(B, 7\)"):
        stats.update(rows[:, :3])
    with pytest.raises(ValueError, match="NaN"):
        stats.update(np.full((2, 7), np.nan))
    stats.update(rows[:1])
    with pytest.raises(ValueError, match="n is 1; expected at least 2 images"):
        _ = stats.cov
    with pytest.raises(ValueError, match="NaN"):
        GaussianStats.from_moments(np.zeros(2), np.full((2, 2), np.inf), 9)
    with pytest.raises(ValueError, match=r"\(2,\) and \(3, 3\); expected"):
        GaussianStats.from_moments(np.zeros(2), np.eye(3), 9)
    with pytest.raises(FileNotFoundError):
        GaussianStats.load(tmp_path / "absent.npz")
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 2)))
    np.savez(tmp_path / "pickle.npz", mu=np.array([{}], object), sigma=np.eye(1))
    (tmp_path / "junk.npz").write_bytes(b"junk")
    for name in ("images", "pickle", "junk"):
        with pytest.raises(ValueError, match="not an .npz of statistics"):
            GaussianStats.load(tmp_path / f"{name}.npz")
