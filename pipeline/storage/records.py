"""JSON ↔ frozen dataclasses, for the JSON files that Python reads again.

A recipe says how a store or a result was made, so that a repair makes it again. It lies next to
what it makes, is written before that, and sealed.

A field is stored under its own name, or under `metadata={"key": …}`. A field whose value and
default are both None is left out of the JSON. A class with methods `to_dict` and `from_dict` is
converted by those. Unknown keys in the JSON are ignored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from flows.errors import FlowError
from pipeline.errors import UserError
from pipeline.integrity.limits import DOCUMENT, read_regular
from pipeline.storage import atomic, seal

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


def from_json(kind: type[T], value: Any, file: str) -> T:  # noqa: ANN401 - JSON
    """Convert what `to_json` returned, from a file, to a record of a class.

    Raises:
        UserError: a key is missing or holds a value of a wrong type; the message names it.
    """
    try:
        result: T = _decode(kind, value, "")
    except _MismatchError as error:
        place, problem, expected = error.args
        place = f"{place} in {file}" if place else file
        raise UserError(
            f"{place} is {problem}; expected {expected}; restore the file or make it again"
        ) from error
    return result


@contextlib.contextmanager
def well_formed(path: Path) -> Iterator[None]:
    """Report missing entries and wrong types of a JSON file, while its values are read.

    Raises:
        UserError: the file is of another form; the message names it.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path} is of another form ({type(error).__name__}: {error}); expected a file of "
            "this version; make it again"
        ) from error


class _MismatchError(Exception):
    """Mismatch of a value and its type: the value's key, the problem, and what is expected."""


def _decode(kind: Any, value: Any, key: str) -> Any:  # noqa: ANN401 - any type
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in members:
            return None
        inner = [member for member in members if member is not type(None)]
        if len(inner) == 1:
            return _decode(inner[0], value, key)
        raise TypeError(f"records hold no union such as {kind}")
    if origin is list or origin is tuple:
        if not isinstance(value, list):
            raise _MismatchError(key, repr(value), "a list")
        return origin(_decode(members[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _MismatchError(key, repr(value), "an object")
        return {name: _decode(members[1], item, _under(key, name)) for name, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_record(kind, value, key)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        names = {float: "a number", int: "an integer", str: "a string", bool: "true or false"}
        raise _MismatchError(key, repr(value), names[kind])
    return value


def _decode_record(kind: type[Any], value: Any, key: str) -> Any:  # noqa: ANN401
    if not isinstance(value, dict):
        raise _MismatchError(key, repr(value), "an object")
    if hasattr(kind, "from_dict"):
        try:
            return kind.from_dict(value)
        except KeyError as error:
            missing = _under(key, str(error.args[0]))
            raise _MismatchError(missing, "missing", "a value") from error
        except (FlowError, TypeError, ValueError) as error:
            raise _MismatchError(key, f"not readable ({error})", f"a {kind.__name__}") from error
    hints, values = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        name, place = _key(field), _under(key, _key(field))
        if name in value:
            values[field.name] = _decode(hints[field.name], value[name], place)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise _MismatchError(place, "missing", "a value")
    try:
        return kind(**values)
    except ValueError as error:
        raise _MismatchError(key, f"not readable ({error})", f"a {kind.__name__}") from error


def _under(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _key(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("key", field.name))


def keep_recipe(path: Path, recipe: bytes | dict[str, Any]) -> None:
    """Write a recipe, its bytes or its JSON values, unless it is there."""
    data = recipe if isinstance(recipe, bytes) else atomic.json_bytes(recipe)
    if read_recipe(path) != data:
        atomic.write_bytes(path, data)


def read_recipe(path: Path) -> bytes | None:
    """Return the content of a recipe; None for one that is absent or broken."""
    try:
        data = read_regular(path, DOCUMENT)
        seal.check(path, data)
    except (UserError, ValueError, OSError):
        return None
    return data


def read_recipe_values(path: Path) -> dict[str, Any]:
    """Return the JSON values of a recipe; none for one that is absent or broken."""
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(read_recipe(path) or b"null")
        return values if isinstance(values, dict) else {}
    return {}
