"""Reads configurations: defaults, then a YAML file of differences, then `--set` overrides.

An unknown key, a wrong value and a setting without effect are errors that name the dotted key.
`--set` has precedence: a value of the file that it leaves without effect is left out, with a line.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pipeline.config import packaged
from pipeline.config.entries import Entries, build, file_entries, latest, set_entries
from pipeline.config.plain import to_dict, with_values
from pipeline.config.rules.applies import InapplicableError, check_applicable
from pipeline.config.schema import Config
from pipeline.config.yaml_files import read_yaml
from pipeline.errors import UserError
from pipeline.runtime.console import say
from pipeline.storage import seal

S = TypeVar("S")
#: key whose default depends on the objective: true under jko
AUTONOMOUS = "velocity.autonomous"


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
    file, given = file_entries(values, f"config {name_or_path}"), set_entries(overrides)
    config = _resolve(schema, file, given)
    if isinstance(config, Config) and AUTONOMOUS not in latest(schema, [*file, *given]):
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
    return _resolve(Config, file_entries(to_dict(config), "config.yaml"), set_entries(overrides))


def read_resolved(schema: type[S], path: Path) -> S:
    """Read the whole configuration that `resolved_yaml` wrote, such as a run's config.yaml.

    Raises:
        UserError: unreadable YAML, an unknown key, a wrong value, or a file that differs from the
            seal above it.
    """
    seal.check(path)
    try:
        return build(schema, file_entries(read_yaml(path), str(path)))
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from error


def _resolve(schema: type[S], file: Entries, given: Entries) -> S:
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


def _applicable(schema: type[S], entries: Entries) -> S:
    config = build(schema, entries)
    check_applicable(config)
    return config
