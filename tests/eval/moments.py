"""Statistics of features, for tests."""

from __future__ import annotations

from eval.gaussian import Features, GaussianStats


def stats_from(features: Features) -> GaussianStats:
    """Accumulate all rows of features (n, d)."""
    stats = GaussianStats(features.shape[1])
    stats.update(features)
    return stats
