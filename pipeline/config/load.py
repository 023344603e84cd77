"""Reads configurations: defaults, then a YAML file of differences, then `--set` overrides.

An unknown key or a wrong type is an error that names the dotted path. `resolved_yaml` gives
the whole of a configuration, to be kept with what it made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from flows.errors import FlowError
from pipeline.config.schema import Config
from pipeline.errors import UserError


def available() -> list[str]:
    """Names of the packaged configurations."""
    root = resources.files("configs")
    names = [str(p) for p in Path(str(root)).rglob("*.yaml")]
    return sorted(str(Path(p).relative_to(str(root)).with_suffix("")) for p in names)


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        name_or_path: a packaged name (`mnist`) or the path of a YAML file.
        overrides: `section.key=value` strings, applied in order.

    Returns:
        The resolved, checked configuration.

    Raises:
        UserError: unknown name, unreadable YAML, unknown key or wrong type.
    """
    values = _read_yaml(_find(name_or_path))
    return _apply(_merge(_defaults(), values, f"config {name_or_path}"), overrides)


def overridden(config: Config, overrides: Sequence[str], sections: Sequence[str]) -> Config:
    """A configuration with overrides of some of its sections, or single keys of them, only.

    Raises:
        UserError: as `load_config`, or an override of another section.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if key not in sections and key.partition(".")[0] not in sections:
            raise UserError(
                f"--set {override} has no effect here; only {', '.join(sections)} can be "
                "overridden on a finished run"
            )
    return _apply(_merge(_defaults(), to_dict(config), "config.yaml"), overrides)


def from_resolved(values: dict[str, Any]) -> Config:
    """A configuration from what `to_dict` gave (a run's config.yaml).

    Raises:
        UserError: an unknown key or a wrong type.
    """
    return _to_dataclasses(_merge(_defaults(), values, "config.yaml"))


def to_dict(config: Any) -> dict[str, Any]:  # noqa: ANN401 - any dataclass of this file
    """Plain nested values (tuples become lists), ready for JSON or YAML."""

    def plain(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result


def differences(
    old: Config, new: Config, sections: Sequence[str], indifferent: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with the old and the new value.

    Args:
        old: a configuration.
        new: another.
        sections: that are compared.
        indifferent: names of keys that are not, in whatever section.
    """
    before, after = to_dict(old), to_dict(new)
    return {
        f"{section}.{key}": (before[section].get(key), value)
        for section in sections
        for key, value in after[section].items()
        if key not in indifferent and before[section].get(key) != value
    }


def resolved_yaml(config: Config) -> str:
    """The whole configuration as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def _defaults() -> Any:  # noqa: ANN401 - OmegaConf nodes
    merged = OmegaConf.structured(Config)
    for node in (merged, *merged.values()):  # frozen dataclasses arrive read-only
        if OmegaConf.is_config(node):
            OmegaConf.set_readonly(node, False)
    return merged


def _apply(merged: Any, overrides: Sequence[str]) -> Config:  # noqa: ANN401
    for override in overrides:
        key, sign, _ = override.partition("=")
        if not sign or not key:
            raise UserError(f"--set takes section.key=value, not {override!r}")
        try:
            values = OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(
                f"--set {override}: its value is not readable YAML; close its brackets and "
                "quotes, and quote the whole for the shell"
            ) from error
        merged = _merge(merged, values, f"--set {override}")
    return _to_dataclasses(merged)


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"no configuration file at {path}; check the path")
        return path
    packaged = Path(str(resources.files("configs"))) / f"{name_or_path}.yaml"
    if not packaged.is_file():
        raise UserError(
            f"unknown configuration {name_or_path!r}; choose one of {', '.join(available())}, "
            "or give the path of a .yaml file"
        )
    return packaged


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not readable YAML: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections with keys, not {type(values).__name__}")
    return values


def _merge(base: Any, values: Any, source: str) -> Any:  # noqa: ANN401 - OmegaConf nodes
    """Merge key by key, so that an error can always name the dotted path."""
    plain = OmegaConf.to_container(values) if OmegaConf.is_config(values) else values
    for key, value in _leaves(plain, ""):
        if isinstance(value, list) and any(isinstance(part, (list, dict)) for part in value):
            raise UserError(f"{source}: {key}: expected a list of plain values, not {value!r}")
        try:
            OmegaConf.update(base, key, value, merge=True, force_add=False)
        except OmegaConfBaseException as error:
            raise UserError(_explain(error, key, value, source)) from error
    return base


def _leaves(values: Any, prefix: str) -> list[tuple[str, Any]]:  # noqa: ANN401
    if not isinstance(values, dict) or (prefix and not values):
        return [(prefix, values)]
    found = []
    for key, value in values.items():
        found += _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _explain(error: OmegaConfBaseException, key: str, value: object, source: str) -> str:
    if isinstance(error, (ConfigAttributeError, ConfigKeyError)):
        parent = key.rpartition(".")[0]
        section: Any = Config()
        for part in parent.split(".") if parent else []:
            section = getattr(section, part, None)
        if dataclasses.is_dataclass(section):
            names = ", ".join(f.name for f in dataclasses.fields(section))
            return f"{source}: unknown key {key}; known here: {names}"
        return f"{source}: unknown key {key}; {parent} has no keys of its own"
    first = str(error).splitlines()[0].rstrip(".")
    if "$" in first:
        first = f"value {value!r} has the wrong type"
    if "is not a ListConfig" in first:
        first = f"expected a list, such as [{value}], not {value!r}"
    return f"{source}: {key}: {first}"


def _to_dataclasses(merged: Any) -> Config:  # noqa: ANN401
    try:
        OmegaConf.to_object(merged.push)
    except FlowError as error:  # a solver does not know in which section it stands
        raise UserError(str(error).replace("solver.", "push.")) from error
    try:
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(str(error).splitlines()[0]) from error
    assert isinstance(config, Config)
    return config
