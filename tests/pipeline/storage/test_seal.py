"""Files below a seal are read as they were written, or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.integrity.digests import HOME
from pipeline.storage import atomic, seal
from pipeline.storage.checkpoints import load_checkpoint, save_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    seal.start(tmp_path / "run")
    return tmp_path / "run"


def test_files_are_recorded_below_the_nearest_seal(folder: Path) -> None:
    first = atomic.write_json(folder / "a.json", {"x": 1})
    second = atomic.write_bytes(folder / "deep" / "er" / "b", b"b")
    atomic.write_bytes(folder / "log", b"grows", sealed=False)
    atomic.write_bytes(folder.parent / "outside", b"")
    seal.start(folder / "inner")
    third = atomic.write_bytes(folder / "inner" / "c", b"c")
    assert seal.recorded(folder) == {"a.json": [first], "deep/er/b": [second]}
    assert seal.recorded(folder / "inner") == {"c": [third]}
    assert atomic.read_json(folder / "a.json", "a") == {"x": 1}


def test_a_changed_digit_is_found(folder: Path) -> None:
    path = folder / "flow.json"
    atomic.write_json(path, {"std": 0.123})
    whole = path.read_text()
    path.write_text(whole.replace("0.123", "0.124"))
    with pytest.raises(UserError, match=r"json is damaged or foreign; .* by `jkoflow verify"):
        atomic.read_json(path, "manifest")
    path.write_text(whole)
    assert atomic.read_json(path, "manifest") == {"std": 0.123}


def test_every_content_that_was_recorded_is_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed between line and rename leaves the file before, again and again."""
    path = folder / "a.json"
    atomic.write_json(path, 0)

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dies)
        for value in (1, 2, 3):
            with pytest.raises(KeyboardInterrupt):
                atomic.write_json(path, value)
    assert len(seal.recorded(folder)["a.json"]) == 4
    assert atomic.read_json(path, "a") == 0


def test_a_line_that_was_cut_hides_no_other(folder: Path) -> None:
    atomic.write_json(folder / "a.json", 1)
    with open(folder / seal.NAME, "a") as file:
        file.write("\n0123456789")  # killed within a line
    digest = atomic.write_json(folder / "b.json", 2)
    assert seal.recorded(folder)["b.json"] == [digest]
    assert atomic.read_json(folder / "a.json", "a") == 1


def test_a_checkpoint_of_another_run_is_refused(folder: Path, tmp_path: Path) -> None:
    seal.start(tmp_path / "other")
    save_checkpoint(folder / "state", {"step": 1})
    save_checkpoint(tmp_path / "other" / "state", {"step": 2})
    assert load_checkpoint(folder / "state") == {"step": 1}
    os.replace(tmp_path / "other" / "state", folder / "state")
    with pytest.raises(UserError, match="damaged or foreign"):
        load_checkpoint(folder / "state")


@pytest.mark.parametrize("fault", ["flipped", "removed"])
def test_a_damaged_seal_trusts_nothing(folder: Path, fault: str) -> None:
    atomic.write_json(folder / "a.json", 1)
    path = folder / seal.NAME
    text = path.read_text()
    path.write_text(text.replace(text.strip()[:2], "zz", 1) if fault == "flipped" else "")
    with pytest.raises(UserError, match="damaged or foreign"):
        atomic.read_json(folder / "a.json", "a")
    path.unlink()
    with pytest.raises(UserError, match=r"the run at .* has no seal; .* by `jkoflow verify"):
        seal.require(folder, "the run at")


def test_shipped_files_are_sealed_by_their_list() -> None:
    shipped = HOME / "pipeline" / "zoo" / "mnist"
    seal.require(shipped, "the run at")
    atomic.read_json(shipped / "flow.json", "manifest")
    assert json.loads((shipped / "flow.json").read_text())


def test_no_link_leads_out_of_a_run(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    (run / "blocks").mkdir(parents=True)
    outside.mkdir()
    (run / "flow.json").write_text("{}")
    seal.start(run)
    (run / "alias.json").symlink_to("flow.json")
    seal.require(run, "the run at")
    for link in (run / "stages", run / "blocks" / "x"):
        link.symlink_to(outside if link.name == "stages" else outside / "absent")
        with pytest.raises(UserError, match=f"{link} in the run at .* leads out of it"):
            seal.require(run, "the run at")
        link.unlink()
