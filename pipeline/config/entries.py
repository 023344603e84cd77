"""Entries: values as a file or `--set` gives them, and configurations built from them.

An unknown key and a wrong value are errors that name the dotted key and where it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml

from pipeline.config.keys import fields_of, keys, options, section_of
from pipeline.config.plain import leaves, make
from pipeline.config.rules.applies import InapplicableError, shown
from pipeline.config.rules.moved import replacement
from pipeline.config.schema import WHERE, Config
from pipeline.config.values import convert
from pipeline.config.yaml_files import bounded_yaml
from pipeline.errors import UserError
from pipeline.runtime.plugins import load_plugins

S = TypeVar("S")
#: keys that decide which sections apply
_DECIDING = ("train.objective", "data.name")


@dataclass(frozen=True)
class Entry:
    """Value as it was given.

    Attributes:
        value: plain.
        source: where it was given, for messages.
        text: as `--set` has it; None in a file.
    """

    value: Any
    source: str
    text: str | None = None


#: values in the order in which they were given, by dotted key
Entries = Sequence[tuple[str, Entry]]


def file_entries(values: dict[str, Any], source: str) -> list[tuple[str, Entry]]:
    """Return the values of a file by dotted key; `source` names it in messages."""
    return [(name, Entry(value, source)) for name, value in leaves(values)]


def set_entries(overrides: Sequence[str]) -> list[tuple[str, Entry]]:
    """Return the values of `--set` by dotted key.

    Raises:
        UserError: an override is not section.key=value, or its value is not readable YAML.
    """
    entries: list[tuple[str, Entry]] = []
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise UserError(f"--set takes section.key=value, not {override!r}")
        source = f"--set {override}"
        try:
            value = bounded_yaml(text) if text else ""
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(
                f"{source}: its value is not readable YAML; close its brackets and quotes, and "
                "quote the whole for the shell"
            ) from error
        inner = leaves(value, f"{key}.") if isinstance(value, dict) and value else [(key, value)]
        entries += [(name, Entry(part, source, text)) for name, part in inner]
    return entries


def build(schema: type[S], entries: Entries) -> S:
    """Convert the values, the last of each key, and build the dataclasses.

    Raises:
        UserError: an unknown key, a wrong value, or a section that does not apply.
    """
    load_plugins()
    known, last = keys(schema), latest(schema, entries)
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
        return make(schema, "", values)
    except ValueError as error:  # of the dataclasses themselves
        raise UserError(str(error)) from error


def latest(schema: type, entries: Entries) -> dict[str, Entry]:
    """Return the last value of each key; an empty section forgets what was set in it so far."""
    sections = {name.rpartition(".")[0] for name in keys(schema)} - {""}
    last: dict[str, Entry] = {}
    for name, entry in entries:
        if name in sections and entry.value in (None, {}):
            last = {key: kept for key, kept in last.items() if not key.startswith(f"{name}.")}
            continue
        last[name] = entry
    return last


def _takes_text(kind: object) -> bool:
    return str in options(kind) and not {int, float, bool} & set(options(kind))


def _refuse_other_sections(values: dict[str, Any], given: dict[str, Entry]) -> None:
    """Refuse keys of sections that do not apply under this objective and these data."""
    probe = make(Config, "", {k: v for k, v in values.items() if k in _DECIDING})
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
            f"{given[name].source}: {name}={shown(values[name])} applies to {WHERE[section]}; "
            f"this configuration has {here}={now}; remove it (--set {section}=null removes the "
            f"section){hint}",
            names,
            f"section {section} applies to {WHERE[section]}",
        )


def _unknown(schema: type, name: str) -> str:
    """Why a key is not known, and what is."""
    moved = replacement(name, fields_of(schema))
    if moved is not None:
        return f"{name} {moved}"
    parent, _, last = name.rpartition(".")
    section = schema
    for part in parent.split(".") if parent else []:
        if part not in fields_of(section):
            return _not_among(name, section)
        inner = section_of(fields_of(section)[part])
        if inner is None:
            return f"unknown key {name}; {parent} has no keys of its own"
        section = inner
    if section_of(fields_of(section).get(last)) is not None:
        return f"{name} is a section; expected keys in it, such as {name}.KEY: VALUE"
    return _not_among(name, section)


def _not_among(name: str, section: type) -> str:
    return f"unknown key {name}; known here: {', '.join(fields_of(section))}"
