"""Keys of a configuration: how a dataclass declares them, and a list of them with their rules.

A schema is a frozen dataclass. Its fields are keys, or sections if they are dataclasses.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

#: rules of `resume_rule`
RULES = ("fixed", "added", "lowered", "later", "free", "moved")


def setting(default: Any, *, resume: str | None = None, **bounds: float) -> Any:  # noqa: ANN401
    """Declare a key with its rules.

    Args:
        default: value, or an empty list.
        resume: rule of the key when a run goes on, see `pipeline.config.keys.resume_rule`.
        bounds: of the value, or of every value of a list: `least` and `most` (inclusive), `above`
            and `below` (exclusive).
    """
    metadata = {**bounds, **({} if resume is None else {"resume": resume})}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def constant(default: Any) -> Any:  # noqa: ANN401
    """Declare a field that is no key of a configuration file; code, options and tests set it."""
    return field(default=default, metadata={"key": False})


@dataclass(frozen=True)
class Key:
    """A key of a configuration.

    Attributes:
        name: dotted, such as train.lr.
        kind: annotation of its value.
        default: its default.
        meaning: its description.
        metadata: its bounds and its resume rule.
    """

    name: str
    kind: Any
    default: Any
    meaning: str
    metadata: dict[str, Any]

    @property
    def plain_default(self) -> str:
        """The default as YAML has it."""
        words = {None: "null", True: "true", False: "false"}
        plain = self.default if self.default is None or isinstance(self.default, bool) else None
        return words[plain] if plain is self.default else str(self.default)

    @property
    def type_name(self) -> str:
        """The type in words, such as `int or list of int`."""
        return type_name(self.kind)


def keys(schema: type) -> dict[str, Key]:
    """List the keys of a schema by name, those of conditional sections included."""
    return _keys_by_name(schema)


def count(*schemas: type) -> int:
    """Count the distinct keys of schemas."""
    return len({name for schema in schemas for name in keys(schema)})


def resume_rule(name: str, schema: type) -> str:
    """Return what may become of a key when a run goes on.

    Args:
        name: dotted key.
        schema: of the configuration.

    Returns:
        fixed: the value decides the weights and must stay. added: likewise, but blocks that are
        added may have another value. lowered: likewise, and a smaller value is taken. later: the
        value decides later passes alone, and the new one is taken. free: the value decides no
        weights, and each call may have its own. moved: the place of the data; the new one is taken
        when the data are the same.
    """
    return str(keys(schema)[name].metadata.get("resume", "fixed"))


def fields_of(schema: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, in order, without its constants."""
    return _fields_of(schema)


@cache
def _keys_by_name(schema: type) -> dict[str, Key]:
    return {key.name: key for key in _keys(schema, "", {})}


@cache
def _fields_of(schema: type) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    items = dataclasses.fields(schema)
    return {item.name: hints[item.name] for item in items if item.metadata.get("key", True)}


def section_of(kind: object) -> type | None:
    """Return the dataclass of an annotation `Section` or `Section | None`; None of a plain one."""
    for option in options(kind):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return option
    return None


def options(kind: object) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def type_name(kind: object) -> str:
    """Name a type in words: `fp32 or bf16`, `int or list of int`, `text or null`."""
    names = []
    for option in options(kind):
        origin = get_origin(option)
        if origin is Literal:
            names += [str(value) for value in get_args(option)]
        elif origin in (list, tuple):
            names.append(f"list of {type_name(get_args(option)[0])}")
        elif option is type(None):
            names.append("null")
        else:
            names.append(
                {"str": "text", "bool": "true or false"}.get(option.__name__, option.__name__)
            )
    return " or ".join(names)


def _keys(schema: type, prefix: str, inherited: dict[str, Any]) -> Iterator[Key]:
    meanings = meanings_of(schema)
    hints = fields_of(schema)
    for item in dataclasses.fields(schema):
        if item.name not in hints:
            continue
        kind = hints[item.name]
        rules = {**inherited, **item.metadata}
        if item.name in inherited.get("fixed", ()):
            rules["resume"] = "fixed"
        section = section_of(kind)
        if section is not None:
            yield from _keys(section, f"{prefix}{item.name}.", rules)
            continue
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        yield Key(prefix + item.name, kind, default, meanings.get(item.name, ""), rules)


@cache
def meanings_of(schema: type) -> dict[str, str]:
    """Read the descriptions of the fields from the docstrings of a dataclass and its bases."""
    meanings: dict[str, str] = {}
    for owner in reversed(schema.__mro__):
        text = inspect.cleandoc(owner.__doc__ or "")
        _, _, body = text.partition("Attributes:\n")
        for name, meaning in re.findall(
            r"^    (\w+): (.*?)(?=^    \w+: |\Z|^\S)", body, re.M | re.S
        ):
            meanings[name] = " ".join(meaning.split())
    return meanings
