"""Validates configurations before anything is written."""

from __future__ import annotations

import math

import torch

from flows.errors import FlowError
from flows.networks.registry import KINDS, make_velocity
from flows.objectives.schedule import gammas, step_sizes
from flows.solving.solver import ADAPTIVE_METHODS, SolverConfig
from pipeline.config.keys import keys
from pipeline.config.rules.applies import check_applicable, value_of
from pipeline.config.schema import Config
from pipeline.config.values import check_bounds
from pipeline.errors import UserError
from pipeline.runtime.system import require_memory
from pipeline.storage.trackers import require_trackers

_FLOAT = 4
#: of the weights: themselves, their gradients, averages and two moments
_COPIES = 5


def check(config: Config) -> None:
    """Check the sections that a training uses.

    Raises:
        UserError: names the key, the value and what is expected.
        FlowError: likewise, of values that the mathematics itself checks.
    """
    for name, key in keys(Config).items():
        check_bounds(name, value_of(config, name), key.metadata)
    check_applicable(config)
    if config.velocity.kind not in KINDS:
        raise UserError(
            f"velocity.kind is {config.velocity.kind!r}; expected one of {', '.join(KINDS)}"
        )
    require_trackers(config.train.trackers)
    _check_refiner(config)
    _check_solvers(config)
    steps(config)


def _check_refiner(config: Config) -> None:
    """Check that a refiner is trained as one can be."""
    plain = config.fm is not None and config.regression.coupling == "independent"
    if config.velocity.image_channels and (config.velocity.classes or not plain):
        raise UserError(
            "a refiner (velocity.image_channels) is trained by flow matching, without classes and "
            "without pairing across images; set train.objective=fm, "
            "matching.coupling=independent and velocity.classes=0"
        )


def _check_solvers(config: Config) -> None:
    """Check the methods, and that fixed grids meet the switches between a block's networks."""
    sampler = config.sampler
    pairs = {"sampler": (sampler.method, sampler.steps)}
    if config.jko is not None:  # the others integrate nothing while they train
        solver = config.jko.solver
        pairs = {"jko.solver": (solver.method, solver.steps), **pairs}
    nets = config.velocity.nets
    for section, (methods, counts) in pairs.items():
        for method in [methods] if isinstance(methods, str) else methods:
            for count in [counts] if isinstance(counts, int) else counts:
                try:
                    SolverConfig(method, count)
                except FlowError as error:
                    raise UserError(f"{section}: {error}") from error
                if count % nets and method not in ADAPTIVE_METHODS:
                    raise UserError(
                        f"{section}.steps must be a multiple of velocity.nets = {nets}, so that "
                        f"no sub-interval straddles the switch between two networks, not {count}"
                    )


def objective_of(config: Config) -> str:
    """Return the objective of the blocks: flow matching is lfm with a free block alone."""
    return "jko" if config.train.objective == "jko" else "lfm"


def ends_free(config: Config) -> bool:
    """Return whether a free block follows those with a step."""
    return config.schedule is None or config.schedule.free_block


def check_shape(config: Config, shape: tuple[int, ...]) -> None:
    """Check that the velocity network takes samples of a shape; no memory is spent.

    The least memory of a training is that of weights, gradients, averages and two moments, and of
    a batch with its velocity.

    Raises:
        FlowError: it does not.
        UserError: network and batch exceed the memory of the machine.
    """
    with torch.device("meta"):
        network = make_velocity(config.velocity, shape)
    weights, batch = sum(p.numel() for p in network.parameters()), config.train.batch_size
    require_memory(
        _FLOAT * (_COPIES * weights + 2 * batch * math.prod(shape)),
        f"the training of {weights:,} weights on batches of {batch} samples",
        "choose a smaller network (velocity.width, velocity.depth) or train.batch_size",
    )


def steps(config: Config) -> list[float]:
    """Return the steps of the blocks before the free one, given or geometric: h_k or γ_k."""
    schedule, jko, lfm = config.schedule, config.jko, config.lfm
    if schedule is not None and jko is not None:
        return jko.h or step_sizes(jko.h0, schedule.rho, jko.h_max, schedule.max_blocks)
    if schedule is not None and lfm is not None:
        times = gammas(lfm.gamma1, schedule.rho, schedule.max_blocks, free_last=False)
        return lfm.gamma or [gamma for gamma in times if gamma is not None]
    return []
