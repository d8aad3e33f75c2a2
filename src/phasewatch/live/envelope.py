"""The envelope of an event: one line of JSON, written and read, and what is refused of it."""

from __future__ import annotations

from typing import Any

import msgspec

from phasewatch.errors import EventError
from phasewatch.live.events import TYPES, Data, Name, Record, Stamp

VERSION = 1
MAX_BYTES = 256 * 1024  # of one event
_TYPE_OF = {kind: name for name, kind in TYPES.items()}


class Event(Record, frozen=True, kw_only=True):
    """An event in its envelope.

    Attributes:
        id: The producer's number of it; a hub numbers events anew for its viewers.
        t_wall_ns: When it was made.
        run: What it belongs to: a run's name, or ``live``.
    """

    _names = ("id", "run")

    id: Name
    t_wall_ns: Stamp
    run: Name
    data: Data

    @property
    def type(self) -> str:
        """One of TYPES."""
        return _TYPE_OF[type(self.data)]


class _Envelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    v: int
    type: str
    id: Name
    t_wall_ns: Stamp
    run: Name
    data: msgspec.Raw


def render_event(event: Event) -> bytes:
    """Give an event as one line of JSON, without its end.

    Raises:
        EventError: If it is larger than MAX_BYTES.
    """
    envelope = {
        "v": VERSION, "type": event.type, "id": event.id, "t_wall_ns": event.t_wall_ns, "run": event.run,
        "data": event.data,
    }  # fmt: skip
    line = msgspec.json.encode(envelope)
    _bound(line)
    return line


def parse_event(line: bytes) -> Event:
    """Read an event.

    Raises:
        EventError: If it is larger than MAX_BYTES, malformed, of another version or of an unknown type.
    """
    _bound(line)
    try:
        envelope = msgspec.json.decode(line, type=_Envelope)
        if envelope.v != VERSION:
            raise EventError(f"event: version {envelope.v}, this reader knows {VERSION}")
        kind = TYPES.get(envelope.type)
        if kind is None:
            raise EventError(f"event: no type {envelope.type[:40]!r}; there are {', '.join(TYPES)}")
        data: Any = msgspec.json.decode(envelope.data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise EventError(f"event: {exc}; docs/formats/events.md says what one is") from exc
    return Event(id=envelope.id, t_wall_ns=envelope.t_wall_ns, run=envelope.run, data=data)


def _bound(line: bytes) -> None:
    if len(line) > MAX_BYTES:
        raise EventError(f"event: {len(line):,} bytes, at most {MAX_BYTES:,}; send fewer bins or rows in each")
