"""Discriminators: their losses and the slope penalty, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pipeline.autoencoder_training.adversary import Adversary


def linear(weight: torch.Tensor, gamma: float) -> Adversary:
    """D(x) = ⟨w, x⟩ at one place, whose slope is w everywhere."""
    adversary = Adversary("r1", 1, 2, 1, gamma)
    conv = nn.Conv2d(1, 1, 4, bias=False)
    with torch.no_grad():
        conv.weight.copy_(weight)
    adversary.main = nn.Sequential(conv)
    return adversary


def test_the_penalty_is_the_squared_slope() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1, 1, 4, 4)
    adversary = linear(weight, gamma=0.3)
    expected = 0.5 * 0.3 * weight.square().sum()
    assert adversary.penalty(torch.randn(5, 1, 4, 4)).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_the_penalty_of_a_network_is_the_mean_square_of_finite_differences() -> None:
    torch.manual_seed(0)
    adversary = Adversary("r1", 1, 4, 1, 2.0).double()
    x = torch.randn(2, 1, 12, 12, dtype=torch.float64)
    step, total = 1e-6, 0.0
    for row in range(12):
        for column in range(12):
            nudge = torch.zeros_like(x)
            nudge[..., row, column] = step
            with torch.no_grad():
                change = (adversary(x + nudge) - adversary(x - nudge)).mean((1, 2, 3)) / (2 * step)
            total += change.square().sum().item()
    assert adversary.penalty(x).item() == pytest.approx(total / 2, rel=1e-5)


def test_losses_where_logits_are_zero() -> None:
    """Logistic: log 2 for each side; hinge: half of one each; nothing to gain from a flat D."""
    for kind, loss, opposing in (("r1", 2 * math.log(2), math.log(2)), ("patchgan", 1.0, 0.0)):
        adversary = Adversary(kind, 1, 4, 1, 0.1)
        with torch.no_grad():
            for parameter in adversary.main[-1].parameters():
                parameter.zero_()
        x = torch.randn(3, 1, 12, 12)
        assert adversary.loss(x, -x).item() == pytest.approx(loss, rel=1e-6)
        assert adversary.autoencoder_loss(adversary(x)).item() == pytest.approx(opposing, abs=1e-6)


def test_a_confident_discriminator_loses_little_and_is_hard_to_fool() -> None:
    adversary = linear(torch.ones(1, 1, 4, 4), gamma=0.0)
    bright, dark = torch.ones(2, 1, 4, 4), -torch.ones(2, 1, 4, 4)
    assert adversary.loss(bright, dark).item() == pytest.approx(
        2 * math.log1p(math.exp(-16)), rel=1e-4
    )
    assert adversary.autoencoder_loss(adversary(dark)).item() == pytest.approx(16.0, rel=1e-6)


def test_images_are_judged_one_by_one_without_normalisation() -> None:
    adversary = Adversary("r1", 3, 4, 2, 0.1)
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(adversary(x)[:1], adversary(x[:1]))


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="is 'wgan'; expected one of patchgan, r1"):
        Adversary("wgan", 1, 4, 1, 0.1)


def test_the_discriminator_is_the_patchgan() -> None:
    """Widths 8, 16, 32, 64 and 1: 4 x 4 kernels, two strided by 2 and two by 1."""
    judge = Adversary("patchgan", 3, 8, 2, 0.0)
    assert judge(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 6, 6)
    kernels = [p.numel() for n, p in judge.named_parameters() if p.ndim == 4]
    assert kernels == [16 * a * b for a, b in ((3, 8), (8, 16), (16, 32), (32, 1))]
