"""Reads configurations: defaults, then a YAML file of differences, then `--set` overrides.

An unknown key, a wrong value and a setting without effect are errors that name the dotted key.
`--set` has precedence: a value of the file that it leaves without effect is left out, with a line.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pipeline.config import packaged
from pipeline.config.applies import InapplicableError, check_applicable
from pipeline.config.keys import fields_of, keys, options, section_of
from pipeline.config.moved import replacement
from pipeline.config.schema import WHERE, Config
from pipeline.config.values import convert
from pipeline.errors import UserError
from pipeline.integrity.limits import CONFIGURATION, read_regular
from pipeline.integrity.reason import reason_of
from pipeline.runtime.console import say
from pipeline.runtime.plugins import load_plugins
from pipeline.storage import seal

S = TypeVar("S")
#: values of a YAML file, those of its aliases counted as often as they stand for some
_MOST_VALUES = 10_000

#: key whose default depends on the objective: true under jko
AUTONOMOUS = "velocity.autonomous"


@dataclass(frozen=True)
class _Entry:
    """A value as it was given.

    Attributes:
        value: plain.
        source: where it was given, for messages.
        text: as `--set` has it; None in a file.
    """

    value: Any
    source: str
    text: str | None = None


#: values in the order in which they were given, by dotted key
_Entries = Sequence[tuple[str, _Entry]]


def load_config(
    name_or_path: str, overrides: Sequence[str] = (), folder: str = packaged.FLOWS
) -> Config:
    """Read the configuration of a flow.

    Args:
        name_or_path: a packaged name (`mnist`) or the path of a YAML file.
        overrides: `section.key=value` strings, applied in order.
        folder: of packaged configurations where a short name is looked up.

    Returns:
        The resolved, checked configuration.

    Raises:
        UserError: unknown name, unreadable YAML, unknown key, wrong value, or a key that does not
            apply.
    """
    return load(Config, name_or_path, overrides, folder)


def load(schema: type[S], name_or_path: str, overrides: Sequence[str], folder: str) -> S:
    """Read a configuration of any schema; see `load_config`."""
    values = read_yaml(packaged.find(name_or_path, folder))
    file, given = _entries(values, f"config {name_or_path}"), _overrides(overrides)
    config = _resolve(schema, file, given)
    if isinstance(config, Config) and all(name != AUTONOMOUS for name, _ in [*file, *given]):
        return with_values(config, {AUTONOMOUS: config.train.objective == "jko"})
    return config


def overridden(config: Config, overrides: Sequence[str], allowed: Sequence[str]) -> Config:
    """Return a configuration with overrides of some sections, or single keys, only.

    Raises:
        UserError: as `load_config`, or an override of another key.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if not any(key == name or key.startswith(f"{name}.") for name in allowed):
            raise UserError(
                f"--set {override} has no effect here; expected a key of {', '.join(allowed)}; "
                "remove it"
            )
    if not overrides:
        return config
    return _resolve(Config, _entries(to_dict(config), "config.yaml"), _overrides(overrides))


def read_resolved(schema: type[S], path: Path) -> S:
    """Read the whole configuration that `resolved_yaml` wrote, such as a run's config.yaml.

    Raises:
        UserError: unreadable YAML, an unknown key, a wrong value, or a file that differs from the
            seal above it.
    """
    seal.check(path)
    try:
        return _build(schema, _entries(read_yaml(path), str(path)))
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from error


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
    return {name: entry.value for name, entry in _entries(to_dict(config), "") if name in known}


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
    return _make(type(config), "", changed)


def _nested(config: Any, prefix: str) -> dict[str, Any]:  # noqa: ANN401
    """The values of a configuration by dotted key, as they are."""
    values: dict[str, Any] = {}
    for name, kind in fields_of(type(config)).items():
        value = getattr(config, name)
        if section_of(kind) is None:
            values[prefix + name] = value
        elif value is not None:
            values |= _nested(value, f"{prefix}{name}.")
    return values


def resolved_yaml(config: Any) -> str:  # noqa: ANN401
    """Write the whole configuration as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of sections with keys.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        values = _plain_yaml(read_regular(path, CONFIGURATION).decode())
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        reason = reason_of(error)
        raise UserError(f"{path} is not readable YAML: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections with keys, not {type(values).__name__}")
    return values


def _plain_yaml(text: str) -> Any:  # noqa: ANN401
    """Read YAML whose aliases expand to a bounded number of values.

    Raises:
        ValueError: an alias contains itself, or there are more than `_MOST_VALUES` values.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node | None) -> int:
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = _MOST_VALUES  # while its parts are counted: an alias of itself
            parts = [part for pair in node.value for part in pair] if isinstance(
                node, yaml.MappingNode
            ) else node.value  # fmt: skip
            sizes[id(node)] = 1 + sum(size(part) for part in parts)
        return sizes[id(node)]

    if size(yaml.compose(text, yaml.SafeLoader)) > _MOST_VALUES:
        raise ValueError(f"it has more than {_MOST_VALUES} values; expected a configuration")
    return yaml.safe_load(text)


def _plain(value: Any) -> Any:  # noqa: ANN401
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(part) for part in value] if isinstance(value, (tuple, list)) else value


def _entries(values: dict[str, Any], source: str) -> list[tuple[str, _Entry]]:
    """The values of a file, by dotted key."""
    return [(name, _Entry(value, source)) for name, value in _leaves(values, "")]


def _leaves(values: dict[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _overrides(overrides: Sequence[str]) -> list[tuple[str, _Entry]]:
    """The values of `--set`, by dotted key."""
    entries: list[tuple[str, _Entry]] = []
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise UserError(f"--set takes section.key=value, not {override!r}")
        source = f"--set {override}"
        try:
            value = _plain_yaml(text) if text else ""
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(
                f"{source}: its value is not readable YAML; close its brackets and quotes, and "
                "quote the whole for the shell"
            ) from error
        inner = _leaves(value, f"{key}.") if isinstance(value, dict) and value else [(key, value)]
        entries += [(name, _Entry(part, source, text)) for name, part in inner]
    return entries


def _resolve(schema: type[S], file: _Entries, given: _Entries) -> S:
    """Build a configuration of settings that all apply, of a file and of `--set`.

    A value of the file that `--set` leaves without effect is left out, with a line on stderr.

    Raises:
        UserError: a wrong key or value, or a setting without effect in `--set`, or in the file by
            itself.
    """
    kept, lines = file, list[str]()
    while True:
        try:
            config = _applicable(schema, [*kept, *given])
        except InapplicableError as error:
            if set(error.names) & {name for name, _ in given}:
                raise
            if not lines:
                _applicable(schema, file)
            lines.append(f"{dict(kept)[error.names[0]].source}: {error.reason}; it is left out")
            kept = [(name, entry) for name, entry in kept if name not in error.names]
        else:
            break
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            say(line)
    return config


def _applicable(schema: type[S], entries: _Entries) -> S:
    config = _build(schema, entries)
    check_applicable(config)
    return config


def _build(schema: type[S], entries: _Entries) -> S:
    """Convert the values, the last of each key, and build the dataclasses."""
    load_plugins()
    known, last = keys(schema), dict[str, _Entry]()
    sections = {name.rpartition(".")[0] for name in known} - {""}
    for name, entry in entries:
        if name in sections and entry.value in (None, {}):  # forgets what was set in it so far
            last = {key: kept for key, kept in last.items() if not key.startswith(f"{name}.")}
            continue
        last[name] = entry
    values: dict[str, Any] = {}
    for name, entry in last.items():
        if name not in known:
            raise UserError(f"{entry.source}: {_unknown(schema, name)}")
        value = entry.value
        text = entry.text
        if text is not None and not isinstance(value, (str, list, dict, type(None))):
            value = text if _takes_text(known[name].kind) else value
        try:
            values[name] = convert(known[name], value)
        except UserError as error:
            raise UserError(f"{entry.source}: {error}") from error
    if schema is Config:
        _refuse_other_sections(values, last)
    try:
        return _make(schema, "", values)
    except ValueError as error:  # of the dataclasses themselves
        raise UserError(str(error)) from error


def _takes_text(kind: object) -> bool:
    return str in options(kind) and not {int, float, bool} & set(options(kind))


def _refuse_other_sections(values: dict[str, Any], given: dict[str, _Entry]) -> None:
    """Refuse keys of sections that do not apply under this objective and these data."""
    probe = _make(Config, "", {k: v for k, v in values.items() if k in _DECIDING})
    for section in dict.fromkeys(name.partition(".")[0] for name in values):
        if probe.has(section):
            continue
        names = [name for name in values if name.startswith(f"{section}.")]
        # a key of --set is named before those of the file
        name = max(names, key=lambda name: given[name].text is not None)
        here, now = "train.objective", str(probe.train.objective)
        hint = f" or set {WHERE[section]}"
        if section == "points":
            here, now, hint = "data.name", probe.data.name, ""
        raise InapplicableError(
            f"{given[name].source}: {name}={_shown(values[name])} applies to {WHERE[section]}; "
            f"this configuration has {here}={now}; remove it (--set {section}=null removes the "
            f"section){hint}",
            names,
            f"section {section} applies to {WHERE[section]}",
        )


#: keys that decide which sections apply
_DECIDING = ("train.objective", "data.name")


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _make(schema: type[S], prefix: str, values: dict[str, Any]) -> S:
    """Build a dataclass from values by dotted key."""
    given: dict[str, Any] = {}
    for name, kind in fields_of(schema).items():
        path, section = prefix + name, section_of(kind)
        if section is None:
            if path in values:
                given[name] = values[path]
        elif any(key.startswith(f"{path}.") for key in values):
            given[name] = _make(section, f"{path}.", values)
    return schema(**given)


def _unknown(schema: type, name: str) -> str:
    """Why a key is not known, and what is."""
    moved = replacement(name)
    if moved is not None:
        return f"{name} {moved}"
    parent, _, last = name.rpartition(".")
    section: type | None = schema
    for part in parent.split(".") if parent else []:
        section = section_of(fields_of(section).get(part)) if section is not None else None
    if section is None:
        return f"unknown key {name}; {parent} has no keys of its own"
    if section_of(fields_of(section).get(last)) is not None:
        return f"{name} is a section; expected keys in it, such as {name}.KEY: VALUE"
    return f"unknown key {name}; known here: {', '.join(fields_of(section))}"
