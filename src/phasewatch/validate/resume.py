"""What a long sweep has read so far, in parts beside the run: a kill costs the last part, not the sweep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from phasewatch import atomic
from phasewatch.artifacts import BINS_DIR, VALIDATION_FILE
from phasewatch.binning.storage import BinIndexRow, MappedBins, open_bins, write_bins
from phasewatch.errors import RunError
from phasewatch.validate.index import read_index, write_index
from phasewatch.validate.verdict import USABLE_STATUSES, BundleVerdict, SweepResult

SWEEP_STATE_FILE = ".sweep.json"  # what was seen when; not a product: it holds times
SWEEP_PARTS_DIR = ".sweep"
PART_SIZE = 500  # bundles a part; about 45 MB of grids

TRANSIENT_CODES = frozenset({"worker-lost", "bundle-unreadable"})  # what may be gone when it is tried again

BundleSignature = list[object]  # size, time and receipt of a bundle: if none of them changed, it is not read again


class SweepCache:
    """What earlier sweeps found, as far as the same version made it and its files belong together."""

    def __init__(self) -> None:
        self.signatures: dict[str, BundleSignature] = {}
        self._verdicts: dict[str, BundleVerdict] = {}
        self._rows: dict[str, tuple[MappedBins, BinIndexRow]] = {}
        self._read = 0

    def add(self, folder: Path, version: str) -> None:
        """Take over what a folder holds; nothing, if anything is odd about it."""
        with suppress(OSError, ValueError, KeyError, TypeError, RunError):
            state = json.loads((folder / SWEEP_STATE_FILE).read_bytes())
            if state["version"] != version:
                return
            grids = open_bins(folder / BINS_DIR)
            rows = {(row.host_id, row.episode_id): row for row in grids.rows}
            verdicts = {v.path: v for v in read_index(folder / VALIDATION_FILE)}
            for path, verdict in verdicts.items():
                if (row := rows.get((verdict.host_id, verdict.episode_id))) and verdict.status in USABLE_STATUSES:
                    self._rows[path] = grids, row
            self._verdicts |= verdicts
            self.signatures |= {path: looks for path, looks in dict(state["items"]).items() if path in verdicts}

    def find_verdicts(self, paths: Sequence[str]) -> tuple[BundleVerdict, ...] | None:
        """Give the verdicts on exactly these, in this order; None if others were found, or one that may pass."""
        if list(self._verdicts) != list(paths):
            return None
        found = tuple(self._verdicts.values())
        return None if any(TRANSIENT_CODES & set(v.reasons) for v in found if v.reasons) else found

    def is_final(self, path: str) -> bool:
        """Whether the same bundle would be judged the same: a copy hangs on its original, a lost worker on the day."""
        verdict = self._verdicts[path]
        return not verdict.duplicate_of and TRANSIENT_CODES.isdisjoint(verdict.reasons)

    def load_result(self, path: str) -> SweepResult:
        """Give what was found."""
        verdict = self._verdicts[path]
        if path not in self._rows:
            return SweepResult(verdict=verdict, row=None, bins=None, levels=None)
        grids, row = self._rows[path]
        self._read += 1
        if self._read % PART_SIZE == 0:
            grids.release_pages()
        return SweepResult(verdict=verdict, row=row, bins=grids.episode_bins(row), levels=grids.episode_levels(row))


class SweepCheckpoint:
    """Takes what a sweep reads, and puts it down every so often."""

    def __init__(self, run: Path, version: str, *, size: int = PART_SIZE) -> None:
        self._folder, self._version, self._size = run / SWEEP_PARTS_DIR, version, size
        self._held: list[tuple[SweepResult, BundleSignature]] = []

    def restore_into(self, taken: SweepCache) -> None:
        """Add what a killed sweep left, the newest last."""
        for part in self._list_parts():
            taken.add(part, self._version)

    def add(self, swept: SweepResult, looks: BundleSignature) -> None:
        """Hold one more; what is held is written when it is a part's worth."""
        self._held.append((swept, looks))
        if len(self._held) >= self._size:
            self._write()

    def clear(self) -> None:
        """Remove them: the run's own files stand, or what they hold is not wanted."""
        self._held = []
        if self._folder.is_dir():
            atomic.remove_folder(self._folder)

    def _list_parts(self) -> list[Path]:
        return sorted(self._folder.iterdir()) if self._folder.is_dir() else []

    def _write(self) -> None:
        part = self._folder / f"{len(self._list_parts()):05d}"
        atomic.make_folder(part)
        write_index(part / VALIDATION_FILE, [swept.verdict for swept, _ in self._held])
        with write_bins(part / BINS_DIR) as grids:
            for swept, _ in self._held:
                if swept.row is not None and swept.bins is not None and swept.levels is not None:
                    grids.add(swept.row, swept.bins, swept.levels)
        write_sweep_state(part, self._version, {swept.verdict.path: looks for swept, looks in self._held})
        self._held = []


def write_sweep_state(folder: Path, version: str, looks: dict[str, BundleSignature]) -> None:
    """Say which bundles the files of a folder were made from; written last, it vouches for them."""
    atomic.write_atomic(folder / SWEEP_STATE_FILE, json.dumps({"version": version, "items": looks}).encode())
