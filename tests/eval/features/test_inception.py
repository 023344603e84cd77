"""The folded network against pytorch-fid's own."""

from __future__ import annotations

import pytest
import torch

import eval.features.folded_conv as folded_conv
from eval.features.inception import Bfloat16Inception, FidInception, PytorchFidInception
from eval.features.inception_weights import read_weights, weights_sha256


def images(n: int, channels: int = 3, side: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth coloured noise, uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 6, 6, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=side, mode="bicubic").clamp(0, 1)
    return (255 * fine).round().to(torch.uint8)


def pytorch_fid_features(network: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compute features as pytorch-fid does from `ToTensor` images."""
    with torch.no_grad():
        return network(x.float().div(255).expand(-1, 3, -1, -1))[0][:, :, 0, 0]


@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28)])
def test_equals_pytorch_fid(random_network, random_reference, channels, side):
    x = images(4, channels, side)
    expected = pytorch_fid_features(random_reference, x)
    assert expected.std(0).mean() > 1e-3  # the features tell the images apart
    torch.testing.assert_close(
        random_network.features(x), expected, atol=1e-5 * float(expected.abs().max()), rtol=0
    )


@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28)])
def test_the_unfolded_network_is_pytorch_fids(random_state, random_reference, channels, side):
    x = images(2, channels, side)
    expected = pytorch_fid_features(random_reference, x)
    actual = PytorchFidInception(random_state).features(x)
    torch.testing.assert_close(actual, expected, atol=1e-6 * float(expected.abs().max()), rtol=0)


def test_equals_pytorch_fid_with_the_real_weights(inception_weights, build_reference):
    state = read_weights(inception_weights)
    x = images(8)
    expected = pytorch_fid_features(build_reference(state), x)
    actual = FidInception(state).features(x)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


def test_real_weights_have_the_known_content(inception_weights):
    expected = "d1f0728dae683a9eadc5adce2422bf295323a4954f47cc9e5ffc10390fc46f66"
    assert weights_sha256(read_weights(inception_weights)) == expected


def test_portable_path_agrees(random_network, monkeypatch):
    x = images(2)
    fast = random_network.features(x)
    monkeypatch.setattr(folded_conv, "prepacked_works", lambda _: False)
    plain = random_network.features(x)
    torch.testing.assert_close(fast, plain, atol=1e-5 * float(plain.abs().max()), rtol=0)


@pytest.mark.parametrize("packed", [True, False])
def test_bfloat16_agrees_to_its_rounding(random_state, random_network, monkeypatch, packed):
    """Ten bfloat16 roundings of 2⁻⁹ in a row stay below 5 %."""
    if not packed:
        monkeypatch.setattr(folded_conv, "prepacked_works", lambda _: False)
    x, network = images(3), Bfloat16Inception(random_state)
    exact, rounded = random_network.features(x), network.features(x)
    assert rounded.dtype == torch.float32
    assert network.name.endswith("/bf16")
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-5 < float(error) < 0.05


@pytest.mark.parametrize("dtype", folded_conv.PACKED_DTYPES)
def test_an_operator_that_is_wrong_or_missing_is_not_trusted(monkeypatch, dtype):
    real = folded_conv._packed_conv

    def without_bias(x, packed, bias, *rest):
        return real(x, packed, torch.zeros_like(bias), *rest)

    def missing(*_):
        raise AttributeError("no such operator")

    for operator in (without_bias, missing):
        monkeypatch.setattr(folded_conv, "_packed_conv", operator)
        assert folded_conv.prepacked_works.__wrapped__(dtype) is False


def test_features_do_not_depend_on_the_split(random_network):
    x = images(13, 1)
    whole = random_network.features(x)
    for sizes in ([1, 12], [5, 5, 3], [11, 2]):
        split = torch.cat([random_network.features(part) for part in x.split(sizes)])
        torch.testing.assert_close(split, whole, atol=1e-6 * float(whole.abs().max()), rtol=0)


def test_a_list_of_different_sizes_is_as_one_by_one(random_network):
    mixed = [images(1, 3, 20)[0], images(1, 1, 31)[0], images(1, 3, 320)[0]]
    together = random_network.features(mixed)
    alone = torch.cat([random_network.features(image[None]) for image in mixed])
    torch.testing.assert_close(together, alone, atol=1e-6 * float(alone.abs().max()), rtol=0)


@pytest.mark.parametrize(
    "bad",
    [torch.rand(2, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8),
     torch.zeros(2, 4, 8, 8, dtype=torch.uint8)],
)  # fmt: skip
def test_images_of_another_dtype_or_shape_raise(random_network, bad):
    with pytest.raises(ValueError, match="expected uint8"):
        random_network.features(bad)
