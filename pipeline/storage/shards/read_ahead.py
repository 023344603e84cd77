"""Reading ahead: a thread reads the samples of the next batch while a training step computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.storage.shards.reader import StoreReader

#: name of the thread
THREAD = "read-ahead"
#: indices (n,) and samples (n, …) by field
_Rows = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Ahead:
    """A batch that is being read: its step, its indices (B,) and what was asked of it."""

    step: int
    batch: Tensor
    rows: Future[_Rows] | None

    def wait(self) -> _Rows:
        """Return what was read; nothing after an error, which then recurs where rows are taken."""
        if self.rows is None or self.rows.exception() is not None:
            return {}
        return self.rows.result()


class ReadAhead(StoreReader):
    """Reader of the batches of a training; a thread reads the next batch while a step computes.

    The next batch is read in those fields, and at those positions in the batch, that the step
    before took. All else is read when it is taken. So `take` returns what the store returns, and
    raises its errors at the step that needs the samples.

    Args:
        store: of the samples.
        batches: step → indices of its batch, int64 (B,).
        last: step after the last, whose batch is not read.
    """

    def __init__(self, store: StoreReader, batches: Callable[[int], Tensor], last: int) -> None:
        super().__init__(store.folder, store.manifest)
        self.store, self._batches, self._last = store, batches, last
        self._pool = ThreadPoolExecutor(1, THREAD)
        self._step, self._batch = -1, torch.empty(0, dtype=torch.int64)
        self._taken: dict[str, list[Tensor]] = {}
        self._rows: _Rows = {}
        self._uses: dict[str, int] = {}
        self._ahead: _Ahead | None = None

    def batch(self, step: int) -> Tensor:
        """Return the indices (B,) of a step's batch, and begin to read the batch after it."""
        if step != self._step:
            taken = {name: torch.cat(parts) for name, parts in self._taken.items()}
            positions = {name: torch.isin(self._batch, rows) for name, rows in taken.items()}
            self._uses = {name: len(parts) for name, parts in self._taken.items()}
            ahead, self._taken = self._ahead, {}
            if ahead is not None and ahead.step == step:
                self._batch, self._rows = ahead.batch, ahead.wait()
            else:
                self._batch, self._rows = self._batches(step), {}
            self._step = step
            self._ahead = self._begin(step + 1, positions) if step + 1 < self._last else None
        return self._batch

    def _begin(self, step: int, positions: Mapping[str, Tensor]) -> _Ahead:
        """Let the thread read the samples at positions, bool (B,) by field, of a step's batch."""
        batch = self._batches(step)
        rows = {name: batch[mask] for name, mask in positions.items()}
        return _Ahead(step, batch, self._pool.submit(self._read, rows) if rows else None)

    def _read(self, rows: Mapping[str, Tensor]) -> _Rows:
        return {name: (indices, self.store.take(name, indices)) for name, indices in rows.items()}

    def take(self, name: str, indices: Tensor) -> Tensor:
        """Return the samples (m, …) of a field at indices (m,) in any order."""
        self._taken.setdefault(name, []).append(indices)
        samples = self._held(name, indices)
        return self.store.take(name, indices) if samples is None else samples

    def _held(self, name: str, indices: Tensor) -> Tensor | None:
        """Return samples that were read ahead; they are let go after as many uses as before."""
        if name not in self._rows:
            return None
        rows, samples = self._rows[name]
        self._uses[name] = self._uses.get(name, 1) - 1
        if not self._uses[name]:
            del self._rows[name]
        if torch.equal(rows, indices):
            return samples.detach()
        places = _find(rows, indices)
        return None if places is None else samples[places]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the samples [start, stop) of a field, (n, …)."""
        return self.store.read(name, start, stop)

    def close(self) -> None:
        """End the thread after the read in progress, if there is one."""
        self._pool.shutdown(cancel_futures=True)
        self._ahead, self._rows = None, {}


def _find(rows: Tensor, indices: Tensor) -> Tensor | None:
    """Return the positions (m,) in rows (n,) of indices (m,); None if one is missing."""
    if not len(rows):
        return None
    ordered, order = rows.sort()
    places = torch.searchsorted(ordered, indices).clamp(max=len(rows) - 1)
    return order[places] if bool((ordered[places] == indices).all()) else None
