"""The registry of telemetry channels: `RAW_FIELDS`, `CHANNELS` and `LEVEL_CHANNELS`.

`RAW_FIELDS` lists the fields of telemetry rows, `CHANNELS` the 46 values per bin that models see. `LEVEL_CHANNELS` has
cumulative totals, which reveal the elapsed time; only the levels-only baseline and the leakage checks use them.
Validator, bins, features, schema, documentation and dashboard derive their tables from here.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from phasewatch.errors import UsageError, suggest_names
from phasewatch.types import CHANNELS_VARIABLE, ChannelKind, ChannelTrust, SourceKind

__all__ = [
    "CHANNELS",
    "CHANNEL_NAMES",
    "CUSTOM_CHANNELS",
    "CUSTOM_CHANNEL_KEYS",
    "CUSTOM_FIELD_KEYS",
    "LEVEL_CHANNELS",
    "MAX_CHANNELS_FILE_BYTES",
    "RAW_FIELDS",
    "ChannelSpec",
    "CustomChannels",
    "RawFieldSpec",
    "build_channel_mask",
    "check_channel_kind",
    "get_custom_channels_digest",
    "list_channel_sets",
    "list_raw_fields",
    "list_source_subsets",
    "parse_custom_channels",
    "read_custom_channels",
]

MAX_CHANNELS_FILE_BYTES = 64 << 10
MAX_CUSTOM_ROWS = 64

_CHANNEL_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_CHANNEL_TEXT = re.compile(r"[ -~]{0,200}")
_NATURE_BY_KIND = {
    ChannelKind.RATE: "counter",
    ChannelKind.RATIO: "counter",
    ChannelKind.DELTA: "gauge",
    ChannelKind.GAUGE: "gauge",
    ChannelKind.COUNT: "tick",
}
_RAW_FIELD_KEYS = {"source", "field", "type", "unit", "nature", "about"}
_REQUIRED_CHANNEL_KEYS = {"name", "source", "kind", "fields", "unit", "about", "reads"}
_CHANNEL_KEYS = _REQUIRED_CHANNEL_KEYS | {"scale", "trust", "accel", "arch", "semantics"}
_CHOICES: Mapping[str, Sequence[str]] = {
    "source": tuple(SourceKind),
    "type": ("int", "float"),
    "nature": ("counter", "gauge", "tick"),
    "kind": tuple(ChannelKind),
    "trust": tuple(ChannelTrust),
    "accel": ("any", "tcg"),
    "arch": ("any", "x86"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomChannels:
    """A user's own channels.

    Attributes:
        raw: Keyword arguments of `RawFieldSpec`, one mapping per field.
        channels: Keyword arguments of `ChannelSpec`, one mapping per channel.
        text: The file's content.
    """

    raw: tuple[Mapping[str, Any], ...] = ()
    channels: tuple[Mapping[str, Any], ...] = ()
    text: bytes = b""

    @property
    def digest(self) -> str:
        """The first 12 hex digits of the file's SHA-256; empty without a file."""
        return sha256(self.text).hexdigest()[:12] if self.text else ""


def read_custom_channels(path: str | None = None) -> CustomChannels:
    """Read a user's own channels.

    Args:
        path: The TOML file; by default the one that `CHANNELS_VARIABLE` names. Without one, nothing is read.

    Raises:
        UsageError: If the file cannot be read or a row is invalid; the message names the row and the valid values.
    """
    path = os.environ.get(CHANNELS_VARIABLE, "") if path is None else path
    if not path:
        return CustomChannels()
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_CHANNELS_FILE_BYTES + 1)
    except OSError as exc:
        raise UsageError(f"{path}: {exc.strerror}; --custom-channels needs a TOML file of channels") from exc
    return parse_custom_channels(text, file=path)


def parse_custom_channels(text: bytes, *, file: str) -> CustomChannels:
    """Parse the content of a file of custom channels; see `read_custom_channels`."""
    if len(text) > MAX_CHANNELS_FILE_BYTES:
        raise UsageError(f"{file}: larger than {MAX_CHANNELS_FILE_BYTES:,} bytes; that is no list of channels")
    try:
        content = tomllib.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as exc:  # a number of 5,000 digits raises a plain ValueError
        raise UsageError(f"{file}: not TOML: {str(exc)[:120]}") from exc
    if unknown := set(content) - {"raw", "channel"}:
        raise UsageError(f"{file}: no table is called {min(unknown)!r}; write [[raw]] and [[channel]]")
    raw = tuple(_parse_raw_row(row, f"{file}: raw {i}") for i, row in enumerate(_check_rows(content, "raw", file), 1))
    channels = tuple(
        _parse_channel_row(row, f"{file}: channel {i}")
        for i, row in enumerate(_check_rows(content, "channel", file), 1)
    )
    if not channels:
        raise UsageError(f"{file}: it has no [[channel]]")
    return CustomChannels(raw=raw, channels=channels, text=text)


def check_channel_kind(kind: ChannelKind, nature: str, *, channel: str) -> None:
    """Raise if a channel of a kind cannot be computed from a field of a nature.

    This above all refuses cumulative totals, which reveal the elapsed time.

    Raises:
        UsageError: If the two do not match.
    """
    if _NATURE_BY_KIND[kind] != nature:
        raise UsageError(
            f"--custom-channels: {channel} is a {kind} of a {nature}; a {kind} is made of a {_NATURE_BY_KIND[kind]} "
            "(a cumulative total is no channel, because it reveals the elapsed time)"
        )


def _check_rows(content: Mapping[str, Any], name: str, file: str) -> list[Any]:
    rows = content.get(name, [])
    if not isinstance(rows, list) or len(rows) > MAX_CUSTOM_ROWS:
        raise UsageError(f"{file}: {name} is no list of at most {MAX_CUSTOM_ROWS} tables; write [[{name}]]")
    return rows


def _parse_raw_row(row: Any, where: str) -> Mapping[str, Any]:
    checked = _check_row(row, where, _RAW_FIELD_KEYS, needed=_RAW_FIELD_KEYS)
    return checked | {"source": SourceKind(checked["source"])}


def _parse_channel_row(row: Any, where: str) -> Mapping[str, Any]:
    checked = _check_row(row, where, _CHANNEL_KEYS, needed=_REQUIRED_CHANNEL_KEYS)
    fields = checked["fields"]
    if not isinstance(fields, list) or not all(isinstance(f, str) and _CHANNEL_NAME.fullmatch(f) for f in fields):
        raise UsageError(f"{where}: `fields` is no list of raw fields")
    scale, semantics = checked.get("scale", 1.0), checked.get("semantics", 1)
    if type(scale) not in (int, float) or not 0 < scale < 1e30 or type(semantics) is not int or semantics < 1:
        raise UsageError(f"{where}: `scale` is a number above 0, `semantics` a whole number from 1 on")
    return checked | {
        "source": SourceKind(checked["source"]),
        "kind": ChannelKind(checked["kind"]),
        "fields": tuple(fields),
        "scale": float(scale),
        "semantics": semantics,
        "trust": ChannelTrust(checked.get("trust", "host")),
    }


def _check_row(row: Any, where: str, keys: set[str], *, needed: set[str]) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UsageError(f"{where}: it is no table")
    if unknown := set(row) - keys:
        raise UsageError(f"{where}: unknown key {min(unknown)!r}; keys are {', '.join(sorted(keys))}")
    if missing := needed - set(row):
        raise UsageError(f"{where}: lacks {', '.join(sorted(missing))}")
    for key, value in row.items():
        if key in _CHOICES and value not in _CHOICES[key]:
            raise UsageError(f"{where}: {key} {str(value)[:40]!r}; one of {', '.join(_CHOICES[key])}")
        if key in ("name", "field") and not (isinstance(value, str) and _CHANNEL_NAME.fullmatch(value)):
            raise UsageError(f"{where}: {key} {str(value)[:40]!r} is no name of small letters, digits and _")
        if key in ("unit", "about", "reads") and not (isinstance(value, str) and _CHANNEL_TEXT.fullmatch(value)):
            raise UsageError(f"{where}: {key} is no line of at most 200 printable ASCII characters")
    return dict(row)


FieldNature = Literal["counter", "gauge", "tick"]  # never falls · level or share · count per tick


@dataclass(frozen=True, slots=True, kw_only=True)
class RawFieldSpec:
    """One field of a source's rows, after `t_wall_ns`, `t_mono_ns` and `seq`; null stands for no reading.

    Attributes:
        nature: ``counter`` never falls; ``gauge`` is a level or share; ``tick`` counts one tick alone.
        about: What it counts, in one line.
    """

    source: SourceKind
    field: str
    type: Literal["int", "float"]
    unit: str
    nature: FieldNature
    about: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelSpec:
    """One column of the bins: its raw fields, and how they become a number in `unit`.

    Attributes:
        kind: How readings become the value of a bin.
        fields: One raw field, or two for a ratio.
        reads: The kernel file, monitor command or header that the sampler reads.
        scale: Factor from the raw field's unit to `unit`.
        accel, arch: Accelerator and architecture on which it exists.
        semantics: Version of its meaning; raised when the sampler changes, so that old models refuse new data.
    """

    name: str
    source: SourceKind
    kind: ChannelKind
    fields: tuple[str, ...]
    unit: str
    about: str
    reads: str
    scale: float = 1.0
    trust: ChannelTrust = ChannelTrust.HOST
    accel: Literal["any", "tcg"] = "any"
    arch: Literal["any", "x86"] = "any"
    semantics: int = 1

    @property
    def full_name(self) -> str:
        """Source and name, as in ``proc.cpu_user``."""
        return f"{self.source}.{self.name}"

    @property
    def in_deployment(self) -> bool:
        """Whether the host measures it, without trust in the guest."""
        return self.trust is ChannelTrust.HOST


def _parse_raw_fields(source: SourceKind, rows: str) -> tuple[RawFieldSpec, ...]:
    """Parse lines of ``field type unit nature about``."""
    specs = []
    for line in rows.strip().splitlines():
        field, kind, unit, nature, about = line.split(None, 4)
        specs.append(RawFieldSpec(source=source, field=field, type=kind, unit=unit, nature=nature, about=about))  # type: ignore[arg-type]
    return tuple(specs)


CUSTOM_CHANNELS = read_custom_channels()  # empty unless CHANNELS_VARIABLE names a file

CUSTOM_FIELD_KEYS = frozenset((row["source"], row["field"]) for row in CUSTOM_CHANNELS.raw)
CUSTOM_CHANNEL_KEYS = frozenset((row["source"], row["name"]) for row in CUSTOM_CHANNELS.channels)

RAW_FIELDS: tuple[RawFieldSpec, ...] = (
    *_parse_raw_fields(
        SourceKind.PROC,
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
    *_parse_raw_fields(
        SourceKind.QMP,
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
    *_parse_raw_fields(
        SourceKind.NETFLOW,
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
    *_parse_raw_fields(
        SourceKind.GUEST,
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
    *(RawFieldSpec(**row) for row in CUSTOM_CHANNELS.raw),
)


def _channel(
    source: SourceKind,
    name: str,
    kind: ChannelKind,
    fields: str | tuple[str, ...],
    unit: str,
    about: str,
    reads: str,
    scale: float = 1.0,
    trust: ChannelTrust | None = None,
    accel: Literal["any", "tcg"] = "any",
    arch: Literal["any", "x86"] = "any",
) -> ChannelSpec:
    return ChannelSpec(
        name=name,
        source=source,
        kind=kind,
        fields=(fields,) if isinstance(fields, str) else fields,
        unit=unit,
        about=about,
        reads=reads,
        scale=scale,
        trust=trust or (ChannelTrust.GUEST if source is SourceKind.GUEST else ChannelTrust.HOST),
        accel=accel,
        arch=arch,
    )


_proc_channel, _qmp_channel, _netflow_channel, _guest_channel = (partial(_channel, source) for source in SourceKind)

_PROC_STAT = "/proc/P/stat"
_PROC_SCHEDSTAT = "/proc/P/task/T/schedstat"
_PROC_STATUS = "/proc/P/task/T/status"

CHANNELS: tuple[ChannelSpec, ...] = (
    _proc_channel("cpu_user", ChannelKind.RATE, "cpu_user_ns", "cores",
        "User time of the QEMU process.", f"{_PROC_STAT} field 14", 1e-9),
    _proc_channel("cpu_sys", ChannelKind.RATE, "cpu_sys_ns", "cores",
        "System time of the QEMU process.", f"{_PROC_STAT} field 15", 1e-9),
    _proc_channel("vcpu_run", ChannelKind.RATE, "vcpu_run_ns", "cores",
        "CPU time that the vCPU threads got.", f"{_PROC_SCHEDSTAT} field 1", 1e-9),
    _proc_channel("vcpu_wait", ChannelKind.RATE, "vcpu_wait_ns", "cores",
        "Time that they waited for a core: contention.", f"{_PROC_SCHEDSTAT} field 2", 1e-9),
    _proc_channel("vcpu_vcs", ChannelKind.RATE, "vcpu_vcs", "1/s",
        "Voluntary switches of the vCPU threads.", f"{_PROC_STATUS} voluntary_ctxt_switches"),
    _proc_channel("vcpu_ics", ChannelKind.RATE, "vcpu_ics", "1/s",
        "Involuntary switches of the vCPU threads.", f"{_PROC_STATUS} nonvoluntary_ctxt_switches"),
    _proc_channel("main_run", ChannelKind.RATE, "main_run_ns", "cores",
        "CPU time of the main thread.", f"{_PROC_SCHEDSTAT} field 1", 1e-9),
    _proc_channel("main_vcs", ChannelKind.RATE, "main_vcs", "1/s",
        "Voluntary switches of the main thread.", f"{_PROC_STATUS} voluntary_ctxt_switches"),
    _proc_channel("aux_run", ChannelKind.RATE, "aux_run_ns", "cores",
        "CPU time of all other threads.", f"{_PROC_SCHEDSTAT} field 1", 1e-9),
    _proc_channel("rss_anon_delta", ChannelKind.DELTA, "rss_anon_bytes", "B/s",
        "Growth of anonymous memory.", "/proc/P/status RssAnon"),
    _proc_channel("io_rchar", ChannelKind.RATE, "io_rchar_bytes", "B/s",
        "Bytes read by system calls.", "/proc/P/io rchar"),
    _proc_channel("io_wchar_net", ChannelKind.RATE, "io_wchar_net_bytes", "B/s",
        "Bytes written by system calls, event kicks removed.", "/proc/P/io wchar, syscw"),
    _proc_channel("io_write_bytes", ChannelKind.RATE, "io_write_bytes", "B/s",
        "Bytes sent to the storage layer.", "/proc/P/io write_bytes"),
    _qmp_channel("blk_rd_bytes", ChannelKind.RATE, ("blk_rd_bytes",), "B/s",
        "Bytes read from the data disk.", "query-blockstats rd_bytes"),
    _qmp_channel("blk_wr_bytes", ChannelKind.RATE, ("blk_wr_bytes",), "B/s",
        "Bytes written to the data disk.", "query-blockstats wr_bytes"),
    _qmp_channel("blk_rd_ops", ChannelKind.RATE, ("blk_rd_ops",), "1/s",
        "Read requests.", "query-blockstats rd_operations"),
    _qmp_channel("blk_wr_ops", ChannelKind.RATE, ("blk_wr_ops",), "1/s",
        "Write requests.", "query-blockstats wr_operations"),
    _qmp_channel("blk_flush_ops", ChannelKind.RATE, ("blk_flush_ops",), "1/s",
        "Flush requests.", "query-blockstats flush_operations"),
    _qmp_channel("blk_wr_lat", ChannelKind.RATIO, ("blk_wr_ns", "blk_wr_ops"), "s",
        "Mean time of a write request.", "query-blockstats wr_total_time_ns / wr_operations", scale=1e-9),
    _qmp_channel("vq_blk", ChannelKind.RATE, ("vq_blk",), "1/s",
        "Requests that the disk's virtqueues completed.", "x-query-virtio-queue-status used-idx"),
    _qmp_channel("jit_tb", ChannelKind.RATE, ("jit_tb",), "1/s",
        "Code translated for the first time.", "x-query-jit TB count", accel="tcg"),
    _qmp_channel("jit_tlb_partial", ChannelKind.RATE, ("jit_tlb_partial",), "1/s",
        "Partial TLB flushes: address-space switches.", "x-query-jit TLB partial flushes", accel="tcg"),
    _qmp_channel("vcpu_busy", ChannelKind.GAUGE, ("vcpu_busy",), "1",
        "Share of time a vCPU was not halted.", "info registers HLT, 10 Hz", accel="tcg", arch="x86"),
    _qmp_channel("vcpu_user", ChannelKind.GAUGE, ("vcpu_user",), "1",
        "Share of time it was in user mode.", "info registers CPL, 10 Hz", accel="tcg", arch="x86"),
    _qmp_channel("bal_minor_faults", ChannelKind.RATE, ("bal_minor_faults",), "1/s",
        "Minor page faults in the guest.", "guest-stats stat-minor-faults", trust=ChannelTrust.GUEST),
    _qmp_channel("bal_free_delta", ChannelKind.DELTA, ("bal_free_bytes",), "B/s",
        "Growth of the guest's free memory.", "guest-stats stat-free-memory", trust=ChannelTrust.GUEST),
    _qmp_channel("bal_cache_delta", ChannelKind.DELTA, ("bal_cache_bytes",), "B/s",
        "Growth of the guest's disk caches.", "guest-stats stat-disk-caches", trust=ChannelTrust.GUEST),
    _netflow_channel("out_pkts", ChannelKind.RATE, ("out_pkts",), "1/s",
        "Frames that the guest sends.", "frames at the network card"),
    _netflow_channel("out_bytes", ChannelKind.RATE, ("out_bytes",), "B/s",
        "Their bytes.", "frames at the network card"),
    _netflow_channel("in_pkts", ChannelKind.RATE, ("in_pkts",), "1/s",
        "Frames that the guest is sent.", "frames at the network card"),
    _netflow_channel("in_bytes", ChannelKind.RATE, ("in_bytes",), "B/s", "Their bytes.", "frames at the network card"),
    _netflow_channel("mean_out_size", ChannelKind.RATIO, ("out_bytes", "out_pkts"), "B",
        "Mean size of a sent frame.", "frames at the network card"),
    _netflow_channel("new_flows", ChannelKind.RATE, ("new_flows",), "1/s",
        "5-tuples seen for the first time.", "TCP and UDP headers over IPv4 or IPv6"),
    _netflow_channel("syn_out", ChannelKind.RATE, ("syn_out",), "1/s",
        "Connections that the guest opens.", "TCP flags SYN without ACK"),
    _netflow_channel("rst_in", ChannelKind.RATE, ("rst_in",), "1/s",
        "Connections that are refused to it.", "TCP flag RST"),
    _netflow_channel("dst_ports", ChannelKind.COUNT, ("dst_ports",), "1",
        "Distinct destination ports in a tick.", "TCP and UDP headers"),
    _netflow_channel("dst_ips", ChannelKind.COUNT, ("dst_ips",), "1",
        "Distinct destination addresses in a tick.", "IPv4 and IPv6 headers"),
    _netflow_channel("dns_queries", ChannelKind.RATE, ("dns_queries",), "1/s",
        "DNS questions that the guest asks.", "UDP destination port 53"),
    _guest_channel("cpu_user", ChannelKind.RATIO, ("cpu_user_jiffies", "cpu_total_jiffies"), "1",
        "Share of time in user mode.", "/proc/stat cpu user, nice"),
    _guest_channel("cpu_sys", ChannelKind.RATIO, ("cpu_sys_jiffies", "cpu_total_jiffies"), "1",
        "Share of time in the kernel.", "/proc/stat cpu system, irq, softirq"),
    _guest_channel("ctxt", ChannelKind.RATE, ("ctxt",), "1/s", "Context switches.", "/proc/stat ctxt"),
    _guest_channel("forks", ChannelKind.RATE, ("forks",), "1/s", "Processes made.", "/proc/stat processes"),
    _guest_channel("procs_running", ChannelKind.GAUGE, ("procs_running",), "1",
        "Runnable processes.", "/proc/stat procs_running"),
    _guest_channel("pgfault", ChannelKind.RATE, ("pgfault",), "1/s", "Page faults.", "/proc/vmstat pgfault"),
    _guest_channel("disk_wr_bytes", ChannelKind.RATE, ("disk_wr_bytes",), "B/s",
        "Bytes written to all disks.", "/proc/diskstats field 10"),
    _guest_channel("mem_dirty", ChannelKind.GAUGE, ("mem_dirty_bytes",), "B",
        "Memory waiting to be written back.", "/proc/meminfo Dirty"),
    *(ChannelSpec(**row) for row in CUSTOM_CHANNELS.channels),
)  # fmt: skip
CHANNEL_NAMES = tuple(c.full_name for c in CHANNELS)


def _level_channel(source: SourceKind, name: str, field: str, unit: str, about: str) -> ChannelSpec:
    is_from_guest = source is SourceKind.GUEST or name.startswith("bal_")
    return ChannelSpec(
        name=name,
        source=source,
        kind=ChannelKind.GAUGE,
        fields=(field,),
        unit=unit,
        about=about,
        reads=f"RAW {field}",
        trust=ChannelTrust.GUEST if is_from_guest else ChannelTrust.HOST,
    )


LEVEL_CHANNELS: tuple[ChannelSpec, ...] = (
    _level_channel(SourceKind.PROC, "rss", "rss_bytes", "B", "Resident memory of QEMU."),
    _level_channel(SourceKind.PROC, "rss_anon", "rss_anon_bytes", "B", "Its anonymous part."),
    _level_channel(SourceKind.PROC, "threads", "threads", "1", "Threads of QEMU."),
    _level_channel(SourceKind.PROC, "cpu_user_total", "cpu_user_ns", "ns", "User time since QEMU started."),
    _level_channel(SourceKind.QMP, "bal_free", "bal_free_bytes", "B", "Free memory of the guest."),
    _level_channel(SourceKind.QMP, "bal_cache", "bal_cache_bytes", "B", "Disk caches of the guest."),
    _level_channel(SourceKind.QMP, "jit_code", "jit_code_bytes", "B", "Size of the translated code."),
    _level_channel(SourceKind.QMP, "jit_tb_total", "jit_tb", "1", "Translated blocks so far."),
    _level_channel(SourceKind.QMP, "wr_highest", "wr_highest_bytes", "B", "Highest offset written on the data disk."),
    _level_channel(SourceKind.NETFLOW, "out_bytes_total", "out_bytes", "B", "Bytes sent so far."),
    _level_channel(SourceKind.GUEST, "mem_free", "mem_free_bytes", "B", "Free memory, as the agent sees it."),
    _level_channel(SourceKind.GUEST, "mem_cached", "mem_cached_bytes", "B", "Page cache, as the agent sees it."),
    _level_channel(SourceKind.GUEST, "uptime", "up_ns", "ns", "The guest's uptime."),
)


def get_custom_channels_digest() -> str:
    """Return a short digest of the user's own channels; empty without any."""
    return CUSTOM_CHANNELS.digest


def list_raw_fields(source: SourceKind) -> tuple[RawFieldSpec, ...]:
    """Return the raw fields of one source, in the order of its rows."""
    return tuple(spec for spec in RAW_FIELDS if spec.source is source)


_BALLOON_CHANNELS = tuple(c for c in CHANNELS if c.source is SourceKind.QMP and c.trust is ChannelTrust.GUEST)
_CHANNEL_SETS: dict[str, frozenset[str]] = {
    "realistic": frozenset(c.full_name for c in CHANNELS if c.in_deployment),
    "oracle": frozenset(c.full_name for c in CHANNELS),
    "portable": frozenset(c.full_name for c in CHANNELS if c.in_deployment and c.accel == "any"),
    "balloon": frozenset(c.full_name for c in _BALLOON_CHANNELS),
    "guest": frozenset(c.full_name for c in CHANNELS if c.source is SourceKind.GUEST),
    # The counters of a tap device, without a look into frames.
    "tap": frozenset(
        f"{SourceKind.NETFLOW}.{n}" for n in ("out_pkts", "out_bytes", "in_pkts", "in_bytes", "mean_out_size")
    ),
    **{
        str(source): frozenset(c.full_name for c in CHANNELS if c.source is source and c.in_deployment)
        for source in (SourceKind.PROC, SourceKind.QMP, SourceKind.NETFLOW)
    },
}


def build_channel_mask(name: str) -> tuple[bool, ...]:
    """Return which of `CHANNELS` a channel set holds, in their order.

    Args:
        name: One of `list_channel_sets`, or several joined with ``+`` (``realistic+balloon``, ``proc+netflow``).

    Raises:
        UsageError: If a part of the name is unknown.
    """
    chosen: frozenset[str] = frozenset()
    for part in name.split("+"):
        if part not in _CHANNEL_SETS:
            raise UsageError(f"no channel set {part!r}; {suggest_names(part, _CHANNEL_SETS)}")
        chosen |= _CHANNEL_SETS[part]
    return tuple(c.full_name in chosen for c in CHANNELS)


def list_channel_sets() -> tuple[str, ...]:
    """Return the names that `build_channel_mask` accepts."""
    return tuple(_CHANNEL_SETS)


def list_source_subsets() -> tuple[str, ...]:
    """Return the 15 channel sets of one, two, three or all sources, smallest first.

    >>> list_source_subsets()[4], list_source_subsets()[-1]
    ('proc+qmp', 'proc+qmp+netflow+guest')
    """
    sources = tuple(map(str, SourceKind))
    return tuple("+".join(chosen) for n in range(1, len(sources) + 1) for chosen in combinations(sources, n))


def _check_tables() -> None:
    """Raise at import if a table contradicts itself; a wrong row would spoil every file that is made with it.

    Raises:
        UsageError: If a name or field is listed twice, or a channel does not match its fields.
    """
    raw = {(spec.source, spec.field): spec for spec in RAW_FIELDS}
    if len(raw) != len(RAW_FIELDS):
        raise UsageError("channels: a raw field is listed twice")
    for table in (CHANNELS, LEVEL_CHANNELS):
        if len({c.full_name for c in table}) != len(table):
            raise UsageError("channels: a channel is listed twice")
        for channel in table:
            if len(channel.fields) != (2 if channel.kind is ChannelKind.RATIO else 1):
                raise UsageError(f"channels: {channel.full_name} has {len(channel.fields)} fields")
            for field in channel.fields:
                if (channel.source, field) not in raw:
                    raise UsageError(f"channels: {channel.full_name} reads {field}, which is no raw field")
                if table is CHANNELS:
                    check_channel_kind(channel.kind, raw[channel.source, field].nature, channel=channel.full_name)


_check_tables()
