"""The VM lab: record labelled episodes from real QEMU virtual machines.

The lab is a closed wing. Only the commands `record` and `doctor` use it; everything else reads the bundles that it
writes. It needs QEMU and Debian packages, the rest of the package does not.

- `plan`, `scheduling`, `plans`, `custom_workload`: what to record, on which host, when.
- `campaign`, `recorder`, `session`: record a plan, its sessions, and one slot of a session.
- `vm`, `qemu_command`, `process`, `host`: one QEMU process, its command line, child processes, facts about the host.
- `guest_image`, `guest_driver`, `guest/`: the image, the connection to the driver in the guest, and its C program.
- `network/`: the simulated network that each VM is connected to; no packet leaves it.

The emulated profiles are harmless: see the safety contracts in `guest/README.md` and `network/README.md`.
"""
