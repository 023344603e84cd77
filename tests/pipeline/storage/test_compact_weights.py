"""Weights in fewer bits."""

from __future__ import annotations

import math

import pytest
import torch

from flows.networks.config import VelocityConfig
from flows.networks.registry import make_velocity
from pipeline.storage.compact_weights import DTYPES, dequantise, quantise

ROWS = torch.tensor([[1.0], [1e-6], [3e4], [0.0]])


def weights() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=g) * ROWS[:, :, None, None],
        "linear.weight": torch.randn(4, 256, generator=g) * ROWS,
        "odd.weight": torch.randn(4, 5, 13, generator=g) * ROWS[:, :, None],
        "conv.bias": torch.randn(4, generator=g),
        "conv.bias.scale": torch.randn(4, generator=g),  # no scale, whatever its name
        "only": torch.tensor(0.25),
    }


def test_ten_bits_round_to_half_a_step() -> None:
    before = weights()
    stored = quantise(before, "int10")
    after = dequantise(stored)
    assert after.keys() == before.keys()
    for name in ("conv.weight", "linear.weight", "odd.weight"):
        assert stored[name].dtype == torch.int8 and after[name].dtype == torch.float32
        groups = stored[name + ".scale"].shape[1]
        assert groups == math.ceil(before[name][0].numel() / 64)
        for old, new in zip(before[name].flatten(1), after[name].flatten(1), strict=True):
            for x, y in zip(old.split(64), new.split(64), strict=True):
                step = x.abs().max() / 511
                assert (x - y).abs().max() <= step * 0.5 * (1 + 2**-12)
                assert x.abs().max() < 1e-3 or (x - y).square().mean().sqrt() < 0.4 * step
        assert torch.equal(after[name][3], before[name][3])  # zero stays zero
    for name in ("conv.bias", "conv.bias.scale", "only"):
        assert stored[name].dtype == torch.float16
        torch.testing.assert_close(after[name].float(), before[name], rtol=1e-3, atol=1e-4)
    size = sum(value.numel() * value.element_size() for value in stored.values())
    assert size < 0.36 * sum(4 * value.numel() for value in before.values())


@pytest.mark.parametrize("name", DTYPES)
def test_quantisation_is_idempotent(name: str) -> None:
    once = dequantise(quantise(weights(), name))
    again = dequantise(quantise(once, name))
    assert all(torch.equal(once[key].float(), again[key].float()) for key in weights())


@pytest.mark.parametrize("name", DTYPES)
def test_values_that_overflow_are_unchanged(name: str) -> None:
    tensors = {"large": torch.tensor([1e30, 1.0]), "bad": torch.tensor([[float("nan"), 1.0]])}
    kept = dequantise(quantise(tensors, name))
    torch.testing.assert_close(kept["large"].float(), tensors["large"], rtol=1e-2, atol=0)
    torch.testing.assert_close(kept["bad"].float(), tensors["bad"], equal_nan=True)


@pytest.mark.parametrize("nets", [1, 2])
def test_a_quantised_unet_has_nearly_the_same_output(nets: int) -> None:
    config = VelocityConfig(
        kind="unet", width=16, depth=1, heads=1, classes=3, nets=nets, zero_init=False
    )
    drawn = torch.Generator().manual_seed(0)
    network, other = (make_velocity(config, (2, 8, 8), drawn) for _ in range(2))
    other.load_state_dict(dequantise(quantise(network.state_dict(), "int10")))
    z, labels = torch.randn((8, 2, 8, 8), generator=drawn), torch.arange(8) % 4
    with torch.inference_mode():
        for t in (0.2, 0.8):
            v, w = (each(torch.tensor(t), z, labels) for each in (network, other))
            error = (v - w).square().mean().sqrt() / v.square().mean().sqrt()
            assert 0 < error < 0.005
