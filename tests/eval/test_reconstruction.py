"""PSNR, SSIM and perplexity against values known otherwise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from eval.reconstruction import Reconstruction, perplexity, psnr, ssim


def images(seed: int, shape: tuple[int, ...] = (3, 2, 14, 13)) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=drawn, dtype=torch.uint8)


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM of one channel (H, W), window by window, as Wang et al. write it."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for row in range(a.shape[0] - 10):
        for column in range(a.shape[1] - 10):
            x = a[row : row + 11, column : column + 11].astype(np.float64)
            y = b[row : row + 11, column : column + 11].astype(np.float64)
            mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
            var_x = (weights * (x - mean_x) ** 2).sum()
            var_y = (weights * (y - mean_y) ** 2).sum()
            cov = (weights * (x - mean_x) * (y - mean_y)).sum()
            luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
            values.append(luminance * (2 * cov + c2) / (var_x + var_y + c2))
    return float(np.mean(values))


def test_psnr_of_a_known_difference() -> None:
    a = torch.full((2, 1, 4, 4), 100, dtype=torch.uint8)
    b = a.clone()
    b[0] += 5  # mean squared error 25
    b[1, :, :2] -= 10  # and 50, downwards: no wrapping around
    expected = [20 * math.log10(255 / 5), 10 * math.log10(255**2 / 50)]
    assert psnr(a, b).tolist() == pytest.approx(expected, rel=1e-12)
    assert psnr(a, a).tolist() == [math.inf, math.inf]


def test_ssim_equals_the_slow_one() -> None:
    a = images(0)
    b = (0.7 * a.float() + 0.3 * images(1).float()).round().to(torch.uint8)
    expected = [
        np.mean([slow_ssim(x, y) for x, y in zip(p.numpy(), q.numpy(), strict=True)])
        for p, q in zip(a, b, strict=True)
    ]
    assert 0.3 < expected[0] < 0.98
    np.testing.assert_allclose(ssim(a, b).numpy(), expected, rtol=1e-9)


def test_ssim_of_equal_images_is_one() -> None:
    np.testing.assert_allclose(ssim(images(3), images(3)).numpy(), 1.0, rtol=1e-12)


def test_perplexity() -> None:
    assert perplexity(torch.tensor([7, 7, 7, 7])) == pytest.approx(4.0)
    assert perplexity(torch.tensor([9, 0, 0])) == pytest.approx(1.0)
    # entropy of (1/2, 1/4, 1/4) is 1.5 bits
    assert perplexity(torch.tensor([2, 1, 0, 1])) == pytest.approx(2**1.5)


def test_means_over_batches() -> None:
    a, b = images(4, (5, 1, 12, 12)), images(5, (5, 1, 12, 12))
    z = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    codes = torch.tensor([[0, 1], [1, 1], [3, 3], [3, 3], [0, 1]])
    total = Reconstruction()
    for rows in (slice(0, 2), slice(2, 5)):
        total.add(a[rows], b[rows], z[rows], codes[rows])
    actual = total.result(entries=4)
    assert actual["n"] == 5
    assert actual["psnr"] == pytest.approx(float(psnr(a, b).mean()))
    assert actual["ssim"] == pytest.approx(float(ssim(a, b).mean()))
    wide = z.numpy().astype(np.float64)
    np.testing.assert_allclose(actual["latents"]["mean"], wide.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(actual["latents"]["std"], wide.std((0, 2, 3), ddof=1), rtol=1e-6)
    assert actual["latents"]["largest"] == pytest.approx(np.abs(wide).max())
    assert actual["codebook"]["used"] == 3
    shares = np.array([2, 4, 4]) / 10
    expected = math.exp(-(shares * np.log(shares)).sum())
    assert actual["codebook"]["perplexity"] == pytest.approx(expected)


def test_perfect_reconstructions_have_no_psnr() -> None:
    a, total = images(6, (2, 1, 12, 12)), Reconstruction()
    total.add(a, a, torch.zeros(2, 1, 1, 1), None)
    actual = total.result(entries=0)
    assert actual["psnr"] is None and actual["ssim"] == pytest.approx(1.0)
    assert "codebook" not in actual
    assert (actual["n"], actual["exact"]) == (2, 2)
    b = a.clone()
    b[1] ^= 1
    total = Reconstruction()
    total.add(a, b, torch.zeros(2, 1, 1, 1), None)
    actual = total.result(entries=0)
    assert actual["exact"] == 1
    assert actual["psnr"] == pytest.approx(20 * math.log10(255))


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (3, 3, 16, 10)])
def test_images_smaller_than_the_window_have_no_ssim(shape: tuple[int, ...]) -> None:
    a, b, total = images(7, shape), images(8, shape), Reconstruction()
    with pytest.raises(ValueError, match=f"are {shape[2]}x{shape[3]}; expected at least 11x11"):
        ssim(a, b)
    total.add(a, b, torch.zeros(3, 1, 1, 1), None)
    actual = total.result(entries=0)
    assert actual["ssim"] is None
    assert actual["psnr"] == pytest.approx(float(psnr(a, b).mean()))


def test_the_smallest_images_have_ssim() -> None:
    a, b = images(9, (2, 1, 11, 11)), images(10, (2, 1, 11, 11))
    expected = [slow_ssim(x[0], y[0]) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(ssim(a, b).numpy(), expected, rtol=1e-9)
