"""One bounded log of events, and viewers who read along in it: nobody waits for a slow one, nobody loses anything unsaid.

A viewer has no queue of its own, only a place in the log. Two hundred of them cost no more memory than one.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import msgspec

from phasewatch.errors import BusyError
from phasewatch.events.schema import EventEnvelope, PerfEvent, PhaseEvent, TelemetryEvent, render_event

HEARTBEAT_S = 2.0  # silence after which a viewer is told that the hub lives
SEND_PAUSE_S = 0.05  # between two parts sent to one viewer: what comes meanwhile goes along
RECONNECT_MS = 1000  # after which a browser that lost its stream comes back


@dataclass(frozen=True, slots=True, kw_only=True)
class HubLimits:
    """What a hub holds and lets in.

    Attributes:
        events, log_bytes: Of the log.
        retained_scenes: Scenes whose newest event outlives the log.
        viewers: At the same time.
        part_bytes: Sent to a viewer in one go.
        rate_per_s, burst: Events that outside producers may send.
    """

    events: int = 4096
    log_bytes: int = 4 * 1024 * 1024
    retained_scenes: int = 128
    viewers: int = 256
    part_bytes: int = 64 * 1024
    rate_per_s: float = 500.0
    burst: float = 2000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HubEntry:
    """One event of the log, as it is sent."""

    number: int
    scene: tuple[str, ...]
    frame: bytes


@dataclass(slots=True, kw_only=True, eq=False)
class HubViewer:
    """A place in the log: the number of the last event that this viewer was given."""

    seen: int
    gap: bytes = b""
    catch_up: tuple[HubEntry, ...] = ()


class EventHub:
    """Takes events, numbers them, and hands them to every viewer in order.

    Args:
        boot: Names this hub's numbers; a viewer who comes with another hub's is told of a gap.
        now_ns: The wall clock.
        monotonic: Seconds, for the rate limit.
        limits: What it holds and lets in.
    """

    def __init__(
        self, *, boot: str, now_ns: Callable[[], int], monotonic: Callable[[], float], limits: HubLimits = HubLimits()
    ) -> None:
        self.limits = limits
        self._boot, self._now_ns, self._monotonic = boot, now_ns, monotonic
        self._log: deque[HubEntry] = deque()
        self._log_bytes = 0
        self._kept: OrderedDict[tuple[str, ...], HubEntry] = OrderedDict()
        self._number = 0
        self._news = asyncio.Event()
        self._looking: list[HubViewer] = []
        self._joined: set[HubViewer] = set()  # who has a place, streaming already or not yet
        self._is_closed = False
        self._budget, self._budget_at = limits.burst, monotonic()

    @property
    def number(self) -> int:
        """Of the newest event; 0 before the first."""
        return self._number

    @property
    def backlog(self) -> int:
        """How many events the slowest viewer has still to be given."""
        return max((self._number - viewer.seen for viewer in self._looking), default=0)

    @property
    def viewers(self) -> int:
        """How many look on."""
        return len(self._looking)

    def publish(self, event: EventEnvelope) -> None:
        """Take an event; call it in the hub's own loop."""
        self._number += 1
        frame = self._render_frame(event.type, render_event(event), self._number)
        entry = HubEntry(number=self._number, scene=_build_scene_key(event), frame=frame)
        self._log.append(entry)
        self._log_bytes += len(frame)
        while len(self._log) > self.limits.events or self._log_bytes > self.limits.log_bytes:
            self._log_bytes -= len(self._log.popleft().frame)
        self._kept[entry.scene] = entry
        self._kept.move_to_end(entry.scene)
        if len(self._kept) > self.limits.retained_scenes:
            self._kept.popitem(last=False)
        self._wake()

    def close(self) -> None:
        """End every viewer's stream; call it in the hub's own loop."""
        self._is_closed = True
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def admit(self, events: int) -> float:
        """Let so many outside events in: 0 if they may pass, else the seconds after which to try again."""
        now = self._monotonic()
        self._budget = min(self.limits.burst, self._budget + (now - self._budget_at) * self.limits.rate_per_s)
        self._budget_at = now
        if events <= self._budget:
            self._budget -= events
            return 0.0
        return (events - self._budget) / self.limits.rate_per_s

    def join(self, last_id: str | None) -> HubViewer:
        """Give a viewer its place: after the last event that it saw, or at what the hub remembers.

        The place is taken from now on; `leave` gives it back.

        Args:
            last_id: The browser's `Last-Event-ID`, None on a first visit.

        Raises:
            BusyError: If there are too many.
        """
        if len(self._joined) >= self.limits.viewers:
            raise BusyError(f"{len(self._joined)} viewers look on already; close one")
        viewer = self._place_viewer(last_id)
        self._joined.add(viewer)
        return viewer

    def leave(self, viewer: HubViewer) -> None:
        """Release a viewer's place; a second call does nothing."""
        self._joined.discard(viewer)

    def _place_viewer(self, last_id: str | None) -> HubViewer:
        first = self._log[0].number if self._log else self._number + 1
        boot, _, digits = (last_id or "").partition(".")
        seen = int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= 19 else -1
        if boot == self._boot and first - 1 <= seen <= self._number:
            return HubViewer(seen=seen)
        known = boot == self._boot and 0 <= seen < first
        gap = b""
        if last_id:
            why = "events passed while this page was away" if known else "the dashboard was started anew"
            gap = self._render_hub_frame("gap", {"missed": first - 1 - seen if known else None, "why": why})
        after = seen if known else 0
        older = tuple(entry for entry in self._kept.values() if after < entry.number < first)
        return HubViewer(seen=first - 1, gap=gap, catch_up=tuple(sorted(older, key=lambda e: e.number)))

    async def stream(self, viewer: HubViewer) -> AsyncIterator[bytes]:
        """Give a viewer its events, as server-sent ones, until it leaves or falls out of the log."""
        self._looking.append(viewer)
        try:
            yield (
                f"retry: {RECONNECT_MS}\n".encode()
                + self._render_hub_frame("hello", {"number": self._number})
                + viewer.gap
            )
            for entry in viewer.catch_up:
                yield entry.frame
            viewer.catch_up = ()
            while not self._is_closed:
                news = self._news
                part, missed = self._next_part(viewer)
                if missed:
                    words = "this page was too slow to follow; it comes back by itself"
                    yield self._render_hub_frame("dropped", {"missed": missed, "why": words})
                    return
                if part:
                    yield part
                    await asyncio.sleep(SEND_PAUSE_S)
                    continue
                try:
                    async with asyncio.timeout(HEARTBEAT_S):
                        await news.wait()
                except TimeoutError:
                    yield self._render_hub_frame("beat", {"number": self._number})
        finally:
            self._looking.remove(viewer)
            self.leave(viewer)

    def _next_part(self, viewer: HubViewer) -> tuple[bytes, int]:
        """Give what comes next, at least one event, and how many are lost before it."""
        if viewer.seen >= self._number:
            return b"", 0
        behind = self._number - viewer.seen
        if behind > len(self._log):
            return b"", behind - len(self._log)
        frames: list[bytes] = []
        size = 0
        for place in range(-behind, 0):  # from the end: a deque's middle is far from both
            entry = self._log[place]
            if frames and size + len(entry.frame) > self.limits.part_bytes:
                break
            frames.append(entry.frame)
            size += len(entry.frame)
            viewer.seen = entry.number
        return b"".join(frames), 0

    def _render_frame(self, kind: str, line: bytes, number: int) -> bytes:
        return f"id: {self._boot}.{number}\nevent: {kind}\ndata: ".encode() + line + b"\n\n"

    def _render_hub_frame(self, kind: str, facts: dict[str, object]) -> bytes:
        """Frame a word of the hub itself; it has no number, so that a browser does not take it for its last event."""
        line = msgspec.json.encode({"t_wall_ns": self._now_ns(), **facts})
        return f"event: {kind}\ndata: ".encode() + line + b"\n\n"


def _build_scene_key(event: EventEnvelope) -> tuple[str, ...]:
    """Name what an event's successor replaces: the newest of each is shown to whoever comes late."""
    data = event.data
    if isinstance(data, TelemetryEvent | PhaseEvent):
        return event.type, data.vm
    if isinstance(data, PerfEvent):
        return event.type, data.process, data.vm or ""
    return event.type, event.run
