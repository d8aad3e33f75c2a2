"""Measure what the guest's agent costs: record pairs of idle machines, with it and without, and write the differences.

Run as `python docs/footprint.py [CORPUS]`, about eight minutes on two cores with nothing else running. The result lies
beside the corpus as `<corpus>.footprint.json`; `docs/datasheet.py` puts it into the datasheet.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from phasewatch import atomic
from phasewatch.episode.bundle import peek
from phasewatch.grid.files import open_grids
from phasewatch.record.campaign import default_cache, record_plan
from phasewatch.record.footprint import LENGTH_S, Footprint, compare, footprint_file, footprint_sessions
from phasewatch.record.progress import Bar
from phasewatch.store.disk import DiskStore
from phasewatch.validate.sweep import sweep

CORPUS = Path(__file__).parents[1] / "corpus" / "lab-v1"
HOST, PAIRS = "pc", 3


def main(arguments: Sequence[str]) -> int:
    """Record, compare, write."""
    corpus = Path(arguments[0]) if arguments else CORPUS
    with tempfile.TemporaryDirectory(prefix="phasewatch-footprint-") as folder:
        store, run = Path(folder) / "store", Path(folder) / "run"
        with Bar() as bar:
            done = record_plan(footprint_sessions(HOST, PAIRS), store=store, cache=default_cache(), progress=bar)
        if done.failed:
            print("\n".join(done.failed), file=sys.stderr)
            return 1
        sweep(store, run, workers=1)
        grids, disk = open_grids(run / "grids"), DiskStore(store)
        host = peek(disk.read(next(disk.walk()))).host
        pairs: dict[str, dict[bool, object]] = {}
        for row in grids.rows:
            pairs.setdefault(row.session, {})[row.agent] = grids.bins_of(row)
        found = Footprint(
            host_id=HOST, accel=host.accel, guest_image=host.recorder, seconds=LENGTH_S, pairs=len(pairs),
            costs=compare(pairs),  # type: ignore[arg-type]
        )  # fmt: skip
    path = footprint_file(corpus)
    atomic.write_whole(path, msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
