"""One run of one VM: its values in memory, its rows as JSON lines, its file as a bounded, deterministic `.tar.zst`."""
