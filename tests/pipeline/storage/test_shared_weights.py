"""Large weights of similar blocks as their mean."""

from __future__ import annotations

import pytest
import torch

from pipeline.storage import shared_weights
from pipeline.storage.compact_weights import grouped
from pipeline.storage.shared_weights import DTYPES, dequantise_block, quantise_blocks


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


def test_large_tensors_have_the_sign_of_their_difference_from_the_mean() -> None:
    given = blocks(networks=1, parts=4)
    (group,) = quantise_blocks(given, "shared")
    assert set(group.mean) == {f"{name}.weight{part}" for name in ("conv", "odd")
                               for part in ("", ".scale", ".shape")}  # fmt: skip
    parts = (group.mean[f"conv.weight{part}"] for part in ("", ".scale", ".shape"))
    mean = shared_weights._from_int6(*parts).flatten(1)
    for before, stored in zip(given, group.blocks, strict=True):
        after = dequantise_block(stored, group.mean)
        assert after["odd.weight"].shape == before["odd.weight"].shape
        difference = before["conv.weight"].flatten(1) - mean
        error = (after["conv.weight"] - before["conv.weight"]).flatten(1).square().mean(1)
        # the least squares of one level a row
        least = difference.square().mean(1) - difference.abs().mean(1).square()
        torch.testing.assert_close(error, least, rtol=1e-3, atol=0)


def test_the_largest_tensors_are_the_mean_of_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.shared_weights._MEAN_ALONE", 20_000)
    given = blocks(networks=1, parts=4)
    (group,) = quantise_blocks(given, "shared")
    for name in ("conv.weight", "odd.weight"):
        mean = torch.stack([block[name] for block in given]).mean(0)
        restored = [dequantise_block(stored, group.mean)[name] for stored in group.blocks]
        assert all(torch.equal(weights, restored[0]) for weights in restored)
        assert restored[0].shape == mean.shape
        # the error of rounding is at most half of a step, which is max |m| / 31 of a group
        error, steps = grouped(restored[0] - mean).abs(), grouped(mean).abs().amax(2) / 31
        assert bool((error <= 0.501 * steps.unsqueeze(2)).all())


def test_small_tensors_are_those_of_the_block() -> None:
    given = blocks(networks=1, parts=4)
    (group,) = quantise_blocks(given, "shared")
    for before, stored in zip(given, group.blocks, strict=True):
        after = dequantise_block(stored, group.mean)
        assert after.keys() == before.keys()
        for name in ("first.weight", "conv.bias", "only"):
            torch.testing.assert_close(after[name].float(), before[name], rtol=2e-3, atol=2e-2)


def test_the_mean_takes_six_bits_a_weight_and_a_block_one() -> None:
    (group,) = quantise_blocks(blocks(networks=1, parts=8), "shared")

    def size(stored: dict[str, torch.Tensor]) -> int:
        return sum(value.numel() * value.element_size() for value in stored.values())

    weights = 256 * (128 * 9 + 101)
    assert size(group.mean) * 8 / weights < 6.6  # scales take half a bit
    assert 1 < size(group.blocks[3]) * 8 / weights < 1.2  # of signs and small tensors


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_second_export_does_not_change_a_mean_without_differences(
    parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.shared_weights._MEAN_ALONE", 20_000)
    (group,) = quantise_blocks(blocks(networks=1, parts=parts), "shared")
    restored = [dequantise_block(stored, group.mean) for stored in group.blocks]
    (again,) = quantise_blocks(restored, "shared")
    for name, value in group.mean.items():
        assert torch.equal(again.mean[name], value), name


def test_blocks_share_a_mean_with_similar_neighbours_alone() -> None:
    given = blocks(networks=2, parts=3)
    assert [len(group.blocks) for group in quantise_blocks(given, "shared")] == [3, 3]
    alone = quantise_blocks([given[0], given[3], given[1]], "shared")
    assert [len(group.blocks) for group in alone] == [1, 1, 1]
    assert not any(group.mean for group in alone)
    for before, group in zip((given[0], given[3], given[1]), alone, strict=True):
        after = dequantise_block(group.blocks[0], {})["conv.weight"]
        torch.testing.assert_close(after, before["conv.weight"], rtol=0, atol=0.05)
    broken = given[1] | {"conv.weight": given[1]["conv.weight"] * float("nan")}
    assert [len(g.blocks) for g in quantise_blocks([given[0], broken], "shared")] == [1, 1]
    other = {name: value for name, value in given[1].items() if name != "only"}
    assert [len(g.blocks) for g in quantise_blocks([given[0], other], "shared")] == [1, 1]


def test_weights_of_zero_remain_zero() -> None:
    block = blocks(networks=1, parts=1)[0] | {"odd.weight": torch.zeros(256, 101)}
    (group,) = quantise_blocks([block, block], "shared")
    restored = dequantise_block(group.blocks[0], group.mean)["odd.weight"]
    assert torch.equal(restored, torch.zeros(256, 101))


@pytest.mark.parametrize(
    ("name", "damaged", "error"),
    [
        ("conv.weight.scale", None, KeyError),
        ("conv.weight.level", None, KeyError),
        ("conv.weight.sign", torch.zeros(8, dtype=torch.uint8), RuntimeError),
        ("conv.weight.level", torch.zeros(3), RuntimeError),
        ("conv.weight", torch.zeros(8, 3, dtype=torch.uint8), RuntimeError),
        ("conv.weight.scale", torch.ones(3, 2), RuntimeError),
        ("conv.weight.shape", torch.tensor([256, 128, 3, 4]), RuntimeError),
        ("conv.weight.shape", torch.tensor([-256, 128, 3, -3]), RuntimeError),
        ("conv.weight.shape", torch.tensor([2.5]), RuntimeError),
        ("conv.weight.shape", torch.tensor([]), RuntimeError),
        # broadcasting these would take memory that the file does not have
        ("conv.weight.shape", torch.ones(100_000), RuntimeError),
        ("conv.weight.level", torch.zeros(4096, 1), RuntimeError),
        ("conv.weight.scale", torch.ones(1, 1), RuntimeError),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    name: str, damaged: torch.Tensor | None, error: type[Exception]
) -> None:
    (group,) = quantise_blocks(blocks(networks=1, parts=2), "shared")
    mean, block = dict(group.mean), dict(group.blocks[0])
    changed = mean if name in mean else block
    changed.pop(name)
    if damaged is not None:
        changed[name] = damaged
    with pytest.raises(error):
        dequantise_block(block, mean)


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "shared"])
def test_other_dtypes_store_every_block_by_itself(dtype: str) -> None:
    groups = quantise_blocks(blocks(networks=1, parts=2), dtype)
    assert [(len(group.blocks), group.mean) for group in groups] == [(1, {}), (1, {})]


@pytest.mark.parametrize(("moved", "sizes"), [(0.06, [2]), (0.08, [1, 1])])
def test_blocks_are_similar_up_to_a_tenth_of_their_weights(moved: float, sizes: list[int]) -> None:
    """Two parts, both moved by a share s of their weights, are √2 s apart."""
    given = blocks(networks=1, parts=2, moved=moved)
    assert [len(group.blocks) for group in quantise_blocks(given, "shared")] == sizes


def test_blocks_that_drift_apart_begin_a_new_group() -> None:
    """Neighbours are 0.06 apart; the third block is 0.12 from the first."""
    start, step = (
        torch.randn(256, 128, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    given = [{"weight": start + 0.06 * k * step} for k in range(4)]
    assert [len(group.blocks) for group in quantise_blocks(given, "shared")] == [2, 2]


def test_blocks_of_other_shapes_share_no_mean() -> None:
    given = blocks(networks=1, parts=2)
    other = given[1] | {"conv.weight": given[1]["conv.weight"][:, :64]}
    assert [len(g.blocks) for g in quantise_blocks([given[0], other], "shared")] == [1, 1]
