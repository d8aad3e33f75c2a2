"""Watch running QEMU virtual machines from the host: find a VM, attach to it, follow it, leave it as it was.

Before a watch: `discover` finds VMs, `monitor_endpoints` their QMP sockets, `access` checks permissions and connects;
`attach` opens the telemetry sources, `ownership` names and records what is put into a VM, `cleanup` undoes it. During a
watch: `session` runs it, `watcher` and `tracker` turn readings into bins and decisions, `silence` notices missing
readings, `events` builds events, `outputs` delivers them, `recording` saves bundles; `baseline` measures a clean VM.
"""
