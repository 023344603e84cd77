"""Downloads over HTTP; an interrupted download resumes, and a silent host times out soon."""

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
"""Time limit for the first answer of a host, so that a blocked host delays nothing."""

STALL_SECONDS = 30.0
_ATTEMPTS = 3
_CHUNK = 1 << 18


class MirrorError(Exception):
    """Failure of a mirror; its text is the reason, and the next mirror is tried."""


class DamagedError(MirrorError):
    """Failure of a mirror that delivered a broken file or another file."""


class _Restart(ConnectionError):
    """Mismatch of a partial file with the server's file; the partial file has been removed."""


def download(url: str, target: Path, answer_seconds: float = ANSWER_SECONDS) -> None:
    """Download `url` to `target`; resume the partial file of an earlier attempt.

    Partial file and the server's validator are `NAME.part` and `NAME.validator`. A file that
    changed on the server is downloaded from its beginning.

    Raises:
        MirrorError: the host does not answer, refuses, or interrupts every attempt.
        OSError: the disk is full or read-only.
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
            # A host that sent nothing is blocked or down: another attempt would only wait.
            progressed = isinstance(error, _Restart) or _size(part) > before
            if not progressed or attempt + 1 == _ATTEMPTS:
                raise MirrorError(_reason(error)) from error
        else:
            os.replace(part, target)
            part.with_suffix(".validator").unlink(missing_ok=True)
            return


def _download_rest(url: str, part: Path, answer_seconds: float) -> None:
    """Append the missing bytes to `part` by one request; raise unless the file is complete."""
    validator = part.with_suffix(".validator")
    offset = _size(part) if validator.exists() else 0
    headers = {"User-Agent": "jkoflow", "Accept-Encoding": "identity"}
    if offset:
        headers |= {"Range": f"bytes={offset}-", "If-Range": validator.read_text()}
    try:
        response = _open_url(urllib.request.Request(url, headers=headers), answer_seconds)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        part.unlink(missing_ok=True)  # it is longer than the file on the server
        raise _Restart("the part of an earlier download does not fit") from error
    with response:
        if response.status != 206:
            offset = 0
        with open(part, "r+b" if offset else "wb") as file:
            file.truncate(offset)
            file.seek(offset)
            _save_validator(validator, response)
            length = response.headers.get("Content-Length")
            total = offset + int(length) if length else None
            _copy(response, file, part.stem, offset, total)
        if total is not None and _size(part) != total:
            raise ConnectionError(f"broke off after {_size(part)} of {total} bytes")


def _save_validator(validator: Path, response: HTTPResponse) -> None:
    """Save the server's validator of this file; without a strong one, delete the old one."""
    text = response.headers.get("ETag") or response.headers.get("Last-Modified")
    if text and not text.startswith("W/"):
        validator.write_text(text)
    else:
        validator.unlink(missing_ok=True)


def _copy(
    response: HTTPResponse, file: IO[bytes], name: str, start: int, total: int | None
) -> None:
    """Copy the body of the response with a progress bar (silent without a terminal)."""
    with tqdm(
        desc=name, initial=start, total=total, unit="B", unit_scale=True, disable=None, leave=False
    ) as bar:
        while True:
            try:
                chunk = response.read(_CHUNK)
            except OSError as error:  # an error of the network, not of the disk
                raise ConnectionError(f"broke off ({_reason(error)})") from error
            if not chunk:
                return
            file.write(chunk)
            bar.update(len(chunk))


def _open_url(request: urllib.request.Request, seconds: float) -> HTTPResponse:
    """Open a URL; give up after `seconds` in total.

    The timeout of a socket counts per address and does not cover the name look-up. A blocked host
    with eight addresses would take eight times as long, so a thread opens the URL.
    """
    answers: queue.Queue[HTTPResponse | Exception] = queue.Queue()
    abandoned = threading.Event()

    def request_answer() -> None:
        try:
            answer = urllib.request.urlopen(request, timeout=STALL_SECONDS)
        except Exception as error:
            answers.put(error)
            return
        answers.put(answer)
        if abandoned.is_set():
            answer.close()

    threading.Thread(target=request_answer, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        abandoned.set()
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _size(path: Path) -> int:
    """Return the size of a file in bytes; 0 if it is absent."""
    return path.stat().st_size if path.exists() else 0


def _reason(error: BaseException) -> str:
    """Describe a network error in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    return str(inner) or type(inner).__name__
