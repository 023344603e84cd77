"""Messages and progress bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

#: wraps an iterable, given its length and a label, in a progress bar
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]

#: seconds between two lines of progress where stderr is no terminal
LOG_SECONDS = 15.0


def say(message: str) -> None:
    """Print a message for people on stderr; stdout is for results that scripts read."""
    print(message, file=sys.stderr, flush=True)


def progress_bar(items: Any, total: int, label: str) -> Any:  # noqa: ANN401 - any iterable
    """Wrap an iterable in a progress bar with the remaining time, on the main process only.

    Where stderr is no terminal, the bar is a line every `LOG_SECONDS`.
    """
    from accelerate.state import PartialState
    from tqdm import tqdm

    quiet = total == 0 or not PartialState().is_main_process
    return tqdm(items, total=total, desc=label, disable=quiet, leave=False, **_style())


def annotate(bar: Any, **values: float) -> None:  # noqa: ANN401 - any iterable
    """Show values after a progress bar from `progress_bar`; other iterables show none."""
    if hasattr(bar, "set_postfix_str"):
        texts = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
        bar.set_postfix_str(", ".join(texts).replace(" per s", "/s"), refresh=False)


def no_progress(items: Any, total: int, label: str) -> Any:  # noqa: ANN401 - any iterable
    """Return an iterable as it is."""
    return items


class ImageCounter:
    """Counter of images on the terminal, for sets of unknown size."""

    def __enter__(self) -> ImageCounter:
        from tqdm import tqdm

        self._bar = tqdm(unit=" images", leave=False, **_style())
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def callback(self, name: str) -> Any:  # noqa: ANN401 - a callback
        """Return the function that adds a number of images of the named set."""
        self._bar.set_description(name)
        return self._bar.update


class _Lines:
    """File that ends every update of a bar with a newline instead of a carriage return."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def _style() -> dict[str, Any]:
    """Return the options of a bar: often on a terminal, a line now and then elsewhere."""
    if sys.stderr.isatty():
        return {"mininterval": 0.2}
    return {"file": _Lines(), "mininterval": LOG_SECONDS, "delay": LOG_SECONDS, "ncols": 0}
