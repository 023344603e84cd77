"""Weights in fewer bits."""

from __future__ import annotations

import pytest
import torch

from flows.velocity import make_velocity
from flows.velocity_base import VelocityConfig
from pipeline.compact import DTYPES, compact, restored

ROWS = torch.tensor([[1.0], [1e-6], [3e4], [0.0]])


def weights() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=g) * ROWS[:, :, None, None],
        "linear.weight": torch.randn(4, 64, generator=g) * ROWS,
        "conv.bias": torch.randn(4, generator=g),
        "conv.bias.scale": torch.randn(4, generator=g),  # no scale, whatever its name
        "only": torch.tensor(0.25),
    }


def test_eight_bits_are_within_half_a_step_of_each_row() -> None:
    before = weights()
    stored = compact(before, DTYPES["int8"])
    after = restored(stored)
    assert after.keys() == before.keys()
    for name in ("conv.weight", "linear.weight"):
        assert stored[name].dtype == torch.int8
        step = before[name].flatten(1).abs().amax(1) / 127
        off = (after[name] - before[name]).flatten(1).abs().amax(1)
        assert bool((off <= step * 0.5 * (1 + 2**-8)).all())
        spread = (after[name] - before[name]).flatten(1).square().mean(1).sqrt()
        assert bool((spread <= 0.4 * step + 1e-12).all())  # uniform on a step: 0.29 of it
        assert torch.equal(after[name][3], before[name][3])  # zero stays zero
    for name in ("conv.bias", "conv.bias.scale", "only"):
        assert stored[name].dtype == torch.float16
        torch.testing.assert_close(after[name].float(), before[name], rtol=1e-3, atol=1e-4)
    size = sum(value.numel() * value.element_size() for value in stored.values())
    assert size < 0.35 * sum(4 * value.numel() for value in before.values())


@pytest.mark.parametrize("name", DTYPES)
def test_what_was_rounded_once_is_rounded_to_itself(name: str) -> None:
    once = restored(compact(weights(), DTYPES[name]))
    again = restored(compact(once, DTYPES[name]))
    assert all(torch.equal(once[key].float(), again[key].float()) for key in weights())


@pytest.mark.parametrize("name", DTYPES)
def test_what_cannot_be_rounded_stays(name: str) -> None:
    tensors = {"large": torch.tensor([1e30, 1.0]), "bad": torch.tensor([[float("nan"), 1.0]])}
    kept = restored(compact(tensors, DTYPES[name]))
    torch.testing.assert_close(kept["large"].float(), tensors["large"], rtol=1e-2, atol=0)
    torch.testing.assert_close(kept["bad"].float(), tensors["bad"], equal_nan=True)


@pytest.mark.parametrize("nets", [1, 2])
def test_a_unet_of_eight_bits_is_nearly_the_same_field(nets: int) -> None:
    config = VelocityConfig(
        kind="unet", width=16, depth=1, heads=1, classes=3, nets=nets, zero_init=False
    )
    drawn = torch.Generator().manual_seed(0)
    network, other = (make_velocity(config, (2, 8, 8), drawn) for _ in range(2))
    other.load_state_dict(restored(compact(network.state_dict(), torch.int8)))
    z, labels = torch.randn((8, 2, 8, 8), generator=drawn), torch.arange(8) % 4
    with torch.inference_mode():
        for t in (0.2, 0.8):
            v, w = (each(torch.tensor(t), z, labels) for each in (network, other))
            error = (v - w).square().mean().sqrt() / v.square().mean().sqrt()
            assert 0 < error < 0.02
