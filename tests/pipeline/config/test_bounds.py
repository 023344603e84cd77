"""Every number of a configuration has bounds, or a plan that names the memory it needs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import Accelerator

from pipeline.autoencoder_training.train import train_autoencoder
from pipeline.config.autoencoder import AutoencoderConfig
from pipeline.config.keys import Key, keys, options
from pipeline.config.load import load, load_config
from pipeline.config.rules.validate import check, check_shape
from pipeline.config.schema import Config
from pipeline.errors import UserError
from tests.pipeline.tiny import World, say

VALUES = ("-1", "0", "1000000000000000", ".nan", "-.inf", "1e308")
#: settings that decide whether another applies
_APPLY = {
    "schedule": "train.objective=jko", "jko": "train.objective=jko", "lfm": "train.objective=lfm",
    "matching": "train.objective=fm", "fm": "train.objective=fm",
}  # fmt: skip


def numbers(schema: type) -> Iterator[Key]:
    """The keys that hold numbers, alone or in lists."""
    for key in keys(schema).values():
        kinds = options(key.kind)
        inner = [part for kind in kinds for part in getattr(kind, "__args__", ())]
        if {*kinds, *inner} & {int, float}:
            yield key


def attempt(schema: type, key: str, value: str, file: str) -> Any:
    """Read a configuration with one value, and check it as a training would."""
    settings = [f"{key}={value}"]
    if schema is AutoencoderConfig:
        config = load(AutoencoderConfig, file, settings, "autoencoders")
        config.architecture.build((1, 12, 12))
        return config
    section = _APPLY.get(key.partition(".")[0])
    flow = load_config(file, [*([section] if section else []), *settings])
    check(flow)
    check_shape(flow, (2, 3, 3))
    return flow


@pytest.mark.parametrize("schema", [Config, AutoencoderConfig])
def test_every_number_is_accepted_or_refused_in_a_sentence(schema: type, tmp_path: Path) -> None:
    """Negative, zero, huge, NaN and infinite values, of every number that the schema has."""
    data = {"name": "folder", "path": str(tmp_path), "size": 12, "mode": "L"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": data}))
    counts = {"refused": 0, "accepted": 0}
    found = list(numbers(schema))
    assert len(found) > 20
    for key in found:
        for value in VALUES:
            begun = time.process_time()  # not the clock, which other work delays
            try:
                attempt(schema, key.name, value, str(tmp_path / "c.yaml"))
                counts["accepted"] += 1
                # nothing that is not finite, and no size that allocates memory
                assert value in ("-1", "0"), (key.name, value)
            except ValueError as error:
                counts["refused"] += 1
                assert len(str(error)) < 500 and "\n" not in str(error), error
            assert time.process_time() - begun < 5, key.name
    assert counts["refused"] > 4 * len(found)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("velocity.width=1000000000", "velocity.width must be at most 65536"),
        ("train.batch_size=1000000000000", "train.batch_size is 1000000000000; expected at least"),
        ("train.batch_size=16777216 velocity.width=65536 velocity.depth=1024", "TB of memory"),
        ("sampler.steps=1000000000", "sampler: steps=1000000000 of rk4 takes 4000000000"),
        ("schedule.max_blocks=1000000000", "schedule.max_blocks is 1000000000; expected"),
    ],
)
def test_sizes_are_refused_before_they_are_allocated(
    capsys: pytest.CaptureFixture[str],
    trained: World,
    tmp_path: Path,
    settings: str,
    sentence: str,
) -> None:
    words = [word for setting in settings.split() for word in ("--set", setting)]
    begun = time.process_time()  # not the clock, which other work delays
    code, out, last = say(capsys, "train", "-c", trained.config(), "-r", tmp_path / "r", *words)
    assert (code, out) == (2, "") and sentence in last
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("words", [("-n", "1000000000000000"), ("-n", "-1"), ("-n", "0")])
def test_a_number_of_images_is_refused(
    capsys: pytest.CaptureFixture[str], trained: World, run: Path, words: tuple[str, ...]
) -> None:
    for verb in ("generate", "evaluate"):
        code, _, last = say(capsys, verb, "-r", run, *words)
        assert code == 2 and last.startswith("error: ")


def test_the_networks_of_an_autoencoder_fit_the_machine(trained: World, tmp_path: Path) -> None:
    data = {**trained.settings["data"]}
    recipe = {"width": 8192, "width_factors": [64, 64]}
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"data": data, "architecture": recipe}))
    config = load(AutoencoderConfig, str(path), [], "autoencoders")
    with pytest.raises(UserError, match="PB of memory; expected at most .* GB"):
        train_autoencoder(config, tmp_path / "out", Accelerator(), lambda x, *_: x, False)
