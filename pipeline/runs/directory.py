"""Run directories: the files of a training, and whether the training may continue there.

* SHA256SUMS: the sha256 of all files but the log, written with each (see `pipeline.storage.seal`).
* config.yaml: the configuration.
* environment.json: versions, machine and command of the training.
* start.json: the manifest before the first block is finished.
* flow.json: the manifest from then on (see `pipeline.runs.manifest`).
* blocks/block-00.safetensors …: finished blocks; those of later passes are in blocks/pass-01/ ….
* blocks/mean-00.safetensors …: means of the weights of similar blocks, in an export (shared).
* stages/: training samples pushed through the blocks.
* checkpoints/: the state to resume from, with the manifest.
* snapshots/: averaged weights at regular steps (fm.snapshot_every).
* networks/: networks of a block that train alone (see `pipeline.runs.networks`).
* previews/: grids of samples of the blocks in training (train.preview_every).
* log.jsonl: the log of the training; tensorboard/, wandb/, trackers.json: its trackers.
* samples/, metrics.json: results of `generate` and `evaluate`.
"""

from __future__ import annotations

import dataclasses
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from pipeline.config.autoencoder import AutoencoderConfig
from pipeline.config.keys import resume_rule
from pipeline.config.load import read_resolved
from pipeline.config.plain import differences, resolved_yaml, with_values
from pipeline.config.schema import Config
from pipeline.config.values import of_block
from pipeline.errors import UserError
from pipeline.runs.manifest import FILE, Manifest
from pipeline.storage import atomic, seal
from pipeline.storage.records import well_formed

C = TypeVar("C", Config, AutoencoderConfig)

CONFIG, ENVIRONMENT, START = "config.yaml", "environment.json", "start.json"
#: command that resumes a run whose environment.json names none
_COMMAND = "jkoflow train --run"
#: rules of the keys whose new value config.yaml takes over when a run is resumed, and when blocks
#: are added (see `pipeline.config.keys.resume_rule`)
RESUMED, EXTENDED = ("later", "moved"), ("later", "moved", "added", "lowered")


@dataclass(frozen=True)
class ResumePolicy:
    """Conditions under which a training may continue in a folder.

    Attributes:
        resume: whether a training that is there may continue at all.
        command: that resumes it, up to the folder.
        changes: rules of the keys whose new value config.yaml takes over. Keys of the rule "free"
            may always differ, and config.yaml keeps theirs.
        noun: of the training, in error messages.
        verify: is called where the data lie elsewhere now; it raises a UserError if they differ.
    """

    resume: bool
    command: str = _COMMAND
    changes: Sequence[str] = RESUMED
    noun: str = "run"
    verify: Callable[[], object] | None = None

    @property
    def option(self) -> str:
        """The option that names the folder on the command line."""
        return self.command.rpartition(" ")[2]


class RunDirectory:
    """Folder of a run; each of its files is read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    @classmethod
    def open_or_create(
        cls,
        folder: Path,
        config: C,
        policy: ResumePolicy,
        accelerator: Accelerator,
    ) -> RunDirectory:
        """Create a run directory, or open one where the training may continue.

        config.yaml takes over the values that may change. All ranks call it, and rank 0 writes.

        Raises:
            UserError: the folder holds a run that may not continue, or something else.
        """
        directory = cls(folder)
        kept = directory._continued(config, policy)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            seal.start(directory.folder)
            atomic.remove_temporaries_below(directory.folder)
            if kept is not None:
                directory._write_config(kept)
            if kept is not None or not (directory.folder / ENVIRONMENT).is_file():
                directory._write_environment(policy.command)
        accelerator.wait_for_everyone()
        return cls(folder)

    @property
    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return (self.folder / CONFIG).is_file()

    @cached_property
    def config(self) -> Config:
        """The configuration; the weights of an exported run are named by their full path.

        Raises:
            UserError: no run is there, or this version cannot read its configuration.
        """
        path = self.folder / CONFIG
        if not path.is_file():
            raise UserError(
                f"no run at {self.folder} (it has no {CONFIG}); train one, or check the path"
            )
        seal.require(self.folder, "the run at")
        config = read_resolved(Config, path)
        weights = self.inside(config.autoencoder.weights)
        guide, refiner = (
            self.inside(name, CONFIG) for name in (config.generate.guide, config.generate.refiner)
        )
        return dataclasses.replace(
            config,
            autoencoder=dataclasses.replace(config.autoencoder, weights=weights),
            generate=dataclasses.replace(config.generate, guide=guide, refiner=refiner),
        )

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest, of a run with at least one finished block.

        Raises:
            UserError: no block is finished, or flow.json is damaged or of another format.
        """
        path = self.folder / FILE
        if not path.is_file():
            raise UserError(
                f"the run at {self.folder} has no finished block yet; finish it with "
                f"`{self.resume_command}`"
            )
        seal.require(self.folder, "the run at")
        manifest = Manifest.from_json(atomic.read_json(path, "flow manifest"), str(path))
        if not manifest.passes:
            raise UserError(
                f"passes in {path} is empty; expected at least one; train the run again"
            )
        return manifest

    @cached_property
    def started(self) -> Manifest | None:
        """The manifest so far: without passes before the first block; None for a new run."""
        if (self.folder / FILE).is_file():
            return self.manifest
        path = self.folder / START
        if not path.is_file():
            return None
        return Manifest.from_json(atomic.read_json(path, "first manifest"), str(path))

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, machine and command of the training; empty if they are not known."""
        path = self.folder / ENVIRONMENT
        if not path.is_file():
            return {}
        with well_formed(path):
            return {**atomic.read_json(path, "environment")}

    @property
    def resume_command(self) -> str:
        """The command that finishes the run."""
        command = self.environment.get("command", _COMMAND)
        return f"{command} {shlex.quote(str(self.folder))} --resume"

    def inside(self, name: str | None, file: str = "") -> str | None:
        """Return the full path of weights or a run (with `file`) in the folder, else the name."""
        path = self.folder / name if name else None
        return str(path) if path is not None and (path / file).is_file() else name

    def _continued(self, config: C, policy: ResumePolicy) -> C | None:
        """Return the configuration to write; None if the one in the folder stays."""
        folder, noun, option = self.folder, policy.noun, policy.option
        if folder.is_file():
            raise UserError(
                f"{folder} is a file; a {noun} is a folder, choose another place with {option}"
            )
        if not self.exists:
            # a run that was killed in its very first commit leaves a seal and a temporary only
            if folder.is_dir() and any(
                not path.name.startswith((atomic.TEMPORARY_PREFIX, seal.NAME))
                for path in folder.iterdir()
            ):
                raise UserError(
                    f"{folder} is not empty and holds no {noun}; choose another place with "
                    f"{option}"
                )
            return config
        if not policy.resume:
            raise UserError(
                f"there is a {noun} at {folder} already; continue it with --resume, or choose "
                f"another place with {option}"
            )
        seal.require(folder, f"the {noun} at")
        schema = type(config)
        stored = read_resolved(schema, self.folder / CONFIG)
        changed = differences(stored, config)
        rules = {key: resume_rule(key, schema) for key in changed}
        refused = [
            key
            for key, rule in rules.items()
            if rule not in (*policy.changes, "free")
            and not (rule == "lowered" and _is_lower(*changed[key]))
        ]
        if refused:
            values = (f"{key}={changed[key][0]} (now {changed[key][1]})" for key in refused)
            raise UserError(
                f"the {noun} at {folder} was started with {', '.join(values)}; continue it as it "
                f"was started, or train elsewhere with {option}"
            )
        if policy.verify is not None and "moved" in rules.values():
            try:
                policy.verify()
            except UserError as error:
                raise UserError(
                    f"the data at {config.data.path} are not those that the {noun} at {folder} "
                    "was started with; give the data.path of the same data, or another folder "
                    f"with {option}"
                ) from error
        taken = {key: changed[key][1] for key, rule in rules.items() if rule != "free"}
        return with_values(stored, taken) if taken else None

    def _write_config(self, config: Config | AutoencoderConfig) -> None:
        """Write config.yaml; train.max_minutes belongs to a call, not to the run."""
        if isinstance(config, Config):
            train = dataclasses.replace(config.train, max_minutes=0.0)
            config = dataclasses.replace(config, train=train)
        atomic.write_bytes(self.folder / CONFIG, resolved_yaml(config).encode())

    def _write_environment(self, command: str) -> None:
        plain = {"command": command, **environment()}
        atomic.write_json(self.folder / ENVIRONMENT, plain)


def _is_lower(old: int | list[int], new: int | list[int]) -> bool:
    """Return whether no block has a larger value than before; a list has one per block."""
    lengths = [len(value) if isinstance(value, list) else 1 for value in (old, new)]
    return all(of_block(new, index) <= of_block(old, index) for index in range(max(lengths)))


def read_config(folder: Path) -> Config:
    """Read the configuration of a run (see `RunDirectory.config`)."""
    return RunDirectory(folder).config


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a run (see `RunDirectory.manifest`)."""
    return RunDirectory(folder).manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Commit the manifest: flow.json, or start.json before the first block is finished."""
    name = FILE if manifest.passes else START
    atomic.write_json(Path(folder) / name, manifest.to_json())


def block_file(index: int, number: int = 0) -> str:
    """Return the path of a block of a pass inside a run directory."""
    folder = f"blocks/pass-{number:02d}" if number else "blocks"
    return f"{folder}/block-{index:02d}.safetensors"


def mean_file(number: int) -> str:
    """Return the path of the mean of a group of blocks inside an exported run."""
    return f"blocks/mean-{number:02d}.safetensors"


def checkpoint_file(index: int, number: int = 0) -> str:
    """Return the path of the checkpoint of a block of a pass inside a run directory."""
    prefix = f"pass-{number:02d}-" if number else ""
    return f"checkpoints/{prefix}block-{index:02d}.safetensors"


def environment() -> dict[str, Any]:
    """Return versions and machine of this process."""
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
