"""The learning-rate schedule of every training: linear warm-up, then half a cosine."""

from __future__ import annotations

import math

import torch

from pipeline.optim.optimisers import MuonAdam


def warmup_cosine(step: int, steps: int, *, peak: float, final: float, warmup: int) -> float:
    """Compute the learning rate of step n of N, from a peak η to a fraction f of it.

        η_n = η · (f + (1 − f) · ½ (1 + cos(π n / N))) · min(1, (n + 1) / w)

    w are the steps of linear warm-up; 0 and 1 are without.
    """
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / steps))
    return peak * (final + (1.0 - final) * cosine) * min(1.0, (step + 1) / max(1, warmup))


def set_learning_rate(optimizer: torch.optim.Adam | MuonAdam, lr: float) -> None:
    """Give every parameter group of an optimiser the learning rate of its next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
