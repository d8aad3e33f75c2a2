"""Read the counters of one VM from the host: the process, the QEMU monitor, the network, and an agent inside the guest.

`base` defines a source and samples all at 2 Hz. Sources: `proc` (/proc; `process`, `vcpu_threads`), `qmp` (QEMU
monitor; `monitor_queries`, `counters`), `af_packet` (frames at the taps; `packet_socket`, `frame_batch`), `capture`
(frames by QEMU filter-dump; `pcap`, `vnet_header`), both with `headers`, `netflow` and `network_cards`, `tap` (tap
devices and their counters), `guest_agent` (rows that the guest reports).
"""
