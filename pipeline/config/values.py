"""Values of settings: conversion of plain ones to the types of a schema, and those of a block."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

from pipeline.config.keys import Key, options, type_name
from pipeline.errors import UserError

#: bounds of `pipeline.config.keys.setting`, in words
BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}

#: largest integer of a setting without a bound of its own
MOST = 10**12

T = TypeVar("T")


class _MismatchError(Exception):
    """A value of another type."""


def of_block(value: T | Sequence[T], index: int) -> T:
    """Return the value of a block.

    Args:
        value: one value for all blocks, or a list of one a block, whose last value holds for all
            later blocks.
        index: of the block.
    """
    if isinstance(value, (list, tuple)):
        return value[min(index, len(value) - 1)]
    return value  # type: ignore[return-value]


def convert(key: Key, value: object) -> Any:  # noqa: ANN401
    """Convert a plain value to the type of a key, and check its bounds.

    Raises:
        UserError: another type, a value out of bounds, or no value of any block.
    """
    try:
        converted = _convert(value, key.kind)
    except _MismatchError:
        raise UserError(
            f"{key.name} is {value!r}; expected {type_name(key.kind)}; change the value"
        ) from None
    if converted == [] and str in options(key.kind):
        raise UserError(f"{key.name} is []; expected at least one value; change the value")
    check_bounds(key.name, converted, key.metadata)
    return converted


def check_bounds(name: str, value: object, rules: Mapping[str, Any]) -> None:
    """Check a value, or every value of a list, against the bounds of its key.

    Raises:
        UserError: it is out of bounds, not finite, or an empty list where values are bounded.
    """
    chosen = {rule: rules[rule] for rule in BOUNDS if rule in rules}
    several = isinstance(value, (list, tuple))
    parts: list[Any] = list(value) if several else [value]  # type: ignore[call-overload]
    numbers = [p for p in parts if isinstance(p, (int, float)) and not isinstance(p, bool)]
    if len(numbers) < len(parts) or (not parts and not chosen):
        return
    if not chosen:
        bounds = {"least": -MOST, "most": MOST}
    elif "most" not in chosen and "below" not in chosen:
        bounds = {**chosen, "most": MOST}
    else:
        bounds = chosen
    broken = {
        rule: bound
        for rule, bound in bounds.items()
        if not all(math.isfinite(part) and BOUNDS[rule][1](part, bound) for part in parts)
    }
    if not parts or broken:
        shown = chosen if {*broken} <= {*chosen} and chosen else bounds
        words = " and ".join(f"{BOUNDS[rule][0]} {_plain(bound)}" for rule, bound in shown.items())
        of_list = "a list of one value per block, each " if several else ""
        raise UserError(f"{name} is {value}; expected {of_list}{words}; change the value")


def _plain(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def _convert(value: object, kind: Any) -> Any:  # noqa: ANN401
    for option in options(kind):
        try:
            return _one(value, option)
        except _MismatchError:
            continue
    raise _MismatchError


def _one(value: Any, kind: Any) -> Any:  # noqa: ANN401
    origin = get_origin(kind)
    if kind is type(None):
        return _require(value, value is None)
    if origin is Literal:
        return _require(value, value in get_args(kind))
    if origin in (list, tuple):
        _require(value, isinstance(value, (list, tuple)))
        return origin(_convert(part, get_args(kind)[0]) for part in value)
    if kind is bool:
        return _require(value, isinstance(value, bool))
    if kind is int:
        return _require(value, isinstance(value, int) and not isinstance(value, bool))
    if kind is float:
        return _number(value)
    return str(
        _require(value, isinstance(value, (str, int, float)) and not isinstance(value, bool))
    )


def _number(value: object) -> float:
    """Read a float; YAML takes 1e-4, which has no point, for text."""
    _require(value, isinstance(value, (int, float, str)) and not isinstance(value, bool))
    try:
        return float(value)  # type: ignore[arg-type]
    except ValueError:
        raise _MismatchError from None


def _require(value: Any, right: bool) -> Any:  # noqa: ANN401
    if not right:
        raise _MismatchError
    return value
