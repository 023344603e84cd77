"""Fuzz tests of all readers.

A damaged file gives the same content, or one sentence, in bounded time and memory.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.faults.mutations import (
    HangError,
    bounded,
    changed,
    changes,
    digest,
    edited,
    edits,
    is_sentence,
)
from tests.faults.readers.reader import Reader


class FuzzError(AssertionError):
    """A reader that answered by anything but the content or a sentence."""


def fuzz(reader: Reader, examples: int, seed: int) -> Counter[str]:
    """Mutate the file of a reader; count the answers.

    Raises:
        FuzzError: an answer is neither the content nor a sentence, with the smallest mutation.
    """
    counts: Counter[str] = Counter()
    reader.file.parent.mkdir(parents=True, exist_ok=True)
    whole = reader.pack(reader.content)
    _write(reader, whole)
    kept = {p: p.read_bytes() for p in reader.file.parent.glob("SHA256SUMS")}
    expected = _whole(reader)
    is_bytes = isinstance(reader.content, bytes)

    @settings(
        max_examples=examples, deadline=None, database=None, print_blob=False,
        phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @hypothesis.seed(seed)
    @given(how=edits if is_bytes else changes)
    def check(how: list) -> None:  # type: ignore[type-arg]
        content = edited(reader.content, how) if is_bytes else changed(reader.content, how)
        try:
            damaged = reader.pack(content)
        except (ValueError, TypeError, OverflowError):
            return  # the content cannot be written in this format
        _write(reader, damaged)
        counts[_answer(reader, expected, damaged == whole)] += 1

    try:
        check()
    finally:
        _write(reader, whole)
        for path, data in kept.items():
            path.write_bytes(data)
    return counts


def _write(reader: Reader, data: bytes) -> None:
    reader.file.unlink(missing_ok=True)  # a new inode, so that no hash is remembered
    reader.file.write_bytes(data)
    reader.after(reader.file)


def _quietly(reader: Reader) -> object:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with tempfile.TemporaryDirectory() as home:
            before = os.environ.get("JKOFLOW_HOME", "")
            os.environ["JKOFLOW_HOME"] = home  # indices and unpacked data sets are new
            try:
                return reader.read(reader.file)
            finally:
                os.environ["JKOFLOW_HOME"] = before


def _whole(reader: Reader) -> str:
    try:
        return digest(_quietly(reader))
    except ValueError as error:  # some readers only take files that are too large for a test
        return str(error)


def _answer(reader: Reader, expected: str, unchanged: bool) -> str:
    names = (reader.file.name, str(reader.file.parent), *reader.names)
    try:
        with bounded():
            value = _quietly(reader)
    except HangError as error:
        raise FuzzError(f"{reader.name}: takes longer than the limit") from error
    except Exception as error:
        if is_sentence(error, *names):
            return "sentence"
        raise FuzzError(f"{reader.name}: {type(error).__name__}: {error}") from error
    if digest(value) == expected:
        return "same content"
    if reader.sealed and not unchanged:
        raise FuzzError(f"{reader.name}: other content, silently")
    return "other content"


def fuzz_all(every: Iterable[Reader], examples: int, seed: int) -> dict[str, Counter[str]]:
    """Fuzz readers; return the counts of each."""
    return {reader.name: fuzz(reader, examples, seed) for reader in every}


def folder() -> Path:
    """A new folder for the files of readers."""
    return Path(tempfile.mkdtemp()) / "readers"
