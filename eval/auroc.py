"""Area under the ROC curve of a score, with a confidence interval.

    AUROC = P(a > b) + ½ P(a = b),   a a score inside the distribution, b one outside

Reference: DeLong, DeLong, Clarke-Pearson, "Comparing the areas under two or more correlated
receiver operating characteristic curves" (1988).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: standard normal quantile of a two-sided interval of 95 %
_QUANTILE = 1.959963984540054


@dataclass(frozen=True)
class Auroc:
    """Area under the ROC curve, and the ends of its 95 % confidence interval.

    The interval has no length where the scores do not overlap.
    """

    value: float
    low: float
    high: float


def auroc(inside: npt.ArrayLike, outside: npt.ArrayLike) -> Auroc:
    """Compute the AUROC of scores (m,) inside and (n,) outside a distribution; larger is inside.

    Raises:
        ValueError: there are fewer than two scores of a kind, or one is not finite.
    """
    a, b = (np.asarray(x, np.float64).ravel() for x in (inside, outside))
    if min(len(a), len(b)) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(
            f"there are {len(a)} scores inside and {len(b)} outside; expected at least 2 finite "
            "ones of each; use more images"
        )
    above, below = _placements(a, b), 1 - _placements(b, a)
    value = float(above.mean())
    error = math.sqrt(above.var(ddof=1) / len(a) + below.var(ddof=1) / len(b))
    low, high = value - _QUANTILE * error, value + _QUANTILE * error
    return Auroc(value, max(low, 0.0), min(high, 1.0))


def _placements(scores: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> np.ndarray:
    """Return the share of the others that lie below each score (m,); ties count half."""
    ordered = np.sort(others)
    left = np.searchsorted(ordered, scores, "left")
    right = np.searchsorted(ordered, scores, "right")
    return np.asarray((left + right) / 2 / len(others))
