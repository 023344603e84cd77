"""Checks of two sets of features."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from eval.gaussian import Features


def pair_of_features(x: Features, y: Features, least: int) -> tuple[Tensor, Tensor]:
    """Convert features (n, d) and (m, d) to CPU tensors of one floating dtype.

    Raises:
        ValueError: the shapes do not fit, a set has fewer than `least` rows, or a feature is not
            finite.
    """
    first, second = (
        t.detach().cpu() if isinstance(t, Tensor) else torch.from_numpy(np.ascontiguousarray(t))
        for t in (x, y)
    )
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"the features have the shapes {tuple(first.shape)} and {tuple(second.shape)}; "
            "expected (n, d) and (m, d) with one d"
        )
    if min(len(first), len(second)) < least:
        raise ValueError(
            f"the sets have {len(first)} and {len(second)} images; expected at least {least} each"
        )
    if not (bool(first.isfinite().all()) and bool(second.isfinite().all())):
        raise ValueError(
            "the features contain NaN or infinity; expected finite values; check the images"
        )
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    return first.to(dtype), second.to(dtype)
