"""The generated pages are current, and the commands that explain settings print them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import packaged
from pipeline.document import pages
from tests.pipeline.tiny import World, say


def test_generated_pages_are_current() -> None:
    for path, text in pages().items():
        assert path.read_text() == text, f"{path.name}: run `python -m pipeline.document`"


def test_configurations_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capsys, "config", "list")
    assert code == 0
    for folder in packaged.FOLDERS:
        assert all(f"  {name} " in out for name in packaged.available(folder))


def test_keys_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capsys, "config", "keys", "jko.h0")
    assert code == 0
    assert out.splitlines()[1] == "jko.h0: float, default 0.5" and "first JKO step size" in out
    code, _, last = say(capsys, "config", "keys", "jko.nothing")
    assert code == 2 and "no key begins with 'jko.nothing'" in last


def test_differences_are_printed(capsys: pytest.CaptureFixture[str], world: World) -> None:
    code, out, _ = say(capsys, "config", "diff", "mnist", "demo")
    assert (code, out) == (0, "name: mnist -> demo\nevaluate.n: 10000 -> 2000\n")
    code, out, _ = say(capsys, "config", "diff", "rgb32-kl", "rgb32-kl")
    assert (code, out) == (0, "")
    code, _, last = say(capsys, "config", "diff", "mnist", "mnist-kl")
    assert code == 2 and "mnist and mnist-kl differ in kind" in last


def test_a_dry_run_does_nothing(
    capsys: pytest.CaptureFixture[str], world: World, tmp_path: Path
) -> None:
    config, run = world.config(), tmp_path / "run"
    code, out, _ = say(capsys, "encode", "--config", config, "--dry-run")
    assert code == 0 and "encode 40 images of folder (train)" in out
    assert "write 3 shards, 0.0 MB" in out and "nothing exists yet" in out
    assert not (world.home / "latents").exists()
    code, out, _ = say(capsys, "train", "--config", config, "--run", run, "--dry-run")
    assert code == 0 and "is absent; run `jkoflow encode`" in out
    assert "train 3 block(s) in pass 0 (ordinary)" in out
    assert "block 2: free, 6 iterations of 16 samples" in out
    assert not run.exists()


def test_a_dry_run_refuses_what_the_training_would(
    capsys: pytest.CaptureFixture[str], trained: World, run: Path, tmp_path: Path
) -> None:
    words = ("train", "--config", trained.config(), "--run", tmp_path / "b", "--init-from", run)
    code, out, _ = say(capsys, *words, "--dry-run")
    assert code == 0 and f"start from 3 block(s) of the jko run {run}" in out
    for setting in ("velocity.depth=3", "velocity.classes=2"):
        refused = say(capsys, *words, "--set", setting)
        assert refused[0] == 2 and say(capsys, *words, "--set", setting, "--dry-run") == refused


def test_a_dry_run_says_what_is_there(
    capsys: pytest.CaptureFixture[str], trained: World, run: Path
) -> None:
    code, out, _ = say(capsys, "encode", "--config", trained.config(), "--dry-run")
    assert code == 0 and "which is complete" in out
    before = sorted(run.rglob("*"))
    code, out, _ = say(capsys, "train", "--run", run, "--resume", "--dry-run")
    assert code == 0 and "is finished; nothing to train" in out
    code, out, _ = say(capsys, "evaluate", "--run", run, "-n", "12", "--dry-run")
    assert code == 0 and "sample 12 images (1, 12, 12)" in out and "24 network evaluations" in out
    assert "the likelihood of 4 images" in out
    assert sorted(run.rglob("*")) == before
