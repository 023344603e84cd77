"""Progress: lines with values where stderr is no terminal."""

from __future__ import annotations

import io
import sys

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
