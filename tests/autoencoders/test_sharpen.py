"""The unsharp mask and its Laplacian."""

import dataclasses

import pytest
import torch

from autoencoders.sharpen import laplacian, sharpen
from tests.autoencoders.models import config


def test_the_laplacian_of_a_parabola_is_constant():
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(7.0), indexing="ij")
    values = laplacian((3 * x**2 - 2 * y**2)[None, None])[..., 1:-1, 1:-1]
    assert torch.allclose(values, torch.full_like(values, 2 * 3 - 2 * 2))


def test_a_border_has_no_slope():
    flat = torch.full((2, 3, 5, 6), 0.7)
    assert laplacian(flat).abs().max() < 1e-6
    assert torch.allclose(sharpen(flat, 0.3), flat)


def test_a_description_without_a_mask_omits_it():
    assert "sharpen" not in config(flavour="kl").to_dict()
    assert dataclasses.replace(config(flavour="kl"), sharpen=0.1).to_dict()["sharpen"] == 0.1
    with pytest.raises(ValueError, match="sharpen"):
        dataclasses.replace(config(flavour="kl"), sharpen=1.0)
