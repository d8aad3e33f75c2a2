"""One pass over a store: read once, verify, decode, gate, grid; in order, and never stopped by one bundle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

from phasewatch import __version__, atomic
from phasewatch.channels import registry_digest
from phasewatch.errors import BundleError, RunError, spell_controls
from phasewatch.grid.files import drop_grids, row_of, write_grids
from phasewatch.store.base import Place, Store, StoreItem, check_store, open_store
from phasewatch.store.disk import SUFFIX
from phasewatch.validate.copies import ArrivalEvidence, Copies, PriorVerdict, parse_admitted
from phasewatch.validate.index import INDEX, read_prior, write_index
from phasewatch.validate.ledger import balances, render_ledger, stage_of
from phasewatch.validate.parts import PART, PARTS, STATE, Looks, Parts, Taken, write_state
from phasewatch.validate.verdict import USABLE, Swept, Verdict, examine, unreadable
from phasewatch.validate.verdict import Place as Where
from phasewatch.workers import Result, map_ordered

__all__ = ["LEDGER", "STATE", "SweepSummary", "Tell", "path_of", "read_one", "sweep"]

VERSION = f"{__version__}/2{registry_digest()}"  # raised when a gate changes, so that no old verdict is taken over
LEDGER = "ledger.json"
BUNDLE_TIMEOUT_S = 30.0


class Mapper(Protocol):
    """Applies a function to each item, in whatever processes, and gives the results in order."""

    def __call__(
        self, fn: Callable[[StoreItem], Swept], items: Iterable[StoreItem], *, workers: int, timeout_s: float | None
    ) -> Iterator[Result[Swept]]:
        """Give a result for each item."""


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
    store: Place,
    run: Path,
    *,
    workers: int = 2,
    full: bool = False,
    choose: Callable[[Sequence[StoreItem]], Sequence[StoreItem]] | None = None,
    tell: Tell | None = None,
    mapper: Mapper = map_ordered,
    part: int = PART,
    prior: Path | None = None,
) -> SweepSummary:
    """Judge everything in a store and grid what is usable.

    Writes ``validation_v1.parquet``, ``grids/`` and ``ledger.json`` into the run; same store, same bytes. A long sweep
    that is killed takes up where it stood.

    Args:
        store: A folder, or a URI that `store.base.open_store` knows.
        run: The run's folder, made if it is not there.
        workers: Processes.
        full: Read everything again, for bit rot; otherwise a bundle of unchanged size, time and receipt is not.
        choose: Narrows the items down (``--limit``).
        tell: Called after each bundle, in order.
        mapper: What the reading is spread with: this machine's processes, or `cluster.map_on_ray`.
        part: How many bundles are read before they are put down, so that a kill does not cost them.
        prior: The index that says which of several bundles with the same telemetry was accepted before; by default the
            one that the run holds from its last sweep.

    Raises:
        StoreError: If there is no store, or not one bundle in it.
    """
    there = open_store(store)
    items = list(there.walk())
    if not any(item.path.endswith(SUFFIX) for item in items):
        check_store(store)
    if choose is not None:
        items = list(choose(items))
    atomic.make_folder(run)
    for folder in (run, run / "grids"):
        if folder.is_dir():
            atomic.sweep_temporaries(folder)
    looks: dict[str, Looks] = {path_of(item): [item.bytes, item.mtime_ns, item.receipt or ""] for item in items}
    if not full and (kept := _nothing_new(run, looks)) is not None:
        return kept
    parts = Parts(run, VERSION, size=part)
    if full:
        parts.clear()
    old = Taken()
    if not full:
        old.add(run, VERSION)
        parts.take(old)  # after the run's own: they are newer, and a killed --full may have found rot
    unchanged = {path for path, seen in looks.items() if old.looks.get(path) == seen and old.is_final(path)}
    verdicts: list[Verdict] = []
    copies = Copies(
        ArrivalEvidence(swept=lambda: read_prior(prior or run / INDEX), admitted=lambda key: _admitted(there, key))
    )
    gridded: dict[int, tuple[str, str]] = {}
    slowest: tuple[str, float] | None = None
    with write_grids(run / "grids") as grids:
        for swept, is_fresh in _results(store, items, unchanged, old, workers, mapper):
            if is_fresh:
                parts.add(swept, looks[swept.verdict.path])
            verdict, row, bins, levels = swept.verdict, swept.row, swept.bins, swept.levels
            if (
                verdict.status in USABLE  # what was taken over may have bins from before it rotted
                and row is not None
                and bins is not None
                and levels is not None
                and copies.add(len(verdicts), verdict, row, bins)
            ):
                grids.add(row, bins, levels)
                gridded[len(verdicts)] = row.host_id, row.episode_id
            verdicts.append(verdict)
            if swept.seconds > (slowest[1] if slowest else 0.0):
                slowest = verdict.path, swept.seconds
            if tell is not None:
                tell(len(verdicts), len(items), verdict)
        ruled = copies.rule()
        atomic.remove(run / STATE)  # from here until all products stand, nothing vouches for the old ones
    for place, verdict in ruled.items():
        verdicts[place] = verdict
    if gone := {gridded[place] for place in ruled if place in gridded}:
        drop_grids(run / "grids", gone)
    write_index(run / INDEX, verdicts)
    stage = stage_of(verdicts)
    if not balances(stage):
        raise RunError(f"{run}: the ledger does not balance: {stage}; this is a bug in phasewatch, please report it")
    atomic.write_whole(run / LEDGER, render_ledger({"validate": stage}))
    write_state(run, VERSION, looks)
    parts.clear()
    return SweepSummary(verdicts=tuple(verdicts), kept=len(unchanged), stage=stage, slowest=slowest)


def _nothing_new(run: Path, looks: dict[str, Looks]) -> SweepSummary | None:
    """Give what the last sweep said, if the store is as it found it and its products stand: they would be the same bytes."""
    old = Taken()
    old.add(run, VERSION)
    verdicts = old.verdicts_of(list(looks)) if old.looks == looks and not (run / PARTS).exists() else None
    if verdicts is None or not (run / LEDGER).is_file():
        return None
    return SweepSummary(verdicts=verdicts, kept=len(verdicts), stage=stage_of(verdicts), slowest=None)


def _results(
    store: Place, items: Sequence[StoreItem], unchanged: Set[str], old: Taken, workers: int, mapper: Mapper
) -> Iterator[tuple[Swept, bool]]:
    """Give each item's result in order, and whether it was read now or taken over."""
    fresh = [item for item in items if path_of(item) not in unchanged]
    reading = mapper(partial(read_one, str(store)), fresh, workers=workers, timeout_s=BUNDLE_TIMEOUT_S)
    for item in items:
        if path_of(item) in unchanged:
            yield old.swept(path_of(item)), False
            continue
        result = next(reading)
        if result.value is not None:
            yield result.value, True
        else:
            words = result.error or "the worker was lost"
            verdict = unreadable(_place(item), "worker-lost", words, item.bytes)
            yield Swept(verdict=verdict, row=None, bins=None, levels=None), True


def read_one(store: str, item: StoreItem) -> Swept:
    """Read, judge and grid one bundle; runs in a worker."""
    began_s = time.perf_counter()
    swept = _read_one(store, item)
    return replace(swept, seconds=time.perf_counter() - began_s)


_opened = lru_cache(maxsize=4)(open_store)  # a worker keeps its connection to an object store


def _read_one(store: str, item: StoreItem) -> Swept:
    try:
        data = _opened(store).read(item)
    except BundleError as error:
        verdict = unreadable(_place(item), error.code, error.words, item.bytes)
        return Swept(verdict=verdict, row=None, bins=None, levels=None)
    examined = examine(data, _place(item))
    if examined.episode is None or examined.grid is None:
        return Swept(verdict=examined.verdict, row=None, bins=None, levels=None)
    row = row_of(examined.episode, examined.grid)
    return Swept(verdict=examined.verdict, row=row, bins=examined.grid.bins, levels=examined.grid.levels)


def path_of(item: StoreItem) -> str:
    """Return an item's path as text that any file can hold: bytes that are not UTF-8 and controls are spelled out."""
    return spell_controls(item.path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))


def _place(item: StoreItem) -> Where:
    return Where(path=path_of(item), host_id=item.host_id, episode_id=item.episode_id, receipt=item.receipt)


def _admitted(store: Store, key: tuple[str, str]) -> PriorVerdict | None:
    """Load what the receiver said of a bundle on its arrival; None if nothing that can be read."""
    text = store.read_status(*key)
    return parse_admitted(text) if text is not None else None
