"""Count many frames at once: frames of one flow that only carry data are counted as one run (pure).

A bulk transfer of 100,000 frames a second has few flows. Frames that open or end a connection, DNS messages, and all
that is not plain TCP or UDP over IPv4 or IPv6 are counted one by one, in their order.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np

from phasewatch.telemetry.dns import DNS_PORT
from phasewatch.telemetry.flow_table import EXCHANGE_PAUSE_NS
from phasewatch.telemetry.headers import (
    ETHERTYPE_IPV4,
    ETHERTYPE_IPV6,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    TCP_FIN,
    TCP_RST,
    TCP_SYN,
    IpHeaders,
)
from phasewatch.telemetry.netflow import FlowCounter

__all__ = ["FrameBatch", "count_batch"]

_MIN_BATCH_FRAMES = 48  # fewer are counted faster one by one
_MIN_RUN_FRAMES = 3
_MIN_BYTES = 74  # Ethernet, IPv6 and TCP: the columns that are looked at
_KEY_WORDS = 5  # of 8 bytes: protocol, direction, version, ports, two addresses
# A guest cannot choose frames whose keys collide, because these factors differ in each process.
_FACTORS = np.array([secrets.randbits(64) | 1 for _ in range(_KEY_WORDS)], np.uint64)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameBatch:
    """Frames of one interface in the order in which they passed.

    Attributes:
        data: ``(n, w)`` uint8, the start of each frame from its Ethernet header; bytes behind `captured` are undefined.
        captured: ``(n,)`` int64, the captured bytes of each.
        sizes: ``(n,)`` int64, bytes of each whole frame.
        outgoing: ``(n,)`` bool, whether the guest sent it.
        t_ns: ``(n,)`` int64, when it passed, on a clock that does not step back.
    """

    data: np.ndarray
    captured: np.ndarray
    sizes: np.ndarray
    outgoing: np.ndarray
    t_ns: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)


def count_batch(counter: FlowCounter, batch: FrameBatch) -> None:
    """Count all frames of a batch, with the result of `FlowCounter.count_frame` for each.

    Only which flow is forgotten first may differ, once more flows are remembered than there is room for.
    """
    is_short = len(batch) < _MIN_BATCH_FRAMES or batch.data.shape[1] < _MIN_BYTES
    has_pause = len(batch) > 0 and int(np.ptp(batch.t_ns)) >= EXCHANGE_PAUSE_NS
    runs = [] if is_short or has_pause else _find_runs(batch)
    run_at = {int(run[0]): run for run in runs}
    is_single = np.ones(len(batch), bool)
    for run in runs:
        is_single[run] = False
    singles = np.flatnonzero(is_single)
    data, width = batch.data[singles].tobytes(), batch.data.shape[1]
    columns = (batch.captured, batch.outgoing, batch.sizes, batch.t_ns)
    rest = zip(singles.tolist(), *(column[singles].tolist() for column in columns), strict=True)
    first = sorted(run_at)
    for place, (at, captured, outgoing, size, t_ns) in enumerate(rest):
        while first and first[0] < at:
            _count_run(counter, batch, run_at[first.pop(0)])
        frame = data[place * width : place * width + captured]
        counter.count_frame(frame, outgoing, size, t_ns=t_ns)
    for at in first:
        _count_run(counter, batch, run_at[at])


def _count_run(counter: FlowCounter, batch: FrameBatch, run: np.ndarray) -> None:
    at = run[0]
    counter.count_run(
        _read_headers(batch.data[at].tobytes()), bool(batch.outgoing[at]), batch.sizes[run], batch.t_ns[run]
    )


def _read_headers(frame: bytes) -> IpHeaders:
    """Read the headers of a frame that `_find_runs` chose."""
    if frame[12] == 0x08:
        protocol, src, dst, at = frame[23], frame[26:30], frame[30:34], 34
    else:
        protocol, src, dst, at = frame[20], frame[22:38], frame[38:54], 54
    ports = (frame[at] << 8 | frame[at + 1], frame[at + 2] << 8 | frame[at + 3])
    return IpHeaders(protocol, src, dst, ports, 0, False, at)


def _find_runs(batch: FrameBatch) -> list[np.ndarray]:
    """Return the indices of the frames of each run, in ascending order."""
    rows, keys = _build_keys(batch)
    if not len(rows):
        return []
    hashes = (keys * _FACTORS).sum(axis=1, dtype=np.uint64)
    order = np.argsort(hashes, kind="stable")
    hashes, keys, rows = hashes[order], keys[order], rows[order]
    is_first = np.concatenate(([True], hashes[1:] != hashes[:-1]))
    starts = np.flatnonzero(is_first)
    if (keys != keys[starts[np.cumsum(is_first) - 1]]).any():  # two flows with one hash
        return []
    ends = np.append(starts[1:], len(rows))
    return [rows[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True) if b - a >= _MIN_RUN_FRAMES]


def _build_keys(batch: FrameBatch) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices ``(r,)`` of frames that may belong to a run, and the flow of each: ``(r, 5)`` uint64."""
    data = batch.data
    ethertype = _read_u16(data, 12)
    is_ipv4 = (ethertype == ETHERTYPE_IPV4) & (data[:, 14] == 0x45) & (data[:, 20] & 0x3F == 0) & (data[:, 21] == 0)
    is_ipv6 = (ethertype == ETHERTYPE_IPV6) & (data[:, 14] >> 4 == 6)
    rows = [
        _find_plain(batch, np.flatnonzero(is_ipv4), protocol_at=23, length_at=16, length_before=20, ports_at=34),
        _find_plain(batch, np.flatnonzero(is_ipv6), protocol_at=20, length_at=18, length_before=0, ports_at=54),
    ]
    index = np.concatenate(rows)
    keys = np.zeros((len(index), 8 * _KEY_WORDS), np.uint8)
    keys[:, 1] = batch.outgoing[index]
    for part, (version, protocol_at, address_at, address_bytes, ports_at) in zip(
        (slice(0, len(rows[0])), slice(len(rows[0]), None)), ((4, 23, 26, 8, 34), (6, 20, 22, 32, 54)), strict=True
    ):
        frames = data[index[part]]
        keys[part, 0], keys[part, 2] = frames[:, protocol_at], version
        keys[part, 4:8] = frames[:, ports_at : ports_at + 4]
        keys[part, 8 : 8 + address_bytes] = frames[:, address_at : address_at + address_bytes]
    return index, keys.view(np.uint64)


def _find_plain(
    batch: FrameBatch, index: np.ndarray, *, protocol_at: int, length_at: int, length_before: int, ports_at: int
) -> np.ndarray:
    """Return those frames that are TCP without SYN, FIN and RST, or UDP without DNS, with all of their headers."""
    frames = batch.data[index]
    protocol, length = frames[:, protocol_at], _read_u16(frames, length_at)
    is_tcp = protocol == PROTOCOL_TCP
    needed = np.where(is_tcp, 20, 8)
    is_data = frames[:, ports_at + 13] & (TCP_SYN | TCP_FIN | TCP_RST) == 0
    is_dns = (_read_u16(frames, ports_at) == DNS_PORT) | (_read_u16(frames, ports_at + 2) == DNS_PORT)
    is_plain = np.where(is_tcp, is_data, (protocol == PROTOCOL_UDP) & ~is_dns)
    is_plain &= batch.captured[index] >= ports_at + needed
    is_plain &= (length == 0) | (length >= length_before + needed)
    plain: np.ndarray = index[is_plain]
    return plain


def _read_u16(data: np.ndarray, at: int) -> np.ndarray:
    """Return the big-endian number at an offset of every frame, ``(n,)`` int64."""
    numbers: np.ndarray = data[:, at].astype(np.int64) << 8 | data[:, at + 1]
    return numbers
