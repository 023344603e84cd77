"""Loop over the optimiser steps of a block: log, checkpoints, and an end in time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.runs.manifest import Manifest
from pipeline.runtime import signals
from pipeline.runtime.console import Progress, annotate, estimate_whole, say
from pipeline.runtime.distributed import broadcast_decision
from pipeline.storage.training_log import TrainingLog
from pipeline.training.block_trainer import BlockTrainer


class Limits:
    """Limits of a training, at which it saves a checkpoint and stops.

    Args:
        minutes: from now on; 0 has no limit.

    Attributes:
        until: optimiser step of the block in training; None for none.
    """

    def __init__(self, minutes: float) -> None:
        self._deadline = time.monotonic() + 60 * minutes if minutes > 0 else None
        self.until: int | None = None

    def reached(self, step: int) -> bool:
        """Return whether the time is up, a signal has come, or the step is `until`."""
        out_of_time = self._deadline is not None and time.monotonic() > self._deadline
        return out_of_time or signals.pending() or step == self.until


@dataclass(frozen=True)
class Place:
    """Place of a block in its training.

    Attributes:
        name: of the block, in messages.
        kind: its step in words.
        checkpoint: path of its checkpoint.
        before: optimiser steps of the blocks and passes before it.
        planned: optimiser steps of it and of the blocks after it in its pass.
        manifest: of the run so far, for the checkpoint; None for none.
    """

    name: str
    kind: str
    checkpoint: Path
    before: int
    planned: int
    manifest: Manifest | None = None


def optimise(
    trainer: BlockTrainer,
    log: TrainingLog,
    place: Place,
    limits: Limits,
    progress: Progress,
    after_step: Callable[[], bool] = lambda: False,
) -> bool:
    """Run the optimiser to its end, with checkpoints; all ranks call it.

    Args:
        trainer: of the block; it continues from a checkpoint that is there.
        log: of the training.
        place: of the block.
        limits: of the training.
        progress: wraps the loop.
        after_step: is called after every step, before a checkpoint; it returns whether the block
            ends now.

    Returns:
        whether the block is finished; False when a limit was reached before.

    Raises:
        JkoflowError: a step failed.
    """
    recipe, index, path = trainer.recipe, trainer.index, place.checkpoint
    state = trainer.load(path) if path.is_file() else None
    log.rewind(index, trainer.done)
    if state is not None:
        log.restore(state)
    saved = time.monotonic()
    remaining = range(trainer.done, trainer.done if trainer.stopped else trainer.iterations)
    bar = progress(remaining, len(remaining), f"{place.name} ({place.kind})")
    estimate_whole(bar, "training", place.planned - trainer.done, "iteration")
    samples_per_second = _rate(trainer)
    with signals.deferred(), trainer.batches.reading_ahead(trainer.iterations):
        for _ in bar:
            log.add(trainer.step().terms)
            annotate(bar, loss=log.mean()["total"], samples_per_s=samples_per_second())
            if trainer.done % recipe.log_every == 0 or trainer.done == trainer.iterations:
                seconds = round(trainer.seconds, 3)
                log.flush(index, trainer.done, place.before + trainer.done, seconds=seconds)
            if after_step():
                break
            halt = limits.reached(trainer.done)
            due = halt or time.monotonic() - saved > recipe.checkpoint_seconds
            if broadcast_decision(trainer.accelerator, due):
                trainer.save(path, log.state(), place.manifest)
                saved = time.monotonic()
                if broadcast_decision(trainer.accelerator, halt):
                    if trainer.accelerator.is_main_process:
                        say(f"{place.name}: saved at step {trainer.done} of {trainer.iterations}")
                    return False
        trainer.save(path, log.state(), place.manifest)
    return True


def _rate(trainer: BlockTrainer) -> Callable[[], float]:
    """Return a function that gives the samples per second of the steps since this call."""
    done, seconds = trainer.done, trainer.seconds

    def rate() -> float:
        steps = trainer.done - done
        return steps * trainer.recipe.batch_size / max(trainer.seconds - seconds, 1e-9)

    return rate
