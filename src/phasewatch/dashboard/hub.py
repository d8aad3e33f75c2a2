"""Distribute events to viewers through one bounded log. Slow viewers never block others; dropped events are reported.

A viewer has no queue, only a position in the log, so two hundred viewers need no more memory than one.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass

import msgspec

from phasewatch.errors import BusyError
from phasewatch.events.schema import EventEnvelope, PerfEvent, PhaseEvent, TelemetryEvent, render_event

__all__ = ["HEARTBEAT_S", "EventHub", "HubEntry", "HubLimits", "HubViewer"]

HEARTBEAT_S = 2.0  # between two heartbeats, with or without events; a page follows the clock of the hub by them
_SEND_PAUSE_S = 0.05  # between two parts sent to one viewer, so that events are sent in batches
_RECONNECT_MS = 1000  # time until a browser reconnects
_DATA = b"data: "


@dataclass(frozen=True, slots=True, kw_only=True)
class HubLimits:
    """Limits of a hub.

    Attributes:
        events, log_bytes: Maximum size of the log.
        retained_scenes, retained_bytes: Number and size of the scenes whose newest event is kept beyond the log.
        viewers: Maximum number of viewers at the same time.
        part_bytes: Maximum size of one part sent to a viewer.
        rate_per_s, burst: Token bucket for the events of outside producers.
    """

    events: int = 4096
    log_bytes: int = 4 * 1024 * 1024
    retained_scenes: int = 2304  # two for each of 1,024 machines, and those of runs
    retained_bytes: int = 16 * 1024 * 1024
    viewers: int = 256
    part_bytes: int = 64 * 1024
    rate_per_s: float = 500.0
    burst: float = 2000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HubEntry:
    """One encoded event of the log.

    Attributes:
        number: Number of the event in this hub.
        kind: Its type, or the kind of a message of the dashboard.
        received_ms: When it was received, milliseconds since the epoch by the clock of the hub.
        frame: The event as viewers get it. Its id has the boot, the number and `received_ms`; the event itself stays as
            the producer sent it, because receivers refuse unknown fields.
    """

    number: int
    kind: str
    received_ms: int
    frame: bytes


@dataclass(slots=True, kw_only=True, eq=False)
class HubViewer:
    """Position of a viewer in the log.

    Attributes:
        seen: Number of the last event that was sent.
        gap: Encoded gap message that the viewer gets first; empty without a gap.
        catch_up: Newest events of the scenes that are older than the log.
    """

    seen: int
    gap: bytes = b""
    catch_up: tuple[HubEntry, ...] = ()


class EventHub:
    """Number the published events and stream them to every viewer in order.

    Args:
        boot: Identifies the numbering of this hub; a viewer with a number of another hub gets a gap.
        now_ns: Wall clock, nanoseconds since the epoch.
        monotonic: Monotonic clock for the rate limit, seconds.
        limits: Limits of the hub.
    """

    def __init__(
        self, *, boot: str, now_ns: Callable[[], int], monotonic: Callable[[], float], limits: HubLimits = HubLimits()
    ) -> None:
        self.limits = limits
        self._boot, self._now_ns, self._monotonic = boot, now_ns, monotonic
        self._log: deque[HubEntry] = deque()
        self._log_bytes = 0
        self._kept: OrderedDict[tuple[str, ...], HubEntry] = OrderedDict()
        self._kept_bytes = 0
        self._number = 0
        self._news = asyncio.Event()
        self._streaming: list[HubViewer] = []
        self._joined: set[HubViewer] = set()  # includes viewers whose stream has not started
        self._is_closed = False
        self._budget, self._budget_at = limits.burst, monotonic()

    @property
    def number(self) -> int:
        """Number of the newest event; 0 before the first."""
        return self._number

    @property
    def backlog(self) -> int:
        """Number of events that the slowest viewer has not received yet."""
        return max((self._number - viewer.seen for viewer in self._streaming), default=0)

    @property
    def viewers(self) -> int:
        """Number of viewers with a stream."""
        return len(self._streaming)

    def publish(self, event: EventEnvelope) -> None:
        """Publish an event; call this in the event loop of the hub."""
        self._append(event.type, _build_scene_key(event), render_event(event))

    def publish_note(self, kind: str, fields: Mapping[str, object], *, scene: tuple[str, ...] | None = None) -> None:
        """Publish a message of the dashboard itself, in order with the events.

        Args:
            kind: Kind of the message.
            fields: Its content.
            scene: Its scene, of which new viewers get the newest message; None if they do not need it.
        """
        key = None if scene is None else (kind, *scene)
        self._append(kind, key, msgspec.json.encode({"t_wall_ns": self._now_ns(), **fields}))

    def snapshot(self) -> tuple[str, list[tuple[str, int, bytes]]]:
        """Return the id of the newest event, and kind, `received_ms` and JSON line of each scene's newest, in order."""
        newest = sorted(self._kept.values(), key=lambda entry: entry.number)
        lines = [
            (entry.kind, entry.received_ms, entry.frame[entry.frame.index(_DATA) + len(_DATA) : -2]) for entry in newest
        ]
        return f"{self._boot}.{self._number}", lines

    def forget(self, scenes: Iterable[tuple[str, ...]]) -> None:
        """Forget the newest events of scenes, so that new viewers do not get them."""
        for scene in scenes:
            if (entry := self._kept.pop(scene, None)) is not None:
                self._kept_bytes -= len(entry.frame)

    def _append(self, kind: str, scene: tuple[str, ...] | None, line: bytes) -> None:
        self._number += 1
        received_ms = self._now_ns() // 1_000_000
        head = f"id: {self._boot}.{self._number}.{received_ms}\nevent: {kind}\n".encode()
        frame = head + _DATA + line + b"\n\n"
        entry = HubEntry(number=self._number, kind=kind, received_ms=received_ms, frame=frame)
        self._log.append(entry)
        self._log_bytes += len(frame)
        while len(self._log) > self.limits.events or self._log_bytes > self.limits.log_bytes:
            self._log_bytes -= len(self._log.popleft().frame)
        if scene is not None:
            self.forget((scene,))
            self._kept[scene] = entry
            self._kept_bytes += len(frame)
        while len(self._kept) > self.limits.retained_scenes or self._kept_bytes > self.limits.retained_bytes:
            self._kept_bytes -= len(self._kept.popitem(last=False)[1].frame)
        self._wake()

    def close(self) -> None:
        """End the streams of all viewers; call this in the event loop of the hub."""
        self._is_closed = True
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def admit(self, events: int) -> float:
        """Apply the rate limit to outside events.

        Args:
            events: Number of events.

        Returns:
            0 if the events are admitted, else the seconds after which to retry.
        """
        now = self._monotonic()
        self._budget = min(self.limits.burst, self._budget + (now - self._budget_at) * self.limits.rate_per_s)
        self._budget_at = now
        if events <= self._budget:
            self._budget -= events
            return 0.0
        return (events - self._budget) / self.limits.rate_per_s

    def join(self, last_id: str | None) -> HubViewer:
        """Register a viewer at the position after its last event, or at the start of the log.

        The viewer counts towards the limit until `leave` is called.

        Args:
            last_id: `Last-Event-ID` of the browser, or None on the first visit.

        Raises:
            BusyError: If the maximum number of viewers is reached.
        """
        if len(self._joined) >= self.limits.viewers:
            raise BusyError(f"the dashboard has {len(self._joined)} viewers, its maximum; close one")
        viewer = self._place_viewer(last_id)
        self._joined.add(viewer)
        return viewer

    def leave(self, viewer: HubViewer) -> None:
        """Unregister a viewer; a second call has no effect."""
        self._joined.discard(viewer)

    def _place_viewer(self, last_id: str | None) -> HubViewer:
        first = self._log[0].number if self._log else self._number + 1
        boot, digits = (*(last_id or "").split("."), "")[:2]
        seen = int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= 19 else -1
        if boot == self._boot and first - 1 <= seen <= self._number:
            return HubViewer(seen=seen)
        known = boot == self._boot and 0 <= seen < first
        gap = b""
        if last_id:
            reason = "events were missed while this page was disconnected" if known else "the dashboard was restarted"
            gap = self._render_hub_frame("gap", {"missed": first - 1 - seen if known else None, "why": reason})
        after = seen if known else 0
        older = tuple(entry for entry in self._kept.values() if after < entry.number < first)
        return HubViewer(seen=first - 1, gap=gap, catch_up=tuple(sorted(older, key=lambda e: e.number)))

    async def stream(self, viewer: HubViewer) -> AsyncIterator[bytes]:
        """Yield the events of a viewer as server-sent events, until it leaves or falls behind the log."""
        self._streaming.append(viewer)
        try:
            yield (
                f"retry: {_RECONNECT_MS}\n".encode()
                + self._render_hub_frame("hello", {"number": self._number})
                + viewer.gap
            )
            for entry in viewer.catch_up:
                yield entry.frame
            viewer.catch_up = ()
            beat_at = self._monotonic() + HEARTBEAT_S
            while not self._is_closed:
                news = self._news
                part, missed = self._next_part(viewer)
                if missed:
                    reason = "this page was too slow; it reconnects automatically"
                    yield self._render_hub_frame("dropped", {"missed": missed, "why": reason})
                    return
                if part:
                    yield part
                    await asyncio.sleep(_SEND_PAUSE_S)
                else:
                    try:
                        async with asyncio.timeout(max(0.0, beat_at - self._monotonic())):
                            await news.wait()
                    except TimeoutError:
                        beat_at = self._monotonic()
                if self._monotonic() >= beat_at:
                    yield self._render_hub_frame("beat", {"number": self._number})
                    beat_at = self._monotonic() + HEARTBEAT_S
        finally:
            self._streaming.remove(viewer)
            self.leave(viewer)

    def _next_part(self, viewer: HubViewer) -> tuple[bytes, int]:
        """Return the next part (at least one event if there are any) and the number of lost events before it."""
        if viewer.seen >= self._number:
            return b"", 0
        behind = self._number - viewer.seen
        if behind > len(self._log):
            return b"", behind - len(self._log)
        frames: list[bytes] = []
        size = 0
        for index in range(-behind, 0):  # from the end: access to the middle of a deque is slow
            entry = self._log[index]
            if frames and size + len(entry.frame) > self.limits.part_bytes:
                break
            frames.append(entry.frame)
            size += len(entry.frame)
            viewer.seen = entry.number
        return b"".join(frames), 0

    def _render_hub_frame(self, kind: str, fields: dict[str, object]) -> bytes:
        """Render a message of the hub; it has no id, so that it does not change the browser's Last-Event-ID."""
        line = msgspec.json.encode({"t_wall_ns": self._now_ns(), **fields})
        return f"event: {kind}\ndata: ".encode() + line + b"\n\n"


def _build_scene_key(event: EventEnvelope) -> tuple[str, ...]:
    """Return the key of the scene of an event; a new viewer gets the newest event of each scene."""
    data = event.data
    if isinstance(data, TelemetryEvent | PhaseEvent):
        return event.type, event.run, data.vm, data.host or ""
    if isinstance(data, PerfEvent):
        return event.type, data.process, data.vm or ""
    return event.type, event.run
