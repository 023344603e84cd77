"""`jkoflow verify` names every broken file."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.runs import verify
from pipeline.runs.zoo import locate
from pipeline.storage import seal
from tests.pipeline.tiny import World, say


def flip(path: Path, place: int = -20) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 64
    path.write_bytes(data)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


@pytest.fixture
def world(trained: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A copy of the data root and the run, which a test may damage."""
    shutil.copytree(trained.home, tmp_path / "home")
    shutil.copytree(trained.root / "run", tmp_path / "run")
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "home"))
    return World(trained.root, trained.settings, tmp_path / "home")


def test_whole_folders_have_no_faults(world: World, tmp_path: Path) -> None:
    assert verify.verify(tmp_path / "run") == verify.verify(tmp_path / "home") == []
    assert verify.verify_installation() == []


def test_every_broken_file_of_a_run_is_named(world: World, tmp_path: Path) -> None:
    run, rng = tmp_path / "run", np.random.default_rng(0)
    names = [n for n in seal.recorded(run) if (run / n).is_file()]
    inner = [p.relative_to(run).as_posix() for p in run.rglob("shard-*")]
    assert {"config.yaml", "flow.json", "blocks/block-00.safetensors"} <= set(names) and inner
    for name in names + inner:
        whole = (run / name).read_bytes()
        flip(run / name, int(rng.integers(len(whole))))
        assert [fault.path for fault in verify.verify(run)] == [run / name]
        (run / name).write_bytes(whole)
    (run / "blocks" / "block-01.safetensors").unlink()
    (run / "checkpoints").mkdir(exist_ok=True)
    shutil.copy(run / "blocks" / "block-00.safetensors", run / "checkpoints" / "x.safetensors")
    assert {(fault.path.name, fault.problem) for fault in verify.verify(run)} == {
        ("block-01.safetensors", "missing"), ("x.safetensors", "unknown to the seal"),
    }  # fmt: skip


def test_a_cache_is_made_again(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """The advice of the error is followed: verify, and --repair."""
    config = world.config()
    code, out, _ = say(capsys, "encode", "--config", config)
    assert code == 0
    cache = Path(out.strip())  # other tests may have left more caches in this home
    before = content(cache)
    for name in ("shard-00001.safetensors", "manifest.json"):
        flip(cache / name)
        code, _, error = say(capsys, "encode", "--config", config)
        assert code == 2 and f"jkoflow verify {cache}" in error
        code, out, error = say(capsys, "verify", cache)
        assert (code, error) == (1, "error: 1 file is broken; see the list above")
        command = f"`jkoflow encode --config {cache / 'recipe.yaml'}`"
        assert out == f"{cache / name} is damaged; make it again by {command}\n"
        code, out, error = say(capsys, "verify", cache, "--repair")
        assert (code, error) == (0, "1 broken files mended") and "with the same bytes" in out
        assert content(cache) == before and say(capsys, "verify", cache)[0] == 0


def test_a_shipped_run_is_taken_from_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path))
    copy = locate("zoo:mnist")
    before = content(copy)
    for name in ("flow.json", "config.yaml", "blocks/block-00.safetensors"):
        flip(copy / name)
    (copy / "blocks" / "block-01.safetensors").unlink()
    code, out, _ = say(capsys, "verify", "zoo:mnist")
    assert code == 1 and len(out.splitlines()) == 3  # a damaged flow.json needs no other file
    assert say(capsys, "verify", "zoo:mnist", "--repair")[0] == 0
    assert say(capsys, "verify", "zoo:mnist", "--repair")[0] == 0
    assert content(copy) == before
    assert say(capsys, "verify", "zoo:mnist")[0] == 0


def test_the_guide_of_a_shipped_run_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path))
    assert say(capsys, "verify", "zoo:mnist-fine/guide")[0] == 0
    flip(locate("zoo:mnist-fine/guide") / "blocks" / "block-00.safetensors")
    code, out, _ = say(capsys, "verify", "zoo:mnist-fine/guide")
    assert code == 1 and len(out.splitlines()) == 1
    code, _, last = say(capsys, "verify", "zoo:mnist-fine/refiner")
    assert code == 2 and "zoo:mnist-fine/refiner is no run" in last


def test_a_folder_that_cannot_be_sealed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, last = say(capsys, "verify", tmp_path / "none", "--seal")
    assert code == 2 and "is no folder; expected a run or a cache" in last


def test_an_earlier_folder_is_sealed_as_it_is(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for path in run.rglob(seal.NAME):
        path.unlink()
    code, _, error = say(capsys, "generate", "--run", run, "-n", "4")
    assert code == 2 and f"seal its files as they are by `jkoflow verify {run} --seal`" in error
    assert say(capsys, "verify", run)[0] == 2
    assert say(capsys, "verify", run, "--seal")[0] == 0
    assert say(capsys, "verify", run)[0] == 0
    assert say(capsys, "generate", "--run", run, "-n", "4")[0] == 0


def test_paths_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "letter").write_text("dear")
    for path, code in ((tmp_path / "nowhere", 2), (tmp_path, 2), (tmp_path / "letter", 1)):
        assert say(capsys, "verify", path)[0] == code
