"""The command line's promises: exit codes, and one `error:` sentence as the last line."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from pipeline.cli import main
from pipeline.storage import seal
from tests.pipeline.records import rewrite
from tests.pipeline.tiny import World, python, say

VERBS = (
    [], ["demo"], ["fetch"], ["encode"], ["train"], ["generate"], ["evaluate"], ["fid"],
    ["autoencoder"], ["autoencoder", "train"], ["autoencoder", "evaluate"],
    ["autoencoder", "convert"], ["reference"], ["toy2d"], ["likelihood"], ["report"],
)  # fmt: skip


def assert_sentence(last: str, *words: str) -> None:
    assert last.startswith("error: ")
    assert "Traceback" not in last
    for word in words:
        assert word in last, last


def test_the_demo_changes_no_other_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    code, _, last = say(capsys, "demo", "--run", tmp_path)
    assert code == 2
    assert_sentence(last, "is not empty and holds no run", "--run")
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_describes_every_option(capsys: pytest.CaptureFixture[str], verb: list[str]) -> None:
    code, out, _ = say(capsys, *verb, "--help")
    assert code == 0 and "Usage:" in out
    undocumented = [
        line
        for line in out.splitlines()
        if re.match(r"^. (\*\s+)?--?\w", line) and not re.search(r"[a-z]\S* \S*[a-z]", line[20:])
    ]
    assert not undocumented


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bake"], ["bake"]),
        ([], ["no command given"]),
        (["autoencoder"], ["no command given"]),
        (["train", "--confg", "smoke"], ["--confg"]),
        (["train", "--config"], ["--config", "requires an argument"]),
        (["encode"], ["--config"]),
        (["generate"], ["--run"]),
        (["generate", "--run", "x", "-n", "many"], ["-n", "integer"]),
        (["train"], ["--config", "--run"]),
        (["encode", "--config", "nonsense"], ["nonsense", "smoke"]),
        (["encode", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["encode", "--config", "smoke", "--set", "trian.lr=1"], ["trian"]),
        (["encode", "--config", "smoke", "--set", "train.lrr=1"], ["train.lrr"]),
        (["encode", "--config", "smoke", "--set", "train.lr=fast"], ["train.lr", "fast"]),
        (["encode", "--config", "smoke", "--set", "train.lr"], ["section.key=value"]),
        (["encode", "--config", "smoke", "--set", "data.name=mnest"], ["mnest"]),
        (["encode", "--config", "smoke", "--set", "data.limit=0"], ["data.limit"]),
        (["fetch", "mnest"], ["mnest", "mnist"]),
        (["encode", "--config", "smoke", "--precision", "fp64", "--dry-run"], ["is fp64"]),
        (["report", "--run", "x", "--out", "x.html"], ["--out goes with runs to compare"]),
        (["verify", "--seal"], ["--seal is given without a path"]),
        (["verify", "x", "--seal", "--repair"], ["--seal and --repair are both given"]),
        (["generate", "--run", "nowhere"], ["no run at nowhere"]),
        (["evaluate", "--run", "nowhere"], ["no run at nowhere"]),
        (["train", "--run", "nowhere", "--resume"], ["no run at nowhere"]),
        (["fid", "nowhere", "mnist-train"], ["nowhere"]),
    ],
)
def test_invalid_arguments_are_user_errors(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, last = say(capsys, *arguments)
    assert code == 2
    assert_sentence(last, *words)
    assert not list(tmp_path.iterdir())


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capsys, "--version")
    assert (code, out.strip()) == (0, metadata.version("jkoflow"))


@pytest.mark.parametrize("where", ["before", "after"])
def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], where: str) -> None:
    words = ["generate", "--run", "nowhere"]
    assert main.main(["--debug", *words] if where == "before" else [*words, "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "runs/directory.py" in err
    assert_sentence(err.strip().splitlines()[-1], "no run at nowhere")


def test_an_unexpected_error_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("pipeline.runs.unfinished.open_latest", fails)
    code, _, last = say(capsys, "generate", "--run", "x")
    assert code == 1
    assert last == "error: RuntimeError: two lines (--debug shows where)"


def test_a_full_disk_has_exit_code_1(
    capsys: pytest.CaptureFixture[str], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.storage.atomic.os.fsync", full)
    code, _, last = say(capsys, "encode", "--config", world.config())
    assert code == 1
    assert_sentence(last, "No space left on device", "free some space")
    assert {path.name for cache in world.caches() for path in cache.iterdir()} <= {seal.NAME}


def test_commands_communicate_through_files(
    capsys: pytest.CaptureFixture[str], trained: World, tmp_path: Path
) -> None:
    code, out, _ = say(capsys, "encode", "--config", trained.config())
    assert code == 0 and Path(out.strip()) in trained.caches()
    run = tmp_path / "run"
    short = ["--set", "train.iterations=1", "--set", "schedule.max_blocks=1"]
    words = ["train", "--config", trained.config(), "--run", run, *short]
    code, out, last = say(capsys, *words)
    assert (code, out.strip()) == (0, str(run))
    assert re.fullmatch(r"2 blocks, 2 .*: finished", last)
    code, out, last = say(capsys, "train", "--run", run, "--resume")
    assert code == 0 and re.fullmatch(r"2 blocks, 0 .*: finished", last)
    code, out, _ = say(capsys, "generate", "--run", run, "-n", "5")
    assert (code, out.strip()) == (0, str(run / "samples" / "grid.png"))
    assert Path(out.strip()).is_file()


def test_train_needs_the_cache(capsys: pytest.CaptureFixture[str], world: World) -> None:
    run = world.root / "run"
    code, _, last = say(capsys, "train", "--config", world.config(), "--run", run)
    assert code == 2
    assert_sentence(last, "does not exist", "jkoflow encode")
    assert not run.exists()


@pytest.mark.parametrize("value", ["0", "-5"])
def test_no_images_is_an_error(
    capsys: pytest.CaptureFixture[str], trained: World, value: str
) -> None:
    code, _, last = say(capsys, "generate", "--run", trained.root / "run", "-n", value)
    assert code == 2
    assert_sentence(last, "expected 1 or more", value)
    code, _, last = say(capsys, "evaluate", "--run", trained.root / "run", "-n", value)
    assert code == 2
    assert_sentence(last, "at least 2 images", value)


class TestRunsThatAreThere:
    """What `train` does with a folder that is not empty."""

    @pytest.fixture
    def run(self, trained: World, tmp_path: Path) -> Path:
        return Path(shutil.copytree(trained.root / "run", tmp_path / "run"))

    def test_without_resume(
        self, capsys: pytest.CaptureFixture[str], trained: World, run: Path
    ) -> None:
        before = (run / "flow.json").read_bytes()
        code, _, last = say(capsys, "train", "--config", trained.config(), "--run", run)
        assert code == 2
        assert_sentence(last, "there is a run at", "--resume", "--run")
        assert (run / "flow.json").read_bytes() == before

    def test_with_another_configuration(
        self, capsys: pytest.CaptureFixture[str], trained: World, run: Path
    ) -> None:
        words = ["train", "--config", trained.config(), "--run", run, "--resume"]
        changes = ["--set", "train.lr=0.5", "--set", "jko.h0=2", "--set", "train.log_every=7"]
        code, _, last = say(capsys, *words, *changes)
        assert code == 2
        assert_sentence(last, "jko.h0=0.5 (now 2.0)", "train.lr=0.001 (now 0.5)")
        assert "log_every" not in last  # which decides nothing
        assert say(capsys, *words, "--set", "train.log_every=7")[0] == 0

    def test_overrides_without_a_configuration(
        self, capsys: pytest.CaptureFixture[str], run: Path
    ) -> None:
        code, _, last = say(capsys, "train", "--run", run, "--resume", "--set", "train.lr=1")
        assert code == 2
        assert_sentence(last, "--set train.lr=1 has no effect here", "jko.refine")

    def test_with_latents_of_another_standardisation(
        self, capsys: pytest.CaptureFixture[str], trained: World, run: Path
    ) -> None:
        words = ["train", "--run", run, "--resume"]
        assert say(capsys, *words)[0] == 0
        manifest = json.loads((run / "flow.json").read_text())
        manifest["standardisation"]["mean"][0] += 0.5
        rewrite(run / "flow.json", json.dumps(manifest))
        code, _, last = say(capsys, *words)
        assert code == 2
        assert_sentence(last, "are standardised otherwise than those", str(run), "--run")

    def test_something_else(
        self, capsys: pytest.CaptureFixture[str], trained: World, tmp_path: Path
    ) -> None:
        (tmp_path / "letters").mkdir()
        (tmp_path / "letters" / "dear.txt").touch()
        for more in ([], ["--resume"]):
            words = ["train", "--config", trained.config(), "--run", tmp_path / "letters", *more]
            code, _, last = say(capsys, *words)
            assert code == 2
            assert_sentence(last, "is not empty and holds no run")


def test_an_interrupted_training_resumes(trained: World, tmp_path: Path) -> None:
    """SIGTERM in a real process: a checkpoint, a sentence, and the run can be resumed."""
    values = yaml.safe_load(Path(trained.config()).read_text())
    values["train"] |= {"iterations": 100_000, "log_every": 1}
    config = tmp_path / "long.yaml"
    config.write_text(yaml.safe_dump(values))
    run = tmp_path / "run"
    process = python("train", "--config", config, "--run", run, env=trained.environment)
    while process.poll() is None and not (run / "log.jsonl").is_file():
        time.sleep(0.02)
    assert not list(run.glob("checkpoints/*"))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and list(run.glob("checkpoints/block-00.safetensors"))
    assert_sentence(err.strip().splitlines()[-1], "interrupted", "with --resume")
    assert "Traceback" not in err
    words = ["train", "--run", run, "--resume", "--max-minutes", "0.0001"]
    process = python(*words, env=trained.environment)
    _, err = process.communicate()
    assert process.returncode == 0
    assert re.search(r"0 blocks, .* stopped in time; continue with --resume", err)


def test_processes_have_the_exit_codes(tmp_path: Path) -> None:
    process = python("generate", "--run", tmp_path / "nowhere", env={})
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert_sentence(err.strip().splitlines()[-1], "no run at")
