"""Parse TOML files of phasewatch into typed values; an unknown key is reported with the nearest known one."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import msgspec

from phasewatch.errors import PlanError, suggest_names

__all__ = ["TomlFault", "find_toml_faults", "find_toml_line", "parse_toml"]

_T = TypeVar("_T", bound=msgspec.Struct)
_HEADER_PATTERN = re.compile(r"\s*\[\[?([^\[\]]+)\]")
_KEY_PATTERN = re.compile(r"""\s*([\w.\-"' ]+?)\s*=""")
_UNKNOWN_FIELD_PATTERN = re.compile(r"unknown field `([^`]*)`")


@dataclass(frozen=True, slots=True, kw_only=True)
class TomlFault:
    """One fault of a TOML file.

    Attributes:
        key: Full name of the key, such as ``outputs.webhook.url``; empty if the file is not TOML.
        words: What is wrong and what was expected.
        line: Line of the key; 0 if unknown.
    """

    key: str
    words: str
    line: int = 0

    def render(self, where: str) -> str:
        """Return one line about it.

        Args:
            where: Name of the file.
        """
        place = f"{where}:{self.line}" if self.line else where
        return f"{place}: {f'{self.key}: ' if self.key else ''}{self.words}"


def find_toml_faults(text: str, into: type[msgspec.Struct]) -> tuple[TomlFault, ...]:
    """Return every unknown, missing and wrong key of a file, in its order; none if `parse_toml` accepts it."""
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as exc:
        return (TomlFault(key="", words=f"not TOML: {str(exc)[:120]}"),)
    return tuple(_find_table_faults(content, into, (), text.splitlines()))


def _find_table_faults(
    table: Mapping[str, Any], into: type[msgspec.Struct], path: tuple[str, ...], lines: list[str]
) -> Iterator[TomlFault]:
    fields = {field.name: field for field in msgspec.structs.fields(into)}
    faults = 0
    for name, value in table.items():
        at = (*path, name)
        key, line = ".".join(at)[:200], find_toml_line(lines, at)
        if name not in fields:
            faults += 1
            yield TomlFault(key=key, words=f"unknown key; {suggest_names(name[:80], fields)}", line=line)
            continue
        struct = _find_struct(fields[name].type)
        if struct is not None and isinstance(value, dict):
            for fault in _find_table_faults(value, struct, at, lines):
                faults += 1
                yield fault
            continue
        try:
            msgspec.convert(value, fields[name].type)
        except msgspec.ValidationError as exc:
            faults += 1
            yield TomlFault(key=key, words=str(exc)[:300], line=line)
    missing = [name for name, field in fields.items() if field.required and name not in table]
    for name in missing:
        faults += 1
        yield TomlFault(key=".".join((*path, name)), words="missing", line=find_toml_line(lines, path))
    if not faults:
        try:
            msgspec.convert(table, into)
        except msgspec.ValidationError as exc:  # a rule of the whole table
            yield TomlFault(key=".".join(path), words=str(exc)[:300], line=find_toml_line(lines, path))


def _find_struct(kind: Any) -> type[msgspec.Struct] | None:
    return next(
        (each for each in (kind, *get_args(kind)) if isinstance(each, type) and issubclass(each, msgspec.Struct)), None
    )


def find_toml_line(lines: list[str], path: tuple[str, ...]) -> int:
    """Return the number of the line that a key or table is written on; 0 if it is written in another form.

    Args:
        lines: The lines of the file.
        path: Names of the tables and of the key.
    """
    table: tuple[str, ...] = ()
    for number, line in enumerate(lines, 1):
        if match := _HEADER_PATTERN.match(line):
            table = tuple(part.strip(" \t\"'") for part in match[1].split("."))
            name = table
        elif match := _KEY_PATTERN.match(line):
            name = (*table, *(part.strip(" \t\"'") for part in match[1].split(".")))
        else:
            continue
        if name == path:
            return number
    return 0


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
