"""Joins networks that were trained alone to the block of a run."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from pipeline.config.keys import resume_rule
from pipeline.config.plain import flat
from pipeline.config.schema import SECTIONS, Config
from pipeline.errors import UserError
from pipeline.runs.manifest import Manifest
from pipeline.runs.networks import (
    NetworkRecord,
    network_folder,
    read_record,
    read_weights,
    require_finished,
    require_same,
)
from pipeline.runtime.sharding import shards_networks
from pipeline.storage.records import to_json
from pipeline.storage.shards.reader import StoreReader
from pipeline.storage.training_log import TrainingLog, rows_of
from pipeline.training.block_trainer import BlockTrainer
from pipeline.training.pass_trainer import PassTrainer

#: entries of a network's log that add up to those of the block
_SUMS = ("total", "seconds")


class NetworkJoiner(PassTrainer):
    """Trainer of a run whose block takes the weights of networks that were trained alone.

    The block is then measured and committed as any other.
    """

    def _optimise(self, trainer: BlockTrainer, log: TrainingLog) -> bool:
        """Take the weights of the networks instead of training them."""
        weights: dict[str, Tensor] = {}
        seconds = 0.0
        for network in range(self.config.velocity.nets):
            record = read_record(self.folder, network)
            assert record is not None  # by `check_join`
            expected = expected_record(self.config, self.manifest, trainer.stage, network)
            require_same(self.folder, record, expected)
            weights |= read_weights(self.folder, record)
            seconds += record.seconds
        trainer.adopt(weights, seconds)
        self._log_losses(log)
        if self.previews.due(trainer):
            self.previews.draw(self.current, trainer, log, trainer.done)
        return True

    def _log_losses(self, log: TrainingLog) -> None:
        """Log the loss of the block, which is the sum of those of its networks."""
        log.rewind(0, 0)
        logs = []
        for network in range(self.config.velocity.nets):
            path = network_folder(self.folder, network) / "log.jsonl"
            rows = list(rows_of(path)) if path.is_file() else []
            logs.append({row["step"]: row for row in rows if row.keys() >= {"step", *_SUMS}})
        for step in sorted(set.intersection(*map(set, logs))):
            sums = {key: sum(rows[step][key] for rows in logs) for key in _SUMS}
            log.measure(0, step, step, **sums)


def check_join(config: Config, folder: Path, accelerator: Accelerator) -> None:
    """Check that all networks of a run are finished, and were trained as the configuration says.

    Raises:
        UserError: one is missing or has other settings, or FSDP divides the block.
    """
    if shards_networks(accelerator):
        raise UserError(
            f"the networks of the run at {folder} were trained alone and are joined as a whole; "
            "expected a launch without FSDP; launch without it"
        )
    for network in range(config.velocity.nets):
        record = read_record(folder, network)
        if record is not None:
            wanted = NetworkRecord(network, _settings(config), record.samples, record.start)
            require_same(folder, record, wanted)
    require_finished(folder, config.velocity.nets)


def expected_record(
    config: Config, manifest: Manifest, stage: StoreReader, network: int
) -> NetworkRecord:
    """Return the record of a network that is trained as a run is.

    Args:
        config: of the run.
        manifest: of the run, with the record of its warm start.
        stage: the samples that the block trains on.
        network: its index.
    """
    start = [] if manifest.init_from is None else [r.sha256 for r in manifest.init_from.blocks]
    return NetworkRecord(network, _settings(config), stage.manifest["key"], start)


def _settings(config: Config) -> dict[str, object]:
    """Return the settings that decide the weights of a network, by dotted key."""
    sections = ("velocity", "train", *SECTIONS)
    settings = {
        key: value
        for key, value in flat(config).items()
        if key.partition(".")[0] in sections
        and key != "train.init_from"  # the sha256 of its blocks are recorded
        and resume_rule(key, Config) not in ("free", "later")
    }
    plain: dict[str, object] = to_json(settings)
    return plain
