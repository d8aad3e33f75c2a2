"""Notice when a source, or some of its channels, gives nothing any more, and when it is back (pure)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from phasewatch.channels import CHANNELS, list_raw_fields
from phasewatch.telemetry.base import N_STAMPS, ReadingRow
from phasewatch.types import ChannelTrust, SourceKind

SILENCE_TIMEOUT_NS = (
    3_000_000_000  # without any reading of a field; the bins of such a channel are unknown from 2.5 s on
)
GUEST_SILENCE_TIMEOUT_NS = 20_000_000_000  # of one that the guest reports when it likes


@dataclass(frozen=True, slots=True, kw_only=True)
class SilenceNote:
    """Channels of one source that give nothing any more, or give readings again.

    Attributes:
        channels: Full names.
        is_back: Whether they give readings again.
        is_whole: Whether they are all that the source gives here.
        was_never: Whether none of them was ever read.
    """

    source: SourceKind
    channels: tuple[str, ...]
    is_back: bool
    is_whole: bool
    was_never: bool

    @property
    def state(self) -> str:
        """What stands among the states of a watch, such as ``proc silent``."""
        return f"{self.source} {'back' if self.is_back else 'silent' if self.is_whole else 'partly silent'}"

    @property
    def text(self) -> str:
        """A line for people."""
        names = str(self.source) if self.is_whole else ", ".join(self.channels)
        if self.is_back:
            return f"{names}: readings again"
        return f"{names}: no reading came yet" if self.was_never else f"{names}: no readings any more"


class SilenceDetector:
    """Follows when each raw field of each source was last read.

    Args:
        sources: Those that are read.
        masked: Channels that this VM cannot give.
        mono_ns: When it begins.
    """

    def __init__(self, sources: Collection[SourceKind], masked: Collection[str], mono_ns: int) -> None:
        kept = [c for c in CHANNELS if c.source in sources and c.full_name not in masked]
        self._channels = {c.full_name: c for c in kept}
        self._places = {
            (source, spec.field): at
            for source in sources
            for at, spec in enumerate(list_raw_fields(source), start=N_STAMPS)
        }
        self._seen_ns = dict.fromkeys(self._places, mono_ns)
        self._silent: set[str] = set()
        self._read: set[tuple[SourceKind, str]] = set()

    def add_row(self, source: SourceKind, row: ReadingRow) -> None:
        """Add one reading."""
        now_ns = int(row[1] or 0)
        for spec in list_raw_fields(source):
            key = source, spec.field
            if key in self._places and row[self._places[key]] is not None:
                self._seen_ns[key] = now_ns
                self._read.add(key)

    def pause(self, mono_ns: int) -> None:
        """Expect nothing of the guest until now: it does not run."""
        for channel in self._channels.values():
            if channel.trust is ChannelTrust.GUEST:
                for field in channel.fields:
                    self._seen_ns[channel.source, field] = mono_ns

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
        return mono_ns - min(self._seen_ns[channel.source, field] for field in channel.fields) > limit_ns

    def _build_note(self, source: SourceKind, names: set[str], *, is_back: bool, is_whole: bool) -> SilenceNote:
        channels = [channel for name, channel in self._channels.items() if name in names]
        return SilenceNote(
            source=source, channels=tuple(c.full_name for c in channels), is_back=is_back, is_whole=is_whole,
            was_never=not any((source, field) in self._read for c in channels for field in c.fields),
        )  # fmt: skip
