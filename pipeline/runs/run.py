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

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoencoders.adapt import Adaptation
from autoencoders.base import Autoencoder
from autoencoders.registry import build_autoencoder
from flows.block import Block
from flows.flow import Flow
from flows.spec import BlockSpec, build_block
from pipeline.config.schema import Config
from pipeline.data.standardisation import Standardisation
from pipeline.errors import UserError
from pipeline.runs.directory import _at_hand, read_config, resuming
from pipeline.runs.manifest import fingerprint_of, origins_of, read_manifest, select
from pipeline.runs.passes import Row
from pipeline.runs.zoo import locate
from pipeline.storage import atomic
from pipeline.storage.compact_weights import dequantise


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
    tensors = dequantise(atomic.read_tensors(path, row["sha256"]))
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
    shape = manifest["shape"]
    blocks = [load_block(folder, row, shape) for row in manifest["blocks"]]
    return Flow.from_blocks(shape, blocks).eval().requires_grad_(False)


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
        return build_autoencoder(known["name"], weights, shape, adaptation)

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


def is_refiner(run: Run) -> bool:
    """Whether a run refines images, rather than drawing latents."""
    return any(spec.velocity.image_channels for spec in run.flow.specs)


def require_latents(run: Run) -> None:
    """Refuse a refiner where a flow of latents is asked for.

    Raises:
        UserError: the run is one.
    """
    if is_refiner(run):
        raise UserError(
            f"the run at {run.folder} is a refiner, which draws what is missing from images that "
            "are there; give it to a run on the same autoencoder by --refiner"
        )
