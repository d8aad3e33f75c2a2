"""Read the counters of one VM from the host: the process, the QEMU monitor, the network, and an agent inside the guest.

`base` defines a source and samples all at 2 Hz. Sources: `proc` (/proc; `process`, `vcpu_threads`), `qmp` (QEMU
monitor; `monitor_queries`, `counters`), `capture` (frames by QEMU filter-dump; `pcap`, `vnet_header`, `headers`,
`netflow`, `network_cards`), `tap` (counters of tap devices), `guest_agent` (rows that the guest reports).
"""
