"""Run directories: what a training leaves behind, and how it is opened again.

config.yaml, environment.json     what was asked for, and where it ran
blocks/block-00.safetensors …     finished blocks; those of later passes in blocks/pass-01/ …
flow.json                         the manifest, committed after every block: the passes, block
                                  hashes, standardisation, autoencoder, data
stages/, checkpoints/             training data pushed through the blocks; resume
snapshots/                        averaged weights on the way (train.snapshot_every)
log.jsonl, tensorboard/           the course of the training
samples/, metrics.json            what `generate` and `evaluate` add

`flow.json` lists all passes under `passes`; at its top, `pass`, `complete`, `flow` and `blocks`
repeat the one that is used: the last complete pass, or the first while that is unfinished. So a
run stays usable while a later pass is in progress.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from autoencoders.adapt import Adaptation
from autoencoders.base import Autoencoder
from autoencoders.registry import build
from flows.block import Block
from flows.flow import FORMAT as FLOW_FORMAT
from flows.flow import Flow
from flows.spec import BlockSpec, build_block
from pipeline import commit
from pipeline.compact import restored
from pipeline.config import Config
from pipeline.config_files import from_resolved, resolved_yaml
from pipeline.datasets import DATASETS
from pipeline.errors import UserError
from pipeline.latents import Standardisation
from pipeline.passes import Pass, Row
from pipeline.shipped import locate

FORMAT = 2
ENVIRONMENT = "environment.json"


def block_file(index: int, number: int = 0) -> str:
    """Path of a block of a pass inside a run directory."""
    folder = f"blocks/pass-{number:02d}" if number else "blocks"
    return f"{folder}/block-{index:02d}.safetensors"


def start_run(folder: Path, config: Config) -> None:
    """Write what identifies a run, before anything is trained; not how long one call may take."""
    kept = dataclasses.replace(config, train=dataclasses.replace(config.train, max_minutes=0.0))
    commit.write_bytes(folder / "config.yaml", resolved_yaml(kept).encode())
    write_environment(folder)


def write_environment(folder: Path) -> None:
    """Write versions and machine."""
    commit.write_json(folder / ENVIRONMENT, environment())


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
    try:
        config = from_resolved(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not readable YAML; the run is damaged") from error
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


def read_manifest(folder: Path) -> dict[str, Any]:
    """flow.json of a run.

    Raises:
        UserError: absent, damaged or of another format.
    """
    path = Path(folder) / "flow.json"
    if not path.is_file():
        raise UserError(
            f"the run at {folder} has no finished block yet; finish it with "
            f"`{resuming(read_config(folder), folder)}`"
        )
    manifest: dict[str, Any] = commit.read_json(path, "flow manifest")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not of format {FORMAT}; train the run again")
    return manifest


def compose(about: dict[str, Any], shape: Sequence[int], passes: Sequence[Pass]) -> dict[str, Any]:
    """flow.json of some passes.

    Args:
        about: name, standardisation, autoencoder and data.
        shape: of one sample.
        passes: in order, at least one.
    """
    whole = [number for number, entry in enumerate(passes) if entry.complete]
    plain = [dataclasses.asdict(entry) for entry in passes]
    base = {"format": FORMAT, **about, "shape": list(shape), "passes": plain}
    return select(base, whole[-1] if whole else len(passes) - 1)


def select(manifest: dict[str, Any], number: int) -> dict[str, Any]:
    """The manifest with another of its passes at the top.

    Raises:
        UserError: there is no such pass.
    """
    passes = manifest["passes"]
    if not 0 <= number < len(passes):
        raise UserError(f"pass {number} does not exist; the run has {len(passes)}, from 0 on")
    rows = passes[number]["blocks"]
    specs = [row["spec"] for row in rows]
    flow = {"format": FLOW_FORMAT, "shape": manifest["shape"], "blocks": specs}
    top = {"pass": number, "complete": passes[number]["complete"], "flow": flow, "blocks": rows}
    return {**manifest, **top}


def passes_of(manifest: dict[str, Any]) -> list[Pass]:
    """The passes of a manifest."""
    return [Pass.from_dict(plain) for plain in manifest["passes"]]


def load_block(folder: Path, row: Row, shape: Sequence[int]) -> tuple[BlockSpec, Block]:
    """A finished block, frozen, checked against its sha256.

    Raises:
        UserError: it is missing, damaged or does not fit.
    """
    path = Path(folder) / row["file"]
    if not path.is_file():
        raise UserError(
            f"the run at {folder} lacks {row['file']}; bring the file back, or train the run again"
        )
    tensors = restored(commit.read_tensors(path, row["sha256"]))
    spec = BlockSpec.from_dict(row["spec"])
    block = build_block(spec, tuple(shape))
    try:
        block.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the structure in flow.json") from error
    return spec, block.eval().requires_grad_(False)


def load_blocks(folder: Path, manifest: dict[str, Any]) -> Flow:
    """The flow of a manifest, every block checked against its sha256.

    Raises:
        UserError: a block is missing, damaged or does not fit.
    """
    flow = Flow(manifest["shape"])
    for row in manifest["blocks"]:
        spec, block = load_block(folder, row, manifest["shape"])
        flow.specs.append(spec)
        flow.blocks.append(block)
    return flow.eval().requires_grad_(False)


def fingerprint_of(blocks: Sequence[Row], manifest: dict[str, Any]) -> str:
    """What generated images depend on besides the seed: blocks and autoencoder."""
    shas = [row["sha256"][:12] for row in blocks]
    return "-".join([*shas, manifest["autoencoder"]["fingerprint"][:12]])


def origins_of(manifest: dict[str, Any]) -> set[str]:
    """Fingerprints of what a run was exported from, the first of them trained; none for others."""
    exported = manifest.get("exported", {})
    return {*exported.get("before", []), *([exported["from"]] if exported else [])}


@dataclass(frozen=True)
class Run:
    """A finished run, ready to generate.

    Attributes:
        folder: the run directory.
        config: its configuration.
        manifest: its flow.json.
        flow: its blocks, frozen.
        standardisation: of its latents.
    """

    folder: Path
    config: Config
    manifest: dict[str, Any]
    flow: Flow
    standardisation: Standardisation

    @property
    def fingerprint(self) -> str:
        """What the generated images depend on besides the seed: blocks and autoencoder."""
        return fingerprint_of(self.manifest["blocks"][: len(self.flow)], self.manifest)

    @property
    def origins(self) -> set[str]:
        """Its fingerprint, and those of the same blocks before they were rounded."""
        return {self.fingerprint, *origins_of(self.manifest)}

    def autoencoder_weights(self) -> str | None:
        """Name or path of its autoencoder's weights; those of an exported run lie inside it."""
        return _at_hand(self.folder, self.manifest["autoencoder"]["weights"])

    def build_autoencoder(self, weights: str | None) -> Autoencoder:
        """One of the same kind and for the same images as its own, whatever the weights.

        Raises:
            ValueError: weights that do not fit; likewise OSError, for those that are not there.
        """
        known = self.manifest["autoencoder"]
        shape, adaptation = tuple(known["image_shape"]), Adaptation(**known["adaptation"])
        return build(known["name"], weights, shape, adaptation)

    def autoencoder(self) -> Autoencoder:
        """The autoencoder that the run's latents came from.

        Raises:
            UserError: it is not at hand, or is another one by the same name.
        """
        wanted = self.manifest["autoencoder"]
        try:
            model = self.build_autoencoder(self.autoencoder_weights())
        except (ValueError, OSError) as error:
            raise UserError(
                f"the autoencoder of the run at {self.folder} is not at hand: {error}"
            ) from error
        if model.fingerprint != wanted["fingerprint"]:
            raise UserError(
                f"the run at {self.folder} was trained with another autoencoder than "
                f"{wanted['weights'] or wanted['name']} is now; bring that one back or train again"
            )
        return model


def open_run(
    folder: Path, blocks: int | None = None, number: int | None = None, images: bool = False
) -> Run:
    """Open a run.

    Args:
        folder: the run directory, or zoo:NAME for a shipped run.
        blocks: use only the first so many blocks; None wants a finished pass and takes all.
        number: the pass; None takes the last complete one.
        images: whether a run on points in the plane is refused.

    Raises:
        UserError: absent, unfinished or damaged, fewer blocks than asked for, or a run on points.
    """
    folder = locate(folder)
    config = read_config(folder)
    manifest = read_manifest(folder)
    if images and "autoencoder" not in manifest:
        raise UserError(
            f"the run at {folder} is of points in the plane, not of images; `jkoflow toy2d "
            f"--config NAME --run {folder} --resume` measures and draws it"
        )
    if number is not None:
        manifest = select(manifest, number)
    count = len(manifest["blocks"])
    if blocks is None and not manifest["complete"]:
        raise UserError(
            f"the run at {folder} stopped after {count} blocks; finish it with "
            f"`{resuming(config, folder)}`, or use --blocks {count}"
        )
    if blocks is not None and not 1 <= blocks <= count:
        raise UserError(f"--blocks must lie between 1 and {count} for the run at {folder}")
    used = blocks or count
    flow = load_blocks(folder, {**manifest, "blocks": manifest["blocks"][:used]})
    standardisation = Standardisation.from_dict(manifest["standardisation"])
    return Run(folder, config, manifest, flow, standardisation)
