"""Progress: lines with values where stderr is no terminal."""

from __future__ import annotations

import io
import sys
from itertools import count

import pytest
from accelerate import Accelerator

from pipeline.runtime import console


def test_piped_progress_is_lines(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(console, "LOG_SECONDS", 0.0)
    bar = console.progress_bar(range(3), 3, "block 0")
    for step in bar:
        console.annotate(bar, loss=0.5 - step, samples_per_s=123.4)
    text = stream.getvalue()
    assert "\r" not in text
    lines = text.splitlines()
    assert all(line.startswith("block 0: ") for line in lines)
    assert "2/3" in lines[-2] and "loss 0.5, samples/s 123.4" in lines[1]


def test_short_piped_loops_print_nothing(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(console.progress_bar(range(3), 3, "block 0")) == [0, 1, 2]
    assert stream.getvalue() == ""


def test_values_after_a_plain_iterable_are_ignored() -> None:
    console.annotate([1, 2], loss=1.0)


def clocked(
    monkeypatch: pytest.MonkeyPatch, seconds: float, whole: tuple[str, int, str] | None = None
) -> str:
    """What a loop of 1000 steps prints whose clock advances at every look, by these seconds."""
    stream, clock = io.StringIO(), count(step=seconds)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(console, "_clock", lambda: next(clock))
    monkeypatch.setattr(console, "_estimated", set())
    for _ in range(2):  # the second loop of a kind says nothing
        bar = console.progress_bar(range(1000), 1000, "encode")
        if whole is not None:
            console.estimate_whole(bar, *whole)
        assert list(bar) == list(range(1000))
    return stream.getvalue()


def test_a_long_loop_says_once_how_long_it_takes(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert clocked(monkeypatch, 3.0) == "encode: about 50 minutes (3 s a step, 1,000 steps)\n"
    assert clocked(monkeypatch, 0.01) == ""
    whole = ("training", 5400, "iteration")
    line = "training: about 4.5 hours (3 s an iteration, 5,400 iterations)\n"
    assert clocked(monkeypatch, 3.0, whole) == line


@pytest.mark.parametrize(
    ("seconds", "steps", "after", "text"),
    [
        (40.0, 3, 1, "generate: about 2 minutes (40 s a step, 3 steps)\n"),  # one step suffices
        (7.0, 20, 3, "generate: about 2.3 minutes (7 s a step, 20 steps)\n"),
        (2.0, 60, 4, "generate: about 2 minutes (2 s a step, 60 steps)\n"),
        (90.0, 1, 1, ""),  # it is over
    ],
)
def test_few_long_steps_have_an_early_estimate(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch,
    seconds: float, steps: int, after: int, text: str,
) -> None:  # fmt: skip
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(console, "_clock", lambda: now[0])
    monkeypatch.setattr(console, "_estimated", set())
    for step in console.progress_bar(range(steps), steps, "generate"):
        assert stream.getvalue() == (text if step >= after else "")
        now[0] += seconds
    assert stream.getvalue() == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5 seconds"), (119, "119 seconds"), (150, "2.5 minutes"), (5400, "90 minutes"),
     (9000, "2.5 hours"), (864000, "10 days")],
)  # fmt: skip
def test_durations_have_the_largest_unit_that_fits_twice(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


def test_a_plain_iterable_has_no_estimate() -> None:
    console.estimate_whole([1, 2], "training", 2, "iteration")
