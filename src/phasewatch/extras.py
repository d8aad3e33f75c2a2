"""Channels of a user's own: a TOML file, read and checked before the tables of `channels` are made of it."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from phasewatch.errors import UsageError
from phasewatch.vocab import Kind, Source, Trust

VARIABLE = "PHASEWATCH_CHANNELS"  # the file's path; worker processes inherit it
CHANNELS_FILE = "channels.toml"  # what a run keeps of it
FILE_BYTES = 64 << 10
ROWS = 64

_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_TEXT = re.compile(r"[ -~]{0,200}")
_NATURE = {Kind.RATE: "counter", Kind.RATIO: "counter", Kind.DELTA: "gauge", Kind.GAUGE: "gauge", Kind.COUNT: "tick"}
_RAW_KEYS = {"source", "field", "type", "unit", "nature", "about"}
_CHANNEL_KEYS = {
    "name", "source", "kind", "fields", "unit", "about", "reads", "scale", "trust", "accel", "arch", "semantics",
}  # fmt: skip
_CHOICES: Mapping[str, Sequence[str]] = {
    "source": tuple(Source), "type": ("int", "float"), "nature": ("counter", "gauge", "tick"), "kind": tuple(Kind),
    "trust": tuple(Trust), "accel": ("any", "tcg"), "arch": ("any", "x86"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """What a user adds: rows of RAW and of CHANNELS as keyword arguments, and the text that they came from."""

    raw: tuple[Mapping[str, Any], ...] = ()
    channels: tuple[Mapping[str, Any], ...] = ()
    text: bytes = b""

    @property
    def digest(self) -> str:
        """Name the file's content in few letters; empty without one."""
        return sha256(self.text).hexdigest()[:12] if self.text else ""


def read_extras(path: str | None = None) -> Extras:
    """Read the file that the environment names; nothing without one.

    Raises:
        UsageError: If it cannot be read, or a row contradicts itself; it names the row and what it may hold.
    """
    path = os.environ.get(VARIABLE, "") if path is None else path
    if not path:
        return Extras()
    try:
        with Path(path).open("rb") as file:
            text = file.read(FILE_BYTES + 1)
    except OSError as exc:
        raise UsageError(f"{path}: {exc.strerror}; --channels names a TOML file of channels") from exc
    return parse_extras(text, file=path)


def parse_extras(text: bytes, *, file: str) -> Extras:
    """Parse the file's text; see `read_extras`."""
    if len(text) > FILE_BYTES:
        raise UsageError(f"{file}: larger than {FILE_BYTES:,} bytes; that is no list of channels")
    try:
        content = tomllib.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as exc:  # a number of 5,000 digits is a plain ValueError
        raise UsageError(f"{file}: not TOML: {str(exc)[:120]}") from exc
    if unknown := set(content) - {"raw", "channel"}:
        raise UsageError(f"{file}: no table is called {min(unknown)!r}; write [[raw]] and [[channel]]")
    raw = tuple(_raw(row, f"{file}: raw {i}") for i, row in enumerate(_rows(content, "raw", file), 1))
    channels = tuple(_channel(row, f"{file}: channel {i}") for i, row in enumerate(_rows(content, "channel", file), 1))
    if not channels:
        raise UsageError(f"{file}: it has no [[channel]]")
    return Extras(raw=raw, channels=channels, text=text)


def check_nature(kind: Kind, nature: str, *, channel: str) -> None:
    """Refuse a channel whose kind cannot be made of its field: above all a total that would tell how late it is.

    Raises:
        UsageError: If it cannot.
    """
    if _NATURE[kind] != nature:
        raise UsageError(
            f"--channels: {channel} is a {kind} of a {nature}; a {kind} is made of a {_NATURE[kind]} "
            "(no running total is a channel: it tells how late it is)"
        )


def _rows(content: Mapping[str, Any], name: str, file: str) -> list[Any]:
    rows = content.get(name, [])
    if not isinstance(rows, list) or len(rows) > ROWS:
        raise UsageError(f"{file}: {name} is no list of at most {ROWS} tables; write [[{name}]]")
    return rows


def _raw(row: Any, where: str) -> Mapping[str, Any]:
    checked = _checked(row, where, _RAW_KEYS, needed=_RAW_KEYS)
    return checked | {"source": Source(checked["source"])}


def _channel(row: Any, where: str) -> Mapping[str, Any]:
    needed = {"name", "source", "kind", "fields", "unit", "about", "reads"}
    checked = _checked(row, where, _CHANNEL_KEYS, needed=needed)
    fields = checked["fields"]
    if not isinstance(fields, list) or not all(isinstance(f, str) and _NAME.fullmatch(f) for f in fields):
        raise UsageError(f"{where}: `fields` is no list of raw fields")
    scale, semantics = checked.get("scale", 1.0), checked.get("semantics", 1)
    if type(scale) not in (int, float) or not 0 < scale < 1e30 or type(semantics) is not int or semantics < 1:
        raise UsageError(f"{where}: `scale` is a number above 0, `semantics` a whole number from 1 on")
    return checked | {
        "source": Source(checked["source"]), "kind": Kind(checked["kind"]), "fields": tuple(fields),
        "scale": float(scale), "semantics": semantics, "trust": Trust(checked.get("trust", "host")),
    }  # fmt: skip


def _checked(row: Any, where: str, keys: set[str], *, needed: set[str]) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UsageError(f"{where}: it is no table")
    if unknown := set(row) - keys:
        raise UsageError(f"{where}: unknown key {min(unknown)!r}; keys are {', '.join(sorted(keys))}")
    if missing := needed - set(row):
        raise UsageError(f"{where}: lacks {', '.join(sorted(missing))}")
    for key, value in row.items():
        if key in _CHOICES and value not in _CHOICES[key]:
            raise UsageError(f"{where}: {key} {str(value)[:40]!r}; one of {', '.join(_CHOICES[key])}")
        if key in ("name", "field") and not (isinstance(value, str) and _NAME.fullmatch(value)):
            raise UsageError(f"{where}: {key} {str(value)[:40]!r} is no name of small letters, digits and _")
        if key in ("unit", "about", "reads") and not (isinstance(value, str) and _TEXT.fullmatch(value)):
            raise UsageError(f"{where}: {key} is no line of at most 200 printable ASCII characters")
    return dict(row)
