"""Signals end a command with a sentence and a code, whenever they come."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.runtime import signals

ROOT = Path(__file__).parents[3]


def reset() -> None:
    """Handle all signals as a terminal's process does, also if the tests run under nohup."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(*words: str, code: str | None = None) -> subprocess.Popen[str]:
    arguments = ["-c", code] if code is not None else ["-m", "pipeline", *words]
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, preexec_fn=reset,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def handled(pid: int, number: int) -> bool:
    """Whether a process has a handler of a signal, by the kernel's word."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_imports_ends_with_a_sentence(number: signal.Signals) -> None:
    process = start("train", "-c", "smoke")
    while process.poll() is None and not handled(process.pid, signal.SIGTERM):
        time.sleep(0.002)
    time.sleep(0.05 * (number - 1))
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 128 + number
    assert out == "" and err == f"error: {signals.SENTENCE}\n"


LOOP = """
import sys, time
from pipeline.runtime import signals
signals.install()
def loop():
    with signals.deferred():
        print("ready", flush=True)
        for _ in range(1000):
            time.sleep(0.01)
            if signals.pending() and {answers}:
                print("saved", flush=True)
                return
signals.GRACE_SECONDS = 0.3
try:
    loop()
except signals.Interrupted as stop:
    print(stop.code)
    sys.exit(stop.code)
"""


def test_a_loop_saves_first() -> None:
    process = start(code=LOOP.format(answers=True))
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert (process.returncode, out) == (143, "saved\n143\n")


@pytest.mark.parametrize("again", [True, False])
def test_a_loop_that_does_not_answer_is_ended(again: bool) -> None:
    """By a second signal, or after some seconds."""
    process = start(code=LOOP.format(answers=False))
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    if again:
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=5)
    assert (process.returncode, out) == (130, "")
    assert err == f"error: {signals.SENTENCE}\n"


def test_signals_that_are_ignored_stay_so() -> None:
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        restore = signals.install()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signals._handle
        restore()
        assert signal.getsignal(signal.SIGTERM) is not signals._handle
    finally:
        signal.signal(signal.SIGHUP, before)
