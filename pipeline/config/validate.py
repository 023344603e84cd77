"""Refuses configurations that no flow could be trained from, before anything is written."""

from __future__ import annotations

import dataclasses
import math

import torch

from flows.errors import FlowError
from flows.networks.registry import KINDS, make_velocity
from flows.objectives.coupling import COUPLINGS
from flows.objectives.losses import INTERPOLANTS, TIMES
from flows.objectives.schedule import gammas, step_sizes
from flows.solving.divergence import make_divergence
from pipeline.config.autoencoder_recipe import OPTIMIZERS
from pipeline.config.schema import Config
from pipeline.errors import UserError

#: what train.objective may be
OBJECTIVES = ("jko", "lfm", "fm")
#: what train.precision and generate.precision may be
PRECISIONS = ("fp32", "bf16")


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
            "train.warmup": train.warmup,
            "train.snapshot_every": train.snapshot_every,
            "train.max_minutes": train.max_minutes,
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
    if not 0 <= train.lr_final <= 1:
        raise UserError(f"train.lr_final must lie in [0, 1], not {train.lr_final}")
    rates = schedule.lr
    if rates is not None and not (rates and all(0 < rate < math.inf for rate in rates)):
        raise UserError(f"schedule.lr needs one positive rate a block, not {rates}")
    if not 0 <= latents.noise < math.inf:
        raise UserError(f"latents.noise must not be negative, not {latents.noise}")
    if not 0 <= latents.disturb < math.inf:
        raise UserError(f"latents.disturb must not be negative, not {latents.disturb}")
    if not 0 <= train.ema < 1:
        raise UserError(f"train.ema must lie in [0, 1), not {train.ema}")
    for name, value in (("schedule.tolerance", schedule.tolerance),
                        ("train.grad_clip", train.grad_clip)):  # fmt: skip
        if not 0 <= value < math.inf:
            raise UserError(
                f"{name} must be finite and at least 0 (which turns it off), not {value}"
            )
    if not 0 < schedule.eta <= 1:
        raise UserError(f"schedule.eta must lie in (0, 1], not {schedule.eta}")
    _check_objective(config)
    if config.velocity.kind not in KINDS:
        raise UserError(
            f"unknown velocity {config.velocity.kind!r}; choose one of {', '.join(KINDS)}"
        )
    if train.jacobian_weight and train.divergence != "finite-difference":
        raise UserError(
            f"train.jacobian_weight={train.jacobian_weight} has no effect with train.divergence="
            f"{train.divergence}; leave it out, or take train.divergence=finite-difference"
        )
    make_divergence(
        train.divergence,
        probes=train.probes,
        sigma0=train.sigma0,
        penalty=train.jacobian_weight,
    )
    _check_max_substeps(config)
    _check_grids(config)
    steps(config)


def _check_grids(config: Config) -> None:
    """Fixed grids meet the switches between the networks of a block."""
    nets, substeps = config.velocity.nets, config.schedule.substeps
    grids = {"push.steps": (config.push, [config.push.steps])}
    if config.train.objective == "jko":  # the others integrate nothing while they train
        name = "schedule.substeps" if substeps else "solver.steps"
        grids = {name: (config.solver, substeps or [config.solver.steps]), **grids}
        if config.train.max_substeps:
            grids["train.max_substeps"] = (config.solver, [config.train.max_substeps])
    for name, (solver, counts) in grids.items():
        for count in counts:
            try:
                dataclasses.replace(solver, steps=count)
            except FlowError as error:
                raise UserError(str(error).replace("solver.steps", name)) from error
        odd = [count for count in counts if count % nets]
        if odd and not solver.adaptive:
            raise UserError(
                f"{name} must be a multiple of velocity.nets = {nets}, so that no sub-interval "
                f"straddles the switch between two networks, not {odd[0]}"
            )


def _check_max_substeps(config: Config) -> None:
    """Grids can grow where there are grids, and not from beyond their limit."""
    most, solver = config.train.max_substeps, config.solver
    if most < 0:
        raise UserError(f"train.max_substeps must be at least 0 (which turns it off), not {most}")
    if not most:
        return
    if config.train.objective != "jko" or solver.adaptive:
        what = f"train.objective={config.train.objective}, which integrates nothing"
        if solver.adaptive:
            what = f"solver.method={solver.method}, which chooses its own steps"
        raise UserError(f"train.max_substeps={most} has no effect with {what}; leave it at 0")
    first = max(config.schedule.substeps or [solver.steps])
    if most < first:
        raise UserError(
            f"train.max_substeps={most} is less than the {first} sub-intervals that a block "
            "starts with (solver.steps, schedule.substeps); raise it, or leave it at 0"
        )


def _check_objective(config: Config) -> None:
    """The objective, and what goes with it and not with others."""
    train, schedule = config.train, config.schedule
    choices = {
        "objective": (train.objective, OBJECTIVES),
        "interpolant": (train.interpolant, INTERPOLANTS),
        "coupling": (train.coupling, COUPLINGS),
        "times": (train.times, TIMES),
        "precision": (train.precision, PRECISIONS),
        "optimizer": (train.optimizer, OPTIMIZERS),
    }
    if train.objective == "distill":
        raise UserError(
            "blocks with the objective distill are made, and gone on with, by `jkoflow distill` "
            "(--resume), not by `jkoflow train`"
        )
    for name, (value, known) in choices.items():
        if value not in known:
            raise UserError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
    if train.snapshot_every and train.objective != "fm":
        raise UserError(
            "train.snapshot_every keeps flows of one block in the making (objective fm), and "
            f"under {train.objective} there are several; leave it at 0"
        )
    plain = train.objective == "fm" and train.coupling == "independent"
    if config.velocity.image_channels and (config.velocity.classes or not plain):
        raise UserError(
            "a refiner (velocity.image_channels) is trained by flow matching, without classes and "
            "without pairing across images: train.objective=fm, train.coupling=independent and "
            "velocity.classes=0"
        )
    if config.latents.disturb and not config.velocity.image_channels:
        raise UserError(
            f"latents.disturb={config.latents.disturb} is for refiners (velocity.image_channels) "
            "alone; leave it at 0"
        )
    if train.objective == "jko":
        if train.precision != "fp32":
            raise UserError(
                f"train.precision={train.precision} is for the regressions (lfm, fm): jko solves "
                "an ODE and takes finite differences, which half precision drowns; leave it at "
                "fp32"
            )
        return
    if schedule.reparameterize or schedule.refine > 1:
        raise UserError(
            f"reparameterize and refine are passes of jko, not of {train.objective}, whose "
            "targets they would change; train a jko run --init-from this one and refine that"
        )
    if train.objective == "fm" and schedule.gamma is not None:
        raise UserError(
            "flow matching (train.objective=fm) is one block to pure noise and takes no "
            "schedule.gamma; leave it out, or train under lfm"
        )


def objective_of(config: Config) -> str:
    """The objective of the blocks, jko or lfm: flow matching is lfm with a free block alone."""
    return "jko" if config.train.objective == "jko" else "lfm"


def ends_free(config: Config) -> bool:
    """Whether a free block follows those with a step."""
    return config.train.objective == "fm" or config.schedule.free_block


def check_shape(config: Config, shape: tuple[int, ...]) -> None:
    """Check that the velocity network takes samples of a shape; no memory is spent.

    Raises:
        FlowError: it does not.
    """
    with torch.device("meta"):
        make_velocity(config.velocity, shape)


def steps(config: Config) -> list[float]:
    """The steps of the blocks before the free one, given or geometric: h_k, or under lfm γ_k.

    Raises:
        UserError: a given step is not positive, or none is given.
        FlowError: h0, gamma1, rho or h_max is not positive.
    """
    schedule = config.schedule
    if config.train.objective == "fm":
        return []
    if config.train.objective == "lfm":
        if schedule.gamma is not None:
            return _given("gamma", schedule.gamma)
        times = gammas(schedule.gamma1, schedule.rho, schedule.max_blocks, free_last=False)
        return [gamma for gamma in times if gamma is not None]
    if schedule.h is not None:
        return _given("h", schedule.h)
    return step_sizes(schedule.h0, schedule.rho, schedule.h_max, schedule.max_blocks)


def _given(name: str, values: list[float]) -> list[float]:
    if not values or not all(0 < value < math.inf for value in values):
        raise UserError(f"schedule.{name} needs one positive step a block, not {values}")
    return [float(value) for value in values]


def _at_least(least: int, values: dict[str, float]) -> None:
    for name, value in values.items():
        if not value >= least:
            raise UserError(f"{name} must be at least {least}, not {value}")
