"""Places where no file can be are refused before the work for the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.storage.paths import require_place


def test_places_where_a_file_can_be(tmp_path: Path) -> None:
    require_place(None)
    require_place(tmp_path / ("x" * 255))
    require_place(tmp_path / "new" / "grid.png")


@pytest.mark.parametrize("name", ["x" * 256, f"{'x' * 256}/grid.png", "ü" * 128])
def test_a_name_that_is_too_long_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"could not be written \(File name too long\)"):
        require_place(tmp_path / name)


def test_a_folder_or_a_name_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a regular file"):
        require_place(tmp_path)
    with pytest.raises(UserError, match=r"could not be written \(Not a directory\)"):
        require_place(tmp_path / "file" / "grid.png")
