"""Plug-ins: an installed package adds a network, an autoencoder and a data set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import jkoflow
from autoencoders import registry as autoencoders
from flows.networks import registry as velocities
from pipeline.config.data import IMAGE_SETS, DataConfig
from pipeline.data.datasets import DATASETS, load_images
from pipeline.runtime.plugins import load_plugins
from tests.pipeline.tiny import say

ROOT = Path(__file__).parents[3]
_PLUGIN = '''
import numpy as np
import torch
import jkoflow

@jkoflow.register("velocity", "shrink")
class Shrink(jkoflow.Velocity):
    def __init__(self, config, shape):
        super().__init__(shape)
        self.rate = torch.nn.Parameter(torch.zeros(shape))

    def forward(self, t, z, labels=None):
        return self.rate * z

class Halves(torch.nn.Module):
    stochastic, fingerprint = False, "halves"

    def __init__(self, weights, image_shape):
        super().__init__()
        self.image_shape = self.latent_shape = image_shape

    def encode(self, x):
        from autoencoders.base import Moments
        return Moments(x / 2)

    def decode(self, z):
        return (2 * z).clamp(-1, 1)

    def describe(self):
        return {"kind": "halves"}

jkoflow.register("autoencoder", "halves")(Halves)

@jkoflow.register("dataset", "noise")
def noise(data, split):
    rng = np.random.default_rng(len(split))
    return rng.integers(0, 256, (30, 1, 4, 4), np.uint8), None
'''
_CONFIG = {
    "name": "plugged",
    "data": {"name": "noise"},
    "autoencoder": {"name": "halves", "weights": None},
    "latents": {"shard_size": 20},
    "velocity": {"kind": "shrink"},
    "train": {"objective": "fm", "iterations": 3, "batch_size": 8, "optimizer": "adam"},
    "sampler": {"method": "rk4", "steps": 1},
}


def install(folder: Path, text: str) -> Path:
    """Install a plug-in package into a folder, as pip does."""
    (folder / "a_plugin.py").write_text(text)
    info = folder / "a_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[jkoflow.plugins]\nmine = a_plugin\n")
    return folder


def test_an_installed_plugin_trains_and_samples(tmp_path: Path) -> None:
    """Every command finds the network, the autoencoder and the data set of the package."""
    site, config = install(tmp_path, _PLUGIN), tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(_CONFIG))
    commands = [
        ["encode", "--config", str(config)],
        ["train", "--config", str(config), "--run", "run"],
        ["generate", "--run", "run", "-n", "4", "--npz", "x.npz"],
    ]
    code = f"from pipeline.cli.main import main; assert not any(map(main, {commands}))"
    path = f"{site}:{ROOT}:{ROOT / 'pipeline/facade'}"
    environment = {**os.environ, "PYTHONPATH": path, "JKOFLOW_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True)
    assert (tmp_path / "x.npz").is_file()


def test_a_plugin_that_raises_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path, "1 / 0"))
    load_plugins.cache_clear()
    code, _, last = say(capsys, "train", "--config", "smoke", "--run", tmp_path / "run")
    load_plugins.cache_clear()
    assert code == 2
    assert "the plug-in mine (a_plugin) could not be imported (ZeroDivisionError" in last


class Scaled(jkoflow.Velocity):
    """v = a z with a bias that is no matrix, so that Muon has nothing to do."""

    def __init__(self, config: Any, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.rate = torch.nn.Parameter(torch.zeros(shape))

    def forward(self, t: Any, z: Any, labels: Any = None) -> Any:
        return self.rate * z


class Raising(Scaled):
    def forward(self, t: Any, z: Any, labels: Any = None) -> Any:
        raise KeyError("boom")


class Narrow(Scaled):
    def forward(self, t: Any, z: Any, labels: Any = None) -> Any:
        return (self.rate * z)[:, :1]


class OneTime(Scaled):
    def forward(self, t: Any, z: Any, labels: Any = None) -> Any:
        return self.rate * z * float(t)


class Plain(torch.nn.Linear):
    def __init__(self, config: Any, shape: tuple[int, ...]) -> None:
        super().__init__(shape[0], shape[0])


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations end with the test."""
    monkeypatch.setattr("jkoflow.plugins.velocities.KINDS", dict(velocities.KINDS))
    monkeypatch.setattr("jkoflow.plugins.autoencoders.NAMES", dict(autoencoders.NAMES))


@pytest.mark.parametrize(
    ("factory", "classes", "message"),
    [
        (Raising, 0, r"own could not be evaluated at t of the shape \(\) .*\(KeyError: 'boom'\)"),
        (OneTime, 0, r"could not be evaluated at t of the shape \(2,\) and z of the shape"),
        (Narrow, 0, r"the shape of the velocity own is \(2, 1\) at z of the shape \(2, 3\)"),
        (Plain, 0, "is of the type Plain; expected a jkoflow.Velocity"),
        (Scaled, 2, r"the shape \(3,\) and 0 classes; expected \(3,\) and 2"),
    ],
)
def test_a_network_that_fails_is_one_sentence(
    kinds: None, factory: Any, classes: int, message: str
) -> None:
    jkoflow.register("velocity", "own")(factory)
    config = jkoflow.VelocityConfig(kind="own", classes=classes)
    with pytest.raises(jkoflow.UserError, match=message) as caught:
        velocities.make_velocity(config, (3,))
    assert "\n" not in str(caught.value)


def test_a_network_is_evaluated_without_a_trace(kinds: None) -> None:
    """The generator, the weights and the mode are those without the evaluation."""

    class Noisy(Scaled):
        def forward(self, t: Any, z: Any, labels: Any = None) -> Any:
            return z + torch.randn(1)

    jkoflow.register("velocity", "noisy")(Noisy)
    torch.manual_seed(0)
    network = velocities.make_velocity(jkoflow.VelocityConfig(kind="noisy"), (3,))
    after = torch.randn(2)
    torch.manual_seed(0)
    assert torch.equal(after, torch.randn(2)) and network.training


def test_an_autoencoder_without_its_protocol_is_one_sentence(kinds: None) -> None:
    jkoflow.register("autoencoder", "bare")(lambda weights, shape: torch.nn.Identity())
    with pytest.raises(jkoflow.UserError, match="bare has no image_shape, latent_shape, stoch"):
        autoencoders.build_autoencoder("bare", None, (1, 4, 4))


def no_disk(data: Any, split: str) -> Any:
    raise OSError("no disk")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (no_disk, r"the dataset own could not be made \(OSError: no disk\)"),
        (lambda data, split: (np.zeros((3, 1, 4, 4)), None), r"expected uint8 \(n, C, H, W\)"),
        (lambda data, split: (np.zeros((3, 1, 4, 4), np.uint8), [1]), "expected 3 whole numbers"),
        (lambda data, split: (np.zeros((3, 1, 4, 4), np.uint8), [[1]] * 3), r"int64 \(3, 1\); "),
        (lambda data, split: np.zeros((3, 1, 4, 4), np.uint8), "own returns ndarray; expected"),
    ],
)
def test_a_data_set_that_fails_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, factory: Any, message: str
) -> None:
    monkeypatch.setattr("jkoflow.plugins.IMAGE_SETS", list(IMAGE_SETS))
    monkeypatch.setattr("pipeline.data.datasets.DATASETS", dict(DATASETS))
    jkoflow.register("dataset", "own")(factory)
    with pytest.raises(jkoflow.UserError, match=message):
        load_images(DataConfig(name="own"))


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("velocity", "unet", "the velocity 'unet' is registered already"),
        ("network", "x", "the kind is 'network'; expected velocity, autoencoder or dataset"),
        ("dataset", "a b", "the name is 'a b'; expected letters"),
    ],
)
def test_registration_mistakes(kind: str, name: str, message: str) -> None:
    with pytest.raises(jkoflow.UserError, match=message):
        jkoflow.register(kind, name)  # type: ignore[arg-type]
