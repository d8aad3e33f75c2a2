"""The tables that validator, grid, features, schema, docs and dashboard derive from: RAW, CHANNELS, LEVELS.

RAW names every key of a telemetry row, CHANNELS the 46 values that a model may see, LEVELS the cumulative totals
that it must not see (they tell how late it is), kept for the levels-only baseline and the leak checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from phasewatch.errors import UsageError, name_the_nearest
from phasewatch.extras import check_nature, read_extras
from phasewatch.vocab import Kind, Source, Trust

Nature = Literal["counter", "gauge", "tick"]  # never falls · a level or share · a count of this tick alone


@dataclass(frozen=True, slots=True, kw_only=True)
class RawSpec:
    """One key of a source's rows, after `t_wall_ns`, `t_mono_ns` and `seq`. A null is "no reading of this field"."""

    source: Source
    field: str
    type: Literal["int", "float"]
    unit: str
    nature: Nature
    about: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelSpec:
    """One column of the grid: which raw fields, and how they become a number in `unit`.

    `semantics` is raised when the sampler's meaning changes, so that old models refuse new data.
    """

    name: str
    source: Source
    kind: Kind
    fields: tuple[str, ...]
    unit: str
    about: str
    reads: str
    scale: float = 1.0
    trust: Trust = Trust.HOST
    accel: Literal["any", "tcg"] = "any"
    arch: Literal["any", "x86"] = "any"
    semantics: int = 1

    @property
    def full_name(self) -> str:
        """Source and name, as columns spell it."""
        return f"{self.source}.{self.name}"

    @property
    def in_deployment(self) -> bool:
        """Whether a defender has it without the guest's word."""
        return self.trust is Trust.HOST


def _raw(source: Source, rows: str) -> tuple[RawSpec, ...]:
    """Read `field type unit nature about…` lines; the table below is easier on the eye this way."""
    specs = []
    for line in rows.strip().splitlines():
        field, kind, unit, nature, about = line.split(None, 4)
        specs.append(RawSpec(source=source, field=field, type=kind, unit=unit, nature=nature, about=about))  # type: ignore[arg-type]
    return tuple(specs)


EXTRAS = read_extras()  # a user's own rows; none unless the environment or `--channels` names a file

RAW: tuple[RawSpec, ...] = (
    *_raw(
        Source.PROC,
        """
cpu_user_ns        int ns    counter  user time of the QEMU process
cpu_sys_ns         int ns    counter  system time of the QEMU process
vcpu_run_ns        int ns    counter  time that all vCPU threads ran
vcpu_wait_ns       int ns    counter  time that they waited for a core
vcpu_vcs           int 1     counter  their voluntary context switches
vcpu_ics           int 1     counter  their involuntary context switches
main_run_ns        int ns    counter  time that the main thread ran
main_vcs           int 1     counter  its voluntary context switches
aux_run_ns         int ns    counter  time that the other threads ran, positive increments summed per thread
io_rchar_bytes     int B     counter  bytes passed to read calls
io_wchar_net_bytes int B     counter  bytes passed to write calls, less 8 for each (event kicks)
io_write_bytes     int B     counter  bytes sent to the storage layer
rss_anon_bytes     int B     gauge    anonymous resident memory
rss_bytes          int B     gauge    resident memory
threads            int 1     gauge    threads of the process
""",
    ),
    *_raw(
        Source.QMP,
        """
blk_rd_bytes       int B     counter  bytes read from the data disk
blk_wr_bytes       int B     counter  bytes written to it
blk_rd_ops         int 1     counter  read requests
blk_wr_ops         int 1     counter  write requests
blk_flush_ops      int 1     counter  flush requests
blk_wr_ns          int ns    counter  time spent in write requests
vq_blk             int 1     counter  requests that the disk's virtqueues completed, unwrapped
jit_tb             int 1     counter  translated blocks
jit_tlb_partial    int 1     counter  partial TLB flushes
vcpu_busy          float 1   gauge    share of register samples that found a vCPU not halted
vcpu_user          float 1   gauge    share of them that found it in user mode
bal_minor_faults   int 1     counter  minor page faults, as the guest's balloon driver reports them
bal_free_bytes     int B     gauge    free memory, likewise
bal_cache_bytes    int B     gauge    disk caches, likewise
jit_code_bytes     int B     gauge    size of the translated code
wr_highest_bytes   int B     gauge    highest offset ever written on the data disk
""",
    ),
    *_raw(
        Source.NETFLOW,
        """
out_pkts           int 1     counter  frames that the guest sent
out_bytes          int B     counter  their bytes
in_pkts            int 1     counter  frames that it was sent
in_bytes           int B     counter  their bytes
new_flows          int 1     counter  5-tuples seen for the first time
syn_out            int 1     counter  TCP SYN without ACK from the guest
rst_in             int 1     counter  TCP RST to the guest
dns_queries        int 1     counter  UDP packets from the guest to port 53
dst_ports          int 1     tick     distinct destination ports since the last tick
dst_ips            int 1     tick     distinct destination addresses since the last tick
""",
    ),
    *_raw(
        Source.GUEST,
        """
up_ns              int ns    counter  the guest's own uptime
cpu_user_jiffies   int 1     counter  user and nice time of all CPUs
cpu_sys_jiffies    int 1     counter  system, irq and softirq time
cpu_total_jiffies  int 1     counter  all time, idle included
ctxt               int 1     counter  context switches
forks              int 1     counter  processes made
pgfault            int 1     counter  page faults
disk_wr_bytes      int B     counter  bytes written to all disks
procs_running      int 1     gauge    runnable processes
mem_dirty_bytes    int B     gauge    dirty memory
mem_free_bytes     int B     gauge    free memory
mem_cached_bytes   int B     gauge    page cache
""",
    ),
    *(RawSpec(**row) for row in EXTRAS.raw),
)


def _proc(name: str, kind: Kind, field: str, unit: str, about: str, reads: str, scale: float = 1.0) -> ChannelSpec:
    return ChannelSpec(
        name=name, source=Source.PROC, kind=kind, fields=(field,), unit=unit, about=about, reads=reads, scale=scale
    )


def _qmp(
    name: str,
    kind: Kind,
    fields: tuple[str, ...],
    unit: str,
    about: str,
    reads: str,
    *,
    scale: float = 1.0,
    trust: Trust = Trust.HOST,
    accel: Literal["any", "tcg"] = "any",
    arch: Literal["any", "x86"] = "any",
) -> ChannelSpec:
    return ChannelSpec(
        name=name, source=Source.QMP, kind=kind, fields=fields, unit=unit, about=about, reads=reads, scale=scale,
        trust=trust, accel=accel, arch=arch,
    )  # fmt: skip


def _net(name: str, kind: Kind, fields: tuple[str, ...], unit: str, about: str, reads: str) -> ChannelSpec:
    return ChannelSpec(name=name, source=Source.NETFLOW, kind=kind, fields=fields, unit=unit, about=about, reads=reads)


def _guest(name: str, kind: Kind, fields: tuple[str, ...], unit: str, about: str, reads: str) -> ChannelSpec:
    return ChannelSpec(
        name=name, source=Source.GUEST, kind=kind, fields=fields, unit=unit, about=about, reads=reads, trust=Trust.GUEST
    )


_STAT = "/proc/P/stat"
_SCHED = "/proc/P/task/T/schedstat"
_STATUS = "/proc/P/task/T/status"

CHANNELS: tuple[ChannelSpec, ...] = (
    _proc("cpu_user", Kind.RATE, "cpu_user_ns", "cores", "User time of the QEMU process.", f"{_STAT} field 14", 1e-9),
    _proc("cpu_sys", Kind.RATE, "cpu_sys_ns", "cores", "System time of the QEMU process.", f"{_STAT} field 15", 1e-9),
    _proc("vcpu_run", Kind.RATE, "vcpu_run_ns", "cores", "CPU time that the vCPU threads got.", f"{_SCHED} field 1", 1e-9),
    _proc("vcpu_wait", Kind.RATE, "vcpu_wait_ns", "cores", "Time that they waited for a core: contention.", f"{_SCHED} field 2", 1e-9),
    _proc("vcpu_vcs", Kind.RATE, "vcpu_vcs", "1/s", "Voluntary switches of the vCPU threads.", f"{_STATUS} voluntary_ctxt_switches"),
    _proc("vcpu_ics", Kind.RATE, "vcpu_ics", "1/s", "Involuntary switches of the vCPU threads.", f"{_STATUS} nonvoluntary_ctxt_switches"),
    _proc("main_run", Kind.RATE, "main_run_ns", "cores", "CPU time of the main thread.", f"{_SCHED} field 1", 1e-9),
    _proc("main_vcs", Kind.RATE, "main_vcs", "1/s", "Voluntary switches of the main thread.", f"{_STATUS} voluntary_ctxt_switches"),
    _proc("aux_run", Kind.RATE, "aux_run_ns", "cores", "CPU time of all other threads.", f"{_SCHED} field 1", 1e-9),
    _proc("rss_anon_delta", Kind.DELTA, "rss_anon_bytes", "B/s", "Growth of anonymous memory.", "/proc/P/status RssAnon"),
    _proc("io_rchar", Kind.RATE, "io_rchar_bytes", "B/s", "Bytes read by system calls.", "/proc/P/io rchar"),
    _proc("io_wchar_net", Kind.RATE, "io_wchar_net_bytes", "B/s", "Bytes written by system calls, event kicks removed.", "/proc/P/io wchar, syscw"),
    _proc("io_write_bytes", Kind.RATE, "io_write_bytes", "B/s", "Bytes sent to the storage layer.", "/proc/P/io write_bytes"),
    _qmp("blk_rd_bytes", Kind.RATE, ("blk_rd_bytes",), "B/s", "Bytes read from the data disk.", "query-blockstats rd_bytes"),
    _qmp("blk_wr_bytes", Kind.RATE, ("blk_wr_bytes",), "B/s", "Bytes written to the data disk.", "query-blockstats wr_bytes"),
    _qmp("blk_rd_ops", Kind.RATE, ("blk_rd_ops",), "1/s", "Read requests.", "query-blockstats rd_operations"),
    _qmp("blk_wr_ops", Kind.RATE, ("blk_wr_ops",), "1/s", "Write requests.", "query-blockstats wr_operations"),
    _qmp("blk_flush_ops", Kind.RATE, ("blk_flush_ops",), "1/s", "Flush requests.", "query-blockstats flush_operations"),
    _qmp("blk_wr_lat", Kind.RATIO, ("blk_wr_ns", "blk_wr_ops"), "s", "Mean time of a write request.", "query-blockstats wr_total_time_ns / wr_operations", scale=1e-9),
    _qmp("vq_blk", Kind.RATE, ("vq_blk",), "1/s", "Requests that the disk's virtqueues completed.", "x-query-virtio-queue-status used-idx"),
    _qmp("jit_tb", Kind.RATE, ("jit_tb",), "1/s", "Code translated for the first time.", "x-query-jit TB count", accel="tcg"),
    _qmp("jit_tlb_partial", Kind.RATE, ("jit_tlb_partial",), "1/s", "Partial TLB flushes: address-space switches.", "x-query-jit TLB partial flushes", accel="tcg"),
    _qmp("vcpu_busy", Kind.GAUGE, ("vcpu_busy",), "1", "Share of time a vCPU was not halted.", "info registers HLT, 10 Hz", accel="tcg", arch="x86"),
    _qmp("vcpu_user", Kind.GAUGE, ("vcpu_user",), "1", "Share of time it was in user mode.", "info registers CPL, 10 Hz", accel="tcg", arch="x86"),
    _qmp("bal_minor_faults", Kind.RATE, ("bal_minor_faults",), "1/s", "Minor page faults in the guest.", "guest-stats stat-minor-faults", trust=Trust.GUEST),
    _qmp("bal_free_delta", Kind.DELTA, ("bal_free_bytes",), "B/s", "Growth of the guest's free memory.", "guest-stats stat-free-memory", trust=Trust.GUEST),
    _qmp("bal_cache_delta", Kind.DELTA, ("bal_cache_bytes",), "B/s", "Growth of the guest's disk caches.", "guest-stats stat-disk-caches", trust=Trust.GUEST),
    _net("out_pkts", Kind.RATE, ("out_pkts",), "1/s", "Frames that the guest sends.", "frames at the network card"),
    _net("out_bytes", Kind.RATE, ("out_bytes",), "B/s", "Their bytes.", "frames at the network card"),
    _net("in_pkts", Kind.RATE, ("in_pkts",), "1/s", "Frames that the guest is sent.", "frames at the network card"),
    _net("in_bytes", Kind.RATE, ("in_bytes",), "B/s", "Their bytes.", "frames at the network card"),
    _net("mean_out_size", Kind.RATIO, ("out_bytes", "out_pkts"), "B", "Mean size of a sent frame.", "frames at the network card"),
    _net("new_flows", Kind.RATE, ("new_flows",), "1/s", "5-tuples seen for the first time.", "TCP and UDP headers over IPv4 or IPv6"),
    _net("syn_out", Kind.RATE, ("syn_out",), "1/s", "Connections that the guest opens.", "TCP flags SYN without ACK"),
    _net("rst_in", Kind.RATE, ("rst_in",), "1/s", "Connections that are refused to it.", "TCP flag RST"),
    _net("dst_ports", Kind.COUNT, ("dst_ports",), "1", "Distinct destination ports in a tick.", "TCP and UDP headers"),
    _net("dst_ips", Kind.COUNT, ("dst_ips",), "1", "Distinct destination addresses in a tick.", "IPv4 and IPv6 headers"),
    _net("dns_queries", Kind.RATE, ("dns_queries",), "1/s", "DNS questions that the guest asks.", "UDP destination port 53"),
    _guest("cpu_user", Kind.RATIO, ("cpu_user_jiffies", "cpu_total_jiffies"), "1", "Share of time in user mode.", "/proc/stat cpu user, nice"),
    _guest("cpu_sys", Kind.RATIO, ("cpu_sys_jiffies", "cpu_total_jiffies"), "1", "Share of time in the kernel.", "/proc/stat cpu system, irq, softirq"),
    _guest("ctxt", Kind.RATE, ("ctxt",), "1/s", "Context switches.", "/proc/stat ctxt"),
    _guest("forks", Kind.RATE, ("forks",), "1/s", "Processes made.", "/proc/stat processes"),
    _guest("procs_running", Kind.GAUGE, ("procs_running",), "1", "Runnable processes.", "/proc/stat procs_running"),
    _guest("pgfault", Kind.RATE, ("pgfault",), "1/s", "Page faults.", "/proc/vmstat pgfault"),
    _guest("disk_wr_bytes", Kind.RATE, ("disk_wr_bytes",), "B/s", "Bytes written to all disks.", "/proc/diskstats field 10"),
    _guest("mem_dirty", Kind.GAUGE, ("mem_dirty_bytes",), "B", "Memory waiting to be written back.", "/proc/meminfo Dirty"),
    *(ChannelSpec(**row) for row in EXTRAS.channels),
)  # fmt: skip


def _level(source: Source, name: str, field: str, unit: str, about: str) -> ChannelSpec:
    return ChannelSpec(
        name=name, source=source, kind=Kind.GAUGE, fields=(field,), unit=unit, about=about, reads=f"RAW {field}",
        trust=Trust.GUEST if source is Source.GUEST or name.startswith("bal_") else Trust.HOST,
    )  # fmt: skip


LEVELS: tuple[ChannelSpec, ...] = (
    _level(Source.PROC, "rss", "rss_bytes", "B", "Resident memory of QEMU."),
    _level(Source.PROC, "rss_anon", "rss_anon_bytes", "B", "Its anonymous part."),
    _level(Source.PROC, "threads", "threads", "1", "Threads of QEMU."),
    _level(Source.PROC, "cpu_user_total", "cpu_user_ns", "ns", "User time since QEMU started."),
    _level(Source.QMP, "bal_free", "bal_free_bytes", "B", "Free memory of the guest."),
    _level(Source.QMP, "bal_cache", "bal_cache_bytes", "B", "Disk caches of the guest."),
    _level(Source.QMP, "jit_code", "jit_code_bytes", "B", "Size of the translated code."),
    _level(Source.QMP, "jit_tb_total", "jit_tb", "1", "Translated blocks so far."),
    _level(Source.QMP, "wr_highest", "wr_highest_bytes", "B", "Highest offset written on the data disk."),
    _level(Source.NETFLOW, "out_bytes_total", "out_bytes", "B", "Bytes sent so far."),
    _level(Source.GUEST, "mem_free", "mem_free_bytes", "B", "Free memory, as the agent sees it."),
    _level(Source.GUEST, "mem_cached", "mem_cached_bytes", "B", "Page cache, as the agent sees it."),
    _level(Source.GUEST, "uptime", "up_ns", "ns", "The guest's uptime."),
)


def registry_digest() -> str:
    """Name the user's own rows; empty where there are none."""
    return EXTRAS.digest


def raw_fields(source: Source) -> tuple[RawSpec, ...]:
    """Give the row keys of one source, in the order in which they stand in a row."""
    return tuple(spec for spec in RAW if spec.source is source)


_BALLOON = tuple(c for c in CHANNELS if c.source is Source.QMP and c.trust is Trust.GUEST)
_MASKS: dict[str, frozenset[str]] = {
    "realistic": frozenset(c.full_name for c in CHANNELS if c.in_deployment),
    "oracle": frozenset(c.full_name for c in CHANNELS),
    "portable": frozenset(c.full_name for c in CHANNELS if c.in_deployment and c.accel == "any"),
    "balloon": frozenset(c.full_name for c in _BALLOON),
    "guest": frozenset(c.full_name for c in CHANNELS if c.source is Source.GUEST),
    # What the counters of a host's tap device tell without looking into a frame.
    "tap": frozenset(
        f"{Source.NETFLOW}.{n}" for n in ("out_pkts", "out_bytes", "in_pkts", "in_bytes", "mean_out_size")
    ),
    **{
        str(source): frozenset(c.full_name for c in CHANNELS if c.source is source and c.in_deployment)
        for source in (Source.PROC, Source.QMP, Source.NETFLOW)
    },
}


def mask_of(name: str) -> tuple[bool, ...]:
    """Give a threat model's mask over CHANNELS, in their order.

    Args:
        name: One of `mask_names`, or several joined with ``+`` (``realistic+balloon``, ``proc+netflow``).

    Raises:
        UsageError: If a part of the name is not registered.
    """
    chosen: frozenset[str] = frozenset()
    for part in name.split("+"):
        if part not in _MASKS:
            raise UsageError(f"no threat model {part!r}; {name_the_nearest(part, _MASKS)}")
        chosen |= _MASKS[part]
    return tuple(c.full_name in chosen for c in CHANNELS)


def mask_names() -> tuple[str, ...]:
    """Give the names that `mask_of` knows."""
    return tuple(_MASKS)


def source_subsets() -> tuple[str, ...]:
    """Name the 15 threat models that have one, two, three or all of the sources, fewest first.

    >>> source_subsets()[4], source_subsets()[-1]
    ('proc+qmp', 'proc+qmp+netflow+guest')
    """
    sources = tuple(map(str, Source))
    return tuple("+".join(chosen) for n in range(1, len(sources) + 1) for chosen in combinations(sources, n))


def _check_tables() -> None:
    """Refuse a table that contradicts itself, at import: a wrong row here would poison every file after it."""
    raw = {(spec.source, spec.field): spec for spec in RAW}
    if len(raw) != len(RAW):
        raise UsageError("channels.RAW: a field stands twice")
    for table in (CHANNELS, LEVELS):
        if len({c.full_name for c in table}) != len(table):
            raise UsageError("channels: a name stands twice")
        for channel in table:
            if len(channel.fields) != (2 if channel.kind is Kind.RATIO else 1):
                raise UsageError(f"channels: {channel.full_name} has {len(channel.fields)} fields")
            for field in channel.fields:
                if (channel.source, field) not in raw:
                    raise UsageError(f"channels: {channel.full_name} reads {field}, which RAW does not name")
                if table is CHANNELS:
                    check_nature(channel.kind, raw[channel.source, field].nature, channel=channel.full_name)


_check_tables()
