"""Messages and progress bars on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

#: a progress bar: takes an iterable and says how much of it there is
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


def say(message: str) -> None:
    """Tell people; results that scripts read go to stdout instead."""
    print(message, file=sys.stderr, flush=True)


def bar(items: Any, total: int, label: str) -> Any:  # noqa: ANN401 - any iterable
    """Wrap an iterable in a progress bar with the time left, on the main process only."""
    from accelerate.state import PartialState
    from tqdm import tqdm

    quiet = total == 0 or not PartialState().is_main_process
    seconds = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(items, total=total, desc=label, disable=quiet, mininterval=seconds, leave=False)


class Meter:
    """A running count of images, for sets whose size is not known beforehand."""

    def __enter__(self) -> Meter:
        from tqdm import tqdm

        seconds = 0.2 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(unit=" images", mininterval=seconds, leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def of(self, name: str) -> Any:  # noqa: ANN401 - a callback
        """The callback that counts images of one set."""
        self._bar.set_description(name)
        return self._bar.update
