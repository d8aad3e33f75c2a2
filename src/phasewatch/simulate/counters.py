"""Convert activity rates into the raw counters of each telemetry source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import list_raw_fields
from phasewatch.simulate.extended import CounterColumns, simulate_destinations, simulate_monitor_sensors
from phasewatch.simulate.generator import RATE_INDEX, TICK_S, SimulationSettings, build_named_rng
from phasewatch.types import ChannelGroup, SourceKind

__all__ = [
    "SIMULATED_MEMORY_MIB",
    "SIMULATED_VCPUS",
    "CounterColumns",
    "SimulatedHost",
    "draw_host",
    "simulate_counters",
]

SIMULATED_VCPUS = 1
SIMULATED_MEMORY_MIB = 256
_MAX_WAIT_FACTOR = 2.5  # a vCPU that waits more than a tenth of the time would count as CPU contention
# The extended fields have no factor, so that hosts and base fields are those of earlier versions.
_RAW_FIELD_NAMES = tuple(
    spec.field for source in SourceKind for spec in list_raw_fields(source) if spec.group is ChannelGroup.BASE
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedHost:
    """A simulated host.

    Attributes:
        host_id: Name of the host.
        arch: ``x86_64`` or ``aarch64``.
        factors: Factor on each base field, in the order of all sources and fields.
        drift: Change of the factor's natural logarithm per week, in the same order.
        busy_samples: Register samples per tick; 0 if the host has none.
    """

    host_id: str
    arch: str
    factors: tuple[float, ...]
    drift: tuple[float, ...]
    busy_samples: int


def draw_host(seed: int, number: int, settings: SimulationSettings) -> SimulatedHost:
    """Draw host `number`; the same seed gives the same host in a store of any size."""
    rng = build_named_rng(seed, "host", number)
    is_arm = number % 6 == 5
    return SimulatedHost(
        host_id=f"sim-{number:02d}",
        arch="aarch64" if is_arm else "x86_64",
        factors=tuple(np.exp(settings.host_effect * rng.standard_normal(len(_RAW_FIELD_NAMES))).tolist()),
        drift=tuple((settings.drift_per_week * rng.standard_normal(len(_RAW_FIELD_NAMES))).tolist()),
        busy_samples=0 if is_arm else 5,
    )


def simulate_counters(
    rng: np.random.Generator,
    activity: NDArray[np.float64],
    host: SimulatedHost,
    *,
    weeks: float,
    settings: SimulationSettings,
) -> dict[SourceKind, CounterColumns]:
    """Convert activity rates into readings at 2 Hz (guest agent: 1 Hz).

    Args:
        rng: Random generator of the episode.
        activity: ``(n, 12)`` float64 rates per second of each tick, from `generator.draw_activity`.
        host: The host of the episode.
        weeks: Weeks since the start of the campaign; determines the drift of the host.
        settings: Spread between episodes.

    Returns:
        For each source a dict of raw field → ``(n,)`` array (guest: ``(n // 2,)``), int64 or float64, in the order of
        the raw fields. An absent reading is −1 (int64) or NaN (float64) and becomes null in the row: balloon fields in
        every second row, ``vcpu_busy`` and ``vcpu_user`` on a host without register samples, and KVM's statistics.
    """
    n = len(activity)
    effect = np.array(host.factors) * np.exp(np.array(host.drift) * weeks)
    effect *= np.exp(settings.episode_effect * 0.4 * rng.standard_normal(len(_RAW_FIELD_NAMES)))
    factor = dict(zip(_RAW_FIELD_NAMES, effect.tolist(), strict=True))
    factor["vcpu_wait_ns"] = min(_MAX_WAIT_FACTOR, factor["vcpu_wait_ns"])
    a = {name: activity[:, i] for name, i in RATE_INDEX.items()}
    packets = rng.poisson(
        np.stack(
            [
                a["sent"] / 500 + a["opened"] * 3 + a["asked"],
                a["received"] / 600 + a["opened"] * 2 + a["asked"],
                a["opened"],
                a["refused"],
                a["asked"],
                a["spread"],
                a["write"] / 16e3 + a["read"] / 24e3,
                a["forks"],
            ]
        )
        * TICK_S
    ).astype(np.float64)
    jitter = np.exp(0.12 * rng.standard_normal((6, n)))
    simulator = _CounterSimulator(rng=rng, a=a, packets=packets, jitter=jitter, factor=factor)
    (more,) = rng.spawn(1)  # of the extended fields
    qmp = simulator.qmp()
    _mask_unknown_values(qmp, rng, a, host.busy_samples)
    proc, netflow, guest = simulator.proc(), simulator.netflow(), simulator.guest()
    return {
        SourceKind.PROC: proc,
        SourceKind.QMP: qmp | simulate_monitor_sensors(more, a, qmp),
        SourceKind.NETFLOW: netflow | simulate_destinations(more, packets, netflow),
        SourceKind.GUEST: guest,
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _CounterSimulator:
    """Computes the counters of each source from common inputs.

    Attributes:
        a: Rate name → ``(n,)`` float64 rates per second.
        packets: ``(8, n)`` float64 counts per tick: packets out, packets in, connections opened, connections refused,
            DNS queries, distinct destinations, disk requests, forks.
        jitter: ``(6, n)`` float64 factors.
        factor: Raw field → factor of host and episode.
    """

    rng: np.random.Generator
    a: dict[str, NDArray[np.float64]]
    packets: NDArray[np.float64]
    jitter: NDArray[np.float64]
    factor: dict[str, float]

    def _total(self, field: str, per_second: NDArray[np.float64], *, start: float) -> NDArray[np.int64]:
        """Return the cumulative sum of a rate from a random start, scaled by the field's factor: ``(n,)`` int64."""
        base = self.rng.uniform(0.2, 1.0) * start
        return np.asarray(np.cumsum(per_second * (TICK_S * self.factor[field])) + base, np.int64)

    def _count(self, values: NDArray[np.float64], *, start: float) -> NDArray[np.int64]:
        """Return the cumulative sum of counts from a random start, without a factor: ``(n,)`` int64."""
        return np.asarray(np.cumsum(values) + int(self.rng.uniform(0.2, 1.0) * start), np.int64)

    def _level(self, field: str, base: float, per_second: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return a gauge that activity changes, in multiples of 4096 bytes: ``(n,)`` int64."""
        moved = base * self.factor[field] + np.cumsum(per_second) * TICK_S
        return np.asarray(np.maximum(moved, 0) // 4096 * 4096, np.int64)

    def proc(self) -> CounterColumns:
        a, p, j = self.a, self.packets, self.jitter
        requests, out, got = p[6] / TICK_S, p[0] / TICK_S, p[1] / TICK_S
        vcpu = a["cpu"] * j[0]
        main = (0.02 + out * 6e-5 + got * 5e-5 + requests * 3e-4) * j[1]
        return {
            "cpu_user_ns": self._total("cpu_user_ns", (vcpu * 0.93 + main * 0.5 + 0.004) * 1e9, start=4e10),
            "cpu_sys_ns": self._total("cpu_sys_ns", (vcpu * 0.03 + main * 0.5 + requests * 2e-4) * 1e9, start=1e10),
            # Whatever the factor of the host, its one vCPU uses one core at most.
            "vcpu_run_ns": self._total(
                "vcpu_run_ns", np.minimum(vcpu, SIMULATED_VCPUS / self.factor["vcpu_run_ns"]) * 1e9, start=4e10
            ),
            "vcpu_wait_ns": self._total("vcpu_wait_ns", (0.004 + 0.03 * vcpu) * j[2] * 1e9, start=1e9),
            "vcpu_vcs": self._total("vcpu_vcs", (25 + 0.4 * (out + got) + requests * 1.5) * j[2], start=1e4),
            "vcpu_ics": self._total("vcpu_ics", (80 + 550 * vcpu) * j[3], start=3e4),
            "main_run_ns": self._total("main_run_ns", main * 1e9, start=2e9),
            "main_vcs": self._total(
                "main_vcs", (140 + 480 * vcpu + 3 * requests + 0.6 * (out + got)) * j[4], start=3e4
            ),
            "aux_run_ns": self._total("aux_run_ns", (0.008 + requests * 1e-4) * j[5] * 1e9, start=1e9),
            "io_rchar_bytes": self._total("io_rchar_bytes", 18e3 * j[5] + a["read"] + a["received"], start=1e8),
            "io_wchar_net_bytes": self._total("io_wchar_net_bytes", 60 * j[4] + a["write"] + a["sent"], start=1e8),
            "io_write_bytes": self._total("io_write_bytes", a["write"] * j[3] // 4096 * 4096, start=1e8),
            "rss_anon_bytes": self._level("rss_anon_bytes", 2.3e8, a["touched"] * j[1]),
            "rss_bytes": self._level("rss_bytes", 2.6e8, a["touched"] * j[1]),
            "threads": np.asarray(5 + np.minimum(4, requests // 10), np.int64),
        }

    def qmp(self) -> CounterColumns:
        a, p, j = self.a, self.packets, self.jitter
        writes = np.floor(p[6] * a["write"] / np.maximum(a["write"] + a["read"], 1.0) + 0.5)
        reads = p[6] - writes
        flushes = np.floor(writes / 8)
        age_s = 60 + np.arange(len(a["cpu"])) * TICK_S
        new_code = (p[7] / TICK_S * 14 + a["cpu"] * 30) * j[0] * (60 / age_s) ** 0.3
        return {
            "blk_rd_bytes": self._count(np.floor(reads * 24e3 * j[1] / 512) * 512, start=1e8),
            "blk_wr_bytes": self._count(np.floor(writes * 16e3 * j[3] / 512) * 512, start=1e8),
            "blk_rd_ops": self._count(reads, start=5e3),
            "blk_wr_ops": self._count(writes, start=5e3),
            "blk_flush_ops": self._count(flushes, start=300),
            "blk_wr_ns": self._total("blk_wr_ns", writes / TICK_S * 2.4e5 * j[2], start=1e9),
            "vq_blk": self._count(p[6] + flushes, start=1e4),
            "jit_tb": self._total("jit_tb", new_code, start=3e5),
            "jit_tlb_partial": self._total("jit_tlb_partial", (45 + 900 * a["cpu"] + 60 * p[7]) * j[5], start=1e5),
            "vcpu_busy": np.zeros(len(age_s)),
            "vcpu_user": np.zeros(len(age_s)),
            "bal_minor_faults": self._total("bal_minor_faults", 100 + 90 * p[7] / TICK_S, start=1e5),
            "bal_free_bytes": np.minimum(
                self._level("bal_free_bytes", 1.3e8, -(a["touched"] + a["write"] * 0.05) * j[2]),
                SIMULATED_MEMORY_MIB << 20,
            ),
            "bal_cache_bytes": self._level("bal_cache_bytes", 6e6, (a["write"] + a["read"]) * 0.05),
            "jit_code_bytes": self._level("jit_code_bytes", 9e7, new_code * 500),
            "wr_highest_bytes": self._level("wr_highest_bytes", 5e7, a["write"] * 0.3),
        }

    def netflow(self) -> CounterColumns:
        a, p, j = self.a, self.packets, self.jitter
        opened, refused, asked, spread = p[2], np.minimum(p[3], p[2]), p[4], p[5]
        size = 66 + np.where(p[0] > 0, a["sent"] / np.maximum(p[0] / TICK_S, 1.0), 0) * j[0] * 0.6
        size_in = 66 + np.where(p[1] > 0, a["received"] / np.maximum(p[1] / TICK_S, 1.0), 0) * j[1] * 0.6
        active = (p[0] > 0).astype(np.float64)
        return {
            "out_pkts": self._count(p[0], start=3e3),
            "out_bytes": self._count(np.floor(p[0] * np.minimum(size, 1514)), start=1e6),
            "in_pkts": self._count(p[1], start=3e3),
            "in_bytes": self._count(np.floor(p[1] * np.minimum(size_in, 1514)), start=1e6),
            "new_flows": self._count(opened + asked, start=200),
            "syn_out": self._count(opened, start=100),
            "rst_in": self._count(refused, start=20),
            "dns_queries": self._count(asked, start=100),
            "dst_ports": np.asarray(active + np.minimum(spread, opened), np.int64),
            "dst_ips": np.asarray(active + np.minimum(spread // 2, opened), np.int64),
        }

    def guest(self) -> CounterColumns:
        a, p, j = self.a, self.packets, self.jitter
        busy, user = a["cpu"] * 100, np.minimum(a["user"], a["cpu"]) * 100
        every = slice(1, None, 2)
        whole: CounterColumns = {
            "up_ns": np.asarray(np.arange(1, len(busy) + 1) * int(TICK_S * 1e9) + 60_000_000_000, np.int64),
            "cpu_user_jiffies": self._total("cpu_user_jiffies", user * j[0], start=2e3),
            "cpu_sys_jiffies": self._total("cpu_sys_jiffies", (busy - user) * j[1], start=1e3),
            "cpu_total_jiffies": self._count(np.full(len(busy), 100 * TICK_S), start=6e3),
            "ctxt": self._total("ctxt", (60 + 500 * a["cpu"] + 30 * p[7]) * j[2], start=1e5),
            "forks": self._count(p[7], start=3e3),
            "pgfault": self._total("pgfault", 95 + 85 * p[7] / TICK_S, start=1e5),
            "disk_wr_bytes": self._total("disk_wr_bytes", a["write"] // 512 * 512, start=1e8),
            "procs_running": np.asarray(1 + (self.rng.random(len(busy)) < a["cpu"]), np.int64),
            "mem_dirty_bytes": np.asarray(a["write"] * j[3] // 4096 * 4096, np.int64),
            "mem_free_bytes": np.minimum(
                self._level("mem_free_bytes", 1.25e8, -(a["touched"] + a["write"] * 0.05)), SIMULATED_MEMORY_MIB << 20
            ),
            "mem_cached_bytes": self._level("mem_cached_bytes", 6e6, (a["write"] + a["read"]) * 0.05),
        }
        return {name: column[every] for name, column in whole.items()}


def _mask_unknown_values(
    qmp: CounterColumns, rng: np.random.Generator, a: dict[str, NDArray[np.float64]], samples: int
) -> None:
    """Add the register samples, and mark absent readings: −1 for integers, NaN for fractions."""
    n = len(a["cpu"])
    for name in ("bal_minor_faults", "bal_free_bytes", "bal_cache_bytes"):
        qmp[name][1::2] = -1
    if samples == 0:
        for name in ("vcpu_busy", "vcpu_user"):
            qmp[name] = np.full(n, np.nan)
        return
    busy = rng.binomial(samples, np.clip(a["cpu"], 0, 1))
    user = rng.binomial(busy, np.clip(a["user"] / np.maximum(a["cpu"], 1e-9), 0, 1))
    qmp["vcpu_busy"], qmp["vcpu_user"] = busy / samples, user / samples
