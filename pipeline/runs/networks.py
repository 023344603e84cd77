"""Networks of a block that train alone, each in its folder of the run.

networks/0, networks/1, … are sealed, and each has a lock of its own. So the trainings may run at
once on machines that share the disk.

* network.json: how the network is trained, and the sha256 of its weights once it is finished.
* network.safetensors: its averaged weights, under their names in the block.
* checkpoints/, log.jsonl: as in a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.errors import UserError
from pipeline.runs.directory import RunDirectory
from pipeline.runs.manifest import FILE
from pipeline.storage import atomic, seal
from pipeline.storage.records import from_json, to_json

FOLDER, RECORD, WEIGHTS = "networks", "network.json", "network.safetensors"


@dataclass(frozen=True)
class NetworkRecord:
    """Content of network.json.

    Attributes:
        network: index of the network, from 0.
        settings: that decide its weights, by dotted key.
        samples: key of the stage that it is trained on.
        start: sha256 of the blocks of another run that it started from; empty for random weights.
        sha256: of its weights; None while it trains.
        seconds: of its training.
    """

    network: int
    settings: dict[str, Any]
    samples: str
    start: list[str]
    sha256: str | None = None
    seconds: float = 0.0


def network_folder(run: Path, network: int) -> Path:
    """Return the folder of a network of a run."""
    return Path(run) / FOLDER / str(network)


def trains_alone(run: Path) -> bool:
    """Return whether the networks of an unfinished run train alone."""
    return (Path(run) / FOLDER).is_dir() and not (Path(run) / FILE).is_file()


def network_command(run: Path, network: int) -> str:
    """Return the command that trains a network of a run that exists, or continues it."""
    return f"{RunDirectory(run).resume_command} --network {network}"


def read_record(run: Path, network: int) -> NetworkRecord | None:
    """Read the record of a network; None if its training has not begun.

    Raises:
        UserError: the record is damaged, or has no seal.
    """
    folder = network_folder(run, network)
    path = folder / RECORD
    if not path.is_file():
        return None
    seal.require(folder, "the network in")
    record = from_json(NetworkRecord, atomic.read_json(path, "record of a network"), str(path))
    if record.network != network:
        raise UserError(
            f"{path} is of network {record.network}; expected network {network}; bring back its "
            f"folder, or remove it and train again by `{network_command(run, network)}`"
        )
    return record


def is_finished(run: Path, network: int) -> bool:
    """Return whether a network is finished; see `read_record` for errors."""
    record = read_record(run, network)
    return record is not None and record.sha256 is not None


def unfinished_networks(run: Path, count: int) -> list[int]:
    """Return the networks of `count` that are not finished; see `read_record` for errors."""
    return [network for network in range(count) if not is_finished(run, network)]


def require_finished(run: Path, count: int) -> None:
    """Check that all networks of a block are finished.

    Raises:
        UserError: some are not.
    """
    missing = unfinished_networks(run, count)
    if missing:
        which = " and ".join(filter(None, (", ".join(map(str, missing[:-1])), str(missing[-1]))))
        plural = "s" if len(missing) > 1 else ""
        raise UserError(
            f"network{plural} {which} of the run at {run} {'are' if plural else 'is'} not "
            f"finished; expected all {count}, each trained alone; train network {missing[0]} by "
            f"`{network_command(run, missing[0])}`"
        )


def require_same(run: Path, found: NetworkRecord, expected: NetworkRecord) -> None:
    """Check that a network is trained as the run is.

    Raises:
        UserError: its settings, its samples or its initial weights are others.
    """
    keys = sorted({*found.settings, *expected.settings})
    changed = [
        f"{key}={found.settings.get(key)} (the run: {expected.settings.get(key)})"
        for key in keys
        if found.settings.get(key) != expected.settings.get(key)
    ]
    if found.samples != expected.samples:
        changed.append("other samples")
    if found.start != expected.start:
        changed.append("other initial weights")
    if changed:
        raise UserError(
            f"network {found.network} of the run at {run} was trained with {', '.join(changed)}; "
            f"expected one training for all; remove {network_folder(run, found.network)}, and "
            f"train it again by `{network_command(run, found.network)}`"
        )


def write_record(run: Path, record: NetworkRecord) -> None:
    """Commit the record of a network."""
    atomic.write_json(network_folder(run, record.network) / RECORD, to_json(record))


def write_weights(run: Path, network: int, weights: dict[str, Tensor]) -> str:
    """Commit the weights of a network, under their names in the block; return their sha256."""
    path = network_folder(run, network) / WEIGHTS
    return atomic.write_tensors(path, _renamed(weights, 0, network))


def read_weights(run: Path, record: NetworkRecord) -> dict[str, Tensor]:
    """Read the weights of a finished network, under their names in the block.

    Raises:
        UserError: the file is missing or damaged.
    """
    return atomic.read_tensors(network_folder(run, record.network) / WEIGHTS, record.sha256)


def _renamed(weights: dict[str, Tensor], old: int, new: int) -> dict[str, Tensor]:
    """Return weights with another index of the network in their names."""
    before, after = (f"velocity.nets.{number}." for number in (old, new))
    return {after + name.removeprefix(before): value for name, value in weights.items()}
