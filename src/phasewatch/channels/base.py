"""The channels of the group ``base``, their raw fields, and the cumulative levels."""

from __future__ import annotations

from functools import partial

from phasewatch.channels.specs import ChannelSpec, RawFieldSpec, build_channel, parse_raw_fields
from phasewatch.types import ChannelKind, ChannelTrust, SourceKind

__all__ = ["BASE_FIELDS", "BASE_TABLE", "LEVEL_CHANNELS"]

BASE_FIELDS: tuple[RawFieldSpec, ...] = (
    *parse_raw_fields(
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
    *parse_raw_fields(
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
    *parse_raw_fields(
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
    *parse_raw_fields(
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
)

_proc_channel, _qmp_channel, _netflow_channel, _guest_channel = (
    partial(build_channel, source) for source in SourceKind
)

_PROC_STAT = "/proc/P/stat"
_PROC_SCHEDSTAT = "/proc/P/task/T/schedstat"
_PROC_STATUS = "/proc/P/task/T/status"

BASE_TABLE: tuple[ChannelSpec, ...] = (
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
)  # fmt: skip


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
