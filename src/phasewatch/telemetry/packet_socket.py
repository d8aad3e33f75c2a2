"""Capture the frames of one network interface by a packet socket: kernel filter, memory-mapped ring, counted drops.

The ring has the layout TPACKET_V2: slots of one size, which the kernel fills and this process empties. A reading is
exact at the tick (TPACKET_V3 holds frames back until a block is full or a timer fires, and runs that timer for an idle
VM too), and idle time costs three system calls a tick.

Source: packet(7), and the kernel's ``Documentation/networking/packet_mmap.rst`` and ``include/uapi/linux/if_packet.h``.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import struct
import time
from array import array
from contextlib import suppress
from fcntl import ioctl

import numpy as np
from numpy.lib.stride_tricks import as_strided

from phasewatch.telemetry.frame_batch import FrameBatch

__all__ = [
    "BLOCK_BYTES",
    "LONG_SNAP_BYTES",
    "MAX_RING_BYTES",
    "MIN_RING_BYTES",
    "SHORT_SNAP_BYTES",
    "SLOTS_PER_BLOCK",
    "SLOT_BYTES",
    "PacketRing",
    "PacketSocket",
    "build_snap_filter",
]

SHORT_SNAP_BYTES = 96  # holds Ethernet, IPv4 without options or IPv6, and the first 20 bytes of TCP
LONG_SNAP_BYTES = 256  # as for `pcap`: for DNS questions, IPv4 options, extension headers, tags, unknown types
# 1560 frames a tick; a ring that overflows is replaced by a larger one. Its memory counts as this process's.
MIN_RING_BYTES = 8 * 65536
MAX_RING_BYTES = 320 * 65536  # 62,400 frames a tick
BLOCK_BYTES = 65536
SLOT_BYTES = 336  # 66 bytes before the frame (headers of the slot), `LONG_SNAP_BYTES`, rounded up to 16
SLOTS_PER_BLOCK = BLOCK_BYTES // SLOT_BYTES

_SOL_PACKET, _PACKET_RX_RING, _PACKET_STATISTICS, _PACKET_VERSION, _TPACKET_V2 = 263, 5, 6, 10, 1
_SO_ATTACH_FILTER, _SIOCGIFINDEX, _ETH_P_ALL = 26, 0x8933, 3
_STATUS_KERNEL, _STATUS_USER, _STATUS_VLAN_VALID = 0, 1, 1 << 4
_PACKET_OUTGOING = 4
_VLAN_TAG_BYTES = 4
_MAX_WAIT_NS = 3_000_000_000  # between a frame and its reading; another stamp is no time of reception
_STATISTICS = struct.Struct("II")  # tp_packets, tp_drops
# `struct tpacket2_hdr`, then `struct sockaddr_ll` at offset 32.
_SLOT_TYPE = np.dtype({
    "names": ["status", "size", "captured", "mac", "seconds", "nanoseconds", "packet_type"],
    "formats": ["u4", "u4", "u4", "u2", "u4", "u4", "u1"],
    "offsets": [0, 4, 8, 12, 16, 20, 42],
    "itemsize": SLOT_BYTES,
})  # fmt: skip

# Classic BPF, `include/uapi/linux/bpf_common.h`.
_LOAD_LENGTH, _LOAD_HALF, _LOAD_BYTE, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _RETURN = 0x80, 0x28, 0x30, 0x15, 0x35, 0x06
_MIN_FILTERED_BYTES = 58  # up to the UDP port of IPv6; a filter that loads a byte behind the frame discards the frame


def build_snap_filter() -> tuple[tuple[int, int, int, int], ...]:
    """Return a classic BPF program that keeps every frame, cut to the bytes that the raw fields of `netflow` need.

    `SHORT_SNAP_BYTES` where that surely suffices: TCP, UDP and ICMP right behind plain IPv4 or IPv6, and ARP.
    `LONG_SNAP_BYTES` otherwise, and for UDP to port 53, because the name of a DNS question is behind the headers.

    Returns:
        Instructions of (code, jump if true, jump if false, operand), where a jump counts the instructions to skip.
    """
    program: list[tuple[int, str, str, int]] = [
        (_LOAD_LENGTH, "", "", 0),
        (_JUMP_GREATER_EQUAL, "", "long", _MIN_FILTERED_BYTES),
        (_LOAD_HALF, "", "", 12),  # Ethernet type; the kernel has removed the first VLAN tag
        (_JUMP_EQUAL, "ipv4", "", 0x0800),
        (_JUMP_EQUAL, "ipv6", "", 0x86DD),
        (_JUMP_EQUAL, "short", "long", 0x0806),
        (_LOAD_BYTE, "", "", 14),
        (_JUMP_EQUAL, "", "long", 0x45),  # no options
        (_LOAD_BYTE, "", "", 23),
        (_JUMP_EQUAL, "udp4", "", 17),
        (_JUMP_EQUAL, "long", "short", 51),  # AH
        (_LOAD_HALF, "", "", 36),  # destination port
        (_JUMP_EQUAL, "long", "short", 53),
        (_LOAD_BYTE, "", "", 20),
        (_JUMP_EQUAL, "short", "", 6),
        (_JUMP_EQUAL, "short", "", 58),
        (_JUMP_EQUAL, "", "long", 17),
        (_LOAD_HALF, "", "", 56),
        (_JUMP_EQUAL, "long", "short", 53),
        (_RETURN, "", "", SHORT_SNAP_BYTES),
        (_RETURN, "", "", LONG_SNAP_BYTES),
    ]
    labels = {"ipv4": 6, "udp4": 11, "ipv6": 13, "short": 19, "long": 20}
    return tuple(
        (code, labels.get(yes, at + 1) - at - 1, labels.get(no, at + 1) - at - 1, operand)
        for at, (code, yes, no, operand) in enumerate(program)
    )


class PacketRing:
    """Reads frames from the memory of a ring, which this process shares with the kernel.

    Args:
        memory: The mapped ring, a multiple of `BLOCK_BYTES`.
    """

    def __init__(self, memory: mmap.mmap | bytearray) -> None:
        flat = np.frombuffer(memory, np.uint8)
        blocks = len(flat) // BLOCK_BYTES
        self._slots = as_strided(flat, (blocks, SLOTS_PER_BLOCK, SLOT_BYTES), (BLOCK_BYTES, SLOT_BYTES, 1))
        self._status = as_strided(flat.view(np.uint32), (blocks, SLOTS_PER_BLOCK), (BLOCK_BYTES, SLOT_BYTES))
        self._at, self._n_slots = 0, blocks * SLOTS_PER_BLOCK

    def count_ready(self, limit: int) -> int:
        """Return how many frames can be taken at once now, up to `limit`."""
        block, slot = divmod(self._at, SLOTS_PER_BLOCK)
        if not self._status[block, slot] & _STATUS_USER:
            return 0
        is_filled = self._status[self._index(min(limit, self._n_slots - self._at))] & _STATUS_USER
        return len(is_filled) if is_filled.all() else int(is_filled.argmin())

    def take(self, count: int, *, from_guest_is_outgoing: bool, now_ns: int, wall_ns: int) -> FrameBatch:
        """Return the next frames, and give their slots back to the kernel.

        Args:
            count: Number of frames, at least 1 and at most `count_ready`.
            from_guest_is_outgoing: Whether the interface transmits what the guest sends (macvtap), else it receives it.
            now_ns: The time now, on the clock of the result.
            wall_ns: The time now, as Unix time, on which the kernel stamps frames.
        """
        index = self._index(count)
        rows = self._slots[index]  # a copy
        heads = rows.view(_SLOT_TYPE)[:, 0]
        same = heads["mac"] == heads["mac"][0]  # the offset of the frame in its slot: the same for one interface
        if not same.all():
            count = int(same.argmin())
            index, rows, heads = self._index(count), rows[:count], heads[:count]
        self._status[index] = _STATUS_KERNEL
        self._at = (self._at + count) % self._n_slots
        data = rows[:, int(heads["mac"][0]) :]
        stamps = heads["seconds"].astype(np.int64) * 1_000_000_000 + heads["nanoseconds"] + (now_ns - wall_ns)
        is_time = (stamps <= now_ns) & (stamps > now_ns - _MAX_WAIT_NS)
        has_tag = (heads["status"] & _STATUS_VLAN_VALID) != 0
        return FrameBatch(
            data=data,
            captured=np.minimum(heads["captured"], data.shape[1]).astype(np.int64),
            sizes=heads["size"].astype(np.int64) + _VLAN_TAG_BYTES * has_tag,
            outgoing=(heads["packet_type"] == _PACKET_OUTGOING) == from_guest_is_outgoing,
            t_ns=np.where(is_time, stamps, now_ns),
        )

    def _index(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the block and the slot of the next slots; `count` must not reach beyond the end of the ring."""
        blocks, slots = np.divmod(np.arange(self._at, self._at + count), SLOTS_PER_BLOCK)
        return blocks, slots


class PacketSocket:
    """Captures the frames of one interface from its opening on; the interface need not be up.

    Args:
        name: Name of the interface, in this process's network namespace.
        from_guest_is_outgoing: Whether the interface transmits what the guest sends (macvtap). A tap receives it.
        ring_bytes: Size of the ring.

    Attributes:
        index: Index of the interface, which a later interface of that name does not share.

    Raises:
        PermissionError: If this process lacks ``CAP_NET_RAW``.
        OSError: If there is no such interface, or no memory for the ring.
    """

    def __init__(self, name: str, *, from_guest_is_outgoing: bool = False, ring_bytes: int = MIN_RING_BYTES) -> None:
        self.name, self.ring_bytes = name, ring_bytes
        self._is_reversed = from_guest_is_outgoing
        self._ring = _NO_RING
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)  # 0: no frames yet
        try:
            self._map_ring(ring_bytes)
            self._attach_filter()
            self.index = self._read_index()
            self._socket.bind((name, _ETH_P_ALL))
            if not self.index or self._read_index() != self.index:
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Close the socket and unmap the ring; may be called twice."""
        self._ring = _NO_RING  # drops its views of the memory
        self._memory.close()
        self._socket.close()

    def is_present(self) -> bool:
        """Return whether the interface still exists and has its name."""
        return self._read_index() == self.index

    def has_frames(self) -> bool:
        """Return whether frames wait."""
        return self._ring.count_ready(1) > 0

    def take(self, limit: int) -> FrameBatch | None:
        """Return the next frames, at most `limit`; None if none waits."""
        count = self._ring.count_ready(limit)
        if not count:
            return None
        self._read_index()  # a system call: no processor reads the frames before the states that show them as filled
        now_ns, wall_ns = time.monotonic_ns(), time.time_ns()
        return self._ring.take(count, from_guest_is_outgoing=self._is_reversed, now_ns=now_ns, wall_ns=wall_ns)

    def pop_drops(self) -> int:
        """Return how many frames the kernel dropped since the last call, because the ring was full."""
        _, drops = _STATISTICS.unpack(self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, _STATISTICS.size))
        return int(drops)

    def _map_ring(self, ring_bytes: int) -> None:
        blocks = ring_bytes // BLOCK_BYTES
        self._socket.setsockopt(_SOL_PACKET, _PACKET_VERSION, _TPACKET_V2)
        request = struct.pack("4I", BLOCK_BYTES, blocks, SLOT_BYTES, blocks * SLOTS_PER_BLOCK)
        self._socket.setsockopt(_SOL_PACKET, _PACKET_RX_RING, request)
        self._memory = mmap.mmap(self._socket.fileno(), blocks * BLOCK_BYTES)
        self._ring = PacketRing(self._memory)

    def _attach_filter(self) -> None:
        """Attach the filter before the socket is bound, so that it sees every frame (``struct sock_fprog``)."""
        program = build_snap_filter()
        code = array("B", b"".join(struct.pack("HBBI", *instruction) for instruction in program))
        address, _ = code.buffer_info()
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(program), address))

    def _read_index(self) -> int:
        """Return the index of the interface of this name in the socket's namespace; 0 if there is none."""
        with suppress(OSError):
            answer = ioctl(self._socket, _SIOCGIFINDEX, struct.pack("16sI20x", self.name.encode(), 0))
            return int(struct.unpack("16sI20x", answer)[1])
        return 0


_NO_RING = PacketRing(bytearray(BLOCK_BYTES))
