"""The taming autoencoder against taming's own modules, and against slow ways of doing the same."""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import pytest
import torch
from taming.modules.diffusionmodules.model import Decoder, Encoder
from torch.nn import functional as F

from autoencoders.architecture import config_from_description
from autoencoders.base import Moments
from autoencoders.taming import TamingAutoencoder
from tests.autoencoders.models import config, model, x_of


def folded(x: torch.Tensor) -> torch.Tensor:
    """Padding and folding, pixel by pixel: 10 x 10 on 12 x 12, then 3 x 3 pixels to channels."""
    canvas = torch.full((len(x), 1, 12, 12), -1.0)
    canvas[:, :, 1:11, 1:11] = x
    h = torch.empty(len(x), 9, 4, 4)
    for row in range(3):
        for column in range(3):
            h[:, 3 * row + column] = canvas[:, 0, row::3, column::3]
    return h


def taming_parts(autoencoder: TamingAutoencoder) -> tuple[Encoder, Decoder]:
    """Taming's own networks, built directly and given the same weights."""
    shared: dict[str, Any] = {
        "ch": 32, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": (), "dropout": 0.0,
        "resolution": 4, "z_channels": 3, "in_channels": 9, "out_ch": 9,
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        encoder, decoder = Encoder(double_z=autoencoder.stochastic, **shared), Decoder(**shared)
    encoder.load_state_dict(autoencoder.encoder.state_dict())
    decoder.load_state_dict(autoencoder.decoder.state_dict())
    return encoder.eval(), decoder.eval()


@pytest.mark.parametrize("flavour", ["kl", "vq"])
@torch.no_grad()
def test_encoding_is_tamings(flavour: str) -> None:
    autoencoder, x = model(flavour=flavour).freeze(), x_of(3)
    encoder, _ = taming_parts(autoencoder)
    expected = autoencoder.quant_conv(encoder(folded(x)))
    moments = autoencoder.encode(x)
    if flavour == "vq":
        assert moments.log_var is None and torch.equal(moments.mean, expected)
        return
    assert moments.log_var is not None
    assert torch.equal(moments.mean, expected[:, :2])
    assert torch.equal(moments.log_var, expected[:, 2:])


@pytest.mark.parametrize("flavour", ["kl", "vq"])
@torch.no_grad()
def test_decoding_is_tamings(flavour: str) -> None:
    autoencoder = model(flavour=flavour).freeze()
    z = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    _, decoder = taming_parts(autoencoder)
    if autoencoder.quantize is not None:
        code = autoencoder.quantize.embedding.weight
        flat = z.permute(0, 2, 3, 1).reshape(-1, 2)
        nearest = torch.stack([((code - v) ** 2).sum(1).argmin() for v in flat])
        assert torch.equal(autoencoder.quantise(z)[2], nearest)
        assert len(nearest.unique()) > 2
        z = code[nearest].view(3, 4, 4, 2).permute(0, 3, 1, 2)
    h = decoder(autoencoder.post_quant_conv(z))
    x = torch.empty(3, 1, 12, 12)
    for row in range(3):
        for column in range(3):
            x[:, 0, row::3, column::3] = h[:, 3 * row + column]
    torch.testing.assert_close(
        autoencoder.decode(z), x[:, :, 1:11, 1:11].clamp(-1, 1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("shape", "canvas", "patch"), [((1, 10, 10), 12, 3), ((3, 8, 8), 0, 1), ((2, 6, 8), 8, 2)]
)
def test_folding_is_undone_exactly(shape: tuple[int, int, int], canvas: int, patch: int) -> None:
    autoencoder = model(image_shape=shape, canvas=canvas, patch=patch)
    x = x_of(2, shape=shape)
    h = autoencoder._fold(x)
    side = (canvas or shape[1]) // patch
    assert h.shape == (2, shape[0] * patch**2, side, side)
    assert torch.equal(autoencoder._unfold(h), x)


def test_the_margin_is_background() -> None:
    autoencoder = model()
    h = autoencoder._fold(torch.ones(1, 1, 10, 10))
    canvas = F.pixel_shuffle(h, 3)
    assert canvas.sum() == 10 * 10 - (12 * 12 - 10 * 10)
    assert (canvas[:, :, 0] == -1).all() and (canvas[:, :, :, -1] == -1).all()


def test_the_gradient_passes_the_codebook_straight() -> None:
    autoencoder = model(flavour="vq")
    z = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    quantised, loss, _ = autoencoder.quantise(z)
    weights = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((quantised * weights).sum(), z, retain_graph=True)
    assert torch.equal(gradient, weights)
    # the codebook loss pulls both ways: the latents by the commitment's share, the entries fully
    gap = (quantised - z).detach()
    assert loss.item() == pytest.approx(1.25 * gap.square().mean().item(), rel=1e-5)
    entries = autoencoder.quantize.embedding.weight
    of_latents, of_entries = torch.autograd.grad(loss, (z, entries))
    pull = 2 * gap / gap.numel()
    torch.testing.assert_close(of_latents, -0.25 * pull, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(of_entries.sum(0), pull.sum((0, 2, 3)), rtol=1e-4, atol=1e-8)


def test_moments_sample_their_posterior() -> None:
    mean = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1).expand(20_000, 2, 1, 1)
    log_var = torch.tensor([math.log(0.25), math.log(9.0)]).view(1, 2, 1, 1).expand_as(mean)
    z = Moments(mean, log_var).sample(torch.Generator().manual_seed(0)).flatten(1)
    torch.testing.assert_close(z.mean(0), torch.tensor([1.0, -2.0]), rtol=0, atol=0.07)
    torch.testing.assert_close(z.std(0), torch.tensor([0.5, 3.0]), rtol=0.02, atol=0)
    again = Moments(mean, log_var).sample(torch.Generator().manual_seed(0)).flatten(1)
    assert torch.equal(z, again)
    assert Moments(mean).sample() is mean


def test_log_variances_are_clamped() -> None:
    autoencoder = model().freeze()
    autoencoder.quant_conv.bias.data[2:] = torch.tensor([1000.0, -1000.0])
    log_var = autoencoder.encode(x_of(1)).log_var
    assert log_var is not None
    assert (log_var[:, 0] == 20).all() and (log_var[:, 1] == -30).all()


def test_wrong_shapes_raise() -> None:
    autoencoder = model().freeze()
    with pytest.raises(ValueError, match=r"shape \(2, 3, 10, 10\); expected \(B, 1, 10, 10\)"):
        autoencoder.encode(x_of(2, shape=(3, 10, 10)))
    with pytest.raises(ValueError, match=r"shape \(2, 2, 4, 5\); expected \(B, 2, 4, 4\)"):
        autoencoder.decode(torch.zeros(2, 2, 4, 5))
    with pytest.raises(ValueError, match="codebook"):
        autoencoder.quantise(torch.zeros(2, 2, 4, 4))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"flavour": "gan"}, "flavour is 'gan'; expected one of kl, vq"),
        ({"ch": 48}, "ch is 48; expected a multiple of 32"),
        ({"dropout": None}, r"dropout is None; expected a number in \[0, 1\)"),
        ({"commitment": "1"}, r"commitment is '1'; expected a number in \[0, inf\)"),
        ({"attention": 1}, "attention is 1; expected true or false"),
        ({"canvas": 8}, "canvas is 8 for images of 10x10"),
        ({"canvas": 13}, "canvas is 13 for images"),
        ({"patch": 5}, "is 12x12; expected multiples of 5 "),
        ({"ch_mult": (1, 1, 1, 1)}, "halved 3 times"),
    ],
)
def test_impossible_architectures_raise(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        config(**changes)


def test_a_description_is_enough_to_build_it_again() -> None:
    autoencoder = model(flavour="vq", ch_mult=(1, 2))
    assert config_from_description(autoencoder.describe()) == autoencoder.config
    with pytest.raises(ValueError, match="colour"):
        config_from_description({**autoencoder.describe(), "colour": 1})
