"""Packaged configurations load, and `--set` has precedence over a file."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.config import packaged
from pipeline.config.autoencoder import AutoencoderConfig
from pipeline.config.load import load, load_config, overridden, read_resolved
from pipeline.config.plain import resolved_yaml, to_dict, with_values
from pipeline.config.rules.validate import check
from pipeline.config.schema import Config
from pipeline.errors import UserError
from tests.pipeline.config.files import write

ROOT = Path(__file__).parents[3]


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


def test_a_refiner_has_no_classes() -> None:
    check(load_config("cifar10-refiner"))
    with pytest.raises(UserError, match="set train.objective=fm, .* and velocity.classes=0"):
        check(load_config("cifar10-refiner", ["velocity.classes=10"]))


@pytest.mark.parametrize("section", ["architecture: {channels: 3}", "training: {iterations: 2}"])
def test_an_autoencoders_file_is_known_by_its_sections(tmp_path: Path, section: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(f"data: {{name: mnist}}\n{section}\n")
    assert packaged.kind_of(path) == packaged.AUTOENCODERS
    path.write_text("data: {name: mnist}\n")
    assert packaged.kind_of(path) == packaged.FLOWS
