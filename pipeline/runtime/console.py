"""Messages and progress bars on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

#: wraps an iterable, given its length and a label, in a progress bar
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]

#: seconds between two lines of progress where stderr is no terminal
LOG_SECONDS = 15.0

#: steps whose time is left out of an estimate, and steps and seconds that it needs
_WARM, _STEPS, _SECONDS = 1, 3, 1.0
#: seconds that suffice for an estimate, however few steps they hold
_ENOUGH = 10.0
#: seconds of a loop that is worth an estimate
LONG_SECONDS = 60.0
_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))

_clock = time.monotonic
#: first words of the labels of loops that have had their estimate
_estimated: set[str] = set()


def say(message: str) -> None:
    """Print a message for people on stderr; stdout is for results that scripts read."""
    print(message, file=sys.stderr, flush=True)


def progress_bar(items: Any, total: int, label: str) -> Any:  # noqa: ANN401 - any iterable
    """Wrap an iterable in a progress bar with the remaining time, on the main process only.

    Where stderr is no terminal, the bar is a line every `LOG_SECONDS`. A loop of over
    `LONG_SECONDS` says how long it will take, the first time in a process. It needs four steps, or
    those of the first `_ENOUGH` seconds.
    """
    from accelerate.state import PartialState
    from tqdm import tqdm

    class Bar(tqdm):
        whole = label, total, "step"

        def __iter__(self) -> Iterator[Any]:
            steps = super().__iter__()
            return iter(steps) if self.disable else _with_estimate(self, steps)

    quiet = total == 0 or not PartialState().is_main_process
    return Bar(items, total=total, desc=label, disable=quiet, leave=False, **_style())


def estimate_whole(bar: Any, label: str, count: int, unit: str) -> None:  # noqa: ANN401
    """Let the estimate of a bar be that of a larger work, of which its loop is the first part.

    Args:
        bar: from `progress_bar`; other iterables have no estimate.
        label: names the work.
        count: number of steps of the whole work.
        unit: a singular, what a step is.
    """
    if hasattr(bar, "whole"):
        bar.whole = label, count, unit


def estimate(label: str, seconds: float, count: int, unit: str) -> str:
    """Describe how long a work takes.

    Args:
        label: names the work.
        seconds: of a step.
        count: number of steps.
        unit: a singular, what a step is.
    """
    article = "an" if unit[0] in "aeiou" else "a"
    each = f"{seconds:.2g} s {article} {unit}, {count:,} {unit}s"
    return f"{label}: about {duration(seconds * count)} ({each})"


def duration(seconds: float) -> str:
    """Format a time for people, such as 24 minutes or 2.5 hours."""
    size, unit = next((pair for pair in _UNITS if seconds >= 2 * pair[0]), _UNITS[-1])
    value = seconds / size
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"


def _with_estimate(bar: Any, steps: Iterable[Any]) -> Iterator[Any]:  # noqa: ANN401
    """Yield the steps of a loop; print an estimate after the first ones, if it is long.

    The first step is left out, unless it alone is long.
    """
    began, done, waits = _clock(), 0, True
    for step in steps:
        yield step
        done += 1
        if not waits:
            continue
        spent = _clock() - began
        counted = max(1, done - _WARM)
        if spent >= _ENOUGH or (done >= _WARM + _STEPS and spent >= _SECONDS):
            waits = False
            label, count, unit = bar.whole
            each, word = spent / counted, label.split()[0]
            if done < count and each * count >= LONG_SECONDS and word not in _estimated:
                _estimated.add(word)
                bar.write(estimate(label, each, count, unit), file=sys.stderr)
        elif done == _WARM:
            began += spent


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
        self._bar.set_description_str(name, refresh=False)  # a bar without a total adds the colon
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
    bar = {"file": _Lines(), "mininterval": LOG_SECONDS, "delay": LOG_SECONDS, "ncols": 0}
    return {**bar, "miniters": 1}  # else a thread of tqdm repeats the last line
