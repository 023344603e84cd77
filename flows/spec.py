"""The specification that a block is built from: plain data, kept in ``flow.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from flows.block import Block
from flows.errors import FlowError
from flows.networks.config import VelocityConfig
from flows.networks.piecewise import time_slice
from flows.networks.registry import make_velocity
from flows.networks.skip import SkipVelocity
from flows.solving.solver import SolverConfig

#: objectives that a single block is trained by; flow matching (fm) is lfm with gamma None
BLOCK_OBJECTIVES = ("jko", "lfm", "distill")


@dataclass(frozen=True)
class BlockSpec:
    """A block without its weights.

    Attributes:
        velocity: its network or networks.
        solver: its solver.
        h: JKO step size; None for a free block, and under lfm.
        objective: ``jko``, ``lfm``, or ``distill`` (regression on the map of several blocks).
        gamma: Ornstein–Uhlenbeck time under lfm; None has pure noise as its target (flow
            matching). A distilled block has the sum of the h or gamma of the blocks it replaces.
        start: beginning of the part of its velocity's time that the block covers; see
            :func:`flows.networks.piecewise.time_slice`.
        length: length of that part.
        skip: constant c of the term c z that is added to the field of the network or networks;
            see :class:`flows.networks.skip.SkipVelocity`.

    Raises:
        FlowError: the objective is unknown, or h, gamma, start, length or skip is out of range.
    """

    velocity: VelocityConfig = field(default_factory=VelocityConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    h: float | None = None
    objective: str = "jko"
    gamma: float | None = None
    start: float = 0.0
    length: float = 1.0
    skip: float = 0.0

    def __post_init__(self) -> None:
        """Check the objective and the ranges."""
        if self.objective not in BLOCK_OBJECTIVES:
            known = ", ".join(BLOCK_OBJECTIVES)
            raise FlowError(f"unknown objective {self.objective!r}; choose one of {known}")
        for name in ("h", "gamma"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise FlowError(f"{name} must be positive and finite, found {value}")
        if not (0 <= self.start < 1 and 0 < self.length <= 1):
            raise FlowError(
                f"start is {self.start} and length {self.length}; expected a part of [0, 1]"
            )
        if not math.isfinite(self.skip):
            raise FlowError(f"skip is {self.skip}; expected a finite number")

    @property
    def step(self) -> float | None:
        """Return the step of the block under its objective, h or gamma; None if it is free."""
        return self.gamma if self.h is None else self.h

    @property
    def sliced(self) -> bool:
        """Return whether the block covers only a part of its velocity's time."""
        return (self.start, self.length) != (0.0, 1.0)

    def child(self, index: int, children: int) -> BlockSpec:
        """Return the specification of one of the equal parts of this block, counted from 0."""
        return replace(
            self,
            h=None if self.h is None else self.h / children,
            gamma=None if self.gamma is None else self.gamma / children,
            start=self.start + self.length * index / children,
            length=self.length / children,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; it leaves out what the block or network lacks."""
        plain = asdict(self)
        if not self.skip:
            del plain["skip"]
        velocity = plain["velocity"]
        if not self.velocity.classes:
            del velocity["classes"], velocity["class_dropout"]
        if not self.velocity.autonomous:
            del velocity["autonomous"]
        if not self.velocity.image_channels:
            del velocity["image_channels"]
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> BlockSpec:
        """Build a specification from :meth:`to_dict`; an unknown key is a FlowError."""
        plain = dict(plain)
        for name, kind in (("velocity", VelocityConfig), ("solver", SolverConfig)):
            if name in plain:
                plain[name] = _from_mapping(kind, plain[name], name)
        return _from_mapping(cls, plain, "block")


def build_block(
    spec: BlockSpec, shape: tuple[int, ...], generator: torch.Generator | None = None
) -> Block:
    """Build a freshly initialised block on samples (D,) or (C, H, W); see `make_velocity`.

    Raises:
        FlowError: the network cannot have samples of this shape, or a sub-interval of the solver
            crosses a switch between its networks.
    """
    velocity = make_velocity(spec.velocity, shape, generator)
    if spec.skip:
        velocity = SkipVelocity(velocity, spec.skip)
    return Block(time_slice(velocity, spec.start, spec.length), spec.solver)


def _from_mapping(kind: Any, plain: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401
    """Build a dataclass from a mapping.

    Raises:
        FlowError: it is no mapping, or has an unknown key or a value of another type.
    """
    if not isinstance(plain, Mapping):
        raise FlowError(f"the {name} of a flow is {plain!r}; expected a mapping")
    unknown = set(plain) - {item.name for item in fields(kind)}
    if unknown:
        raise FlowError(f"unknown key {', '.join(sorted(unknown))} in the {name} of a flow")
    defaults = kind()
    for key, value in plain.items():
        if not (_is_like(value, getattr(defaults, key)) or (key == "width" and _is_widths(value))):
            raise FlowError(f"{key} is {value!r} in the {name} of a flow; expected another type")
    return kind(**plain)


def _is_like(value: object, default: object) -> bool:
    """Return whether a value has the type of a default; None stands for a number or None."""
    if default is None and value is None:
        return True
    if default is None or isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(default)


def _is_widths(value: object) -> bool:
    """Return whether a value has the type of the widths of a unet's levels."""
    return isinstance(value, (list, tuple)) and all(type(part) is int for part in value)
