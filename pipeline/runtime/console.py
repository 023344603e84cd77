"""Messages and progress bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

#: wraps an iterable, given its length and a label, in a progress bar
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


def say(message: str) -> None:
    """Print a message for people on stderr; stdout is for results that scripts read."""
    print(message, file=sys.stderr, flush=True)


def progress_bar(items: Any, total: int, label: str) -> Any:  # noqa: ANN401 - any iterable
    """Wrap an iterable in a progress bar with the remaining time, on the main process only."""
    from accelerate.state import PartialState
    from tqdm import tqdm

    quiet = total == 0 or not PartialState().is_main_process
    return tqdm(
        items, total=total, desc=label, disable=quiet, mininterval=_interval(), leave=False
    )


class ImageCounter:
    """Counter of images on the terminal, for sets of unknown size."""

    def __enter__(self) -> ImageCounter:
        from tqdm import tqdm

        self._bar = tqdm(unit=" images", mininterval=_interval(), leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def callback(self, name: str) -> Any:  # noqa: ANN401 - a callback
        """Return the function that adds a number of images of the named set."""
        self._bar.set_description(name)
        return self._bar.update


def _interval() -> float:
    """Return the seconds between two updates: few on a terminal, more in a log file."""
    return 0.2 if sys.stderr.isatty() else 15.0
