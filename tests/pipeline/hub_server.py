"""A server that speaks as much of the hub's protocol as a push and a download need."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any


class Hub(http.server.ThreadingHTTPServer):
    """The repositories by name, each with its files; `reads` counts the requests for them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reads = 0
        self.repositories: dict[str, dict[str, bytes]] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, name: str) -> str:
        return hashlib.sha1(repr(sorted(self.repositories[name].items())).encode()).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        """Be quiet."""

    def _send(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, code: int = 200) -> None:
        self._send(json.dumps(value).encode(), code, Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[1:] == ["repos", "create"]:
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            self.server.repositories.setdefault(name, {})
            return self._json({"url": f"{self.server.address}/{name}"})
        if parts[1:] == ["validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        name, action = "/".join(parts[2:4]), parts[4]
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        assert action == "commit"
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                data = base64.b64decode(entry["value"]["content"])
                self.server.repositories[name][entry["value"]["path"]] = data
        commit = self.server.commit(name)
        url = f"{self.server.address}/{name}/commit/{commit}"
        return self._json({"commitUrl": url, "commitOid": commit, "success": True})

    def do_GET(self) -> None:
        self.server.reads += 1
        path = self.path.split("?")[0].strip("/").removeprefix("datasets/")
        parts = path.split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.server.repositories.get(name)
        if files is None:
            return self._send(b"{}", 404, X_Error_Code="RepoNotFound")
        if parts[0] == "api" and "tree" in parts:
            return self._json([
                {"type": "file", "path": file, "size": len(data), "oid": "0" * 40}
                for file, data in sorted(files.items())
            ])  # fmt: skip
        if parts[0] == "api":
            siblings = [{"rfilename": f, "size": len(d)} for f, d in sorted(files.items())]
            return self._json(
                {"id": name, "sha": self.server.commit(name), "siblings": siblings, "tags": [],
                 "private": False, "downloads": 0, "likes": 0}
            )  # fmt: skip
        file = "/".join(parts[4:])
        if file not in files:
            return self._send(b"", 404, X_Error_Code="EntryNotFound")
        return self._send(
            files[file],
            X_Repo_Commit=self.server.commit(name),
            ETag=f'"{hashlib.sha1(files[file]).hexdigest()}"',
        )

    do_HEAD = do_GET


@contextlib.contextmanager
def serving_hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
