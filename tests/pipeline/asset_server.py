"""A made-up asset and a web server that serves it well or badly, for the tests of assets."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pipeline.assets.archives import find_files
from pipeline.assets.catalogue import Asset
from pipeline.assets.download import DamagedError
from pipeline.assets.mirrors import Mirror, MirrorError, web_files
from pipeline.assets.readers import Content

THING = np.random.default_rng(0).bytes(3_000_000)
HALF = 1_400_000


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `THING`, as well or as badly as the server's `plan` says, request by request."""

    def do_GET(self) -> None:
        server = self.server
        server.asked.append(self.headers.get("Range"))
        how = server.plan.pop(0) if server.plan else "well"
        if how == "404":
            return self.send_error(404)
        if how == "silent":
            server.released.wait(20)
            return None
        data, status, start = server.data, 200, 0
        wanted = self.headers.get("Range")
        if wanted and self.headers.get("If-Range") == server.etag and how != "no ranges":
            start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
            if start >= len(data):
                return self.send_error(416)
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) - start))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        if how in ("break off", "stall"):
            self.wfile.write(data[start:HALF])
            self.wfile.flush()
            if how == "stall":
                server.released.wait(20)
            self.connection.close()
            return None
        self.wfile.write(data[start:])
        return None

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None
    server.data, server.etag, server.plan, server.asked = THING, '"one"', [], []
    server.released = threading.Event()
    server.base = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def read_thing(raw: Path, scratch: Path) -> Content:
    files = find_files(raw, ["thing.bin"], scratch)
    if not files:
        raise DamagedError("thing.bin is missing")
    data = files["thing.bin"].read_bytes()
    return Content(hashlib.sha256(data).hexdigest(), {"stored.bin": lambda f: f.write(data)})


def thing(*mirrors: object) -> Asset:
    return Asset(
        name="thing",
        title="the thing",
        sha256=hashlib.sha256(THING).hexdigest(),
        stored=("stored.bin",),
        by_hand="thing.bin",
        mirrors=mirrors,
        read=read_thing,
    )


def url(server: http.server.ThreadingHTTPServer, **options: float) -> Mirror:
    return web_files(server.base, "thing.bin", **options)


class Recorder:
    """A mirror that must not be needed, or that fails for a given reason."""

    def __init__(self, label: str, reason: str = "") -> None:
        self.label, self.reason, self.calls = label, reason, 0

    def download_files(self, partial: Path, scratch: Path) -> Path:
        self.calls += 1
        raise MirrorError(self.reason)


def check_whole(root: Path) -> None:
    """Stored, and nothing else left lying about."""
    folder = root / "assets" / "thing"
    assert (folder / "stored.bin").read_bytes() == THING
    assert {p.name for p in folder.iterdir()} - {"by-hand"} == {
        "manifest.json", "stored.bin",
    }  # fmt: skip


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        with contextlib.suppress(FileNotFoundError):  # a folder that is walked may vanish
            if condition():
                return
        time.sleep(0.01)
    raise AssertionError("it never happened")
