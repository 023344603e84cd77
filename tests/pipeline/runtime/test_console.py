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
    """The clock is looked at after the warm step, and twice after three more."""
    assert clocked(monkeypatch, 3.0) == "encode: about 33 minutes (2 s a step, 1,000 steps)\n"
    assert clocked(monkeypatch, 0.01) == ""
    whole = ("training", 5400, "iteration")
    line = "training: about 3 hours (2 s an iteration, 5,400 iterations)\n"
    assert clocked(monkeypatch, 3.0, whole) == line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5 seconds"), (119, "119 seconds"), (150, "2.5 minutes"), (5400, "90 minutes"),
     (9000, "2.5 hours"), (864000, "10 days")],
)  # fmt: skip
def test_durations_have_the_largest_unit_that_fits_twice(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


def test_a_plain_iterable_has_no_estimate() -> None:
    console.estimate_whole([1, 2], "training", 2, "iteration")
