"""Opens the log of a training with the trackers that its configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pipeline.config.plain import flat
from pipeline.runtime.console import say
from pipeline.runtime.distributed import errors_on_all_ranks
from pipeline.storage.trackers import Trackers
from pipeline.storage.training_log import TrainingLog


def open_log(
    folder: Path,
    config: Any,  # noqa: ANN401 - of any schema
    names: Sequence[str],
    accelerator: Accelerator,
) -> TrainingLog:
    """Open log.jsonl and the trackers of a training; all ranks call it, and rank 0 writes.

    Args:
        folder: the run directory.
        config: the configuration, which the trackers show.
        names: of the trackers.
        accelerator: device and ranks.

    Raises:
        UserError: a tracker is unknown, not installed, or does not start.
    """
    trackers = None
    with errors_on_all_ranks(accelerator):
        if accelerator.is_main_process and names:
            trackers = Trackers(names, folder, flat(config), say)
    return TrainingLog(folder, accelerator.is_main_process, trackers)
