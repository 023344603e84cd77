"""Finished runs, opened for sampling: configuration, manifest, and the flow with its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from autoencoders.base import Autoencoder
from autoencoders.registry import build_autoencoder
from flows.block import Block
from flows.errors import FlowError
from flows.flow import Flow
from flows.networks.registry import BUILT_IN
from flows.spec import BlockSpec, build_block
from pipeline.config.data import LATENTS
from pipeline.config.schema import Config
from pipeline.data.standardisation import Standardisation
from pipeline.errors import UserError
from pipeline.integrity.reason import reason_of
from pipeline.runs.directory import RunDirectory
from pipeline.runs.manifest import Manifest
from pipeline.runs.passes import SharedFile, StoredBlock
from pipeline.runs.zoo import locate, name_of
from pipeline.storage import atomic
from pipeline.storage.shared_weights import dequantise_block


def load_block(folder: Path, row: StoredBlock, shape: Sequence[int]) -> tuple[BlockSpec, Block]:
    """Load a finished block, frozen, and check it against its sha256.

    Raises:
        UserError: the file is missing, damaged or does not fit its specification.
    """
    stored = _read_weights(folder, row)
    mean = {} if row.mean is None else _read_weights(folder, row.mean)
    path = Path(folder) / row.file
    try:
        tensors = dequantise_block(stored, mean)
    except (KeyError, RuntimeError, IndexError, ValueError) as error:
        raise UserError(
            f"{path} has no complete weights ({type(error).__name__}: {error}); expected those "
            "of `jkoflow export`; export the run again"
        ) from error
    return row.spec, build_stored(row.spec, shape, tensors, path)


def _read_weights(folder: Path, row: StoredBlock | SharedFile) -> dict[str, Tensor]:
    """Read a file of weights of a run, and check it against its sha256."""
    path = Path(folder) / row.file
    if not path.is_file():
        raise UserError(
            f"the run at {folder} lacks {row.file}; bring the file back, or train the run again"
        )
    return atomic.read_tensors(path, row.sha256)


def build_stored(
    spec: BlockSpec, shape: Sequence[int], tensors: dict[str, Tensor], path: Path
) -> Block:
    """Build a frozen block with the weights of a file.

    Raises:
        UserError: the weights do not fit the specification.
    """
    try:
        _require_size(spec, shape, tensors)
        block = build_block(spec, tuple(shape))
        block.load_state_dict(tensors)
    except (RuntimeError, FlowError) as error:
        reason = f" ({reason_of(error)})" if isinstance(error, FlowError) else ""
        raise UserError(
            f"{path} does not fit its specification in flow.json{reason}; bring back the file of "
            "this run, or train the run again"
        ) from error
    return block.eval().requires_grad_(False)


def _require_size(
    spec: BlockSpec, shape: Sequence[int], tensors: dict[str, Tensor]
) -> None:
    """Check that a specification claims no larger network than the file has, before it is built.

    The largest tensor has at least width² elements if there are several layers, and at least as
    many as there are products of the width with channels, patches or features of a sample. The
    width is the largest of a unet's levels.
    """
    velocity = spec.velocity
    if velocity.kind not in BUILT_IN:  # a plug-in's network may use width and depth as it likes
        return
    if velocity.kind == "linear":  # it has neither width nor depth
        sizes = [shape[0]]
    else:
        width = max(velocity.widths)
        layers = width if velocity.depth > 1 else 1
        sizes = [width * layers, velocity.widths[0] * shape[0], velocity.classes]
        folds = velocity.kind in ("unet", "dit")
        sizes.append(velocity.widths[0] * velocity.patch**2 if folds else 1)
    largest = max((tensor.numel() for tensor in tensors.values()), default=0)
    depth = 1 if velocity.kind == "linear" else velocity.depth
    nets = velocity.nets * spec.length  # a part of a block holds only the networks of its time
    if max(sizes) > largest or depth * nets > 4 * len(tensors):
        raise RuntimeError("the network is larger than its file")


def load_blocks(folder: Path, manifest: Manifest) -> Flow:
    """Load the flow of a manifest, and check every block against its sha256.

    Raises:
        UserError: a block is missing, damaged or does not fit.
    """
    blocks = [load_block(folder, row, manifest.shape) for row in manifest.blocks]
    return Flow.from_blocks(manifest.shape, blocks).eval().requires_grad_(False)


@dataclass(frozen=True)
class BlockInTraining:
    """Block of an unfinished run, after `step` of `iterations` optimiser steps."""

    index: int
    step: int
    iterations: int

    def sentence(self, folder: Path) -> str:
        """Say which weights a result of the run at a folder has."""
        return (
            f"the run at {folder} is unfinished; block {self.index} has its averaged weights of "
            f"step {self.step} of {self.iterations}"
        )


@dataclass(frozen=True)
class Run:
    """Run with its configuration, its manifest and its flow, which is frozen.

    `training` is its last block if that is still in training (see `pipeline.runs.unfinished`).
    """

    folder: Path
    config: Config
    manifest: Manifest
    flow: Flow
    training: BlockInTraining | None = None

    @property
    def name(self) -> str:
        """Name in messages: its folder, zoo:NAME or hf://owner/name."""
        return name_of(self.folder)

    @property
    def standardisation(self) -> Standardisation:
        """Standardisation of its samples."""
        return self.manifest.standardisation

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the blocks in use and the autoencoder."""
        return self.manifest.fingerprint(len(self.flow))

    @property
    def origins(self) -> set[str]:
        """Its fingerprint, and those of the runs that it was exported from."""
        return {self.fingerprint, *self.manifest.origins}

    def autoencoder_weights(self) -> str | None:
        """Return name or path of the autoencoder's weights; an exported run may hold them."""
        return RunDirectory(self.folder).inside(self.manifest.require_autoencoder().weights)

    def build_autoencoder(self, weights: str | None) -> Autoencoder:
        """Build an autoencoder of the run's kind and for its images, with any weights.

        Raises:
            ValueError: the weights do not fit.
            OSError: the weights cannot be read.
        """
        known = self.manifest.require_autoencoder()
        return build_autoencoder(known.name, weights, known.image_shape, known.adaptation)

    def autoencoder(self) -> Autoencoder:
        """Load the autoencoder of the run's latents.

        Raises:
            UserError: it is not available, or another one has its name.
        """
        wanted = self.manifest.require_autoencoder()
        try:
            model = self.build_autoencoder(self.autoencoder_weights())
        except (ValueError, OSError) as error:
            raise UserError(
                f"the autoencoder of the run at {self.name} is not available: {error}"
            ) from error
        if model.fingerprint != wanted.fingerprint:
            raise UserError(
                f"the run at {self.name} was trained with another autoencoder than "
                f"{wanted.weights or wanted.name} is now; bring that one back or train again"
            )
        return model


def open_run(
    folder: Path, blocks: int | None = None, number: int | None = None, images: bool = False
) -> Run:
    """Open a run, from its directory or zoo:NAME.

    `blocks` is the number of first blocks to use; None is all blocks of a finished pass. `number`
    is the pass; None is the last complete one. `images` requires a run on images.

    Raises:
        UserError: the run is absent, unfinished, damaged or on points, or has fewer blocks.
    """
    folder = locate(folder)
    directory, name = RunDirectory(folder), name_of(folder)
    config, manifest = directory.config, directory.manifest
    if images and manifest.autoencoder is None:
        raise UserError(f"the run at {name} is on {_description(directory)}")
    if number is not None:
        manifest = manifest.select(number)
    count = len(manifest.blocks)
    if blocks is None and not manifest.complete:
        raise UserError(
            f"the run at {name} stopped after {count} blocks; finish it with "
            f"`{directory.resume_command}`, or use --blocks {count}"
        )
    if manifest.complete and not count:
        raise UserError(f"the run at {name} has no block; bring back its flow.json")
    if blocks is not None and not 1 <= blocks <= count:
        raise UserError(f"--blocks must lie between 1 and {count} for the run at {name}")
    used = blocks or count
    flow = load_blocks(folder, manifest.with_blocks(manifest.blocks[:used]))
    return Run(folder, config, manifest, flow)


def _description(directory: RunDirectory) -> str:
    """Say what a run without an autoencoder is on, and what can be done with it."""
    if directory.config.data.name == LATENTS:
        shape = "x".join(map(str, directory.manifest.shape))
        return (
            f"tensors of shape {shape}, which its configuration's autoencoder does not decode; "
            "expected a run on images; sample it in Python by `jkoflow.load`"
        )
    return (
        "points in the plane; expected a run on images; "
        f"`{directory.resume_command}` measures and plots it"
    )


def is_refiner(run: Run) -> bool:
    """Return whether a run refines images; other runs sample latents."""
    return any(spec.velocity.image_channels for spec in run.flow.specs)


def same_autoencoder(run: Run, other: Run) -> bool:
    """Return whether the latents of two runs come from the same autoencoder."""
    one, two = (each.manifest.autoencoder for each in (run, other))
    return (one and one.fingerprint) == (two and two.fingerprint)


def require_latents(run: Run) -> None:
    """Raise UserError if a run is a refiner, which samples no latents."""
    if is_refiner(run):
        raise UserError(
            f"the run at {run.name} is a refiner, which samples the detail of decoded images; "
            "expected a run on latents; give the refiner to one by --refiner"
        )
