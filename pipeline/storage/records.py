"""JSON ↔ frozen dataclasses, for the JSON files that Python reads again.

A field is stored under its own name, or under `metadata={"key": …}`. A field whose value and
default are both None is left out of the JSON. A class with methods `to_dict` and `from_dict` is
converted by those. Unknown keys in the JSON are ignored.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from flows.errors import FlowError
from pipeline.errors import UserError

T = TypeVar("T")


def to_json(value: Any) -> Any:  # noqa: ANN401 - any record
    """Convert a record to plain dicts, lists, numbers, strings, booleans and None."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            _key(field): to_json(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if not (field.default is None and getattr(value, field.name) is None)
        }
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def from_json(kind: type[T], value: Any, file: str, key: str = "") -> T:  # noqa: ANN401 - JSON
    """Convert what `to_json` returned to a record of a class.

    `file` and `key`, dotted, name the place of the value in error messages.

    Raises:
        UserError: a key is missing or holds a value of a wrong type; the message names it.
    """
    result: T = _decode(kind, value, _Place(file, key))
    return result


@dataclasses.dataclass(frozen=True)
class _Place:
    """Place of a value in a JSON file."""

    file: str
    key: str

    def under(self, name: str) -> _Place:
        return _Place(self.file, f"{self.key}.{name}" if self.key else name)

    def item(self, index: int) -> _Place:
        return _Place(self.file, f"{self.key}[{index}]")

    def error(self, problem: str, expected: str) -> UserError:
        subject = f"{self.key} in {self.file}" if self.key else self.file
        return UserError(
            f"{subject} is {problem}; expected {expected}; restore the file or make it again"
        )


def _decode(kind: Any, value: Any, place: _Place) -> Any:  # noqa: ANN401 - any type
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in members:
            return None
        inner = [member for member in members if member is not type(None)]
        if len(inner) == 1:
            return _decode(inner[0], value, place)
        raise TypeError(f"records hold no union such as {kind}")
    if origin is list or origin is tuple:
        if not isinstance(value, list):
            raise place.error(repr(value), "a list")
        return origin(_decode(members[0], item, place.item(i)) for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise place.error(repr(value), "an object")
        return {name: _decode(members[1], item, place.under(name)) for name, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_record(kind, value, place)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        names = {float: "a number", int: "an integer", str: "a string", bool: "true or false"}
        raise place.error(repr(value), names[kind])
    return value


def _decode_record(kind: type[Any], value: Any, place: _Place) -> Any:  # noqa: ANN401
    if not isinstance(value, dict):
        raise place.error(repr(value), "an object")
    if hasattr(kind, "from_dict"):
        try:
            return kind.from_dict(value)
        except KeyError as error:
            raise place.under(str(error.args[0])).error("missing", "a value") from error
        except (FlowError, TypeError, ValueError) as error:
            raise place.error(f"not readable ({error})", f"a {kind.__name__}") from error
    hints, values = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        key = _key(field)
        if key in value:
            values[field.name] = _decode(hints[field.name], value[key], place.under(key))
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise place.under(key).error("missing", "a value")
    try:
        return kind(**values)
    except ValueError as error:
        raise place.error(f"not readable ({error})", f"a {kind.__name__}") from error


def _key(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("key", field.name))
