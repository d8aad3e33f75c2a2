"""Parse TOML files of phasewatch into typed values; an unknown key is reported with the nearest known one."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any, TypeVar, get_args

import msgspec

from phasewatch.errors import PlanError, suggest_names

__all__ = ["parse_toml"]

_T = TypeVar("_T", bound=msgspec.Struct)
_UNKNOWN_FIELD_PATTERN = re.compile(r"unknown field `([^`]*)`")


def parse_toml(text: str, into: type[_T], *, where: str) -> _T:
    """Parse TOML into a struct that forbids unknown fields.

    Args:
        text: Content of the file.
        into: The type of the struct.
        where: Name of the file, for messages.

    Raises:
        PlanError: If the text is not TOML, or a key is unknown, missing or of the wrong type.
    """
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as exc:  # a number of 5,000 digits is a plain ValueError
        raise PlanError(f"{where}: not TOML: {str(exc)[:120]}") from exc
    try:
        return msgspec.convert(content, into)
    except msgspec.ValidationError as exc:
        raise PlanError(f"{where}: {exc}{_suggest_field(str(exc), into)}") from exc


def _suggest_field(message: str, into: type[msgspec.Struct]) -> str:
    match = _UNKNOWN_FIELD_PATTERN.search(message)
    if match is None:
        return ""
    names = {name for struct in _list_structs(into) for name in struct.__struct_fields__}
    return f"; {suggest_names(match[1], names)}"


def _list_structs(kind: Any) -> Iterator[type[msgspec.Struct]]:
    """Yield a struct and all structs in its fields."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
        for field in msgspec.structs.fields(kind):
            yield from _list_structs(field.type)
    for part in get_args(kind):
        yield from _list_structs(part)
