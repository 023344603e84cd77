"""The baselines by name, and how a model is built from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, get_type_hints

import torch

from flows.baselines.autoregressive import Autoregressive, AutoregressiveConfig
from flows.baselines.base import DensityModel
from flows.baselines.ffjord import Ffjord, FfjordConfig
from flows.baselines.ignn import Ignn, IgnnConfig
from flows.baselines.iresnet import IResNet, IResNetConfig
from flows.baselines.otflow import OtFlow, OtFlowConfig
from flows.baselines.score_sde import ScoreSde, ScoreSdeConfig
from flows.errors import FlowError


@dataclass(frozen=True)
class Baseline:
    """A kind of baseline.

    Attributes:
        title: its name in tables.
        config: class of its configuration.
        build: builds the model from its configuration, D and a generator of weights.
    """

    title: str
    config: type[Any]
    build: Callable[..., DensityModel]


BASELINES: dict[str, Baseline] = {
    "ffjord": Baseline("FFJORD", FfjordConfig, Ffjord),
    "otflow": Baseline("OT-Flow", OtFlowConfig, OtFlow),
    "ignn": Baseline("IGNN", IgnnConfig, Ignn),
    "iresnet": Baseline("i-ResNet", IResNetConfig, IResNet),
    "scoresde": Baseline("ScoreSDE", ScoreSdeConfig, ScoreSde),
    "maf": Baseline("MAF", AutoregressiveConfig, Autoregressive),
    "nsf": Baseline("NSF", AutoregressiveConfig, Autoregressive),
}


def make_baseline(
    name: str, config: object, dim: int, generator: torch.Generator | None = None
) -> DensityModel:
    """Build a freshly initialised baseline.

    Args:
        name: a key of ``BASELINES``.
        config: its configuration, of the class that ``BASELINES`` names.
        dim: D.
        generator: source of the initial weights; None uses PyTorch's global generator.

    Raises:
        FlowError: the name is unknown, or the configuration is of another model.
    """
    baseline = _find(name)
    if not isinstance(config, baseline.config):
        raise FlowError(
            f"the configuration of {name} is a {type(config).__name__}; expected a "
            f"{baseline.config.__name__}"
        )
    if isinstance(config, AutoregressiveConfig) and (config.bins > 0) != (name == "nsf"):
        raise FlowError(
            f"the configuration of {name} has {config.bins} bins; expected "
            f"{'at least 2' if name == 'nsf' else '0'}"
        )
    return baseline.build(config, dim, generator)


def config_to_dict(config: Any) -> dict[str, Any]:  # noqa: ANN401 - any configuration
    """Return a configuration as plain nested values, for JSON."""
    return asdict(config)


def config_from_dict(name: str, plain: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Build the configuration of a baseline from plain nested values.

    Raises:
        FlowError: the name or a key is unknown, or a value is out of range.
    """
    return _from_mapping(_find(name).config, plain, name)


def _find(name: str) -> Baseline:
    if name not in BASELINES:
        raise FlowError(f"baseline {name!r} is unknown; choose one of {', '.join(BASELINES)}")
    return BASELINES[name]


def _from_mapping(kind: type[Any], plain: Mapping[str, Any], where: str) -> Any:  # noqa: ANN401
    hints = get_type_hints(kind)
    unknown = set(plain) - {item.name for item in fields(kind)}
    if unknown:
        raise FlowError(f"unknown key {', '.join(sorted(unknown))} in {where}; remove it")
    values = {
        key: _from_mapping(hints[key], value, f"{where}.{key}")
        if is_dataclass(hints[key]) and isinstance(value, Mapping)
        else value
        for key, value in plain.items()
    }
    return kind(**values)
