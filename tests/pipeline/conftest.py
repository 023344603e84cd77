"""Fixtures of the pipeline's tests."""

from __future__ import annotations

import http.server
from collections.abc import Iterator

import pytest

from tests.pipeline.asset_server import serving


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    with serving() as server:
        yield server
