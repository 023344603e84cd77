"""Configurations: packaged ones load, and every mistake is named by its dotted key."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.config import packaged
from pipeline.config.applies import APPLIES
from pipeline.config.autoencoder import AutoencoderConfig
from pipeline.config.keys import RULES, count, keys, resume_rule
from pipeline.config.load import (
    differences,
    load,
    load_config,
    overridden,
    read_resolved,
    resolved_yaml,
    to_dict,
    with_values,
)
from pipeline.config.moved import GONE, MOVED, replacement
from pipeline.config.schema import SECTIONS, Config
from pipeline.config.training import FmConfig, JkoConfig, MatchingConfig, TrainConfig
from pipeline.config.validate import check
from pipeline.config.values import of_block
from pipeline.errors import UserError

ROOT = Path(__file__).parents[3]


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("folder", packaged.FOLDERS)
def test_every_packaged_configuration_loads_and_round_trips(folder: str, tmp_path: Path) -> None:
    schema = AutoencoderConfig if folder == packaged.AUTOENCODERS else Config
    assert packaged.available(folder)
    for name in packaged.available(folder):
        config = load(schema, name, [], folder)
        path = tmp_path / f"{name}.yaml"
        path.write_text(resolved_yaml(config))
        assert read_resolved(schema, path) == config
        if isinstance(config, Config):
            check(config)


def test_files_hold_differences_only(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "train: {lr: 2}\njko: {solver: {steps: [3, 2]}}\n"))
    assert config.train.lr == 2.0 and isinstance(config.train.lr, float)
    assert config.jko is not None and config.jko.solver.steps == [3, 2]
    default = Config()
    assert config.latents == default.latents
    assert dataclasses.replace(config.train, lr=default.train.lr) == default.train
    assert load_config(write(tmp_path, "")) == with_values(
        default, {"velocity.autonomous": True}
    )


@pytest.mark.parametrize(
    ("overrides", "autonomous"),
    [
        ([], True),
        (["velocity.autonomous=false"], False),
        (["train.objective=lfm"], False),
        (["train.objective=fm"], False),
        (["train.objective=lfm", "velocity.autonomous=true"], True),
    ],
)
def test_blocks_of_jko_are_autonomous_by_default(
    tmp_path: Path, overrides: list[str], autonomous: bool
) -> None:
    config = load_config(write(tmp_path, "train: {lr: 2}\n"), overrides)
    assert config.velocity.autonomous is autonomous
    stored = tmp_path / "config.yaml"
    stored.write_text(resolved_yaml(config))
    assert read_resolved(Config, stored) == config


def test_overrides_are_applied_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {lr: 2}\n")
    config = load_config(
        path,
        ["train.lr=1e-4", "train.lr=3e-4", "data.limit=100", "sampler.method=euler",
         "train.warm_start=false", "train.iterations=[4,5]", "data.name=folder",
         "data.path=/a=b", "name=2024-01-02"],
    )  # fmt: skip
    assert config.train.lr == 3e-4
    assert config.data.limit == 100 and config.data.path == "/a=b"
    assert config.sampler.method == "euler" and config.train.warm_start is False
    assert config.train.iterations == [4, 5] and config.name == "2024-01-02"
    assert load_config(path, ["data.limit=null"]).data.limit is None


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
        ("mnist", "data.size=8", r"data\.size=8 applies to data\.name=folder, hf or .*None"),
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


def test_a_section_is_left_out_by_null() -> None:
    config = load_config("cifar10", ["matching=null", "fm=null"])
    assert config.matching == MatchingConfig() and config.fm == FmConfig()


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
        assert name in known and words
        condition(Config())


def test_old_keys_are_named_with_their_new_place(tmp_path: Path) -> None:
    known = keys(Config)
    sections = {name.partition(".")[0] for name in known}
    for old in (*MOVED, *GONE):
        assert old not in known and replacement(old), old
        assert not old.endswith(".*") or old.removesuffix(".*") not in sections
    assert all(new in known for new in MOVED.values() if " " not in new and "," not in new)
    own = keys(AutoencoderConfig)
    assert not set(own) & (set(MOVED) | set(GONE))
    for key, said in (
        ("push.steps=3", "push.steps is now sampler.steps; rename it"),
        ("solver.rtol=3", "solver.rtol is no setting here: adaptive solvers always have"),
        ("jko.rho=2", "jko.rho is now schedule.rho; rename it"),
        ("jko.eta=0.3", "jko.eta is no setting here: a later pass always goes half of the way"),
        ("architecture.ch=64", "architecture.ch is no setting here: it belongs to an autoencoder"),
        ("velocity.hidden=[4]", "velocity.hidden is now velocity.width and velocity.depth"),
    ):
        with pytest.raises(UserError, match=said.replace("[", r"\[")):
            load_config("smoke", [key])
    assert replacement("never.known") is None
    (tmp_path / "config.yaml").write_text("name: old\nschedule: {h0: 0.5}\n")
    with pytest.raises(UserError, match=r"config\.yaml: schedule\.h0 is now jko\.h0; rename it"):
        read_resolved(Config, tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.lrr=1", r"--set train\.lrr=1: unknown key train\.lrr; known here: .*\blr\b"),
        ("trian.lr=1", r"unknown key trian"),
        ("train.lr=fast", r"train\.lr is 'fast'; expected float or list of float"),
        ("train.iterations=1.5", r"train\.iterations is 1\.5; expected int or list of int"),
        ("train.warm_start=maybe", r"train\.warm_start is 'maybe'; expected true or false"),
        ("data.limit=many", r"data\.limit is 'many'; expected int or null"),
        ("train=3", r"train is a section"),
        ("train.lr.x=3", r"train\.lr has no keys of its own"),
        ("train.lr", r"section\.key=value"),
        ("=3", r"section\.key=value"),
        ("train.iterations=[1,a]", r"train\.iterations is \[1, 'a'\]; expected"),
        ("jko.h=[[0.5]]", r"jko\.h is \[\[0\.5\]\]; expected list of float or null"),
        ("data.also=mnist", r"data\.also is 'mnist'; expected list of text"),
        ("train.precision=fp8", r"train\.precision is 'fp8'; expected fp32 or bf16"),
        ("data.also=[mnist/test", r"its value is not readable YAML"),
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
        ("train: {lr: [a]}", r"train\.lr"),
        ("train: 3", r"train is a section"),
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


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("architecture.flavour=xy", "architecture.flavour is 'xy'; expected kl or vq"),
        ("training.precision=fp8", "training.precision is 'fp8'; expected fp32 or bf16"),
        ("training.optimizer=sgd", "training.optimizer is 'sgd'; expected adam or muon"),
        ("training.discriminator=wgan", "discriminator is 'wgan'; expected patchgan or r1"),
        ("training.latent_noise=-0.1", "latent_noise is -0.1; expected at least 0"),
        ("training.start=null", "training.decoder_only needs training.start, the weights"),
        ("training.ema=1", "training.ema is 1.0; expected at least 0 and below 1"),
        ("training.kl_warmup=-1", "training.kl_warmup is -1; expected at least 0"),
        ("training.momentum=1", "momentum is 1.0; expected at least 0 and below 1"),
        ("training.warmup=3", "training.warmup is no setting here: the warm-up of an autoencoder"),
        ("training.prune=0", "unknown key training.prune"),
        ("train.lr=1", "unknown key train.lr"),
    ],
)
def test_mistakes_of_autoencoders_are_named(override: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        load(AutoencoderConfig, "mnist-kl", [override], packaged.AUTOENCODERS)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown configuration 'nonsense' in flows; .*smoke"):
        load_config("nonsense")
    with pytest.raises(UserError, match="toy2d/rose is for `jkoflow toy2d`"):
        load_config("rose")
    with pytest.raises(UserError, match="no configuration file at"):
        load_config(str(tmp_path / "absent.yaml"))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not readable YAML"):
        load_config(str(binary))


def test_foreign_folders_hide_nothing(tmp_path: Path) -> None:
    """`python -m pipeline` puts the working directory first on the path of modules."""
    for name in ("configs", "flows", "eval", "autoencoders"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('foreign')")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "configs" / "flows").mkdir()
    (tmp_path / "configs" / "flows" / "mnist.yaml").write_text("name: foreign")
    result = subprocess.run(
        [sys.executable, "-m", "pipeline", "config", "show", "mnist"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout) == to_dict(load_config("mnist"))


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


def test_differences_and_new_values() -> None:
    old, new = load_config("mnist"), load_config("demo")
    assert differences(old, new) == {"name": ("mnist", "demo"), "evaluate.n": (10000, 2000)}
    changed = with_values(old, {"jko.refine": 3, "data.limit": 5})
    assert changed.jko is not None and changed.jko.refine == 3 and changed.data.limit == 5
    assert set(differences(old, changed)) == {"jko.refine", "data.limit"}


def test_rules_of_resuming() -> None:
    assert {resume_rule(name, Config) for name in keys(Config)} == set(RULES)
    for name, rule in (
        ("data.path", "moved"), ("data.test_split", "free"), ("velocity.width", "added"),
        ("velocity.classes", "fixed"), ("sampler.steps", "fixed"), ("jko.refine", "later"),
        ("train.max_minutes", "free"), ("generate.n", "free"), ("points.train", "fixed"),
    ):  # fmt: skip
        assert resume_rule(name, Config) == rule, name


def test_every_key_has_a_meaning() -> None:
    for schema in (Config, AutoencoderConfig):
        assert all(key.meaning for key in keys(schema).values())
    assert count(Config, AutoencoderConfig) <= 115


def test_a_value_of_a_block() -> None:
    assert [of_block(3, k) for k in range(2)] == [3, 3]
    assert [of_block([3, 2], k) for k in range(3)] == [3, 2, 2]
