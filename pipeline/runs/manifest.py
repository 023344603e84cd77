"""flow.json, the manifest of a run: origin of its samples, and its passes with their blocks.

The manifest is committed after every finished block. One pass is in use: the last complete one,
or the last one while none is complete. So a run stays usable while a later pass is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from autoencoders.adapt import Adaptation
from flows.freezing import can_freeze
from pipeline.data.standardisation import Standardisation
from pipeline.errors import UserError
from pipeline.runs.passes import BlockRow, Pass, StoredBlock
from pipeline.storage.records import from_json, to_json

FILE = "flow.json"
FORMAT = 2


@dataclass(frozen=True)
class DataRecord:
    """Data set that a run was trained on; `count` and `seed` are of a set that is generated."""

    name: str
    split: str
    fingerprint: str
    count: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class LatentsRecord:
    """Latents that a run was trained on.

    Attributes:
        key: of their cache.
        noise: standard deviation of the noise that was added to them.
        stochastic: whether they were sampled from the encoder's posterior.
        disturb: largest noise on the latents that a refiner learns from.
    """

    key: str
    noise: float
    stochastic: bool
    disturb: float | None = None


@dataclass(frozen=True)
class AutoencoderRecord:
    """Autoencoder of a run's latents, for images of shape (C, H, W).

    Its weights are None for a kind without weights.
    """

    name: str
    weights: str | None
    fingerprint: str
    image_shape: tuple[int, int, int]
    adaptation: Adaptation


@dataclass(frozen=True)
class ClassesRecord:
    """Numbers of training samples of each class."""

    counts: list[int]


@dataclass(frozen=True)
class WarmStartRecord:
    """Run, a directory or zoo:NAME, whose weights the blocks started from (`--init-from`).

    Attributes:
        run: its directory, or zoo:NAME.
        name: of its configuration.
        objective: that it was trained with.
        blocks: its blocks.
        interpolant: that its flow matching learnt; None in older records, of runs that learnt the
            trigonometric one or were not converted to it.
    """

    run: str
    name: str
    objective: str
    blocks: tuple[StoredBlock, ...]
    interpolant: str | None = None

    @property
    def from_linear(self) -> bool:
        """Return whether the run is flow matching of the linear interpolant."""
        return self.objective == "fm" and self.interpolant == "linear"

    def shares_time(self, autonomous: bool) -> bool:
        """Return whether autonomous blocks are parts of the time of the only block of the run."""
        return autonomous and len(self.blocks) == 1 and can_freeze(self.blocks[0].spec.velocity)


@dataclass(frozen=True)
class DerivationRecord:
    """Run that the blocks of this run were made from, other than by training on samples.

    Attributes:
        how: past participle that says what was done, such as "distilled".
        run: directory of the other run.
        name: of its configuration.
        objective: that it was trained with.
        blocks: sha256 of its blocks.
        groups: its blocks that each block of this run stands for.
        sampler: its section sampler.
    """

    how: str
    run: str
    name: str
    objective: str
    blocks: list[str]
    groups: list[list[int]]
    sampler: dict[str, Any]


@dataclass(frozen=True)
class ExportRecord:
    """Origin of an exported run: its fingerprint, and `before` those of the runs it came from."""

    origin: str = field(metadata={"key": "from"})
    dtype: str
    before: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class HelperRecord:
    """Guide or refiner of an exported run: its fingerprint `run`, weights and training time."""

    name: str
    run: str
    parameters: int
    seconds: float


@dataclass(frozen=True)
class Manifest:
    """Content of flow.json.

    A run on points has no latents and no autoencoder. `init_from`, `derived_from` and `exported`
    are None for a run that was trained here on samples. Pass `number` is in use.
    """

    name: str
    shape: tuple[int, ...]
    standardisation: Standardisation
    data: DataRecord
    latents: LatentsRecord | None = None
    autoencoder: AutoencoderRecord | None = None
    classes: ClassesRecord | None = None
    class_names: list[str] | None = None
    init_from: WarmStartRecord | None = None
    derived_from: DerivationRecord | None = None
    exported: ExportRecord | None = None
    guide: HelperRecord | None = None
    refiner: HelperRecord | None = None
    passes: tuple[Pass, ...] = ()
    number: int = field(default=0, metadata={"key": "pass"})

    @classmethod
    def from_json(cls, plain: Any, file: str = FILE) -> Manifest:  # noqa: ANN401 - JSON
        """Convert the content of flow.json.

        Raises:
            UserError: another format, no pass, or a key that is missing or of a wrong type.
        """
        if not isinstance(plain, dict) or plain.get("format") != FORMAT:
            raise UserError(
                f"{file} is not of format {FORMAT}; expected a run of this version; train it again"
            )
        manifest = from_json(cls, plain, file)
        if not 0 <= manifest.number < max(1, len(manifest.passes)):
            raise UserError(
                f"pass in {file} is {manifest.number}; expected one of its "
                f"{len(manifest.passes)} passes; train the run again"
            )
        return manifest

    def to_json(self) -> dict[str, Any]:
        """Convert to the content of flow.json."""
        return {"format": FORMAT, **to_json(self)}

    @property
    def current(self) -> Pass:
        """The pass in use."""
        return self.passes[self.number]

    @property
    def blocks(self) -> tuple[BlockRow, ...]:
        """Rows of the blocks in use."""
        return self.current.blocks

    @property
    def complete(self) -> bool:
        """Whether the pass in use is finished."""
        return self.current.complete

    def require_autoencoder(self) -> AutoencoderRecord:
        """Return the autoencoder of a run on images; a run without one is a UserError."""
        if self.autoencoder is None:
            raise UserError(
                f"the run {self.name} has no autoencoder, because it is on points or tensors; "
                "expected a run on images; sample tensors in Python by `jkoflow.load`"
            )
        return self.autoencoder

    def class_counts(self) -> tuple[int, ...]:
        """Return the number of training samples of each class; UserError without classes."""
        if self.classes is None:
            raise UserError(
                f"classes is missing in the manifest of {self.name}; expected the counts of a run "
                "with classes; train the run again"
            )
        return tuple(self.classes.counts)

    def fingerprint(self, count: int | None = None) -> str:
        """Identify the first `count` blocks (None for all) and the autoencoder.

        Generated images depend on these and on the seed.
        """
        rows = self.blocks[:count]
        shas = [row.sha256[:12] for row in rows]
        means = dict.fromkeys(row.mean.sha256[:12] for row in rows if row.mean is not None)
        return "-".join([*shas, *means, self.require_autoencoder().fingerprint[:12]])

    @property
    def origins(self) -> set[str]:
        """Fingerprints of the runs that this one was exported from; empty for a trained one."""
        return {self.exported.origin, *self.exported.before} if self.exported else set()

    def with_passes(self, passes: Sequence[Pass]) -> Manifest:
        """Return the manifest with other passes; the last complete one, or the last, is in use."""
        complete = [number for number, entry in enumerate(passes) if entry.complete]
        number = complete[-1] if complete else max(0, len(passes) - 1)
        return dataclasses.replace(self, passes=tuple(passes), number=number)

    def with_blocks(self, blocks: Sequence[BlockRow]) -> Manifest:
        """Return the manifest with other blocks in the pass in use."""
        passes = list(self.passes)
        passes[self.number] = dataclasses.replace(self.current, blocks=tuple(blocks))
        return dataclasses.replace(self, passes=tuple(passes))

    def select(self, number: int) -> Manifest:
        """Return the manifest with another pass in use; UserError if there is no such pass."""
        if not 0 <= number < len(self.passes):
            count = len(self.passes)
            raise UserError(f"pass {number} does not exist; expected 0 to {count - 1}")
        return dataclasses.replace(self, number=number)
