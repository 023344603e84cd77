"""Whether a training may continue in a folder, and what the folder records of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.runs.directory import (
    EXTENDED,
    ResumePolicy,
    RunDirectory,
    write_manifest,
)
from tests.pipeline.gaussian_source import tiny
from tests.pipeline.records import synthetic_manifest

RESUMED = ResumePolicy(resume=True)


def enter(folder: Path, config: Config, policy: ResumePolicy = RESUMED) -> RunDirectory:
    return RunDirectory.open_or_create(folder, config, policy, Accelerator(cpu=True))


def test_a_new_run_records_configuration_command_and_versions(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert not RunDirectory(folder).exists
    policy = ResumePolicy(False, "jkoflow toy2d --run")
    opened = enter(folder, tiny("train.max_minutes=3"), policy)
    assert opened.exists and opened.config == tiny()  # the time limit is not the run's
    assert opened.environment["versions"]["torch"]
    assert opened.resume_command == f"jkoflow toy2d --run {folder} --resume"
    assert RunDirectory(Path("a b")).resume_command.endswith("'a b' --resume")
    with pytest.raises(UserError, match="no finished block yet; finish it with `jkoflow toy2d"):
        _ = opened.manifest


def test_the_first_manifest_lies_apart_until_a_block_is_finished(tmp_path: Path) -> None:
    enter(tmp_path / "run", tiny())
    assert RunDirectory(tmp_path / "run").started is None
    write_manifest(tmp_path / "run", synthetic_manifest("tiny", (2,)))
    assert not (tmp_path / "run" / "flow.json").exists()
    started = RunDirectory(tmp_path / "run").started
    assert started is not None and (started.name, started.passes) == ("tiny", ())


def test_a_run_continues_only_where_that_is_asked_for(tmp_path: Path) -> None:
    enter(tmp_path / "run", tiny())
    with pytest.raises(UserError, match="already; continue it with --resume, or .* with --out"):
        enter(tmp_path / "run", tiny(), ResumePolicy(False, "jkoflow distill --out"))
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    enter(tmp_path / "run", tiny("train.log_every=7", "generate.n=3"))
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before  # they decide no weights


@pytest.mark.parametrize("key", ["train.lr", "jko.h0", "sampler.steps", "schedule.max_blocks"])
def test_settings_that_decide_the_weights_are_fixed(tmp_path: Path, key: str) -> None:
    enter(tmp_path / "run", tiny())
    with pytest.raises(UserError, match=rf"the run at .* was started with {key}=\S+ \(now 7"):
        enter(tmp_path / "run", tiny(f"{key}=7"))
    extended = ResumePolicy(resume=True, changes=EXTENDED)
    if key in ("train.lr", "jko.h0"):
        opened = enter(tmp_path / "run", tiny(f"{key}=7"), extended)
        assert opened.config == tiny(f"{key}=7")
    else:
        with pytest.raises(UserError, match="was started with"):
            enter(tmp_path / "run", tiny(f"{key}=7"), extended)


def test_later_passes_may_be_asked_for_later(tmp_path: Path) -> None:
    enter(tmp_path / "run", tiny())
    later = "jko.reparameterize=2"
    assert enter(tmp_path / "run", tiny(later)).config == tiny(later)


def test_data_that_moved_are_verified(tmp_path: Path) -> None:
    def at(place: str) -> Config:
        return tiny("data.name=picture", f"data.path={place}")

    enter(tmp_path / "run", at("here"))
    calls = []
    policy = ResumePolicy(resume=True, verify=lambda: calls.append("verified"))
    enter(tmp_path / "run", at("here"), policy)
    assert not calls
    assert enter(tmp_path / "run", at("there"), policy).config.data.path == "there"
    assert calls == ["verified"]

    def differ() -> None:
        raise UserError("the samples differ")

    with pytest.raises(UserError, match="the data at elsewhere are not those that the run at"):
        enter(tmp_path / "run", at("elsewhere"), ResumePolicy(True, verify=differ))
    assert RunDirectory(tmp_path / "run").config.data.path == "there"


def test_other_content_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="is a file; a run is a folder"):
        enter(tmp_path / "file", tiny())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("text")
    with pytest.raises(UserError, match="is not empty and holds no training; .* with --out"):
        noun = ResumePolicy(True, "jkoflow autoencoder train --out", noun="training")
        enter(tmp_path / "folder", tiny(), noun)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["thesis.tex"]


def test_a_missing_environment_is_written_again(tmp_path: Path) -> None:
    enter(tmp_path / "run", tiny())
    (tmp_path / "run" / "environment.json").unlink()  # as a killed process leaves it
    enter(tmp_path / "run", tiny())
    plain = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert plain["command"] == "jkoflow train --run"


@pytest.mark.parametrize("raised", ["7", "[6,7]", "[5,6,7]"])
def test_iterations_rise_for_no_block(tmp_path: Path, raised: str) -> None:
    enter(tmp_path / "run", tiny("train.iterations=6"))
    with pytest.raises(UserError, match=r"was started with train.iterations=6 \(now"):
        enter(tmp_path / "run", tiny(f"train.iterations={raised}"))
    lower = tiny("train.iterations=[6,4]")
    assert enter(tmp_path / "run", lower).config == lower
