"""Everything random is a pure function of its parts."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.runtime import rng
from pipeline.runtime.rng import Batches, Permutation, generator, normals


def draw(*parts: int | str) -> torch.Tensor:
    return torch.randn(4, generator=generator(*parts))


def test_a_generator_is_the_same_in_every_process() -> None:
    code = (
        "import torch; from pipeline.runtime.rng import generator; "
        "print(torch.randint(10**9, (5,), generator=generator(3, 'order', 2)).tolist())"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    here = torch.randint(10**9, (5,), generator=generator(3, "order", 2)).tolist()
    assert said.strip() == str(here)


def test_other_parts_give_another_stream() -> None:
    parts = [(0,), (1,), (0, 0), ("0",), (0, "a"), ("a", 0), (0, "a", 1), (12, 3), (1, 23)]
    drawn = {tuple(draw(*p).tolist()) for p in parts}
    assert len(drawn) == len(parts)


def test_the_global_state_is_unchanged() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    draw(1, "x")
    Batches(10, 4, 0).indices(7)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize(("count", "size"), [(10, 3), (7, 7), (5, 12), (1, 4)])
def test_every_epoch_is_a_permutation(count: int, size: int) -> None:
    batches = Batches(count, size, 0, "block", 1)
    steps = -(-3 * count // size)
    drawn = torch.cat([batches.indices(step) for step in range(steps)])
    epochs = [drawn[e * count : (e + 1) * count] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(count))
    if count > 5:
        assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_indices_of_all_ranks_are_the_batch(ranks: int) -> None:
    whole = Batches(50, 10, 0)
    for step in (0, 3, 4, 11):
        shares = [Batches(50, 10, 0).indices(step, rank, ranks) for rank in range(ranks)]
        together = torch.empty(10, dtype=torch.long)
        for rank, share in enumerate(shares):
            together[rank::ranks] = share
        assert torch.equal(together, whole.indices(step))


def test_any_step_can_be_sampled_first() -> None:
    forwards = Batches(11, 4, 2)
    in_order = [forwards.indices(step) for step in range(9)]
    for step in (8, 0, 5, 2):
        assert torch.equal(Batches(11, 4, 2).indices(step), in_order[step])
        assert torch.equal(forwards.indices(step), in_order[step])


def test_more_ranks_than_samples_is_a_user_error() -> None:
    batches = Batches(50, 2, 0)
    assert [len(batches.indices(0, rank, 2)) for rank in range(2)] == [1, 1]
    with pytest.raises(UserError, match="batch_size is 2; expected at least .*3"):
        batches.indices(0, 0, 3)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_a_permutation_without_a_table_has_every_element_once(count: int) -> None:
    order = Permutation(count, generator("permutation", count))
    parts = [order(part) for part in torch.arange(count).split(300)]
    assert torch.cat(parts).sort().values.tolist() == list(range(count))


def test_a_permutation_without_a_table_looks_random() -> None:
    """Elements, their neighbours and another key's elements are uncorrelated."""
    positions = torch.arange(20_000)
    one, other = (Permutation(20_000, generator(key))(positions).double() for key in (1, 2))
    pairs = [(one, positions.double()), (one[1:], one[:-1]), (one, other)]
    for a, b in pairs:
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.03
    steps = one.diff().abs()
    assert float(steps.mean()) == pytest.approx(20_000 / 3, rel=0.03)


def test_epochs_of_large_sets_hold_every_sample_once(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [Batches(50, 8, "large").indices(step) for step in range(2)]
    monkeypatch.setattr(rng, "TABLE", 10)
    batches = Batches(50, 8, "large")
    drawn = torch.cat([batches.indices(step) for step in range(25)])
    for epoch in drawn.split(50):
        assert epoch.sort().values.tolist() == list(range(50))
    assert drawn[:50].tolist() != drawn[50:100].tolist()
    assert torch.equal(Batches(50, 8, "large").indices(20), drawn[160:168])  # of any step at once
    assert not torch.equal(table[0], drawn[:8])


def test_noise_by_counters_is_numpys_philox() -> None:
    """Row i is the stream of the counter i · 2⁶⁴, whatever rows come with it."""
    rows = torch.tensor([5, 0, 5, 10**9])
    noise = normals(rows, (3, 2), "a", 1)
    key = torch.randint(2**62, (2,), generator=generator("a", 1)).numpy().astype(np.uint64)
    for values, row in zip(noise, rows.tolist(), strict=True):
        source = np.random.Generator(np.random.Philox(key=key, counter=row << 64))
        expected = source.standard_normal(6, dtype=np.float32).reshape(3, 2)
        assert np.array_equal(values.numpy(), expected)
    assert not torch.equal(normals(rows, (3, 2), "a", 2), noise)


def test_noise_by_counters_is_normal() -> None:
    noise = normals(torch.arange(4000), (25,), "normal").double()
    moments = [float((noise**k).mean()) for k in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.04)
    between = torch.corrcoef(noise.T) - torch.eye(25)
    along = (noise[1:] * noise[:-1]).mean()
    assert float(between.abs().max()) < 0.08 and abs(float(along)) < 0.01


def test_an_order_of_many_elements_has_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    table = rng.order(100, generator("order"))(torch.arange(100))
    assert torch.equal(table, torch.randperm(100, generator=generator("order")))
    monkeypatch.setattr(rng, "TABLE", 50)
    assert rng.order(100, generator("order"))(torch.arange(100)).unique().tolist() == [*range(100)]
