"""Downloading over HTTP: resumed where it broke off, given up at once where all is blocked."""

from __future__ import annotations

import os
import queue
import threading
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO

from tqdm import tqdm

ANSWER_SECONDS = 8.0
"""How long a host may take to answer; one that is blocked must not hold up the next source."""

STALL_SECONDS = 30.0
_ATTEMPTS = 3
_CHUNK = 1 << 18


class SourceError(Exception):
    """This source did not deliver; the text says why, and the next one is tried."""


class DamagedError(SourceError):
    """The source delivered, but not the asset: a broken file, or another one."""


class _Restart(ConnectionError):
    """The part that an earlier try left does not fit; it is gone, ask again."""


def download(url: str, target: Path, answer_seconds: float = ANSWER_SECONDS) -> None:
    """Download `url` to `target`, going on from the part that an earlier try left.

    The part lies beside the target as `NAME.part`, with the server's validator in
    `NAME.validator`: a file that changed in between is fetched from its beginning.

    Raises:
        SourceError: the host does not answer, refuses, or keeps breaking off.
        OSError: the disk refused (full, read-only).
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    for attempt in range(_ATTEMPTS):
        before = _size(part)
        try:
            _download_rest(url, part, answer_seconds)
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            # A host that gave nothing at all is blocked or down: do not wait for it again.
            hopeful = isinstance(error, _Restart) or _size(part) > before
            if not hopeful or attempt + 1 == _ATTEMPTS:
                raise SourceError(_reason(error)) from error
        else:
            os.replace(part, target)
            part.with_suffix(".validator").unlink(missing_ok=True)
            return


def _download_rest(url: str, part: Path, answer_seconds: float) -> None:
    """One request: append what is missing to `part`; raises unless the whole is there."""
    validator = part.with_suffix(".validator")
    offset = _size(part) if validator.exists() else 0
    headers = {"User-Agent": "jkoflow", "Accept-Encoding": "identity"}
    if offset:
        headers |= {"Range": f"bytes={offset}-", "If-Range": validator.read_text()}
    try:
        response = _answer(urllib.request.Request(url, headers=headers), answer_seconds)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        part.unlink(missing_ok=True)  # longer than the file that the server has
        raise _Restart("the part of an earlier download does not fit") from error
    with response:
        if response.status != 206:
            offset = 0
        with open(part, "r+b" if offset else "wb") as file:
            file.truncate(offset)
            file.seek(offset)
            _remember(validator, response)
            length = response.headers.get("Content-Length")
            total = offset + int(length) if length else None
            _copy(response, file, part.stem, offset, total)
        if total is not None and _size(part) != total:
            raise ConnectionError(f"broke off after {_size(part)} of {total} bytes")


def _remember(validator: Path, response: HTTPResponse) -> None:
    """Keep what tells this edition of the file from another; without it, never resume."""
    text = response.headers.get("ETag") or response.headers.get("Last-Modified")
    if text and not text.startswith("W/"):
        validator.write_text(text)
    else:
        validator.unlink(missing_ok=True)


def _copy(
    response: HTTPResponse, file: IO[bytes], name: str, start: int, total: int | None
) -> None:
    """Copy the answer's body, showing how far it is (silent where no terminal looks)."""
    with tqdm(
        desc=name, initial=start, total=total, unit="B", unit_scale=True, disable=None, leave=False
    ) as bar:
        while True:
            try:
                chunk = response.read(_CHUNK)
            except OSError as error:  # the network's, not to be mistaken for the disk's
                raise ConnectionError(f"broke off ({_reason(error)})") from error
            if not chunk:
                return
            file.write(chunk)
            bar.update(len(chunk))


def _answer(request: urllib.request.Request, seconds: float) -> HTTPResponse:
    """Open a URL, or give up after `seconds` whatever holds it up.

    A socket's own timeout counts per address and does not cover the name look-up, so that a
    blocked host with eight addresses takes eight times as long: the waiting is done here.
    """
    answers: queue.Queue[HTTPResponse | Exception] = queue.Queue()
    gone = threading.Event()

    def ask() -> None:
        try:
            answer = urllib.request.urlopen(request, timeout=STALL_SECONDS)
        except Exception as error:
            answers.put(error)
            return
        answers.put(answer)
        if gone.is_set():
            answer.close()

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        gone.set()
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: BaseException) -> str:
    """What a network error means, in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    return str(inner) or type(inner).__name__
