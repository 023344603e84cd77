"""A setting without effect is refused, or left out where `--set` has precedence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.config import packaged
from pipeline.config.keys import keys
from pipeline.config.load import load_config, overridden
from pipeline.config.plain import to_dict
from pipeline.config.rules.applies import APPLIES
from pipeline.config.rules.validate import check
from pipeline.config.schema import SECTIONS, Config
from pipeline.config.training import FmConfig, JkoConfig, MatchingConfig, TrainConfig
from pipeline.errors import UserError
from tests.pipeline.config.files import write


def test_only_the_section_of_the_objective_is_there() -> None:
    jko, fm = load_config("mnist"), load_config("mnist-fm")
    assert isinstance(jko.jko, JkoConfig) and jko.fm is None and jko.lfm is None
    assert isinstance(fm.fm, FmConfig) and fm.jko is None
    assert jko.schedule is not None and jko.matching is None
    assert fm.schedule is None and fm.matching is not None
    assert set(SECTIONS) & set(to_dict(jko)) == {"schedule", "jko"}
    assert set(SECTIONS) & set(to_dict(fm)) == {"matching", "fm"}
    with pytest.raises(UserError, match="section jko applies to train.objective=jko"):
        Config(train=TrainConfig(objective="fm"), jko=JkoConfig())


@pytest.mark.parametrize(
    ("name", "override", "named"),
    [
        ("mnist-fm", "jko.h0=0.25", r"jko\.h0=0\.25 applies to train\.objective=jko; this "
         r"configuration has train\.objective=fm; remove it .* or set train\.objective=jko"),
        ("mnist", "matching.times=logit-normal", r"applies to train\.objective=lfm"),
        ("mnist", "points.train=5", r"points\.train=5 applies to `jkoflow toy2d`"),
        ("mnist", "data.size=8", r"data\.size=8 applies to data\.name=folder, hf or .*; this "
         r"configuration has data\.name=mnist; change that, or remove data\.size \(default null"),
        ("mnist", "velocity.heads=2", r"velocity\.heads=2 applies to velocity\.kind=unet"),
        ("mnist", "generate.guidance=2", r"generate\.guidance=2\.0 applies to velocity\.classes"),
        ("mnist", "latents.disturb=0.1", r"applies to velocity\.image_channels"),
        ("mnist", "train.precision=bf16", r"applies to train\.objective=lfm or fm, or jko with"),
        ("mnist-fm", "velocity.class_dropout=0.5", r"applies to velocity\.classes above 0"),
        ("demo", "jko.later_iterations=7", r"applies to jko\.reparameterize above 0 or jko"),
    ],
)  # fmt: skip
def test_settings_that_do_not_apply_are_refused(name: str, override: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        load_config(name, [override])


@pytest.mark.parametrize("override", ["data.limit=5", "latents.mirror=true", "data.also=[mnist]"])
def test_points_have_no_settings_of_images(override: str) -> None:
    with pytest.raises(UserError, match="applies to data.name of images"):
        load_config("rose", [override], packaged.TOY2D)
    assert load_config("gas", ["data.limit=5"], packaged.TABULAR).data.limit == 5


def test_a_section_is_left_out_by_null() -> None:
    config = load_config("cifar10", ["matching=null", "fm=null"])
    assert config.matching == MatchingConfig() and config.fm == FmConfig()


def test_a_section_that_is_left_out_has_the_defaults_of_the_objective(tmp_path: Path) -> None:
    file = write(tmp_path, "velocity: {autonomous: false, width: 64}")
    assert not load_config(file).velocity.autonomous
    config = load_config(file, ["velocity=null"])
    assert config.velocity == load_config(write(tmp_path, "")).velocity
    assert config.velocity.autonomous


@pytest.mark.parametrize(
    ("name", "overrides", "lines"),
    [
        ("mnist", ["train.objective=fm", "matching.times=logit-normal"], [
            "config mnist: section schedule applies to train.objective=jko or lfm; it is left out",
            "config mnist: section jko applies to train.objective=jko; it is left out",
        ]),
        ("mnist", ["train.objective=lfm"], [
            "config mnist: section jko applies to train.objective=jko; it is left out",
        ]),
        ("mnist-lfm", ["sampler.method=dopri5"], []),  # its steps are the default
        ("cifar10", ["sampler.method=dopri5"], [
            "config cifar10: sampler.steps=12 applies to a fixed-grid sampler.method; "
            "it is left out",
        ]),
        ("cifar10", ["velocity.classes=0"], [
            "config cifar10: generate.guidance=2.5 applies to velocity.classes above 0 or a "
            "generate.guide; it is left out",
        ]),
        ("mnist", ["train.lr=0.1"], []),
    ],
)  # fmt: skip
def test_values_of_the_file_without_effect_under_set_are_left_out(
    name: str, overrides: list[str], lines: list[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = load_config(name, overrides)
    assert capsys.readouterr().err.splitlines() == lines
    check(config)
    monkeypatch.setenv("RANK", "1")
    assert load_config(name, overrides) == config and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.objective=fm", "jko.h0=1"], r"--set jko\.h0=1: jko\.h0=1\.0 applies to train"),
        (["train.objective=fm", "schedule.max_blocks=2"], r"--set schedule\.max_blocks=2: "),
        (["sampler.method=dopri5", "sampler.steps=3"], r"sampler\.steps=3 applies to"),
    ],
)
def test_settings_of_the_command_line_are_never_left_out(
    overrides: list[str], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        load_config("mnist", overrides)


def test_a_file_without_effect_by_itself_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "velocity: {kind: conv, heads: 2}\n")
    for overrides in ([], ["velocity.kind=resmlp"]):
        with pytest.raises(UserError, match=r"velocity\.heads=2 applies to velocity\.kind=unet"):
            load_config(path, overrides)
    assert load_config(path, ["velocity.kind=unet"]).velocity.heads == 2


def test_a_finished_run_yields_to_an_adaptive_method(capsys: pytest.CaptureFixture[str]) -> None:
    changed = overridden(load_config("mnist-fm"), ["sampler.method=dopri5"], ("sampler",))
    assert changed.sampler.method == "dopri5"
    assert capsys.readouterr().err == (
        "config.yaml: sampler.steps=20 applies to a fixed-grid sampler.method; it is left out\n"
    )


def test_the_table_of_conditions_names_keys() -> None:
    known = keys(Config)
    for name, condition, words in APPLIES:
        assert name in known and set(re.findall(r"[a-z_.]+", words)) & set(known)
        condition(Config())
