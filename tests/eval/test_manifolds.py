"""Precision, recall, density and coverage against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from eval.manifolds import manifold_metrics


def test_manifolds_equal_brute_force(monkeypatch):
    monkeypatch.setattr("eval.manifolds._CHUNK", 7)
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(40, 3)), 0.8 * rng.normal(size=(33, 3)) + 1.2

    def inside(points, balls, k):
        """Whether each point (rows) lies in each ball (columns)."""
        radius = [sorted(np.linalg.norm(balls - b, axis=1))[k] for b in balls]  # [0] is itself
        return np.array([[np.linalg.norm(p - b) <= r for b, r in zip(balls, radius, strict=True)]
                         for p in points])  # fmt: skip

    actual = manifold_metrics(real, fake)
    assert actual.precision == pytest.approx(inside(fake, real, 3).any(1).mean())
    assert actual.recall == pytest.approx(inside(real, fake, 3).any(1).mean())
    assert actual.density == pytest.approx(inside(fake, real, 5).mean() * 40 / 5)
    assert actual.coverage == pytest.approx(inside(fake, real, 5).any(0).mean())
    assert 0 < actual.recall < actual.precision < 1


def test_manifolds_at_their_ends():
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    same, apart = manifold_metrics(x, x), manifold_metrics(x, x + 1000)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert 0.9 < same.density < 1.5
    assert (apart.precision, apart.recall, apart.density, apart.coverage) == (0, 0, 0, 0)
    half = manifold_metrics(np.concatenate([x, x + 1000]), x)  # a mode is missing
    assert (half.precision, half.recall, half.coverage) == (1, 0.5, 0.5)


def test_bad_sets_are_named():
    x = np.zeros((10, 3))
    with pytest.raises(ValueError, match="10 and 3 images; expected at least 4"):
        manifold_metrics(x, x[:3])
    with pytest.raises(ValueError, match="k is 0 and k_density 5; expected at least 1"):
        manifold_metrics(x, x, k=0)
