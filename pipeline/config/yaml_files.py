"""Reads YAML files of sections with keys, of a bounded number of values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.integrity.limits import CONFIGURATION, LimitError, read_regular
from pipeline.integrity.reason import reason_of

#: values of a YAML file, those of its aliases counted as often as they stand for some
_MOST_VALUES = 10_000


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of sections with keys.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        values = bounded_yaml(read_regular(path, CONFIGURATION).decode())
    except LimitError as error:
        raise UserError(str(error)) from error
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        reason = reason_of(error)
        raise UserError(f"{path} is not readable YAML: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections with keys, not {type(values).__name__}")
    return values


def bounded_yaml(text: str) -> Any:  # noqa: ANN401
    """Read YAML whose aliases expand to a bounded number of values.

    Raises:
        ValueError: an alias contains itself, a key is given twice, or there are more than
            `_MOST_VALUES` values.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node | None) -> int:
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = _MOST_VALUES  # while its parts are counted: an alias of itself
            _require_distinct_keys(node)
            parts = [part for pair in node.value for part in pair] if isinstance(
                node, yaml.MappingNode
            ) else node.value  # fmt: skip
            sizes[id(node)] = 1 + sum(size(part) for part in parts)
        return sizes[id(node)]

    if size(yaml.compose(text, yaml.SafeLoader)) > _MOST_VALUES:
        raise ValueError(f"it has more than {_MOST_VALUES} values; expected a configuration")
    return yaml.safe_load(text)


def _require_distinct_keys(node: yaml.Node) -> None:
    """Refuse a mapping with a key twice, whose first value would be without effect."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    found = [key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
    for key in found:
        if found.count(key) > 1 and key != "<<":
            raise ValueError(f"the key {key} is given twice; expected it once; join both")
