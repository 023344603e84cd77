"""Fixtures of the tests of stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.storage.shards.stores import write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "store")
    return tmp_path / "store"
