"""Configurations: packaged ones load, and every mistake is named by its dotted path."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from pipeline.config.load import (
    available,
    from_resolved,
    load_config,
    overridden,
    resolved_yaml,
    to_dict,
)
from pipeline.config.schema import Config
from pipeline.errors import UserError


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", available())
def test_every_packaged_configuration_loads_and_round_trips(name: str) -> None:
    config = load_config(name)
    assert config.name
    assert from_resolved(yaml.safe_load(resolved_yaml(config))) == config


def test_files_hold_differences_only(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "train: {lr: 2}\narchitecture: {ch_mult: [1, 2]}\n"))
    assert config.train.lr == 2.0 and isinstance(config.train.lr, float)
    assert config.architecture.ch_mult == (1, 2)
    default = Config()
    assert config.schedule == default.schedule
    assert dataclasses.replace(config.train, lr=default.train.lr) == default.train
    assert load_config(write(tmp_path, "")) == default


def test_overrides_are_applied_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {lr: 2}\n")
    config = load_config(
        path,
        ["train.lr=1e-4", "train.lr=3e-4", "data.limit=100", "generate.method=euler",
         "train.warm_start=false", "generate.labels=[4,5]", "data.path=/a=b"],
    )  # fmt: skip
    assert config.train.lr == 3e-4
    assert config.data.limit == 100 and config.data.path == "/a=b"
    assert config.generate.method == "euler" and config.train.warm_start is False
    assert config.generate.labels == [4, 5]
    assert load_config(path, ["data.limit=null"]).data.limit is None


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.lrr=1", r"--set train\.lrr=1: unknown key train\.lrr; known here: .*\blr\b"),
        ("trian.lr=1", r"unknown key trian"),
        ("train.lr=fast", r"train\.lr: .*fast.*"),
        ("train.iterations=1.5", r"train\.iterations: .*1\.5"),
        ("train.warm_start=maybe", r"train\.warm_start"),
        ("data.limit=many", r"data\.limit"),
        ("train=3", r"train"),
        ("train.lr.x=3", r"train\.lr"),
        ("train.lr", r"section\.key=value"),
        ("=3", r"section\.key=value"),
        ("architecture.ch_mult=[1,a]", r"architecture\.ch_mult"),
        ("schedule.h=[[0.5]]", r"schedule\.h: expected a list of plain values, not \[\[0\.5\]\]"),
        ("data.also=[{a: 1}]", r"data\.also: expected a list of plain values"),
        ("data.also=mnist", r"data\.also: expected a list, such as \[mnist\], not 'mnist'"),
    ],
)
def test_mistakes_of_overrides_are_named(override: str, named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        load_config("smoke", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("train: {lrr: 1}", r"some\.yaml: unknown key train\.lrr"),
        ("colour: red", r"unknown key colour"),
        ("train: {lr: [1]}", r"train\.lr"),
        ("train: 3", r"train"),
        ("data: {limit: x}", r"data\.limit"),
        ("- 1", "must hold sections with keys, not list"),
        ("just words", "must hold sections with keys, not str"),
        ("a: [", "not readable YAML"),
        ("a: 1: 2", "not readable YAML"),
    ],
)
def test_mistakes_of_files_are_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_values_out_of_range_are_named() -> None:
    for override, named in (
        ("solver.steps=0", "solver.steps must be at least 1"),
        ("solver.method=rk5", "unknown solver 'rk5'"),
        ("architecture.flavour=xy", "flavour"),
        ("autoencoder_training.precision=fp8", "precision"),
        ("autoencoder_training.optimizer=sgd", "optimizer must be one of adam, muon, not 'sgd'"),
    ):
        with pytest.raises(UserError, match=named):
            load_config("smoke", [override])


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown configuration 'nonsense'; choose one of .*smoke"):
        load_config("nonsense")
    with pytest.raises(UserError, match="no configuration file at"):
        load_config(str(tmp_path / "absent.yaml"))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not readable YAML"):
        load_config(str(binary))


def test_a_finished_run_is_overridden_in_some_sections_only() -> None:
    config = load_config("smoke")
    changed = overridden(config, ["generate.n=3"], ("generate",))
    assert changed.generate.n == 3
    assert dataclasses.replace(changed, generate=config.generate) == config
    with pytest.raises(UserError, match=r"--set train\.lr=1 has no effect here.*generate"):
        overridden(config, ["train.lr=1"], ("generate",))
    assert overridden(config, [], ()) == config


def test_dicts_are_plain() -> None:
    plain = to_dict(load_config("smoke"))
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert isinstance(plain["architecture"]["ch_mult"], list)
