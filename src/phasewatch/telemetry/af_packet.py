"""Capture the frames of all network cards of a running VM at its tap devices: the first choice for `netflow`.

A packet socket on each tap sees every frame, also beside vhost-net, which carries frames past QEMU, and for cards with
several queues. Nothing is added to the VM. Data that cannot be seen is None and reported, never zero: a card without a
tap, a tap that is replaced, frames that the kernel dropped, more frames than could be read, frames that cannot be
parsed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from phasewatch.errors import VmError
from phasewatch.telemetry.base import ReadingValues, build_missing_reading
from phasewatch.telemetry.capture import (
    CARD_CHECK_READINGS,
    MAX_CARDS,
    MAX_READ_CPU_NS,
    NETFLOW_FIELDS,
    PCI_CHECK_READINGS,
    NetworkNoticeCode,
    Readability,
    SourceNotice,
)
from phasewatch.telemetry.frame_batch import FrameBatch, count_batch
from phasewatch.telemetry.netflow import FlowCounter
from phasewatch.telemetry.network_cards import Nic, count_passthrough_cards, count_unplugged_cards, parse_network_cards
from phasewatch.telemetry.packet_socket import MAX_RING_BYTES, MIN_RING_BYTES, PacketSocket
from phasewatch.telemetry.process import PROC_ROOT
from phasewatch.telemetry.qmp import QmpMonitor
from phasewatch.telemetry.tap import TapDevice, TapFinder, find_cards_without_tap
from phasewatch.types import SourceKind

__all__ = ["FrameSocket", "PacketSource", "match_taps"]

_BATCH_FRAMES = 2048
_MAX_REST_BATCHES = 8  # of a socket that is closed
_RING_GROWTH = 4
_QUIET_READINGS = 20  # readings without a dropped frame before dropped frames are reported again: 10 s


class FrameSocket(Protocol):
    """What captures the frames of one interface; `PacketSocket`, or a fake."""

    ring_bytes: int

    def is_present(self) -> bool:
        """Return whether the interface still exists and has its name."""

    def has_frames(self) -> bool:
        """Return whether frames wait."""

    def take(self, limit: int) -> FrameBatch | None:
        """Return the next frames, at most `limit`; None if none waits."""

    def pop_drops(self) -> int:
        """Return how many frames were dropped since the last call."""

    def close(self) -> None:
        """Stop capturing."""


def open_packet_socket(device: TapDevice, ring_bytes: int) -> FrameSocket:
    """Open a packet socket on a device.

    Raises:
        OSError: If it cannot be opened.
    """
    return PacketSocket(device.name, from_guest_is_outgoing=device.is_macvtap, ring_bytes=ring_bytes)


def match_taps(cards: Sequence[Nic], devices: Collection[TapDevice]) -> tuple[TapDevice, ...]:
    """Return the device of every card.

    Raises:
        VmError: If there is no card, or one has no device, or it is unknown which.
    """
    if not cards:
        raise VmError("the VM has no network card that can be captured")
    if len(cards) > MAX_CARDS:
        raise VmError(f"at most {MAX_CARDS} cards are captured")
    named: list[TapDevice] = []
    unnamed: list[Nic] = []
    for card in cards:
        if card.kind != "tap":
            raise VmError(f"{card.netdev} has no tap: its backend is {card.kind}")
        own = [device for device in devices if card.fd in device.fds or card.ifname == device.name]
        if own:
            named.append(own[0])
        else:
            unnamed.append(card)
    rest = [device for device in devices if device not in named]
    if unnamed and len(rest) != len(unnamed):
        raise VmError(f"it is unknown which tap {unnamed[0].netdev} has")
    return tuple(dict.fromkeys([*named, *rest[: len(unnamed)]]))


class PacketSource:
    """Counts the frames of every network card of one VM at its taps.

    Args:
        pid: The QEMU process.
        monitor: A connected monitor, which lists the cards; None trusts the command line. The source leaves it open.
        proc: Path of /proc.
        open_socket: Opens the capture of one device with a ring of so many bytes.
    """

    source = SourceKind.NETFLOW

    def __init__(
        self,
        *,
        pid: int,
        monitor: QmpMonitor | None = None,
        proc: Path = PROC_ROOT,
        open_socket: Callable[[TapDevice, int], FrameSocket] = open_packet_socket,
    ) -> None:
        self._pid, self._monitor, self._proc, self._open_socket = pid, monitor, proc, open_socket
        self._sockets: dict[TapDevice, FrameSocket] = {}
        self._counter, self._readability = FlowCounter(), Readability()
        self._readings, self._n_behind, self._n_quiet = 0, 0, _QUIET_READINGS
        self._finder, self._devices = TapFinder(pid, proc), tuple[TapDevice, ...]()
        self._cards: tuple[Nic, ...] = ()
        self._passed_through, self._unplugged_seen = 0, 0
        self._reason = ""
        self._is_active = False
        self._notices: list[SourceNotice] = []

    async def open(self) -> None:
        """Find the taps and open a socket on each.

        Raises:
            VmError: If a card has no tap, or a tap cannot be opened.
        """
        await self._refresh(with_cards=True)
        self._notices.clear()
        if self._reason:
            await self.close()
            raise VmError(self._reason)
        self._is_active = True

    async def close(self) -> None:
        """Close the sockets."""
        self._is_active = False
        for socket in self._sockets.values():
            socket.close()
        self._sockets.clear()

    @property
    def unknown_fields(self) -> frozenset[str]:
        """Raw fields that cannot be read at present."""
        return NETFLOW_FIELDS if self._reason else self._counter.unknown_fields

    def describe(self) -> list[str]:
        """Return a message for each tap that is captured."""
        return [f"frames are captured at {device.name}, outside of the VM" for device in self._sockets]

    def pop_notices(self) -> list[SourceNotice]:
        """Return and clear the changes since the last call."""
        notices, self._notices = self._notices, []
        return notices

    async def read(self) -> ReadingValues:
        """Return one reading; None for every field unless it is certain that every frame was seen."""
        if not self._is_active:
            return build_missing_reading(self.source)
        self._readings += 1
        is_whole = self._read_frames()
        is_whole &= not self._has_drops()
        is_whole &= await self._verify_taps()
        reading = self._counter.pop_reading(time.monotonic_ns())
        self._notices.extend(self._readability.pop_notices(self._counter))
        return reading if is_whole and not self._reason else build_missing_reading(self.source)

    def _read_frames(self) -> bool:
        """Count new frames of all taps in turn; return whether all were read."""
        end_ns = time.thread_time_ns() + MAX_READ_CPU_NS
        turns = list(self._sockets.values())
        while turns:
            turns = [socket for socket in turns if self._count_frames(socket)]
            if time.thread_time_ns() >= end_ns:
                break
        is_behind = any(socket.has_frames() for socket in turns)
        self._n_behind = self._n_behind + 1 if is_behind else 0
        if self._n_behind == CARD_CHECK_READINGS:
            self._add_notice(
                NetworkNoticeCode.BEHIND,
                "more frames pass than can be read: the network is unknown until they are read",
            )
        return not is_behind

    def _count_frames(self, socket: FrameSocket) -> bool:
        """Count some frames; return whether more may wait."""
        batch = socket.take(_BATCH_FRAMES)
        if batch is None:
            return False
        count_batch(self._counter, batch)
        return True

    def _has_drops(self) -> bool:
        """Return whether the kernel dropped frames since the last reading; a ring that was too small is replaced."""
        total = 0
        for device, socket in self._sockets.items():
            drops = socket.pop_drops()
            total += drops
            if drops and socket.ring_bytes < MAX_RING_BYTES:
                with suppress(OSError):  # without memory for it, the present ring stays
                    self._sockets[device] = self._open_socket(
                        device, min(_RING_GROWTH * socket.ring_bytes, MAX_RING_BYTES)
                    )
                    socket.close()  # with its frames: this reading is unknown
        if total and self._n_quiet >= _QUIET_READINGS:
            self._add_notice(
                NetworkNoticeCode.LOST,
                f"the kernel dropped {total} frames, which came faster than they were read: the network is unknown",
            )
        self._n_quiet = 0 if total else self._n_quiet + 1
        return total > 0

    async def _verify_taps(self) -> bool:
        """Check that taps and cards are unchanged; return whether they are."""
        unplugged = self._monitor.events["DEVICE_DELETED"] if self._monitor is not None else 0
        is_gone = not all(socket.is_present() for socket in self._sockets.values())
        is_due = self._readings % CARD_CHECK_READINGS == 0
        if not (is_due or is_gone or unplugged != self._unplugged_seen):
            return True
        with_cards = unplugged != self._unplugged_seen or self._readings % PCI_CHECK_READINGS == 0
        if not (with_cards or is_gone or self._reason) and self._finder.is_unchanged():
            return True
        before = dict(self._sockets)
        self._unplugged_seen = unplugged
        await self._refresh(with_cards=with_cards)
        return self._sockets == before

    async def _refresh(self, *, with_cards: bool) -> None:
        """Find the taps of all cards, open a socket on each new one, and close those that are gone."""
        devices = self._finder.find()
        if self._monitor is not None and (with_cards or self._reason or devices != self._devices):
            with suppress(VmError, AttributeError, KeyError, TypeError):  # a silent monitor makes no frame invisible
                await self._refresh_cards(self._monitor)
        self._devices = devices
        before = self._reason
        try:
            wanted = self._choose_devices(devices)
            self._reason = ""
        except VmError as exc:
            self._reason, wanted = str(exc), ()
        for device in [d for d in self._sockets if d not in wanted and (wanted or d not in devices)]:
            self._count_rest(self._sockets.pop(device))
            self._add_notice(NetworkNoticeCode.CARD_GONE, f"the network card on {device.name} is gone")
        for device in wanted:
            self._open_device(device)
        if self._reason and self._reason != before:
            code = NetworkNoticeCode.UNWATCHED if self._devices or self._cards else NetworkNoticeCode.NO_CARD
            self._add_notice(code, f"the network is unknown: {self._reason}")

    async def _refresh_cards(self, monitor: QmpMonitor) -> None:
        """Update the list of cards from the monitor command ``info network`` and QMP ``query-pci``."""
        text = str(await monitor.ask("human-monitor-command", **{"command-line": "info network"}))
        self._cards = parse_network_cards(text)
        with suppress(VmError):  # a machine without PCI
            buses = await monitor.ask("query-pci")
            self._passed_through = count_passthrough_cards(buses, self._cards, count_unplugged_cards(text))

    def _choose_devices(self, devices: tuple[TapDevice, ...]) -> tuple[TapDevice, ...]:
        """Return the devices that carry the frames of all cards.

        Raises:
            VmError: If a card's frames cannot be captured.
        """
        if self._passed_through:
            raise VmError(f"{self._passed_through} network card(s) passed through from the host")
        if self._monitor is not None:
            return match_taps(self._cards, devices)
        if others := find_cards_without_tap(self._pid, self._proc):
            raise VmError(f"{', '.join(others)} has no tap")
        if not 0 < len(devices) <= MAX_CARDS:
            raise VmError(f"at most {MAX_CARDS} cards are captured" if devices else "the VM has no tap")
        return devices

    def _open_device(self, device: TapDevice) -> None:
        """Open a socket on a device, unless the present one still serves."""
        present = self._sockets.get(device)
        if present is not None and present.is_present():
            return
        if present is not None:
            self._count_rest(self._sockets.pop(device))
            self._add_notice(NetworkNoticeCode.LOST, f"frames of {device.name} were lost: the tap was replaced")
        try:
            if not device.is_macvtap and not self._shares_namespace():
                raise VmError(f"{device.name} is in another network namespace than this process")
            self._sockets[device] = self._open_socket(device, MIN_RING_BYTES)
        except VmError as exc:
            self._reason = str(exc)
        except PermissionError:
            self._reason = f"{device.name}: a packet socket needs CAP_NET_RAW, which this process does not have"
        except OSError as exc:
            self._reason = f"{device.name}: no packet socket could be opened: {exc.strerror}"
        else:
            if present is None:
                self._add_notice(NetworkNoticeCode.CARD_ADDED, f"new network card on {device.name}")

    def _count_rest(self, socket: FrameSocket) -> None:
        for _ in range(_MAX_REST_BATCHES):  # the reading in which a socket is closed is unknown anyway
            if not self._count_frames(socket):
                break
        socket.close()

    def _shares_namespace(self) -> bool:
        """Return whether the VM's process is in this process's network namespace, where its tap has its name."""
        try:
            here, there = ((self._proc / of / "ns" / "net").stat() for of in ("self", str(self._pid)))
        except OSError:
            return False
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)

    def _add_notice(self, code: NetworkNoticeCode, text: str) -> None:
        self._notices.append(SourceNotice(code=code, text=text))
