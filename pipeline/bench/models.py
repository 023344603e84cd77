"""The models of a benchmark, and the width that gives each a wanted number of parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, cast

import torch

from flows.baselines.autoregressive import AutoregressiveConfig
from flows.baselines.ffjord import FfjordConfig
from flows.baselines.ignn import IgnnConfig
from flows.baselines.iresnet import IResNetConfig
from flows.baselines.otflow import OtFlowConfig
from flows.baselines.registry import BASELINES, make_baseline
from flows.baselines.score_sde import ScoreSdeConfig
from flows.networks.config import VelocityConfig
from flows.networks.registry import make_velocity
from pipeline.config.rules.validate import ends_free, steps
from pipeline.config.sampling import SamplerConfig
from pipeline.config.schema import Config
from pipeline.config.training import (
    FmConfig,
    JkoConfig,
    LfmConfig,
    MatchingConfig,
    Objective,
    ScheduleConfig,
)
from pipeline.errors import JkoflowError, UserError

#: models that the pipeline of images trains
BLOCKWISE = {
    "jko": "JKO-iFlow", "lfm": "local flow matching", "fm": "flow matching",
    "segments": "flow matching, a network for each part of time",
}  # fmt: skip
TITLES = {**BLOCKWISE, **{name: baseline.title for name, baseline in BASELINES.items()}}
#: largest part of a training that warms up, so that a short one has its learning rate, too
WARMUP = 0.1
#: models whose inverse is a fixed point
FIXED_POINTS = ("iresnet", "ignn")
#: models that need the extra zuko
AUTOREGRESSIVE = ("maf", "nsf")
#: bins of the splines of NSF
_BINS = 8
#: residual blocks of i-ResNet and IGNN
_RESIDUAL_BLOCKS = 8
_WIDEST = 4096


def check_models(names: Sequence[str]) -> None:
    """Check the names of models.

    Raises:
        UserError: one is unknown, named twice or needs a package that is not installed, or there
            is none.
    """
    for name in names:
        if name not in TITLES:
            raise UserError(f"model {name!r} is unknown; choose from {', '.join(TITLES)}")
        if name in AUTOREGRESSIVE and find_spec("zuko") is None:
            raise UserError(
                f"model {name} needs the package zuko, which is not installed; run: pip install "
                "'jkoflow[zuko]'"
            )
    if not names or len(set(names)) != len(names):
        raise UserError(
            f"--models is {','.join(names)!r}; expected at least one name, each of them once"
        )


class SizeError(JkoflowError):
    """Model that has more parameters than allowed, however narrow it is."""


def as_jko(config: Config) -> Config:
    """Return a configuration of JKO-iFlow on the data and with the networks of another one.

    A configuration of another objective has the default steps.
    """
    if config.jko is not None:
        return config
    train = dataclasses.replace(config.train, objective="jko")
    changed: dict[str, Any] = {"jko": JkoConfig(), "schedule": ScheduleConfig()}
    changed |= {"matching": None, "lfm": None, "fm": None}
    return dataclasses.replace(config, train=train, **changed)


def blockwise_config(config: Config, name: str, width: int, batches: int) -> Config:
    """Return the configuration of a blockwise model with all networks of one width.

    JKO blocks do not see the time. Segments are flow matching with as many networks as JKO has
    blocks, each on an equal part of the time. Regressions keep the section matching of their
    configuration. The number of blocks is fixed, so that the parameters are known. Batches are
    split as the configuration of JKO splits its iterations, for lfm evenly, and evenly over the
    passes of `jko.reparameterize`. The warm-up takes at most a tenth of the shortest block.

    Args:
        config: of any objective; see `as_jko`.
        name: a key of `BLOCKWISE`.
        width: of every network.
        batches: of all blocks and passes together, at least one for each.

    Raises:
        UserError: there are fewer batches than blocks, or blocks would be split.
    """
    matching = config.matching or MatchingConfig()
    config = as_jko(config)
    assert config.schedule is not None and config.jko is not None
    blocks, passes = block_count(config, name), pass_count(config, name)
    if batches < blocks * passes:
        raise UserError(
            f"the budget is {batches} batches for {blocks} blocks of {name}"
            + (f" in {passes} passes" if passes > 1 else "")
            + "; expected at least one for each; raise --budget"
        )
    if name == "jko" and config.jko.refine > 1:
        raise UserError(
            f"jko.refine is {config.jko.refine}; expected 1, because split blocks have more "
            "parameters than --parameters; set jko.h to more steps instead"
        )
    given = config.train.iterations
    shares = [given] if isinstance(given, int) else list(given)
    if name != "jko":
        shares = [1]
    shares = [shares[min(index, len(shares) - 1)] for index in range(blocks)]
    batches //= passes
    iterations = [max(1, int(batches * share / sum(shares))) for share in shares]
    iterations[0] += max(0, batches - sum(iterations))
    while sum(iterations) > batches:  # one batch for each of many blocks is more than their share
        iterations[iterations.index(max(iterations))] -= 1
    kind = cast(Objective, "fm" if name == "segments" else name)
    warmup = min(config.train.warmup, int(WARMUP * min(iterations)))
    train = dataclasses.replace(config.train, objective=kind, iterations=iterations, warmup=warmup)
    velocity = dataclasses.replace(config.velocity, width=width, autonomous=name == "jko")
    sampler = config.sampler
    if name == "segments":
        nets = block_count(config, "jko")
        velocity = dataclasses.replace(velocity, nets=nets)
        # the sampler serves the check of the block alone; its grid must meet the parts
        sampler = SamplerConfig("midpoint", nets)
    changed: dict[str, Any] = {
        "schedule": dataclasses.replace(config.schedule, tolerance=0.0),
        "jko": dataclasses.replace(config.jko, later_iterations=None),
    }
    if name == "lfm":
        schedule = ScheduleConfig(max_blocks=blocks - 1, tolerance=0.0)
        changed = {"jko": None, "lfm": LfmConfig(), "schedule": schedule, "matching": matching}
    elif kind == "fm":
        changed = {"jko": None, "fm": FmConfig(), "schedule": None, "matching": matching}
    return dataclasses.replace(config, train=train, velocity=velocity, sampler=sampler, **changed)


def block_count(config: Config, name: str) -> int:
    """Return the number of blocks of jko and lfm under a configuration; 1 for fm and segments."""
    config = as_jko(config)
    return 1 if name in ("fm", "segments") else len(steps(config)) + ends_free(config)


def pass_count(config: Config, name: str) -> int:
    """Return how often the blocks are trained: further passes of jko have other step sizes."""
    jko = config.jko
    return 1 if name != "jko" or jko is None else 1 + jko.reparameterize


def baseline_config(name: str, width: int, depth: int) -> Any:  # noqa: ANN401
    """Return the configuration of a baseline with networks of a width.

    Args:
        name: a key of `flows.baselines.registry.BASELINES`.
        width: hidden features.
        depth: hidden layers of the networks of FFJORD and ScoreSDE; the others have their own.
    """
    if name == "ffjord":
        return FfjordConfig(VelocityConfig("mlp", width, depth, "tanh"))
    if name == "otflow":
        return OtFlowConfig(width=width)
    if name == "ignn":
        return IgnnConfig(VelocityConfig("mlp", width, 2, autonomous=True), _RESIDUAL_BLOCKS)
    if name in AUTOREGRESSIVE:
        return AutoregressiveConfig(width, bins=_BINS if name == "nsf" else 0)
    if name == "iresnet":
        return IResNetConfig(width=width, blocks=_RESIDUAL_BLOCKS)
    return ScoreSdeConfig(VelocityConfig("resmlp", width, depth))


def parameter_count(name: str, config: Config, shape: tuple[int, ...], width: int) -> int:
    """Count the parameters of a model of a width on samples (D,) or (C, H, W).

    No memory is spent, but for maf and nsf. The baselines see samples as vectors.
    """
    dim = math.prod(shape)
    if name in AUTOREGRESSIVE:  # zuko computes its masks from their values
        settings = baseline_config(name, width, config.velocity.depth)
        return make_baseline(name, settings, dim, torch.Generator()).parameter_count
    with torch.device("meta"):
        if name in BLOCKWISE:
            blocks = block_count(config, name)
            batches = blocks * pass_count(config, name)
            velocity = blockwise_config(config, name, width, batches).velocity
            return blocks * sum(p.numel() for p in make_velocity(velocity, shape).parameters())
        model = make_baseline(name, baseline_config(name, width, config.velocity.depth), dim)
        return model.parameter_count


def width_for(name: str, config: Config, shape: tuple[int, ...], parameters: int) -> int:
    """Return the largest width with which a model has at most some number of parameters.

    The width of a unet is a multiple of its attention heads, and that of a dit of 4, too.

    Raises:
        SizeError: the model has more with its least width.
    """
    heads = max(1, config.velocity.heads) if config.velocity.kind in ("unet", "dit") else 1
    least = math.lcm(4, heads) if config.velocity.kind == "dit" else heads
    unit = least if name in BLOCKWISE else 1

    def count(units: int) -> int:
        return parameter_count(name, config, shape, unit * units)

    smallest = count(1)
    if smallest > parameters:
        raise SizeError(
            f"--parameters is {parameters}, but {name} of width {unit} has {smallest}; raise it"
        )
    return unit * _largest(count, parameters)


def require_one_fits(
    names: Sequence[str], config: Config, shape: tuple[int, ...], most: int
) -> None:
    """Check that one of some models has at most some number of parameters.

    Raises:
        UserError: all have more, whatever their width.
    """
    for name in names:
        try:
            width_for(name, config, shape, most)
        except SizeError as error:
            problem = error
        else:
            return
    raise UserError(str(problem))


def _largest(count: Callable[[int], int], most: int) -> int:
    """Return the largest number from 1 on whose count is at most some number."""
    low, high = 1, 2
    while high < _WIDEST and count(high) <= most:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= most else (low, middle)
    return low
