"""The channels of the group ``extended`` and their raw fields: whom a VM talks to, what it writes, what it dirties.

All are measured by the host. Addresses and names stay in the sampler; its rows hold counts alone (docs/adr/0085).
"""

from __future__ import annotations

from functools import partial

from phasewatch.channels.specs import ChannelSpec, RawFieldSpec, build_channel, parse_raw_fields
from phasewatch.types import ChannelGroup, ChannelKind, SourceKind

__all__ = ["EXTENDED_FIELDS", "EXTENDED_TABLE"]

EXTENDED_FIELDS: tuple[RawFieldSpec, ...] = (
    *parse_raw_fields(
        SourceKind.QMP,
        """
blk_rd_ns          int ns    counter  time spent in read requests
blk_merged         int 1     counter  read and write requests that were merged into others
blk_flush_ns       int ns    counter  time spent in flush requests
blk_clusters       int 1     counter  64 KiB clusters written, each once per reading
blk_rewritten      int 1     counter  those of them that were written before since the sampling began
mem_dirty_rate     int B/s   gauge    memory that changed per second, estimated from sampled pages
kvm_exits          int 1     counter  exits of all vCPUs
kvm_io_exits       int 1     counter  exits for port and memory-mapped I/O
kvm_halt_exits     int 1     counter  exits of halted vCPUs
kvm_halt_polls     int 1     counter  attempts to wait for an interrupt by polling
""",
        ChannelGroup.EXTENDED,
    ),
    *parse_raw_fields(
        SourceKind.NETFLOW,
        """
dst_new            int 1     counter  destinations (address, port, protocol) contacted for the first time
dst_bytes          int B     counter  bytes exchanged with destinations, both ways
dst_new_bytes      int B     counter  those exchanged with destinations contacted for the first time in the last minute
dst_top_bytes      int B     counter  those exchanged with the busiest destination of each reading
dst_top_out_bytes  int B     counter  those sent to it
conn_accepted      int 1     counter  TCP connections of the guest that were accepted
conn_refused       int 1     counter  those that were refused with RST
conn_silent        int 1     counter  those without an answer for 3 s
conn_closed        int 1     counter  accepted connections that were closed
conn_closed_ns     int ns    counter  how long these had been open
conn_open          int 1     gauge    accepted connections that are open
rhythm             int 1/1000 gauge   largest regularity of exchanges with one destination, 1000 = a clock
dns_asked          int 1     counter  DNS questions of the guest that could be parsed
dns_new_names      int 1     counter  those for a name that was not asked for before
dns_name_bytes     int B     counter  length of the names asked for
dns_entropy        int mbit  counter  sum of the names' entropies per character
dns_txt            int 1     counter  questions for TXT records
dns_answers        int 1     counter  DNS answers to the guest
dns_nxdomain       int 1     counter  those that say that the name does not exist
""",
        ChannelGroup.EXTENDED,
    ),
)

_qmp_channel, _netflow_channel = (
    partial(build_channel, source, group=ChannelGroup.EXTENDED) for source in (SourceKind.QMP, SourceKind.NETFLOW)
)

EXTENDED_TABLE: tuple[ChannelSpec, ...] = (
    _qmp_channel("blk_rd_size", ChannelKind.RATIO, ("blk_rd_bytes", "blk_rd_ops"), "B",
        "Mean size of a read request.", "query-blockstats rd_bytes / rd_operations"),
    _qmp_channel("blk_wr_size", ChannelKind.RATIO, ("blk_wr_bytes", "blk_wr_ops"), "B",
        "Mean size of a write request.", "query-blockstats wr_bytes / wr_operations"),
    _qmp_channel("blk_rd_lat", ChannelKind.RATIO, ("blk_rd_ns", "blk_rd_ops"), "s",
        "Mean time of a read request.", "query-blockstats rd_total_time_ns / rd_operations", 1e-9),
    _qmp_channel("blk_flush_lat", ChannelKind.RATIO, ("blk_flush_ns", "blk_flush_ops"), "s",
        "Mean time of a flush request.", "query-blockstats flush_total_time_ns / flush_operations", 1e-9),
    _qmp_channel("blk_merged", ChannelKind.RATE, ("blk_merged",), "1/s",
        "Requests merged into others.", "query-blockstats rd_merged, wr_merged"),
    _qmp_channel("blk_clusters", ChannelKind.RATE, ("blk_clusters",), "1/s",
        "64 KiB clusters written.", "query-named-block-nodes dirty-bitmaps count"),
    _qmp_channel("blk_rewritten", ChannelKind.RATIO, ("blk_rewritten", "blk_clusters"), "1",
        "Share of written clusters that were written before.", "query-named-block-nodes dirty-bitmaps count"),
    _qmp_channel("mem_dirty_rate", ChannelKind.GAUGE, ("mem_dirty_rate",), "B/s",
        "Memory that changes per second.", "calc-dirty-rate page-sampling, query-dirty-rate"),
    _qmp_channel("kvm_exits", ChannelKind.RATE, ("kvm_exits",), "1/s",
        "Exits of the vCPUs.", "query-stats vcpu exits", accel="kvm"),
    _qmp_channel("kvm_io_exits", ChannelKind.RATE, ("kvm_io_exits",), "1/s",
        "Exits for I/O.", "query-stats vcpu io_exits, mmio_exits", accel="kvm"),
    _qmp_channel("kvm_halt_exits", ChannelKind.RATE, ("kvm_halt_exits",), "1/s",
        "Exits of halted vCPUs.", "query-stats vcpu halt_exits", accel="kvm"),
    _qmp_channel("kvm_halt_polls", ChannelKind.RATE, ("kvm_halt_polls",), "1/s",
        "Attempts to wait by polling.", "query-stats vcpu halt_attempted_poll", accel="kvm"),
    _netflow_channel("new_dsts", ChannelKind.RATE, ("dst_new",), "1/s",
        "Destinations contacted for the first time.", "address, port and protocol of sent frames"),
    _netflow_channel("new_dst_share", ChannelKind.RATIO, ("dst_new_bytes", "dst_bytes"), "1",
        "Share of bytes exchanged with destinations of the last minute.", "address, port and protocol of frames"),
    _netflow_channel("top_dst_share", ChannelKind.RATIO, ("dst_top_bytes", "dst_bytes"), "1",
        "Share of bytes exchanged with the busiest destination.", "address, port and protocol of frames"),
    _netflow_channel("top_dst_out_share", ChannelKind.RATIO, ("dst_top_out_bytes", "dst_top_bytes"), "1",
        "Share of its bytes that the guest sent.", "address, port and protocol of frames"),
    _netflow_channel("conn_accepted", ChannelKind.RATE, ("conn_accepted",), "1/s",
        "Connections of the guest that are accepted.", "TCP flags SYN, then SYN with ACK"),
    _netflow_channel("conn_refused", ChannelKind.RATE, ("conn_refused",), "1/s",
        "Connections that are refused.", "TCP flags SYN, then RST"),
    _netflow_channel("conn_silent", ChannelKind.RATE, ("conn_silent",), "1/s",
        "Connections without an answer for 3 s.", "TCP flag SYN"),
    _netflow_channel("conn_duration", ChannelKind.RATIO, ("conn_closed_ns", "conn_closed"), "s",
        "Mean time that closed connections had been open.", "TCP flags SYN with ACK, then FIN or RST", 1e-9),
    _netflow_channel("conn_open", ChannelKind.GAUGE, ("conn_open",), "1",
        "Open connections.", "TCP flags SYN with ACK, FIN, RST"),
    _netflow_channel("rhythm", ChannelKind.GAUGE, ("rhythm",), "1",
        "Largest regularity of exchanges with one destination.", "times of frames per destination", 1e-3),
    _netflow_channel("dns_new_names", ChannelKind.RATE, ("dns_new_names",), "1/s",
        "DNS names that were not asked for before.", "questions in UDP packets to port 53"),
    _netflow_channel("dns_name_len", ChannelKind.RATIO, ("dns_name_bytes", "dns_asked"), "B",
        "Mean length of a DNS name.", "questions in UDP packets to port 53"),
    _netflow_channel("dns_entropy", ChannelKind.RATIO, ("dns_entropy", "dns_asked"), "bit",
        "Mean entropy per character of a DNS name.", "questions in UDP packets to port 53", 1e-3),
    _netflow_channel("dns_txt_share", ChannelKind.RATIO, ("dns_txt", "dns_asked"), "1",
        "Share of DNS questions for TXT records.", "questions in UDP packets to port 53"),
    _netflow_channel("dns_nxdomain_share", ChannelKind.RATIO, ("dns_nxdomain", "dns_answers"), "1",
        "Share of DNS answers that say that the name does not exist.", "UDP packets from port 53"),
)  # fmt: skip
