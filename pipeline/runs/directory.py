"""The files of a run directory."""

from __future__ import annotations

import dataclasses
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pipeline.config.autoencoder_recipe import AutoencoderConfig
from pipeline.config.load import read_resolved, resolved_yaml
from pipeline.config.schema import Config
from pipeline.data.datasets import DATASETS
from pipeline.errors import UserError
from pipeline.storage import atomic

ENVIRONMENT = "environment.json"


def block_file(index: int, number: int = 0) -> str:
    """Path of a block of a pass inside a run directory."""
    folder = f"blocks/pass-{number:02d}" if number else "blocks"
    return f"{folder}/block-{index:02d}.safetensors"


def start_run(folder: Path, config: Config | AutoencoderConfig) -> None:
    """Write what identifies a run, before anything is trained; not how long one call may take."""
    if isinstance(config, Config):
        train = dataclasses.replace(config.train, max_minutes=0.0)
        config = dataclasses.replace(config, train=train)
    atomic.write_bytes(folder / "config.yaml", resolved_yaml(config).encode())
    write_environment(folder)


def write_environment(folder: Path) -> None:
    """Write versions and machine."""
    atomic.write_json(folder / ENVIRONMENT, environment())


def environment() -> dict[str, Any]:
    """Versions and machine, to be kept with what they made."""
    names = ("jkoflow", "torch", "torchvision", "torchdiffeq", "accelerate", "taming-transformers")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return {
        "python": sys.version.split()[0],
        "system": platform.system(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }


def read_config(folder: Path) -> Config:
    """The configuration of a run; what lies in an exported one is named by its path.

    Raises:
        UserError: not a run directory, or a configuration this version cannot read.
    """
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise UserError(f"no run at {folder} (it has no config.yaml); train one or check --run")
    config = read_resolved(Config, path)
    weights = _at_hand(path.parent, config.autoencoder.weights)
    guide, refiner = (
        _at_hand(path.parent, name, "config.yaml")
        for name in (config.generate.guide, config.generate.refiner)
    )
    return dataclasses.replace(
        config,
        autoencoder=dataclasses.replace(config.autoencoder, weights=weights),
        generate=dataclasses.replace(config.generate, guide=guide, refiner=refiner),
    )


def _at_hand(folder: Path, name: str | None, file: str = "") -> str | None:
    """Name or path of weights, or of a run (by a file of it); an exported run has them inside."""
    inside = folder / name if name else None
    return str(inside) if inside is not None and (inside / file).is_file() else name


def resuming(config: Config, folder: Path) -> str:
    """The command that finishes a run of a configuration."""
    if config.train.objective == "distill":
        return "jkoflow distill … --resume"
    verb = "train" if config.data.name in DATASETS else "toy2d"
    return f"jkoflow {verb} --run {folder} --resume"
