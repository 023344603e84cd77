"""Weights of similar blocks as differences from their mean."""

from __future__ import annotations

import pytest
import torch

from pipeline.storage.shared_weights import DTYPES, dequantise_block, quantise_blocks

#: mean squared error of four levels for N(0, 1): J. Max 1960, table I
MSE = 0.1175


def blocks(networks: int, parts: int, moved: float = 0.02) -> list[dict[str, torch.Tensor]]:
    """Return parts of networks, moved by a share of their weights."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    made = []
    for _ in range(networks):
        scale = torch.logspace(-2, 1, 256)[:, None, None, None]
        large = draw(256, 128, 3, 3) * scale
        for part in range(parts):
            made.append(
                {
                    "conv.weight": large + moved * scale * draw(256, 128, 3, 3),
                    "odd.weight": large.flatten(1)[:, :101]
                    + moved * scale[:, 0, 0] * draw(256, 101),
                    "first.weight": draw(8, 4, 3, 3) * part,
                    "conv.bias": draw(256),
                    "only": torch.tensor(0.25),
                }
            )
    return made


def test_differences_have_the_error_of_four_levels_of_a_normal_distribution() -> None:
    given = blocks(networks=1, parts=4)
    (group,) = quantise_blocks(given, "int2")
    assert set(group.mean) == {f"{name}.weight{part}" for name in ("conv", "odd")
                               for part in ("", ".scale", ".rest")}  # fmt: skip
    mean = torch.stack([block["conv.weight"] for block in given]).mean(0)
    for before, stored in zip(given, group.blocks, strict=True):
        after = dequantise_block(stored, group.mean)
        assert after.keys() == before.keys()
        assert all(after[name].shape == before[name].shape for name in before)
        error = (after["conv.weight"] - before["conv.weight"]).flatten(1).square().mean(1)
        moved = (before["conv.weight"] - mean).flatten(1).square().mean(1)
        torch.testing.assert_close((error / moved).mean(), torch.tensor(MSE), rtol=0.03, atol=0)
        for name in ("first.weight", "conv.bias", "only"):
            torch.testing.assert_close(after[name].float(), before[name], rtol=2e-3, atol=2e-2)


def test_a_block_takes_two_bits_a_weight() -> None:
    (group,) = quantise_blocks(blocks(networks=1, parts=8), "int2")

    def size(stored: dict[str, torch.Tensor]) -> int:
        return sum(value.numel() * value.element_size() for value in stored.values())

    weights = 256 * 128 * 9
    assert size(group.blocks[3]) * 8 / weights < 2.3
    assert size(group.mean) * 8 / weights < 11.5


def test_blocks_share_a_mean_with_similar_neighbours_alone() -> None:
    given = blocks(networks=2, parts=3)
    assert [len(group.blocks) for group in quantise_blocks(given, "int2")] == [3, 3]
    alone = quantise_blocks([given[0], given[3], given[1]], "int2")
    assert [len(group.blocks) for group in alone] == [1, 1, 1]
    assert not any(group.mean for group in alone)
    for before, group in zip((given[0], given[3], given[1]), alone, strict=True):
        after = dequantise_block(group.blocks[0], {})["conv.weight"]
        torch.testing.assert_close(after, before["conv.weight"], rtol=0, atol=0.05)
    broken = given[1] | {"conv.weight": given[1]["conv.weight"] * float("nan")}
    assert [len(g.blocks) for g in quantise_blocks([given[0], broken], "int2")] == [1, 1]
    other = {name: value for name, value in given[1].items() if name != "only"}
    assert [len(g.blocks) for g in quantise_blocks([given[0], other], "int2")] == [1, 1]


def test_equal_blocks_are_their_mean() -> None:
    block = blocks(networks=1, parts=1)[0]
    (group,), (alone,) = (quantise_blocks([block] * count, "int2") for count in (2, 1))
    errors = [
        (dequantise_block(each.blocks[-1], each.mean)["conv.weight"] - block["conv.weight"]).norm()
        for each in (group, alone)
    ]
    assert 0 < errors[0] < errors[1]  # the differences correct the rounding of the mean
    zero = block | {"odd.weight": torch.zeros(256, 101)}
    (group,) = quantise_blocks([zero, zero], "int2")
    assert torch.equal(
        dequantise_block(group.blocks[0], group.mean)["odd.weight"], torch.zeros(256, 101)
    )


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "int2"])
def test_other_dtypes_store_every_block_by_itself(dtype: str) -> None:
    groups = quantise_blocks(blocks(networks=1, parts=2), dtype)
    assert [(len(group.blocks), group.mean) for group in groups] == [(1, {}), (1, {})]


@pytest.mark.parametrize(("moved", "sizes"), [(0.06, [2]), (0.08, [1, 1])])
def test_blocks_are_similar_up_to_a_tenth_of_their_weights(moved: float, sizes: list[int]) -> None:
    """Two parts, both moved by a share s of their weights, are √2 s apart."""
    given = blocks(networks=1, parts=2, moved=moved)
    assert [len(group.blocks) for group in quantise_blocks(given, "int2")] == sizes


def test_blocks_that_drift_apart_begin_a_new_group() -> None:
    """Neighbours are 0.06 apart; the third block is 0.12 from the first."""
    start, step = (
        torch.randn(256, 128, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    given = [{"weight": start + 0.06 * k * step} for k in range(4)]
    assert [len(group.blocks) for group in quantise_blocks(given, "int2")] == [2, 2]


def test_blocks_of_other_shapes_share_no_mean() -> None:
    given = blocks(networks=1, parts=2)
    other = given[1] | {"conv.weight": given[1]["conv.weight"][:, :64]}
    assert [len(g.blocks) for g in quantise_blocks([given[0], other], "int2")] == [1, 1]
