"""A reader that reads ahead returns what its store returns, and raises what its store raises."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.runtime.rng import Batches
from pipeline.storage.shards.manifest import shard_name
from pipeline.storage.shards.read_ahead import THREAD, ReadAhead
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.shards.remote import open_remote_store
from tests.pipeline.storage.shards.stores import COUNT, SHARD, flip, rows, write

SIZE, STEPS = 10, 8


class Watched(StoreReader):
    """A store that notes which thread takes what, and fails at some samples."""

    def __init__(self, store: StoreReader) -> None:
        super().__init__(store.folder, store.manifest)
        self.taken: list[tuple[str, str, int]] = []
        self.bad: set[int] = set()
        self.wait = threading.Event()
        self.wait.set()

    def take(self, name: str, indices: Tensor) -> Tensor:
        thread = threading.current_thread().name
        if thread.startswith(THREAD):
            self.wait.wait()
        self.taken.append((thread, name, len(indices)))
        if self.bad & set(indices.tolist()):
            raise UserError("sample is damaged; expected another; mend it")
        return super().take(name, indices)

    def here(self) -> list[tuple[str, str, int]]:
        """What other threads than that of a reader ahead took."""
        return [row for row in self.taken if not row[0].startswith(THREAD)]


@pytest.fixture
def store(tmp_path: Path) -> Watched:
    return Watched(write(tmp_path / "store"))


def batches() -> Callable[[int], Tensor]:
    return Batches(COUNT, SIZE, 7).indices


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD)]


@pytest.mark.parametrize(
    "parts",
    [
        [[*range(SIZE)]],  # the whole batch
        [[*range(1, SIZE, 3)]],  # the share of a rank
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]],  # micro-batches
        [[7, 3, 3, 0]],
        [[]],
    ],
)
def test_samples_are_those_of_the_store(store: Watched, parts: list[list[int]]) -> None:
    """From the third step on, the thread has read all of them; batches cross epochs."""
    ahead, plain, expected = ReadAhead(store, batches(), STEPS), batches(), rows(0, COUNT)
    for step in range(STEPS):
        batch = ahead.batch(step)
        assert torch.equal(batch, plain(step))
        for part in parts:
            assert torch.equal(ahead.batch(step)[part], batch[part])
            assert torch.equal(ahead.take("x", batch[part]), expected[batch[part]])
        assert torch.equal(ahead.take("n", batch[:4]), batch[:4])
        if step == 1:
            store.taken.clear()
    assert store.here() == [] and len(store.taken) >= 2 * (STEPS - 3)
    for part in parts:  # memory ran out, and the parts are taken again
        assert torch.equal(ahead.take("x", batch[part]), expected[batch[part]])
    ahead.close()
    assert threads() == []


def test_other_samples_are_read_when_they_are_taken(store: Watched) -> None:
    ahead, everything = ReadAhead(store, batches(), STEPS), torch.arange(COUNT)
    for step in range(4):
        batch = ahead.batch(step)
        assert torch.equal(ahead.take("n", batch), batch)
        assert torch.equal(ahead.take("n", everything), everything)
        assert torch.equal(ahead.read("x", 3, 9), rows(3, 9)) and len(ahead) == COUNT
    ahead.batch(1)  # a step that is not the next one
    assert torch.equal(ahead.take("n", everything), everything)
    ahead.close()


def test_nothing_is_read_beyond_the_last_step(store: Watched) -> None:
    ahead, asked = ReadAhead(store, batches(), 3), batches()
    for step in range(3):
        ahead.take("n", ahead.batch(step))
    ahead.close()
    assert [row[2] for row in store.taken] == [SIZE] * 3
    assert torch.equal(asked(2), ahead.batch(2))


def test_the_error_is_that_of_the_step_that_needs_the_sample(store: Watched) -> None:
    ahead, plain = ReadAhead(store, batches(), STEPS), batches()
    bad = next(i for i in plain(4).tolist() if all(i not in plain(step) for step in (2, 3)))
    for step in range(4):
        batch = ahead.batch(step)
        if step == 2:
            store.bad.add(bad)
        assert torch.equal(ahead.take("n", batch), batch)
    batch = ahead.batch(4)
    with pytest.raises(UserError, match="sample is damaged; expected another; mend it"):
        ahead.take("n", batch)
    store.bad.clear()  # an error that passes, such as that of a network
    assert torch.equal(ahead.take("n", batch), batch)
    ahead.close()
    assert threads() == []


def test_a_step_computes_while_the_next_batch_is_read(store: Watched) -> None:
    """The thread waits for its disk; the next step waits for the thread."""
    ahead = ReadAhead(store, batches(), STEPS)
    ahead.take("n", ahead.batch(0))
    store.wait.clear()
    ahead.take("n", ahead.batch(1))
    assert len(store.taken) == len(store.here()) == 2
    timer = threading.Timer(0.2, store.wait.set)
    timer.start()
    batch = ahead.batch(2)
    assert store.wait.is_set() and torch.equal(ahead.take("n", batch), batch)
    assert len(store.here()) == 2
    ahead.close()
    timer.join()
    assert len(store.taken) in (3, 4) and threads() == []  # the batch of step 3 may be read


def test_shards_at_an_address_are_copied_ahead(local: StoreReader, url: str) -> None:
    ahead = ReadAhead(open_remote_store(url, "store"), Batches(len(local), 6, 1).indices, 9)
    for step in range(9):
        batch = ahead.batch(step)
        assert torch.equal(ahead.take("x", batch), local.take("x", batch))
    ahead.close()
    assert threads() == []


def test_a_damaged_shard_at_an_address_is_named_at_its_step(
    local: StoreReader, url: str, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_bytes((local.folder / shard_name(3)).read_bytes())
    flip(damaged)
    fsspec.filesystem("memory").put(str(damaged), f"/bucket/store/{shard_name(3)}")
    order = torch.tensor([0, 1, 8, 9, 16, 17, 3 * 8, 3 * 8 + 1])
    ahead = ReadAhead(open_remote_store(url, "store"), lambda step: order[2 * step :][:2], 4)
    for step in range(3):
        assert torch.equal(ahead.take("n", ahead.batch(step)), ahead.batch(step))
    with pytest.raises(UserError, match=r"shard-00003.* is damaged; expected the sha256"):
        ahead.take("n", ahead.batch(3))
    ahead.close()
    assert threads() == []


def test_two_threads_share_the_maps_of_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step may read while the thread does; maps are closed under both."""
    monkeypatch.setattr("pipeline.storage.shards.reader.SCATTERED", 1)
    monkeypatch.setattr("pipeline.storage.shards.reader._MOST_MAPS", 2)
    store, wrong = write(tmp_path / "store", count=40 * SHARD), list[int]()

    def read(seed: int) -> None:
        source = torch.Generator().manual_seed(seed)
        for _ in range(60):
            indices = torch.randint(len(store), (30,), generator=source)
            if not torch.equal(store.take("n", indices), indices):
                wrong.append(seed)

    pool = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    assert wrong == [] and len(store._maps) <= 2
