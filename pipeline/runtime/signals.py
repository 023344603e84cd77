"""SIGINT, SIGTERM and SIGHUP: a command ends with one sentence and the exit code 128 + signal.

Files are written whole or not at all, so a command may end at any moment, during imports too. A
training loop asks for the signal instead (`deferred`): it ends after its next checkpoint, or when
the signal is `GRACE_SECONDS` old.

This module imports the standard library only, because it guards the import of everything else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

GRACE_SECONDS = 4.5
SENTENCE = (
    "interrupted; finished steps are kept; run the same command again (a training: with --resume)"
)
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP

_pending: int | None = None
_deferring = False
_cleanup: Callable[[], object] = tuple


class Interrupted(BaseException):
    """A signal that a training loop has answered by a checkpoint.

    Attributes:
        code: exit code of the command.
    """

    def __init__(self, number: int) -> None:
        super().__init__(SENTENCE)
        self.code = 128 + number


def install(cleanup: Callable[[], object] = tuple) -> Callable[[], None]:
    """Handle the signals in this process, unless they are ignored, as under nohup.

    Args:
        cleanup: is called before the process ends.

    Returns:
        A function that restores the handlers before.
    """
    global _cleanup, _pending
    before, kept = {}, _cleanup
    _cleanup, _pending = cleanup, None
    for name in _NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            with contextlib.suppress(ValueError):  # of a thread other than the main one
                before[number] = signal.signal(number, _handle)

    def restore() -> None:
        global _cleanup
        _cleanup = kept
        if _pending is not None and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)  # the command has ended in time
        for number, handler in before.items():
            signal.signal(number, handler)

    return restore


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Defer signals for the time of a loop that calls `pending` and `raise_pending`."""
    global _deferring
    before, _deferring = _deferring, True
    try:
        yield
    finally:
        _deferring = before
    raise_pending()


def pending() -> bool:
    """Return whether a signal waits for an answer."""
    return _pending is not None


def raise_pending() -> None:
    """End the command if a signal waits, after a checkpoint.

    Raises:
        Interrupted: a signal waits.
    """
    if _pending is not None:
        raise Interrupted(_pending)


def ignore_termination() -> None:
    """Ignore SIGTERM from now on, while the command waits for the reason why it must end."""
    with contextlib.suppress(ValueError):  # of a thread other than the main one
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def _handle(number: int, frame: FrameType | None) -> None:
    """Answer a signal at once, or remember it for the loop."""
    global _pending
    late = _pending is not None  # a second signal, or the alarm
    _pending = _pending or number
    if _deferring and not late:
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, _handle)
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
        return
    with contextlib.suppress(Exception):
        _cleanup()
    line = "\n" if sys.stderr is not None and os.isatty(2) else ""
    if os.environ.get("RANK", "0") == "0":  # a signal mostly reaches all ranks
        with contextlib.suppress(OSError):
            os.write(2, f"{line}error: {SENTENCE}\n".encode())  # print is not reentrant
    os._exit(128 + _pending)
