"""The specification a block is built from: plain data that goes into ``flow.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from flows.block import Block, SolverConfig
from flows.errors import FlowError
from flows.networks.piecewise import time_slice
from flows.networks.registry import VelocityConfig, make_velocity
from flows.objectives.losses import OBJECTIVES


@dataclass(frozen=True)
class BlockSpec:
    """Everything about a block but its weights.

    Attributes:
        velocity: its network, or networks.
        solver: its grid.
        h: JKO step size; None for a free block (and under lfm).
        objective: ``jko`` | ``lfm`` | ``distill`` (regressed on what other blocks do together).
        gamma: Ornstein–Uhlenbeck time under ``lfm``; None aims at pure noise (flow matching).
            A distilled block has the sum of the steps, h or gamma, of the blocks it stands for.
        start: where in its velocity's time this block begins; see
        :func:`flows.networks.piecewise.time_slice`.
        length: how much of its velocity's time it covers.
    """

    velocity: VelocityConfig = field(default_factory=VelocityConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    h: float | None = None
    objective: str = "jko"
    gamma: float | None = None
    start: float = 0.0
    length: float = 1.0

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        if self.objective not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise FlowError(f"unknown objective {self.objective!r}; choose one of {known}")
        for name in ("h", "gamma"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise FlowError(f"{name} must be positive and finite, found {value}")

    @property
    def weight(self) -> float | None:
        """The step this block takes under its objective: h or gamma; None if it is free."""
        return self.gamma if self.h is None else self.h

    @property
    def sliced(self) -> bool:
        """Whether the block covers only a part of its velocity's time."""
        return (self.start, self.length) != (0.0, 1.0)

    def child(self, index: int, children: int, solver: SolverConfig) -> BlockSpec:
        """The specification of one of the equal parts of this block."""
        return replace(
            self,
            solver=solver,
            h=None if self.h is None else self.h / children,
            gamma=None if self.gamma is None else self.gamma / children,
            start=self.start + self.length * index / children,
            length=self.length / children,
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        plain = asdict(self)
        velocity = plain["velocity"]
        velocity["hidden"] = list(self.velocity.hidden)
        if not self.velocity.classes:  # a flow without classes is described as it always was
            del velocity["classes"], velocity["class_dropout"]
        if not self.velocity.beside:
            del velocity["beside"]
        if self.velocity.nets == 1:  # nor has one network any other clock than the block's
            del velocity["clock"]
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> BlockSpec:
        """The inverse of :meth:`to_dict`; a missing key takes its default.

        Raises:
            FlowError: an unknown key, or a value out of range.
        """
        plain = dict(plain)
        for name, kind in (("velocity", VelocityConfig), ("solver", SolverConfig)):
            if name in plain:
                plain[name] = _strict(kind, plain[name], name)
        return _strict(cls, plain, "block")


def build_block(
    spec: BlockSpec, shape: tuple[int, ...], generator: torch.Generator | None = None
) -> Block:
    """A freshly initialised block for samples of the given shape."""
    velocity = make_velocity(spec.velocity, shape, generator)
    return Block(time_slice(velocity, spec.start, spec.length), spec.solver)


def _strict(kind: Any, plain: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401
    """Builds a dataclass from a mapping and names the keys it does not know."""
    unknown = set(plain) - {item.name for item in fields(kind)}
    if unknown:
        raise FlowError(f"unknown key {', '.join(sorted(unknown))} in the {name} of a flow")
    return kind(**plain)
