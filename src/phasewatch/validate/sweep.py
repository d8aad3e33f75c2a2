"""One pass over a store: read once, verify, decode, gate, grid; in order, and never stopped by one bundle."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phasewatch import __version__, atomic
from phasewatch.errors import BundleError, RunError, StoreError
from phasewatch.grid.files import GridRow, Grids, open_grids, row_of, write_grids
from phasewatch.store.disk import DiskStore, StoreItem
from phasewatch.validate.index import INDEX, read_index, write_index
from phasewatch.validate.ledger import balances, render_ledger, stage_of
from phasewatch.validate.verdict import USABLE, Place, Verdict, examine, unreadable
from phasewatch.vocab import Status
from phasewatch.workers import map_ordered

VERSION = f"{__version__}/1"  # raised when a gate changes, so that no old verdict is taken over
STATE = ".sweep.json"  # what was seen when; not a product: it holds times
LEDGER = "ledger.json"
BUNDLE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Swept:
    """One bundle's verdict with its grid where it is usable; what crosses from a worker."""

    verdict: Verdict
    row: GridRow | None
    bins: NDArray[np.float32] | None
    levels: NDArray[np.float32] | None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSummary:
    """What a sweep did.

    Attributes:
        verdicts: One for everything that was looked at, in order.
        kept: How many of them were unchanged since the last sweep and not read again.
        stage: The ledger's entry.
        slowest: The bundle that took longest to read and judge, with its seconds; None if none was read.
    """

    verdicts: tuple[Verdict, ...]
    kept: int
    stage: dict[str, object]
    slowest: tuple[str, float] | None


Tell = Callable[[int, int, Verdict], None]  # done, in all, latest verdict


def sweep(
    store: Path,
    run: Path,
    *,
    workers: int = 2,
    full: bool = False,
    choose: Callable[[Sequence[StoreItem]], Sequence[StoreItem]] | None = None,
    tell: Tell | None = None,
) -> SweepSummary:
    """Judge everything in a store and grid what is usable.

    Writes ``validation_v1.parquet``, ``grids/`` and ``ledger.json`` into the run; same store, same bytes.

    Args:
        store: The store's folder.
        run: The run's folder, made if it is not there.
        workers: Processes.
        full: Read everything again, for bit rot; otherwise a bundle of unchanged size, time and receipt is not.
        choose: Narrows the items down (``--limit``).
        tell: Called after each bundle, in order.

    Raises:
        StoreError: If there is no store, or nothing in it.
    """
    items = list(DiskStore(store).walk())
    if not items:
        raise StoreError(f"{store}: the store is empty; record into it with `phasewatch record --out {store}`")
    if choose is not None:
        items = list(choose(items))
    atomic.make_folder(run)
    for folder in (run, run / "grids"):
        if folder.is_dir():
            atomic.sweep_temporaries(folder)
    state = {path_of(item): [item.bytes, item.mtime_ns, item.receipt or ""] for item in items}
    before = {} if full else _read_state(run)
    old = _Old(run if before else None)
    unchanged = {path for path, looks in state.items() if before.get(path) == looks and path in old.verdicts}
    results = _results(store, items, unchanged, old, workers)
    verdicts: list[Verdict] = []
    seen: dict[str, str] = {}
    slowest: tuple[str, float] | None = None
    atomic.remove(run / STATE)  # until the products stand, nothing vouches for the old ones
    with write_grids(run / "grids") as grids:
        for swept in results:
            verdict, usable = _judge_copy(swept.verdict, seen)
            if usable and swept.row is not None and swept.bins is not None and swept.levels is not None:
                grids.add(swept.row, swept.bins, swept.levels)
            verdicts.append(verdict)
            if swept.seconds > (slowest[1] if slowest else 0.0):
                slowest = verdict.path, swept.seconds
            if tell is not None:
                tell(len(verdicts), len(items), verdict)
    write_index(run / INDEX, verdicts)
    stage = stage_of(verdicts)
    if not balances(stage):
        raise RunError(f"{run}: the ledger does not balance: {stage}; this is a bug in phasewatch, please report it")
    atomic.write_whole(run / LEDGER, render_ledger({"validate": stage}))
    atomic.write_whole(run / STATE, json.dumps({"version": VERSION, "items": state}).encode())
    return SweepSummary(verdicts=tuple(verdicts), kept=len(unchanged), stage=stage, slowest=slowest)


class _Old:
    """The products of the last sweep, from which unchanged bundles are taken over; without one there are none."""

    def __init__(self, run: Path | None) -> None:
        self.verdicts: dict[str, Verdict] = {}
        self._grids: Grids | None = None
        self._rows: dict[tuple[str, str], GridRow] = {}
        if run is None:
            return
        with suppress(RunError):
            self._grids = open_grids(run / "grids")
            self._rows = {(row.host_id, row.episode_id): row for row in self._grids.rows}
            self.verdicts = {v.path: v for v in read_index(run / INDEX)}

    def swept(self, path: str) -> Swept:
        """Give what the last sweep found."""
        verdict = self.verdicts[path]
        row = self._rows.get((verdict.host_id, verdict.episode_id)) if verdict.status in USABLE else None
        if row is None or self._grids is None:
            return Swept(verdict=verdict, row=None, bins=None, levels=None)
        return Swept(verdict=verdict, row=row, bins=self._grids.bins_of(row), levels=self._grids.levels_of(row))


def _read_state(run: Path) -> dict[str, list[object]]:
    with suppress(OSError, ValueError, KeyError, TypeError):
        state = json.loads((run / STATE).read_bytes())
        if state["version"] == VERSION:
            return dict(state["items"])
    return {}


def _results(store: Path, items: Sequence[StoreItem], unchanged: Set[str], old: _Old, workers: int) -> Iterator[Swept]:
    """Give each item's result in order: read by a worker, or taken over."""
    # A copy's verdict depends on what stands before it, so copies are always judged anew.
    fresh = [i for i in items if path_of(i) not in unchanged or old.verdicts[path_of(i)].duplicate_of]
    reading = map_ordered(partial(read_one, str(store)), fresh, workers=workers, timeout_s=BUNDLE_TIMEOUT_S)
    is_fresh = {item.path for item in fresh}
    for item in items:
        if item.path not in is_fresh:
            yield old.swept(path_of(item))
            continue
        result = next(reading)
        if result.value is not None:
            yield result.value
        else:
            words = result.error or "the worker was lost"
            verdict = unreadable(_place(item), "worker-lost", words, item.bytes)
            yield Swept(verdict=verdict, row=None, bins=None, levels=None)


def read_one(store: str, item: StoreItem) -> Swept:
    """Read, judge and grid one bundle; runs in a worker."""
    began_s = time.perf_counter()
    swept = _read_one(store, item)
    return replace(swept, seconds=time.perf_counter() - began_s)


def _read_one(store: str, item: StoreItem) -> Swept:
    try:
        data = DiskStore(store).read(item)
    except BundleError as error:
        verdict = unreadable(_place(item), error.code, error.words, item.bytes)
        return Swept(verdict=verdict, row=None, bins=None, levels=None)
    examined = examine(data, _place(item))
    if examined.episode is None or examined.grid is None:
        return Swept(verdict=examined.verdict, row=None, bins=None, levels=None)
    row = row_of(examined.episode, examined.grid)
    return Swept(verdict=examined.verdict, row=row, bins=examined.grid.bins, levels=examined.grid.levels)


def path_of(item: StoreItem) -> str:
    """Give an item's path as text that any file can hold: bytes of a name that are not UTF-8 are spelled out."""
    return item.path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _place(item: StoreItem) -> Place:
    return Place(path=path_of(item), host_id=item.host_id, episode_id=item.episode_id, receipt=item.receipt)


def _judge_copy(verdict: Verdict, seen: dict[str, str]) -> tuple[Verdict, bool]:
    """Reject telemetry that an earlier usable bundle holds too; say whether the bundle stays usable."""
    if verdict.status not in USABLE:
        return verdict, False
    first = seen.setdefault(verdict.telemetry_sha256, f"{verdict.host_id}/{verdict.episode_id}")
    if first == f"{verdict.host_id}/{verdict.episode_id}":
        return verdict, True
    reasons = ("duplicate", *(code for code in verdict.reasons if code != "duplicate"))
    words = f"{verdict.path}: the same telemetry as {first}"
    return replace(verdict, status=Status.REJECTED, reasons=reasons, detail=words, duplicate_of=first), False
