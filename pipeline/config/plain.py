"""Configurations as plain values: nested, by dotted key or as YAML, and their differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import yaml

from pipeline.config.keys import fields_of, keys, section_of

S = TypeVar("S")


def to_dict(config: Any) -> dict[str, Any]:  # noqa: ANN401 - any dataclass of a schema
    """Return plain nested values for JSON or YAML, without the sections that do not apply."""
    return {
        name: _plain(value)
        for name, kind in fields_of(type(config)).items()
        if (value := getattr(config, name)) is not None or section_of(kind) is None
    }


def flat(config: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the plain values of a configuration by dotted key."""
    known = keys(type(config))
    return {name: value for name, value in leaves(to_dict(config)) if name in known}


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:  # noqa: ANN401
    """Compare two configurations.

    Returns:
        Dotted keys whose values differ, with the old and the new value; a key of a section that
        does not apply has the value None.
    """
    before, after = flat(old), flat(new)
    names = [*before, *(name for name in after if name not in before)]
    return {
        name: (before.get(name), after.get(name))
        for name in names
        if before.get(name) != after.get(name)
    }


def with_values(config: S, values: dict[str, Any]) -> S:
    """Return a configuration with other values of some dotted keys; no rule is checked."""
    changed = {**_nested(config, ""), **values}
    return make(type(config), "", changed)


def resolved_yaml(config: Any) -> str:  # noqa: ANN401
    """Write the whole configuration as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def make(schema: type[S], prefix: str, values: dict[str, Any]) -> S:
    """Build a dataclass of a schema from values by dotted key, which begins with the prefix."""
    given: dict[str, Any] = {}
    for name, kind in fields_of(schema).items():
        path, section = prefix + name, section_of(kind)
        if section is None:
            if path in values:
                given[name] = values[path]
        elif any(key.startswith(f"{path}.") for key in values):
            given[name] = make(section, f"{path}.", values)
    return schema(**given)


def leaves(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield nested values by dotted key; an empty section is a value."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nested(config: Any, prefix: str) -> dict[str, Any]:  # noqa: ANN401
    """Return the values of a configuration by dotted key, as they are."""
    values: dict[str, Any] = {}
    for name, kind in fields_of(type(config)).items():
        value = getattr(config, name)
        if section_of(kind) is None:
            values[prefix + name] = value
        elif value is not None:
            values |= _nested(value, f"{prefix}{name}.")
    return values


def _plain(value: Any) -> Any:  # noqa: ANN401
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(part) for part in value] if isinstance(value, (tuple, list)) else value
