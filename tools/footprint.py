"""Measure the cost of the guest's agent: `python -m tools.footprint [CORPUS]`, about eight minutes on two idle cores.

It records pairs of idle machines, with and without the agent, and writes the differences to `<corpus>.footprint.json`
beside the corpus; `tools/datasheet.py` adds them to the datasheet.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from phasewatch import atomic
from phasewatch.binning.storage import open_bins
from phasewatch.bundle.archive import unpack_manifest
from phasewatch.cli.progress import show_progress
from phasewatch.lab.campaign import RecordingOptions, default_cache, record_plan
from phasewatch.store.local import DiskStore
from phasewatch.validate.sweep import sweep
from tools.datasheet_tables import (
    FOOTPRINT_DURATION_S,
    AgentFootprint,
    build_footprint_path,
    build_footprint_sessions,
    compute_channel_costs,
)

CORPUS = Path(__file__).parents[1] / "corpus" / "lab-v1"
HOST, PAIRS = "pc", 3


def main(arguments: Sequence[str]) -> int:
    """Record the pairs, compute the differences and write them."""
    corpus = Path(arguments[0]) if arguments else CORPUS
    with tempfile.TemporaryDirectory(prefix="phasewatch-footprint-") as folder:
        store, run = Path(folder) / "store", Path(folder) / "run"
        with show_progress() as progress:
            options = RecordingOptions(cache=default_cache())
            done = record_plan(build_footprint_sessions(HOST, PAIRS), store=store, options=options, progress=progress)
        if done.failed:
            print("\n".join(done.failed), file=sys.stderr)
            return 1
        sweep(store, run, workers=1)
        grids, disk = open_bins(run / "grids"), DiskStore(store)
        host = unpack_manifest(disk.read(next(disk.walk()))).host
        pairs: dict[str, dict[bool, object]] = {}
        for row in grids.rows:
            pairs.setdefault(row.session, {})[row.agent] = grids.episode_bins(row)
        found = AgentFootprint(
            host_id=HOST,
            accel=host.accel,
            guest_image=host.recorder,
            seconds=FOOTPRINT_DURATION_S,
            pairs=len(pairs),
            costs=compute_channel_costs(pairs),  # type: ignore[arg-type]
        )
    path = build_footprint_path(corpus)
    atomic.write_atomic(path, msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
