"""Refuses configurations that no flow could be trained from, before anything is written."""

from __future__ import annotations

import math

import torch

from flows.divergence import make_divergence
from flows.schedule import step_sizes
from flows.velocity import KINDS, make_velocity
from pipeline.config import Config, ScheduleConfig
from pipeline.errors import UserError


def check(config: Config) -> None:
    """Check the sections that a training uses.

    Raises:
        UserError: names the key, the value and what is expected.
        FlowError: likewise, of values that the mathematics itself checks.
    """
    train, schedule, latents = config.train, config.schedule, config.latents
    _at_least(
        1,
        {
            "train.iterations": train.iterations,
            "train.batch_size": train.batch_size,
            "train.log_every": train.log_every,
            "latents.draws": latents.draws,
            "train.probes": train.probes,
            "schedule.max_blocks": schedule.max_blocks,
            "schedule.refine": schedule.refine,
            "latents.shard_size": latents.shard_size,
        },
    )
    _at_least(
        0,
        {
            "schedule.reparameterize": schedule.reparameterize,
            "schedule.tolerance": schedule.tolerance,
            "train.grad_clip": train.grad_clip,
        },
    )
    if schedule.later_iterations is not None:
        _at_least(1, {"schedule.later_iterations": schedule.later_iterations})
    for name in ("iterations", "substeps"):
        values = getattr(schedule, name)
        if values is not None and (not values or min(values) < 1):
            raise UserError(
                f"schedule.{name} needs one value a block, each at least 1, not {values}"
            )
    if not 0 < train.lr < math.inf:
        raise UserError(f"train.lr must be positive, not {train.lr}")
    if not 0 <= latents.noise < math.inf:
        raise UserError(f"latents.noise must not be negative, not {latents.noise}")
    if not 0 <= train.ema < 1:
        raise UserError(f"train.ema must lie in [0, 1), not {train.ema}")
    if not 0 < schedule.eta <= 1:
        raise UserError(f"schedule.eta must lie in (0, 1], not {schedule.eta}")
    if train.objective != "jko":
        raise UserError(f"unknown objective {train.objective!r}; choose jko")
    if config.velocity.kind not in KINDS:
        raise UserError(
            f"unknown velocity {config.velocity.kind!r}; choose one of {', '.join(KINDS)}"
        )
    make_divergence(train.divergence, probes=train.probes, sigma0=train.sigma0)
    steps(config.schedule)


def check_shape(config: Config, shape: tuple[int, ...]) -> None:
    """Check that the velocity network takes samples of a shape; no memory is spent.

    Raises:
        FlowError: it does not.
    """
    with torch.device("meta"):
        make_velocity(config.velocity, shape)


def steps(schedule: ScheduleConfig) -> list[float]:
    """The step sizes h_k of the blocks with a movement term, given or geometric.

    Raises:
        UserError: a given step is not positive, or none is given.
        FlowError: h0, rho or h_max is not positive.
    """
    if schedule.h is None:
        return step_sizes(schedule.h0, schedule.rho, schedule.h_max, schedule.max_blocks)
    if not schedule.h or not all(0 < h < math.inf for h in schedule.h):
        raise UserError(f"schedule.h needs one positive step a block, not {schedule.h}")
    return [float(h) for h in schedule.h]


def _at_least(least: int, values: dict[str, float]) -> None:
    for name, value in values.items():
        if not value >= least:
            raise UserError(f"{name} must be at least {least}, not {value}")
