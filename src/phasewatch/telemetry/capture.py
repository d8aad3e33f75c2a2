"""Capture the frames of all network cards of a running VM through QEMU: the `netflow` source of a watch.

Each card has two packet dumps, one for each direction (QEMU object ``filter-dump``). Cards are listed again and again,
because they may come, go, or get another backend. Data that cannot be seen is None and reported, never zero: a card
that is not captured, a filter that is gone, frames that cannot be parsed, more frames than could be read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol, runtime_checkable

from phasewatch.errors import VmError
from phasewatch.telemetry.base import ReadingValues, build_missing_reading
from phasewatch.telemetry.netflow import FLOW_FIELDS, FlowCounter, NetflowReading
from phasewatch.telemetry.network_cards import Nic, count_passthrough_cards, count_unplugged_cards, parse_network_cards
from phasewatch.telemetry.pcap import INCOMING, MAX_UNREAD_BYTES, OUTGOING, ROTATE_BYTES, DumpFile, list_open_dumps
from phasewatch.telemetry.process import PROC_ROOT
from phasewatch.telemetry.qmp import QmpMonitor
from phasewatch.telemetry.tap import TapCounters, find_taps_by_fd
from phasewatch.telemetry.vnet_header import VnetHeaderFinder
from phasewatch.types import SourceKind

__all__ = [
    "CARD_CHECK_READINGS",
    "MAX_CARDS",
    "MAX_READ_CPU_NS",
    "NETFLOW_FIELDS",
    "PCI_CHECK_READINGS",
    "CaptureSource",
    "NetworkNoticeCode",
    "NetworkSource",
    "Readability",
    "SourceNotice",
    "build_filter_ids",
]

MAX_CARDS = 8
MAX_READ_BYTES = 6 << 20  # read at most at one tick, over all cards: half a second of 50,000 frames
MAX_READ_CPU_NS = 150_000_000  # CPU time for parsing at one tick, so that costly frames do not delay other sources
CARD_CHECK_READINGS = 4  # readings between two lists of the cards: 2 s
PCI_CHECK_READINGS = 20  # readings between two lists of the PCI buses: 10 s
NETFLOW_FIELDS = frozenset(NetflowReading._fields)


class NetworkNoticeCode(StrEnum):
    """Codes of network changes during a watch."""

    CARD_ADDED = "network-card-added"
    CARD_GONE = "network-card-gone"
    NO_CARD = "network-no-card"
    UNWATCHED = "network-card-unwatched"
    UNREADABLE = "network-frames-unreadable"
    READABLE = "network-frames-readable"
    BEHIND = "network-frames-unread"
    LOST = "network-frames-lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceNotice:
    """One change that a source reports.

    Attributes:
        code: What happened.
        text: The same for people.
    """

    code: NetworkNoticeCode
    text: str


@runtime_checkable
class NetworkSource(Protocol):
    """A source that knows which network fields it cannot read, and reports changes."""

    @property
    def unknown_fields(self) -> frozenset[str]:
        """Raw fields that cannot be read at present."""

    def pop_notices(self) -> list[SourceNotice]:
        """Return and clear the changes since the last call."""


def build_filter_ids(prefix: str) -> tuple[str, ...]:
    """Return the ids of all filters that a watcher may add to a VM.

    Args:
        prefix: Identity of the watcher, from `phasewatch.live.ownership.build_name_prefix`.
    """
    return tuple(f"{prefix}-{card}{side}{turn}" for card in range(MAX_CARDS) for side in "ab" for turn in "01")


class Readability:
    """Reports when most frames can no longer be parsed, and when they can again."""

    def __init__(self) -> None:
        self._is_unreadable = False

    def pop_notices(self, counter: FlowCounter) -> list[SourceNotice]:
        """Return the change since the last call, if there is one."""
        was_unreadable, self._is_unreadable = self._is_unreadable, bool(counter.unknown_fields)
        if self._is_unreadable == was_unreadable:
            return []
        if was_unreadable:
            return [SourceNotice(code=NetworkNoticeCode.READABLE, text="frames can be parsed again")]
        text = "most frames cannot be parsed: flows, ports and addresses are unknown"
        return [SourceNotice(code=NetworkNoticeCode.UNREADABLE, text=text)]


@dataclass(slots=True, kw_only=True)
class _CardCapture:
    """One card: its two dumps, or the tap whose counters replace them, or the reason why it is not captured."""

    nic: Nic
    finder: VnetHeaderFinder
    ids: tuple[str, ...]
    dumps: tuple[DumpFile, ...] = ()
    tap: str = ""
    reason: str = ""
    lost: set[str] = field(default_factory=set)  # ids of dumps that must be restarted
    waiting: set[str] = field(default_factory=set)  # ids of dumps whose last frame was incomplete at the last tick


class CaptureSource:
    """Counts the frames of every network card of one VM.

    Args:
        monitor: A connected monitor; the source leaves it open.
        folder: A private folder in memory, which the cleanup process removes.
        ids: Object ids that the cleanup process knows, from `build_filter_ids`.
        pid: The QEMU process.
        proc: Path of /proc.
    """

    source = SourceKind.NETFLOW

    def __init__(
        self, *, monitor: QmpMonitor, folder: Path, ids: Sequence[str], pid: int, proc: Path = PROC_ROOT
    ) -> None:
        self._monitor, self._folder, self._pid, self._proc = monitor, folder, pid, proc
        self._slots = [tuple(ids[i : i + 4]) for i in range(0, 4 * MAX_CARDS, 4)]
        self._cards: dict[str, _CardCapture] = {}
        self._passed_through = 0
        self._counter, self._taps = FlowCounter(), TapCounters(pid, proc)
        self._readings, self._unplugged_seen = 0, 0
        self._is_active = False
        self._is_answered = False  # whether the monitor listed the filters when it was last asked
        self._has_more, self._n_behind = False, 0
        self._readability = Readability()
        self._notices: list[SourceNotice] = []

    async def open(self) -> None:
        """Find the cards and add filters.

        Raises:
            VmError: If there is no card, or none can be captured.
        """
        await self._refresh_cards(with_pci=True)
        self._notices.clear()
        if not self._cards:
            raise VmError("the VM has no network card that can be captured")
        if not any(card.dumps or card.tap for card in self._cards.values()):
            raise VmError(next(iter(self._cards.values())).reason)
        self._taps.read(self._tap_names())
        self._is_active = True

    async def close(self) -> None:
        """Remove the filters and their files."""
        self._is_active = False
        for card in self._cards.values():
            for dump in card.dumps:
                await dump.stop()

    @property
    def open_filter_ids(self) -> tuple[str, ...]:
        """Ids of the filters that are in the VM now."""
        return tuple(dump.id for card in self._cards.values() for dump in card.dumps if dump.is_open)

    @property
    def unknown_fields(self) -> frozenset[str]:
        """Raw fields that cannot be read at present."""
        if not self._cards or self._describe_unwatched():
            return NETFLOW_FIELDS
        without_content = FLOW_FIELDS if any(card.tap for card in self._cards.values()) else frozenset()
        return without_content | self._counter.unknown_fields

    def describe(self) -> list[str]:
        """Return a message for each card that is captured, and for each that is not."""
        lines = []
        for card in self._cards.values():
            name = f"{card.nic.name or card.nic.model} on {card.nic.netdev}"
            if card.dumps:
                ids = " and ".join(dump.id for dump in card.dumps)
                lines.append(f"during the watch the VM contains the filters {ids} for {name}")
            elif card.tap:
                lines.append(f"{name}: only the counters of {card.tap} are read: {card.reason}")
        return lines + [f"not captured: {card}" for card in self._describe_unwatched()]

    def pop_notices(self) -> list[SourceNotice]:
        """Return and clear the changes since the last call."""
        notices, self._notices = self._notices, []
        return notices

    async def read(self) -> ReadingValues:
        """Return one reading; None for every field unless it is certain that every frame was seen."""
        if not self._is_active:
            return build_missing_reading(self.source)
        self._readings += 1
        is_quiet = self._read_dumps()
        is_whole = not any(card.lost for card in self._cards.values())
        is_whole &= not self._is_behind()
        is_whole &= await self._verify_filters(is_quiet=is_quiet)
        counters = self._counter.pop_reading(time.monotonic_ns())
        traffic = self._taps.read(self._tap_names())
        self._notices.extend(self._readability.pop_notices(self._counter))
        unknown = self.unknown_fields
        if not is_whole or traffic is None or unknown == NETFLOW_FIELDS:
            return build_missing_reading(self.source)
        tap_counters = (*traffic, *(0 for _ in FLOW_FIELDS))
        values = [None if n is None else n + more for n, more in zip(counters, tap_counters, strict=True)]
        return tuple(None if name in unknown else n for name, n in zip(NetflowReading._fields, values, strict=True))

    def _read_dumps(self) -> bool:
        """Read new frames from all dumps in turn; return whether a dump had nothing new."""
        left, is_quiet, is_first = MAX_READ_BYTES, False, True
        end_ns = 0  # of CPU time, which is not looked at before there is something to read
        turns = list(self._open_dumps())
        while turns and left > 0 and (is_first or time.thread_time_ns() < end_ns):
            unfinished = []
            for card, dump in turns:
                try:
                    n_bytes = dump.read_chunk(self._frame_counter(card, dump))
                except (OSError, ValueError):
                    card.lost.add(dump.ids[0])
                    continue
                left -= n_bytes
                if n_bytes:
                    end_ns = end_ns or time.thread_time_ns() + MAX_READ_CPU_NS
                    unfinished.append((card, dump))
                    card.waiting.discard(dump.ids[0])
                elif is_first:
                    is_quiet = True
                    if (
                        dump.has_partial_frame
                    ):  # frames are written whole: an incomplete one for a whole tick is an error
                        if dump.ids[0] in card.waiting:
                            card.lost.add(dump.ids[0])
                        card.waiting.add(dump.ids[0])
            turns, is_first = unfinished, False
        self._has_more = any(dump.unread_bytes() for _, dump in turns)
        return is_quiet

    def _frame_counter(self, card: _CardCapture, dump: DumpFile) -> Callable[[bytes, int], None]:
        counter, locate, outgoing = self._counter, card.finder.locate, dump.is_outgoing

        def count(frame: bytes, size: int) -> None:
            start, t_ns = locate(frame, size, outgoing=outgoing), dump.locate_frame(time.monotonic_ns())
            counter.count_frame(frame, outgoing, size, start=start, t_ns=t_ns)

        return count

    def _is_behind(self) -> bool:
        """Return whether frames wait that could not be read in time; a dump that is too far behind is restarted."""
        for card, dump in self._open_dumps():
            with suppress(OSError):
                if dump.unread_bytes() > MAX_UNREAD_BYTES // (2 * len(self._cards)):
                    card.lost.add(dump.ids[0])
        self._n_behind = self._n_behind + 1 if self._has_more else 0
        if self._n_behind == CARD_CHECK_READINGS:
            self._add_notice(
                NetworkNoticeCode.BEHIND,
                "more frames pass than can be read: the network is unknown until they are read",
            )
        return self._has_more

    async def _verify_filters(self, *, is_quiet: bool) -> bool:
        """Check that filters and cards are unchanged; return whether they are.

        A file looks the same without frames and without a filter. So at a tick without frames the filters are looked
        for: by QEMU's descriptors of the files, as long as the monitor answered the last query, else by a query.
        """
        unplugged = self._monitor.events["DEVICE_DELETED"]
        is_due = self._readings % CARD_CHECK_READINGS == 0 or any(card.lost for card in self._cards.values())
        is_due |= is_quiet and unplugged != self._unplugged_seen
        is_full = any(self._is_full(dump) for _, dump in self._open_dumps())
        if not (is_due or is_full) and (not is_quiet or (self._is_answered and self._are_dumps_written())):
            return True
        self._is_answered = False
        try:
            present = await self._list_filters()
        except VmError:
            return False
        self._is_answered = True
        for card, dump in self._open_dumps():
            if dump.id not in present:
                card.lost.add(dump.ids[0])
        has_lost = any(card.lost for card in self._cards.values())
        is_same = not has_lost
        if is_due or has_lost or unplugged != self._unplugged_seen:
            is_written = self._are_dumps_written()
            files = None if is_written else list_open_dumps(self._pid, self._folder, self._proc)
            for card, dump in self._open_dumps():
                if files is not None and not dump.find_writer(files):  # QEMU stops a dump when memory is full
                    card.lost.add(dump.ids[0])
                    is_same = False
            try:
                is_same &= await self._refresh_cards(with_pci=self._readings % PCI_CHECK_READINGS == 0)
            except VmError:
                return False
            self._unplugged_seen = unplugged
        await self._restart_dumps(present)
        return is_same

    def _are_dumps_written(self) -> bool:
        return all(dump.is_still_written() for _, dump in self._open_dumps())

    async def _list_filters(self) -> set[str]:
        """Return the ids of this watcher's filters in the VM, after removing those that are not read."""
        own = {name for slot in self._slots for name in slot}
        try:
            present = {child["name"] for child in await self._monitor.ask("qom-list", path="/objects")} & own
        except (KeyError, TypeError) as exc:
            raise VmError("the monitor returned no list of objects") from exc
        for name in present - {dump.id for _, dump in self._open_dumps()}:
            await self._monitor.ask("object-del", id=name)
        return present

    async def _restart_dumps(self, present: set[str]) -> None:
        """Restart lost and full dumps; frames between two filters, less than a millisecond, are not counted."""
        for card in self._cards.values():
            for dump in card.dumps:
                is_lost = dump.ids[0] in card.lost
                if not (is_lost or self._is_full(dump) or not dump.is_open):
                    continue
                was_open = dump.is_open
                if was_open and dump.id not in present:
                    dump.abandon()
                elif not await dump.stop(None if is_lost else self._frame_counter(card, dump)):
                    is_lost = True
                if is_lost and was_open:
                    self._add_notice(
                        NetworkNoticeCode.LOST,
                        f"frames of {card.nic.netdev} were lost: its filter was replaced",
                    )
                card.lost.discard(dump.ids[0])
                card.waiting.discard(dump.ids[0])
                try:
                    await dump.start()
                except VmError:  # tried again at the next tick; unknown until then
                    card.lost.add(dump.ids[0])

    async def _refresh_cards(self, *, with_pci: bool) -> bool:
        """Update the list of cards; return whether nothing changed.

        Source: monitor command ``info network``, and QMP ``query-pci`` for cards that the host passes through.
        """
        text = str(await self._monitor.ask("human-monitor-command", **{"command-line": "info network"}))
        nics = {nic.netdev: nic for nic in parse_network_cards(text)}
        is_same = nics.keys() == self._cards.keys()
        for netdev in [name for name in self._cards if name not in nics]:
            await self._remove_card(netdev)
        for netdev, nic in nics.items():
            if netdev in self._cards:
                self._cards[netdev].finder.add_macs([nic.mac])
                self._cards[netdev].nic = nic
            else:
                self._cards[netdev] = await self._add_card(nic)
                self._add_notice(NetworkNoticeCode.CARD_ADDED, f"new network card {nic.name} on {nic.netdev}")
                if self._cards[netdev].reason and not self._cards[netdev].tap:
                    self._add_notice(
                        NetworkNoticeCode.UNWATCHED, f"{nic.netdev} cannot be captured: {self._cards[netdev].reason}"
                    )
        if not is_same and not nics:
            self._add_notice(NetworkNoticeCode.NO_CARD, "the last network card is gone: the network is unknown")
        if with_pci:
            with suppress(VmError):  # a machine without PCI
                buses = await self._monitor.ask("query-pci")
                now = count_passthrough_cards(buses, tuple(nics.values()), count_unplugged_cards(text))
                if now > self._passed_through:
                    self._add_notice(
                        NetworkNoticeCode.UNWATCHED,
                        "a network card is passed through from the host: its frames are invisible",
                    )
                is_same &= now == self._passed_through
                self._passed_through = now
        return is_same

    async def _add_card(self, nic: Nic) -> _CardCapture:
        """Add a card, with filters, else with its tap, else with the reason why it is not captured."""
        slot = next(iter([s for s in self._slots if all(card.ids != s for card in self._cards.values())]), ())
        card = _CardCapture(nic=nic, finder=VnetHeaderFinder([nic.mac]), ids=slot)
        if not slot:
            card.reason = f"at most {MAX_CARDS} cards are captured"
            return card
        if nic.queues > 1:
            card.reason = f"QEMU cannot filter a card with {nic.queues} queues"
        else:
            dumps = [
                DumpFile(
                    monitor=self._monitor, netdev=nic.netdev, queue=queue, folder=self._folder, ids=(ids[0], ids[1])
                )
                for queue, ids in ((OUTGOING, slot[:2]), (INCOMING, slot[2:]))
            ]
            try:
                for dump in dumps:
                    await dump.start()
                card.dumps = tuple(dumps)
                return card
            except VmError as exc:
                card.reason = str(exc)
                for dump in dumps:
                    await dump.stop()
            except BaseException:  # `_list_filters` removes filters without a dump
                for dump in dumps:
                    dump.abandon()
                raise
        card.tap = self._find_tap(nic)
        return card

    def _find_tap(self, nic: Nic) -> str:
        """Return the name of a card's tap device; empty if unknown."""
        taps = find_taps_by_fd(self._pid, self._proc)
        if nic.ifname or nic.fd in taps:
            return nic.ifname or taps[nic.fd]
        free = set(taps.values()) - set(self._tap_names())
        return free.pop() if nic.kind == "tap" and len(free) == 1 else ""

    async def _remove_card(self, netdev: str) -> None:
        card = self._cards.pop(netdev)
        for dump in card.dumps:
            await dump.stop(self._frame_counter(card, dump))
        self._add_notice(NetworkNoticeCode.CARD_GONE, f"the network card on {netdev} is gone")

    def _open_dumps(self) -> Iterator[tuple[_CardCapture, DumpFile]]:
        return ((card, dump) for card in self._cards.values() for dump in card.dumps if dump.is_open)

    def _is_full(self, dump: DumpFile) -> bool:
        return dump.read_bytes >= ROTATE_BYTES // (2 * len(self._cards))

    def _tap_names(self) -> list[str]:
        return [card.tap for card in self._cards.values() if card.tap]

    def _describe_unwatched(self) -> list[str]:
        unwatched = [f"{c.nic.netdev}: {c.reason}" for c in self._cards.values() if not c.dumps and not c.tap]
        if self._passed_through:
            unwatched.append(f"{self._passed_through} network card(s) passed through from the host")
        return unwatched

    def _add_notice(self, code: NetworkNoticeCode, text: str) -> None:
        self._notices.append(SourceNotice(code=code, text=text))
