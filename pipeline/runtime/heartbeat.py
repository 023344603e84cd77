"""Heartbeats: each of several processes shows that it lives, and all end when one has died.

Every rank counts beats under a key of the process group's store. Rank 0 watches all ranks and
writes a verdict; the others watch rank 0 and the verdict. So the store serves a few requests a
beat and rank, and a rank that waits in a collective for a dead one still ends.

A rank whose connection breaks asks for a faster verdict. One rank prints the sentence: the first
that claims it in the store.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from pipeline.errors import JkoflowError

#: seconds between two beats, and without a beat until a rank counts as dead
BEAT, SILENCE = 2.0, 45.0
#: beats without a sign of life that suffice once a connection has broken
SUSPECT_BEATS = 4
_STORE_SECONDS = 30.0
_DONE = "done"
#: words of the errors of a collective whose other end is gone
_BROKEN = ("connection closed by peer", "connection reset by peer", "broken pipe", "gloo", "nccl")


Answer = TypeVar("Answer")


class Store(Protocol):
    """The part of a store of torch.distributed that heartbeats use."""

    def set(self, key: str, value: str) -> Any:  # noqa: ANN401
        """Write a value."""

    def get(self, key: str) -> bytes:
        """Read a value, which is there."""

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys are there."""

    def add(self, key: str, amount: int) -> int:
        """Add to a counter; return its new value."""


class Heartbeat:
    """Heartbeat of one rank, in a thread.

    Args:
        store: of all ranks; no other thread uses this connection.
        rank: of this process.
        ranks: number of processes.
        end: receives the sentence and the exit code when another rank has died or failed, in the
            thread; it ends this process.
        beat: seconds between two beats.
        silence: seconds without a beat until a rank counts as dead.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        ranks: int,
        end: Callable[[str, int], object],
        beat: float = BEAT,
        silence: float = SILENCE,
    ) -> None:
        self.store, self.rank, self.ranks, self.end = store, rank, ranks, end
        self.beat, self.silence = beat, silence
        self.host = platform.node() or "an unnamed host"
        self._count = 0
        self._lost = False  # whether the store is gone
        self._ended = threading.Event()
        self._lock = threading.Lock()  # of the store's connection and the states
        now = time.monotonic()
        self._seen = {other: ("", now) for other in range(ranks) if other != rank}
        self._hosts = dict.fromkeys(range(ranks), "an unknown host")
        self._show()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def claim(self) -> bool:
        """Return whether this rank is the first that asks to print an error."""
        claims = self._ask(lambda: self.store.add("claim", 1))
        return claims in (1, None)  # None: the store died with its rank

    def suspect(self) -> None:
        """Ask for a verdict within a few beats, because a connection has broken."""
        self.silence = min(self.silence, SUSPECT_BEATS * self.beat)
        self._ask(lambda: self.store.set("suspect", "1"))

    def wait_for_verdict(self) -> None:
        """Wait as long as a verdict on a broken connection may take; the thread acts on it."""
        self.suspect()
        self._thread.join(self.silence + 3 * self.beat)

    def leave(self, failure: str | None = None, code: int = 0) -> None:
        """End the heartbeat of a rank that ends.

        Args:
            failure: the sentence of an error, by which the other ranks end too.
            code: their exit code.
        """
        if failure is not None:
            self._ask(lambda: self._judge(f"{code} {failure}"))
        self._ended.set()
        self._ask(lambda: self.store.set(_key(self.rank), f"{_DONE} {self.host}"))

    def linger(self) -> None:
        """Wait a few beats for the other living ranks, whose store ends with this process."""
        now, limit = time.monotonic(), SUSPECT_BEATS * self.beat
        living = [rank for rank, (_, at) in self._seen.items() if now - at < limit]
        while time.monotonic() < now + 3 * self.beat:
            states = self._ask(lambda: [self._state(rank) for rank in living])
            if states is None or all(state == _DONE for state in states):
                return
            time.sleep(self.beat / 20)

    def _ask(self, question: Callable[[], Answer]) -> Answer | None:
        """Return the store's answer; None once it did not answer, and then ever after."""
        try:
            with self._lock:
                return None if self._lost else question()
        except (RuntimeError, ValueError, OSError):
            self._lost = True
            return None

    def _show(self) -> None:
        self._count += 1
        self.store.set(_key(self.rank), f"{self._count} {self.host}")

    def _run(self) -> None:
        contact = time.monotonic()
        while not self._ended.wait(self.beat):
            found = self._ask(self._look)
            if found is not None:
                contact = time.monotonic()
            elif time.monotonic() - contact > self.silence:
                # the store is that of rank 0, or of its launcher
                found = [(death(0, self._hosts[0]), 1)]
            if self._ended.is_set():
                return
            for sentence, code in found or ():
                self.end(sentence, code)
                return
            if self._seen and all(state == _DONE for state, _ in self._watched().values()):
                return

    def _look(self) -> Sequence[tuple[str, int]]:
        """Show that this rank lives, and return the verdict, if there is one."""
        if self._ended.is_set():
            return ()
        self._show()
        if self.store.check(["suspect"]):
            self.silence = min(self.silence, SUSPECT_BEATS * self.beat)
        if not self.store.check(["verdict"]):
            now = time.monotonic()
            for other in self._watched():
                state = self._state(other)
                if state != self._seen[other][0]:
                    self._seen[other] = state, now
                elif state != _DONE and now - self._seen[other][1] > self.silence:
                    self._judge(f"1 {death(other, self._hosts[other])}")
                    break
        if self.store.check(["verdict"]):
            code, _, sentence = self.store.get("verdict").decode().partition(" ")
            return [(sentence, int(code))]
        return ()

    def _judge(self, verdict: str) -> None:
        """Write the verdict, unless there is one."""
        if self.store.add("judges", 1) == 1:
            self.store.set("verdict", verdict)

    def _state(self, other: int) -> str:
        """Return the count of a rank's beats, or that it is done."""
        if not self.store.check([_key(other)]):
            return ""
        state, _, self._hosts[other] = self.store.get(_key(other)).decode().partition(" ")
        return state

    def _watched(self) -> dict[int, tuple[str, float]]:
        """Return what was seen last, and when, of the ranks that this one watches."""
        if self.rank == 0:
            return self._seen
        return {0: self._seen[0]}


def death(rank: int, host: str) -> str:
    """Return the sentence about a dead rank."""
    return (
        f"rank {rank} on {host} has died; the other processes stop too; finished steps are kept; "
        "start all processes again (a training: with --resume)"
    )


def is_broken_connection(error: BaseException) -> bool:
    """Return whether an error says that the other end of a collective is gone."""
    if isinstance(error, JkoflowError) or not isinstance(error, RuntimeError):
        return False
    text = f"{type(error).__name__} {error}".lower()
    return "distbackenderror" in text or any(word in text for word in _BROKEN)


# ---------------------------------------------------------------------- of this process

_current: Heartbeat | None = None
_claimed = False


def start(rank: int, ranks: int, end: Callable[[str, int], object]) -> None:
    """Start the heartbeat of this process once, if it is one of several of a process group."""
    global _current
    if ranks > 1 and _current is None:
        _current = Heartbeat(_open_store(), rank, ranks, end)


def current() -> Heartbeat | None:
    """Return the heartbeat of this process, if there is one."""
    return _current


def claims_error() -> bool:
    """Return whether this process prints an error; of several processes it is the first one.

    An error before the process group exists is claimed in the launcher's store.
    """
    global _claimed
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    if _claimed:  # by the other thread, which prints it
        return False
    _claimed = True
    if _current is not None:
        return _current.claim()
    if not _has_launcher():
        return True
    try:
        return bool(_open_store().add("claim", 1) == 1)
    except (RuntimeError, ValueError, OSError, KeyError):
        return True


def leave(failure: str | None = None, code: int = 0) -> None:
    """End the heartbeat of this process, if there is one."""
    global _current
    beating, _current = _current, None
    if beating is not None:
        beating.leave(failure, code)
        if beating.rank == 0 and not _has_launcher():
            beating.linger()


def _open_store() -> Any:  # noqa: ANN401 - imported late
    """Connect to the store of the process group."""
    from torch.distributed import PrefixStore, TCPStore

    environ = os.environ
    store = TCPStore(
        environ["MASTER_ADDR"],
        int(environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=_STORE_SECONDS),
        wait_for_workers=False,
    )
    # torchrun restarts processes on the same store
    return PrefixStore(f"jkoflow/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _has_launcher() -> bool:
    """Return whether the store belongs to torchrun, and outlives the processes."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _key(rank: int) -> str:
    return f"beat/{rank}"
