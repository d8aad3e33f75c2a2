"""Read a user's own channels from a TOML file."""

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
from phasewatch.types import CHANNELS_VARIABLE, ChannelKind, ChannelTrust, SourceKind

__all__ = [
    "CUSTOM_CHANNELS",
    "CUSTOM_CHANNEL_KEYS",
    "CUSTOM_FIELD_KEYS",
    "MAX_CHANNELS_FILE_BYTES",
    "CustomChannels",
    "check_channel_kind",
    "get_custom_channels_digest",
    "parse_custom_channels",
    "read_custom_channels",
]

MAX_CHANNELS_FILE_BYTES = 64 << 10
MAX_CUSTOM_ROWS = 64

_CHANNEL_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_CHANNEL_TEXT = re.compile(r"[ -~]{0,200}")
_NATURE_BY_KIND = {
    ChannelKind.RATE: "counter",
    ChannelKind.RATIO: "counter",
    ChannelKind.DELTA: "gauge",
    ChannelKind.GAUGE: "gauge",
    ChannelKind.COUNT: "tick",
}
_RAW_FIELD_KEYS = {"source", "field", "type", "unit", "nature", "about"}
_REQUIRED_CHANNEL_KEYS = {"name", "source", "kind", "fields", "unit", "about", "reads"}
_CHANNEL_KEYS = _REQUIRED_CHANNEL_KEYS | {"scale", "trust", "accel", "arch", "semantics"}
_CHOICES: Mapping[str, Sequence[str]] = {
    "source": tuple(SourceKind),
    "type": ("int", "float"),
    "nature": ("counter", "gauge", "tick"),
    "kind": tuple(ChannelKind),
    "trust": tuple(ChannelTrust),
    "accel": ("any", "tcg"),
    "arch": ("any", "x86"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomChannels:
    """A user's own channels.

    Attributes:
        raw: Keyword arguments of `RawFieldSpec`, one mapping per field.
        channels: Keyword arguments of `ChannelSpec`, one mapping per channel.
        text: The file's content.
    """

    raw: tuple[Mapping[str, Any], ...] = ()
    channels: tuple[Mapping[str, Any], ...] = ()
    text: bytes = b""

    @property
    def digest(self) -> str:
        """The first 12 hex digits of the file's SHA-256; empty without a file."""
        return sha256(self.text).hexdigest()[:12] if self.text else ""


def read_custom_channels(path: str | None = None) -> CustomChannels:
    """Read a user's own channels.

    Args:
        path: The TOML file; by default the one that `CHANNELS_VARIABLE` names. Without one, nothing is read.

    Raises:
        UsageError: If the file cannot be read or a row is invalid; the message names the row and the valid values.
    """
    path = os.environ.get(CHANNELS_VARIABLE, "") if path is None else path
    if not path:
        return CustomChannels()
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_CHANNELS_FILE_BYTES + 1)
    except OSError as exc:
        raise UsageError(f"{path}: {exc.strerror}; --custom-channels needs a TOML file of channels") from exc
    return parse_custom_channels(text, file=path)


def parse_custom_channels(text: bytes, *, file: str) -> CustomChannels:
    """Parse the content of a file of custom channels; see `read_custom_channels`."""
    if len(text) > MAX_CHANNELS_FILE_BYTES:
        raise UsageError(f"{file}: larger than {MAX_CHANNELS_FILE_BYTES:,} bytes; that is no list of channels")
    try:
        content = tomllib.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as exc:  # a number of 5,000 digits raises a plain ValueError
        raise UsageError(f"{file}: not TOML: {str(exc)[:120]}") from exc
    if unknown := set(content) - {"raw", "channel"}:
        raise UsageError(f"{file}: no table is called {min(unknown)!r}; write [[raw]] and [[channel]]")
    raw = tuple(_parse_raw_row(row, f"{file}: raw {i}") for i, row in enumerate(_check_rows(content, "raw", file), 1))
    channels = tuple(
        _parse_channel_row(row, f"{file}: channel {i}")
        for i, row in enumerate(_check_rows(content, "channel", file), 1)
    )
    if not channels:
        raise UsageError(f"{file}: it has no [[channel]]")
    return CustomChannels(raw=raw, channels=channels, text=text)


def check_channel_kind(kind: ChannelKind, nature: str, *, channel: str) -> None:
    """Raise if a channel of a kind cannot be computed from a field of a nature.

    This above all refuses cumulative totals, which reveal the elapsed time.

    Raises:
        UsageError: If the two do not match.
    """
    if _NATURE_BY_KIND[kind] != nature:
        raise UsageError(
            f"--custom-channels: {channel} is a {kind} of a {nature}; a {kind} is made of a {_NATURE_BY_KIND[kind]} "
            "(a cumulative total is no channel, because it reveals the elapsed time)"
        )


def _check_rows(content: Mapping[str, Any], name: str, file: str) -> list[Any]:
    rows = content.get(name, [])
    if not isinstance(rows, list) or len(rows) > MAX_CUSTOM_ROWS:
        raise UsageError(f"{file}: {name} is no list of at most {MAX_CUSTOM_ROWS} tables; write [[{name}]]")
    return rows


def _parse_raw_row(row: Any, where: str) -> Mapping[str, Any]:
    checked = _check_row(row, where, _RAW_FIELD_KEYS, needed=_RAW_FIELD_KEYS)
    return checked | {"source": SourceKind(checked["source"])}


def _parse_channel_row(row: Any, where: str) -> Mapping[str, Any]:
    checked = _check_row(row, where, _CHANNEL_KEYS, needed=_REQUIRED_CHANNEL_KEYS)
    fields = checked["fields"]
    if not isinstance(fields, list) or not all(isinstance(f, str) and _CHANNEL_NAME.fullmatch(f) for f in fields):
        raise UsageError(f"{where}: `fields` is no list of raw fields")
    scale, semantics = checked.get("scale", 1.0), checked.get("semantics", 1)
    if type(scale) not in (int, float) or not 0 < scale < 1e30 or type(semantics) is not int or semantics < 1:
        raise UsageError(f"{where}: `scale` is a number above 0, `semantics` a whole number from 1 on")
    return checked | {
        "source": SourceKind(checked["source"]),
        "kind": ChannelKind(checked["kind"]),
        "fields": tuple(fields),
        "scale": float(scale),
        "semantics": semantics,
        "trust": ChannelTrust(checked.get("trust", "host")),
    }


def _check_row(row: Any, where: str, keys: set[str], *, needed: set[str]) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UsageError(f"{where}: it is no table")
    if unknown := set(row) - keys:
        raise UsageError(f"{where}: unknown key {min(unknown)!r}; keys are {', '.join(sorted(keys))}")
    if missing := needed - set(row):
        raise UsageError(f"{where}: lacks {', '.join(sorted(missing))}")
    for key, value in row.items():
        if key in _CHOICES and value not in _CHOICES[key]:
            raise UsageError(f"{where}: {key} {str(value)[:40]!r}; one of {', '.join(_CHOICES[key])}")
        if key in ("name", "field") and not (isinstance(value, str) and _CHANNEL_NAME.fullmatch(value)):
            raise UsageError(f"{where}: {key} {str(value)[:40]!r} is no name of small letters, digits and _")
        if key in ("unit", "about", "reads") and not (isinstance(value, str) and _CHANNEL_TEXT.fullmatch(value)):
            raise UsageError(f"{where}: {key} is no line of at most 200 printable ASCII characters")
    return dict(row)


CUSTOM_CHANNELS = read_custom_channels()  # empty unless CHANNELS_VARIABLE names a file

CUSTOM_FIELD_KEYS = frozenset((row["source"], row["field"]) for row in CUSTOM_CHANNELS.raw)
CUSTOM_CHANNEL_KEYS = frozenset((row["source"], row["name"]) for row in CUSTOM_CHANNELS.channels)


def get_custom_channels_digest() -> str:
    """Return a short digest of the user's own channels; empty without any."""
    return CUSTOM_CHANNELS.digest
