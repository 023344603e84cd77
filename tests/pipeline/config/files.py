"""A configuration file of some text."""

from __future__ import annotations

from pathlib import Path


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return str(path)
