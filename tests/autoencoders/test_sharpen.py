"""The unsharp mask: the Laplacian of a parabola, a blur undone, latents left alone."""

import dataclasses

import pytest
import torch

from autoencoders.base import to_float, to_uint8
from autoencoders.sharpen import calibrate, laplacian, sharpen
from autoencoders.taming import TamingAutoencoder
from pipeline.autoencoder_training.finishing import sharpened
from tests.autoencoders.models import blobs, config


def test_the_laplacian_of_a_parabola_is_constant():
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(7.0), indexing="ij")
    values = laplacian((3 * x**2 - 2 * y**2)[None, None])[..., 1:-1, 1:-1]
    assert torch.allclose(values, torch.full_like(values, 2 * 3 - 2 * 2))


def test_a_border_has_no_slope():
    flat = torch.full((2, 3, 5, 6), 0.7)
    assert laplacian(flat).abs().max() < 1e-6
    assert torch.allclose(sharpen(flat, 0.3), flat)


def test_calibration_restores_the_detail_that_a_blur_took():
    images = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5
    blurred = images + 0.05 * laplacian(images)
    strength = calibrate(blurred, images, (-1.0, 1.0))
    again = sharpen(blurred, strength)
    assert laplacian(again).abs().mean() == pytest.approx(
        laplacian(images).abs().mean().item(), rel=5e-3
    )
    assert (again - images).abs().mean() < 0.4 * (blurred - images).abs().mean()
    assert calibrate(images, blurred, (-1.0, 1.0)) == 0.0


def test_a_sharpened_autoencoder_has_the_same_latents_and_more_detail():
    torch.manual_seed(0)
    model = TamingAutoencoder(config(flavour="kl")).freeze()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, blobs(16).shape, dtype=torch.uint8, generator=generator)
    made = sharpened(model, images)
    assert 0.0 < made.config.sharpen < 1.0
    assert made.fingerprint != model.fingerprint
    x = to_float(images)
    with torch.inference_mode():
        a, b = model.encode(x), made.encode(x)
        plain, masked = model.decode(a.mean), made.decode(a.mean)
    assert torch.equal(a.mean, b.mean)
    assert torch.equal(masked, sharpen(plain, made.config.sharpen).clamp(*model.config.limits))
    assert laplacian(masked).abs().mean() > laplacian(plain).abs().mean()
    assert not torch.equal(to_uint8(plain), to_uint8(masked))


def test_no_mask_leaves_older_descriptions_as_they_were():
    assert "sharpen" not in config(flavour="kl").to_dict()
    assert dataclasses.replace(config(flavour="kl"), sharpen=0.1).to_dict()["sharpen"] == 0.1
    with pytest.raises(ValueError, match="sharpen"):
        dataclasses.replace(config(flavour="kl"), sharpen=1.0)
