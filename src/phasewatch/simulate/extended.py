"""Simulate the raw fields of the extended channels from the activity and the base counters of an episode."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import list_raw_fields
from phasewatch.simulate.generator import TICK_S
from phasewatch.types import SourceKind

__all__ = ["CounterColumns", "simulate_destinations", "simulate_monitor_sensors"]

# Raw field → ``(n,)`` readings, int64 or float64.
CounterColumns = dict[str, NDArray[np.int64] | NDArray[np.float64]]

_CLUSTER_BYTES = 1 << 16
_MIB = 1 << 20


def simulate_monitor_sensors(
    rng: np.random.Generator, a: dict[str, NDArray[np.float64]], qmp: CounterColumns
) -> CounterColumns:
    """Simulate what `telemetry.monitor_sensors` reads, for a host without KVM.

    Args:
        rng: Random generator of the extended fields.
        a: Rate name → ``(n,)`` float64 rates per second.
        qmp: The base fields of the monitor.
    """
    n = len(a["cpu"])
    reads, writes, flushes = (_count_steps(qmp[name]) for name in ("blk_rd_ops", "blk_wr_ops", "blk_flush_ops"))
    clusters = np.minimum(writes, _count_steps(qmp["blk_wr_bytes"]) // _CLUSTER_BYTES + (writes > 0))
    made: CounterColumns = {
        "blk_rd_ns": np.cumsum((reads * 1.5e5 * rng.uniform(0.5, 1.5, n)).astype(np.int64)),
        "blk_merged": np.cumsum(rng.binomial(reads + writes, 0.1)),
        "blk_flush_ns": np.cumsum((flushes * 2e6 * rng.uniform(0.5, 1.5, n)).astype(np.int64)),
        "blk_clusters": np.cumsum(clusters),
        "blk_rewritten": np.cumsum(rng.binomial(clusters, 0.3)),
        "mem_dirty_rate": ((a["touched"] + a["cpu"] * 2e7) // _MIB).astype(np.int64) * _MIB,
    }
    unread = {spec.field: np.full(n, -1, np.int64) for spec in list_raw_fields(SourceKind.QMP) if "kvm" in spec.field}
    return made | unread


def simulate_destinations(
    rng: np.random.Generator, packets: NDArray[np.float64], netflow: CounterColumns
) -> CounterColumns:
    """Simulate what `telemetry.flow_table` and `telemetry.dns` count.

    Args:
        rng: Random generator of the extended fields.
        packets: ``(8, n)`` float64 counts per tick, as `counters` has them.
        netflow: The base fields of the network card.
    """
    n = packets.shape[1]
    opened, refused, asked, spread = packets[2:6].astype(np.int64)
    refused = np.minimum(refused, opened)
    silent = rng.binomial(opened - refused, 0.05)
    closed = opened - refused - silent
    sent = _count_steps(netflow["out_bytes"])
    both = sent + _count_steps(netflow["in_bytes"])
    new = rng.binomial(opened, 0.1) + np.minimum(spread, opened) // 2
    is_new = np.convolve(new > 0, np.ones(round(60 / TICK_S)))[:n] > 0
    top = rng.uniform(0.5, 1.0, n)
    return {
        "dst_new": np.cumsum(new),
        "dst_bytes": np.cumsum(both),
        "dst_new_bytes": np.cumsum((both * is_new * rng.uniform(0.0, 1.0, n)).astype(np.int64)),
        "dst_top_bytes": np.cumsum((both * top).astype(np.int64)),
        "dst_top_out_bytes": np.cumsum((sent * top).astype(np.int64)),
        "conn_accepted": np.cumsum(closed),
        "conn_refused": np.cumsum(refused),
        "conn_silent": np.cumsum(silent),
        "conn_closed": np.cumsum(closed),
        "conn_closed_ns": np.cumsum((closed * 3e8 * rng.uniform(0.5, 1.5, n)).astype(np.int64)),
        "conn_open": 1 + np.minimum(opened, 20),
        "rhythm": (1000 * np.clip(0.3 + 0.1 * rng.standard_normal(n), 0.0, 1.0)).astype(np.int64),
        "dns_asked": np.cumsum(asked),
        "dns_new_names": np.cumsum(rng.binomial(asked, 0.3)),
        "dns_name_bytes": np.cumsum((asked * rng.uniform(12.0, 24.0, n)).astype(np.int64)),
        "dns_entropy": np.cumsum((asked * rng.uniform(2500.0, 3500.0, n)).astype(np.int64)),
        "dns_txt": np.cumsum(rng.binomial(asked, 0.02)),
        "dns_answers": np.cumsum(asked),
        "dns_nxdomain": np.cumsum(rng.binomial(asked, 0.05)),
    }


def _count_steps(counter: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the increase of a counter in each tick, ``(n,)`` int64; 0 in the first."""
    return np.diff(counter, prepend=counter[:1]).astype(np.int64)
