"""Inception score: how certain and how varied the classes of generated images are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InceptionScore:
    """Inception score `value` ± `standard_error`, the mean over random parts of the images."""

    value: float
    standard_error: float
    splits: int


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 0) -> InceptionScore:
    """Compute the Inception score from logits (n, classes) of a classifier without its bias.

        IS = exp E[KL(p(y|x) ‖ p(y))]

    It is averaged over `splits` random parts of the images, of equal size up to one. This estimate
    is biased, and its bias depends on the size of a part.

    Raises:
        ValueError: there are fewer images than parts, fewer than two parts, or a logit is not
            finite.

    Reference: Salimans et al. 2016.
    """
    if splits < 2 or len(logits) < splits:
        raise ValueError(
            f"the Inception score has {len(logits)} images in {splits} parts; expected at least 2 "
            "parts and an image in each"
        )
    if not bool(logits.isfinite().all()):
        raise ValueError(
            "the logits contain NaN or infinity; expected finite values; check the images"
        )
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    values = []
    for part in logits.cpu().double()[order].tensor_split(splits):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - torch.tensor(float(len(part))).log()
        values.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    scores = torch.stack(values)
    return InceptionScore(float(scores.mean()), float(scores.std() / splits**0.5), splits)
