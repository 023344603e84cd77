"""The Inception score against its definition, torch-fidelity and closed forms."""

from __future__ import annotations

import pytest
import torch

from eval.inception_score import inception_score


def test_ends_of_the_scale():
    certain = 100 * torch.eye(5).repeat(40, 1)
    assert inception_score(certain, splits=2).value == pytest.approx(5, rel=0.05)
    assert inception_score(torch.zeros(200, 5)).value == pytest.approx(1)


def test_equals_torch_fidelity():
    """The value of isc_features_to_metric (0.4.0), two parts, on the order of this seed."""
    logits = ((torch.arange(60 * 7) * 7919 % 251).float() / 60).view(60, 7)
    score = inception_score(logits, splits=2)
    assert score.value == pytest.approx(1.59379589, rel=1e-6)
    assert score.standard_error == pytest.approx(0.002300893, rel=1e-5)


def test_bad_logits_are_named():
    with pytest.raises(ValueError, match="9 images in 10 parts"):
        inception_score(torch.zeros(9, 3))
    with pytest.raises(ValueError, match="NaN or infinity"):
        inception_score(torch.full((20, 3), float("nan")))
