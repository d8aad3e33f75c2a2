"""Resume a validation: results are saved in parts, so that a killed process repeats only its last part."""

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

__all__ = [
    "PART_SIZE",
    "SWEEP_PARTS_DIR",
    "SWEEP_STATE_FILE",
    "BundleSignature",
    "SweepCache",
    "SweepCheckpoint",
    "write_sweep_state",
]

SWEEP_STATE_FILE = ".sweep.json"  # signatures of the validated bundles; not a result, because it holds times
SWEEP_PARTS_DIR = ".sweep"
PART_SIZE = 500  # bundles per part; about 45 MB of bins

_TRANSIENT_CODES = frozenset({"worker-lost", "bundle-unreadable"})  # findings that may disappear at the next attempt

BundleSignature = list[object]  # size, time and receipt of a bundle; it is read again if one of them changed


class SweepCache:
    """Results of earlier validations by the same version."""

    def __init__(self) -> None:
        self.signatures: dict[str, BundleSignature] = {}
        self._verdicts: dict[str, BundleVerdict] = {}
        self._rows: dict[str, tuple[MappedBins, BinIndexRow]] = {}
        self._read = 0

    def add(self, folder: Path, version: str) -> None:
        """Load the results in a folder; nothing if its files are incomplete or of another version."""
        with suppress(OSError, ValueError, KeyError, TypeError, RunError):
            state = json.loads((folder / SWEEP_STATE_FILE).read_bytes())
            if state["version"] != version:
                return
            mapped = open_bins(folder / BINS_DIR)
            rows = {(row.host_id, row.episode_id): row for row in mapped.rows}
            verdicts = {v.path: v for v in read_index(folder / VALIDATION_FILE)}
            for path, verdict in verdicts.items():
                if (row := rows.get((verdict.host_id, verdict.episode_id))) and verdict.status in USABLE_STATUSES:
                    self._rows[path] = mapped, row
            self._verdicts |= verdicts
            self.signatures |= {path: seen for path, seen in dict(state["items"]).items() if path in verdicts}

    def find_verdicts(self, paths: Sequence[str]) -> tuple[BundleVerdict, ...] | None:
        """Return the verdicts on exactly these bundles in this order; None if others are held, or one is transient."""
        if list(self._verdicts) != list(paths):
            return None
        verdicts = tuple(self._verdicts.values())
        return None if any(_TRANSIENT_CODES & set(v.reasons) for v in verdicts if v.reasons) else verdicts

    def is_final(self, path: str) -> bool:
        """Whether an unchanged bundle gets the same verdict again: not for copies and transient errors."""
        verdict = self._verdicts[path]
        return not verdict.duplicate_of and _TRANSIENT_CODES.isdisjoint(verdict.reasons)

    def load_result(self, path: str) -> SweepResult:
        """Return the result on one bundle."""
        verdict = self._verdicts[path]
        if path not in self._rows:
            return SweepResult(verdict=verdict, row=None, bins=None, levels=None)
        mapped, row = self._rows[path]
        self._read += 1
        if self._read % PART_SIZE == 0:
            mapped.release_pages()
        return SweepResult(verdict=verdict, row=row, bins=mapped.episode_bins(row), levels=mapped.episode_levels(row))


class SweepCheckpoint:
    """Saves the results of a running validation in parts."""

    def __init__(self, run: Path, version: str, *, size: int = PART_SIZE) -> None:
        self._folder, self._version, self._size = run / SWEEP_PARTS_DIR, version, size
        self._held: list[tuple[SweepResult, BundleSignature]] = []

    def restore_into(self, cache: SweepCache) -> None:
        """Add the parts that a killed validation left, the newest last."""
        for part in self._list_parts():
            cache.add(part, self._version)

    def add(self, result: SweepResult, signature: BundleSignature) -> None:
        """Add one result; a part is written when it is full."""
        self._held.append((result, signature))
        if len(self._held) >= self._size:
            self._write()

    def clear(self) -> None:
        """Remove all parts."""
        self._held = []
        if self._folder.is_dir():
            atomic.remove_folder(self._folder)

    def _list_parts(self) -> list[Path]:
        return sorted(self._folder.iterdir()) if self._folder.is_dir() else []

    def _write(self) -> None:
        part = self._folder / f"{len(self._list_parts()):05d}"
        atomic.make_folder(part)
        write_index(part / VALIDATION_FILE, [result.verdict for result, _ in self._held])
        with write_bins(part / BINS_DIR) as writer:
            for result, _ in self._held:
                if result.row is not None and result.bins is not None and result.levels is not None:
                    writer.add(result.row, result.bins, result.levels)
        write_sweep_state(part, self._version, {result.verdict.path: seen for result, seen in self._held})
        self._held = []


def write_sweep_state(folder: Path, version: str, signatures: dict[str, BundleSignature]) -> None:
    """Write which bundles the files of a folder were made from; written last, so that they are complete."""
    atomic.write_atomic(folder / SWEEP_STATE_FILE, json.dumps({"version": version, "items": signatures}).encode())
