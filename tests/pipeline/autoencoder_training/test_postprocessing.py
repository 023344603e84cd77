"""Postprocessing of a trained autoencoder: latent channels and the unsharp mask."""

from __future__ import annotations

import pytest
import torch

from autoencoders.base import to_float, to_uint8
from autoencoders.sharpen import laplacian, sharpen
from autoencoders.taming import TamingAutoencoder
from pipeline.autoencoder_training.postprocessing import (
    mask_strength,
    select_channels,
    with_unsharp_mask,
    without_unused_channels,
)
from tests.autoencoders.models import blobs, config, model, x_of


@torch.no_grad()
def test_channels_that_are_not_selected_are_zero() -> None:
    autoencoder, x = model(embed_dim=4).freeze(), x_of(3)
    slim = select_channels(autoencoder, [2, 0])
    full, kept = autoencoder.encode(x), slim.encode(x)
    assert full.log_var is not None and kept.log_var is not None
    torch.testing.assert_close(kept.mean, full.mean[:, [2, 0]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kept.log_var, full.log_var[:, [2, 0]], rtol=1e-5, atol=1e-6)
    z = torch.zeros(3, 4, 4, 4)
    z[:, [2, 0]] = kept.mean
    torch.testing.assert_close(slim.decode(kept.mean), autoencoder.decode(z), rtol=1e-5, atol=1e-6)
    assert slim.fingerprint not in ("", autoencoder.fingerprint)
    assert select_channels(autoencoder, [0, 1, 2, 3]) is autoencoder
    for wrong, channels in ((autoencoder, []), (model(flavour="vq").freeze(), [0])):
        with pytest.raises(ValueError, match="expected"):
            select_channels(wrong, channels)


def test_the_mask_restores_the_detail_lost_by_a_blur() -> None:
    images = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5
    blurred = images + 0.05 * laplacian(images)
    strength = mask_strength(blurred, images, (-1.0, 1.0))
    again = sharpen(blurred, strength)
    assert laplacian(again).abs().mean() == pytest.approx(
        laplacian(images).abs().mean().item(), rel=5e-3
    )
    assert (again - images).abs().mean() < 0.4 * (blurred - images).abs().mean()
    assert mask_strength(images, blurred, (-1.0, 1.0)) == 0.0


def test_images_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nats of the channels are those of all images at once."""
    torch.manual_seed(0)
    model = TamingAutoencoder(config(flavour="kl")).freeze()
    images = torch.randint(0, 256, blobs(16).shape, dtype=torch.uint8)
    moments = model.encode(to_float(images))
    nats = 0.5 * (moments.mean**2 + moments.log_var.exp() - 1 - moments.log_var).mean((0, 2, 3))
    limit = float(nats.sort().values[:2].mean())  # between the two smallest
    monkeypatch.setattr("pipeline.autoencoder_training.postprocessing._BATCH", 3)
    kept = without_unused_channels(model, images, limit)
    assert kept.config.embed_dim == model.config.embed_dim - 1
    assert with_unsharp_mask(model, images).config.sharpen > 0


def test_an_autoencoder_with_a_mask_has_the_same_latents_and_more_detail() -> None:
    torch.manual_seed(0)
    plain_model = TamingAutoencoder(config(flavour="kl")).freeze()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, blobs(16).shape, dtype=torch.uint8, generator=generator)
    masked_model = with_unsharp_mask(plain_model, images)
    assert 0.0 < masked_model.config.sharpen < 1.0
    assert masked_model.fingerprint != plain_model.fingerprint
    x = to_float(images)
    with torch.inference_mode():
        a, b = plain_model.encode(x), masked_model.encode(x)
        plain, masked = plain_model.decode(a.mean), masked_model.decode(a.mean)
    assert torch.equal(a.mean, b.mean)
    strength, limits = masked_model.config.sharpen, plain_model.config.limits
    assert torch.equal(masked, sharpen(plain, strength).clamp(*limits))
    assert laplacian(masked).abs().mean() > laplacian(plain).abs().mean()
    assert not torch.equal(to_uint8(plain), to_uint8(masked))
