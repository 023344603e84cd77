"""Images of another shape than the encoder's, and quantised latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from autoencoders import weights
from autoencoders.adapt import Adaptation, AdaptedAutoencoder, adapt
from autoencoders.architecture import TamingConfig, config_from_description
from autoencoders.base import Moments
from autoencoders.codebook import look_up, nearest_indices
from autoencoders.identity import IdentityAutoencoder
from autoencoders.registry import build_autoencoder
from autoencoders.taming import TamingAutoencoder
from pipeline.integrity.digests import stamp


def model(flavour: str = "vq", image_shape: tuple[int, int, int] = (3, 32, 32)) -> (
    TamingAutoencoder
):  # fmt: skip
    torch.manual_seed(0)
    config = TamingConfig(
        flavour=flavour, image_shape=image_shape, ch_mult=(1, 2), n_embed=16, resolution=256,
        attn_resolutions=(128,),
    )  # fmt: skip
    autoencoder = TamingAutoencoder(config)
    if flavour != "kl":  # entries as far apart as the latents are
        with torch.no_grad():
            autoencoder._entries().normal_()
    return autoencoder.freeze()


def images(n: int, *shape: int) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(2)) * 2 - 1


def quantised(inner: TamingAutoencoder) -> AdaptedAutoencoder:
    autoencoder = adapt(inner, (3, 32, 32), Adaptation(latents="quantised"))
    assert isinstance(autoencoder, AdaptedAutoencoder)
    return autoencoder


def test_an_autoencoder_that_fits_is_left_as_it_is() -> None:
    inner = model()
    for adaptation in (Adaptation(), Adaptation("native"), Adaptation("resize"),
                       Adaptation("resize", 32)):  # fmt: skip
        assert adapt(inner, (3, 32, 32), adaptation) is inner


def test_another_shape_raises_unless_it_may_be_fitted() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 28, 28\); expected \(3, 32, 32\)"):
        adapt(model(), (1, 28, 28), Adaptation())


@torch.no_grad()
@pytest.mark.parametrize(("size", "seen"), [(0, 32), (64, 64)])
def test_digits_through_an_rgb_autoencoder(size: int, seen: int) -> None:
    inner = model("kl")
    ours = adapt(inner, (1, 28, 28), Adaptation("resize", size))
    assert ours.image_shape == (1, 28, 28)
    assert ours.latent_shape == (4, seen // 2, seen // 2)
    x = images(2, 1, 28, 28)
    # by hand: resized, three equal channels, encoded; decoded, resized back, mean of RGB
    large = F.interpolate(x, (seen, seen), mode="bilinear", antialias=True).repeat(1, 3, 1, 1)
    reference = inner if seen == 32 else inner.reshaped((3, 64, 64))
    moments, expected = ours.encode(x), reference.encode(large)
    torch.testing.assert_close(moments.mean, expected.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(moments.log_var, expected.log_var, atol=1e-6, rtol=0)
    back = F.interpolate(
        reference.decode(moments.mean), (28, 28), mode="bilinear", antialias=True
    ).mean(1, keepdim=True)
    torch.testing.assert_close(ours.decode(moments.mean), back.clamp(-1, 1), atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_error_of_resizing_alone() -> None:
    # pixel space, so that nothing but the resizing and the channels can lose anything
    smooth = torch.linspace(-1, 1, 28).expand(2, 1, 28, 28)
    pixels = adapt(IdentityAutoencoder((3, 28, 28)), (1, 28, 28), Adaptation("native"))
    torch.testing.assert_close(pixels.decode(pixels.encode(smooth).mean), smooth)
    larger = build_autoencoder("identity", None, (1, 28, 28), Adaptation("resize", 64))
    again = larger.decode(larger.encode(smooth).mean)
    assert larger.latent_shape == (1, 64, 64)
    # bilinear weights keep a ramp but for their rounding, and mix at the border
    error = (again - smooth).abs()
    assert error[..., 1:-1].max() < 2e-3 and error.max() < 2 / 27 / 4


@torch.no_grad()
def test_native_encodes_at_the_images_own_size() -> None:
    inner = model()
    ours = adapt(inner, (3, 16, 24), Adaptation("native"))
    assert ours.latent_shape == (4, 8, 12)
    x = images(2, 3, 16, 24)
    expected = inner.quant_conv(inner.encoder(x))
    torch.testing.assert_close(ours.encode(x).mean, expected, atol=1e-6, rtol=0)
    assert ours.fingerprint != inner.fingerprint
    # attention sits where it sat: the very same tensors
    assert set(ours.state_dict()) == set(inner.state_dict())
    assert "encoder.down.1.attn.0.q.weight" in inner.state_dict()


def test_images_that_cannot_be_fitted_raise() -> None:
    with pytest.raises(ValueError, match="expected multiples of"):
        adapt(model(), (3, 27, 27), Adaptation("native"))
    with pytest.raises(ValueError, match="images have 3 channels; expected 1, or 1 to replicate"):
        adapt(model(image_shape=(1, 32, 32)), (3, 32, 32), Adaptation("native"))
    with pytest.raises(ValueError, match="size of IdentityAutoencoder is fixed"):
        adapt(IdentityAutoencoder((3, 32, 32)), (3, 16, 16), Adaptation("native"))
    with pytest.raises(ValueError, match="has no codebook; use latents=pre"):
        quantised(model("kl"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"fit": "crop"}, "fit is 'crop'; expected one of exact, native, resize"),
        ({"latents": "indices"}, "latents is 'indices'; expected one of pre, quantised"),
        ({"size": 64}, "fit=resize for a size above 0"),
        ({"fit": "resize", "size": -1}, "expected size ≥ 0"),
    ],
)
def test_unknown_adaptations(values: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Adaptation(**values)


@torch.no_grad()
@pytest.mark.parametrize("flavour", ["vq", "gumbel"])
def test_quantised_latents_are_entries_and_decode_to_the_same_images(flavour: str) -> None:
    inner = model(flavour)
    ours, x = quantised(inner), images(2, 3, 32, 32)
    z, q = inner.encode(x).mean, ours.encode(x).mean
    entries = inner._entries()
    assert torch.equal(q, look_up(nearest_indices(q, entries), entries))
    assert not torch.equal(q, z) and ours.fingerprint != inner.fingerprint
    torch.testing.assert_close(ours.decode(q), inner.decode(z), atol=1e-5, rtol=0)
    # a flow's samples are near entries, not on them: decoding snaps
    noisy = q + 1e-3 * images(2, *q.shape[1:])
    torch.testing.assert_close(ours.decode(noisy), inner.decode(z), atol=1e-5, rtol=0)
    assert ours.describe()["inner"] == inner.describe()
    assert torch.equal(ours.codes(noisy), inner.codes(z))
    # grey levels and the unsharp mask are those of the architecture, too
    changed = TamingAutoencoder(replace(inner.config, levels=(60, 180), sharpen=0.5))
    changed.load_state_dict(inner.state_dict())
    expected = changed.freeze().decode(z)
    torch.testing.assert_close(quantised(changed).decode(q), expected, atol=1e-5, rtol=0)
    assert (expected - inner.decode(z)).abs().max() > 0.01


@torch.no_grad()
def test_looking_up_in_slices_is_looking_up_in_the_full_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    z, entries = images(3, 5, 4, 6), images(40, 5)
    flat = z.permute(0, 2, 3, 1).reshape(-1, 1, 5)
    expected = (flat - entries).square().sum(-1).argmin(1).view(3, 4, 6)
    assert torch.equal(nearest_indices(z, entries), expected)
    monkeypatch.setattr("autoencoders.codebook._MAX_DISTANCES", 100)  # two vectors at a time
    assert torch.equal(nearest_indices(z, entries), expected)
    assert torch.equal(look_up(expected, entries)[1, :, 2, 3], entries[expected[1, 2, 3]])


def test_quantising_with_and_without_gradients_agree() -> None:
    inner, z = model(), images(2, 4, 16, 16)
    q, loss, indices = inner.quantise(z)  # taming's own
    with torch.no_grad():
        q2, loss2, indices2 = inner.quantise(z)
    assert torch.equal(indices, indices2)
    torch.testing.assert_close(q, q2, atol=1e-6, rtol=0)
    torch.testing.assert_close(loss, loss2, atol=1e-6, rtol=1e-6)


def test_stored_weights_keep_the_new_parts_of_an_architecture(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = TamingConfig("gumbel", (3, 16, 24), ch_mult=(1, 2), resolution=64, attention=False)
    autoencoder = TamingAutoencoder(config).freeze()
    tensors, metadata = weights.to_tensors(autoencoder, torch.float32)
    (tmp_path / "x.safetensors").write_bytes(stamp(save(tensors, metadata)))
    again = weights.load_weights(tmp_path / "x.safetensors")
    assert again.config == config and again.fingerprint == autoencoder.fingerprint
    # at their defaults they are no part of a description: older fingerprints stand
    assert {"resolution", "attention"}.isdisjoint(TamingConfig().to_dict())
    assert config_from_description(TamingConfig().to_dict()) == TamingConfig()


def test_weights_beyond_half_precision_are_stored_in_full() -> None:
    autoencoder = model("kl")
    autoencoder.quant_conv.weight[0, 0] = 1e6
    tensors, _ = weights.to_tensors(autoencoder)
    assert tensors["quant_conv.weight"].dtype == torch.float32
    assert tensors["quant_conv.bias"].dtype == torch.float16
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values())


def test_without_a_variance_the_sample_is_the_mean() -> None:
    assert Moments(torch.ones(1)).sample().item() == 1.0


def test_every_adaptation_has_a_fingerprint_of_its_own() -> None:
    """Otherwise latents of one would be taken from the cache of the other."""
    inner, small = model(), (3, 28, 28)
    prints = {
        adapt(inner, shape, Adaptation("resize", size, latents)).fingerprint
        for shape, size, latents in (
            (small, 0, "pre"), (small, 0, "quantised"), (small, 64, "pre"), ((1, 28, 28), 0, "pre")
        )
    }  # fmt: skip
    assert len(prints) == 4
