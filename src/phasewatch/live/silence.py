"""Detect when a telemetry source, or some of its channels, stops giving readings, and when they return (pure)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from phasewatch.channels import CHANNELS, list_raw_fields
from phasewatch.telemetry.base import N_STAMPS, ReadingRow
from phasewatch.types import ChannelTrust, SourceKind

__all__ = ["GUEST_SILENCE_TIMEOUT_NS", "SILENCE_TIMEOUT_NS", "SilenceDetector", "SilenceNote"]

# Time without a reading of a field; the bins of its channels are unknown after 2.5 s.
SILENCE_TIMEOUT_NS = 3_000_000_000
GUEST_SILENCE_TIMEOUT_NS = 20_000_000_000  # for fields that the guest reports at times of its own choice


@dataclass(frozen=True, slots=True, kw_only=True)
class SilenceNote:
    """Channels of one source that stopped giving readings, or give them again.

    Attributes:
        source: The source.
        channels: Full names.
        is_back: Whether they give readings again.
        is_whole: Whether they are all channels that the source provides for this VM.
        was_never: Whether none of them was ever read.
    """

    source: SourceKind
    channels: tuple[str, ...]
    is_back: bool
    is_whole: bool
    was_never: bool

    @property
    def state(self) -> str:
        """The state for `WatchResult.states`, such as ``proc silent``."""
        return f"{self.source} {'back' if self.is_back else 'silent' if self.is_whole else 'partly silent'}"

    def render(self) -> str:
        """Return a message for people."""
        names = str(self.source) if self.is_whole else ", ".join(self.channels)
        if self.is_back:
            return f"{names}: readings again"
        return f"{names}: no reading came yet" if self.was_never else f"{names}: no readings any more"


class SilenceDetector:
    """Follows when each raw field of each source was last read.

    Args:
        sources: The sources that are read.
        masked: Channels that this VM cannot provide.
        mono_ns: Monotonic time of the start.
    """

    def __init__(self, sources: Collection[SourceKind], masked: Collection[str], mono_ns: int) -> None:
        kept = [c for c in CHANNELS if c.source in sources and c.full_name not in masked]
        self._channels = {c.full_name: c for c in kept}
        fields = {source: [spec.field for spec in list_raw_fields(source)] for source in sources}
        self._columns = {name: tuple(fields[c.source].index(f) for f in c.fields) for name, c in self._channels.items()}
        # Per source and raw field: when it was last read, and whether it ever was.
        self._seen_ns = {source: [mono_ns] * len(names) for source, names in fields.items()}
        self._is_read = {source: [False] * len(names) for source, names in fields.items()}
        self._silent: set[str] = set()

    def add_row(self, source: SourceKind, row: ReadingRow) -> None:
        """Add one reading."""
        if source not in self._seen_ns:
            return
        now_ns, seen_ns, is_read = int(row[1] or 0), self._seen_ns[source], self._is_read[source]
        for at, value in enumerate(row[N_STAMPS:]):
            if value is not None:
                seen_ns[at] = now_ns
                is_read[at] = True

    def pause(self, mono_ns: int) -> None:
        """Restart the timeout of the guest's fields, because the guest does not run."""
        for name, channel in self._channels.items():
            if channel.trust is ChannelTrust.GUEST:
                for at in self._columns[name]:
                    self._seen_ns[channel.source][at] = mono_ns

    def find_changes(self, mono_ns: int) -> list[SilenceNote]:
        """Return what changed since the last call."""
        silent = {name for name, channel in self._channels.items() if self._is_silent(name, mono_ns)}
        notes = []
        for source in dict.fromkeys(c.source for c in self._channels.values()):
            own = {name for name, channel in self._channels.items() if channel.source is source}
            gone, back = own & (silent - self._silent), own & (self._silent - silent)
            if back:
                notes.append(
                    self._build_note(source, back, is_back=True, is_whole=self._silent >= own and not own & silent)
                )
            if gone:
                notes.append(self._build_note(source, gone, is_back=False, is_whole=silent >= own))
        self._silent = silent
        return notes

    def _is_silent(self, name: str, mono_ns: int) -> bool:
        channel = self._channels[name]
        limit_ns = GUEST_SILENCE_TIMEOUT_NS if channel.trust is ChannelTrust.GUEST else SILENCE_TIMEOUT_NS
        seen_ns = self._seen_ns[channel.source]
        return mono_ns - min(seen_ns[at] for at in self._columns[name]) > limit_ns

    def _build_note(self, source: SourceKind, names: set[str], *, is_back: bool, is_whole: bool) -> SilenceNote:
        channels = [channel for name, channel in self._channels.items() if name in names]
        return SilenceNote(
            source=source,
            channels=tuple(c.full_name for c in channels),
            is_back=is_back,
            is_whole=is_whole,
            was_never=not any(self._is_read[source][at] for c in channels for at in self._columns[c.full_name]),
        )
