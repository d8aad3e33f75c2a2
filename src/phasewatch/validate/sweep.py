"""One pass over a store: read once, verify, decode, gate, grid; in order, and never stopped by one bundle."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

from phasewatch import atomic
from phasewatch._version import __version__
from phasewatch.artifacts import ACCOUNTING_FILE, VALIDATION_FILE
from phasewatch.binning.storage import build_index_row, remove_episodes, write_bins
from phasewatch.channels import get_custom_channels_digest
from phasewatch.errors import BundleError, RunError, escape_unprintable
from phasewatch.parallel.pool import ItemResult, map_ordered
from phasewatch.progress import Progress
from phasewatch.store.base import BundleStore, StoreItem, StoreLocation, check_store, open_store
from phasewatch.store.local import BUNDLE_SUFFIX
from phasewatch.types import BundleStatus
from phasewatch.validate.copies import DuplicateResolver, PriorVerdict, PriorVerdictLoaders, parse_prior_verdict
from phasewatch.validate.index import build_accounting, is_balanced, read_prior_verdicts, render_accounting, write_index
from phasewatch.validate.resume import (
    PART_SIZE,
    SWEEP_PARTS_DIR,
    SWEEP_STATE_FILE,
    BundleSignature,
    SweepCache,
    SweepCheckpoint,
    write_sweep_state,
)
from phasewatch.validate.verdict import (
    USABLE_STATUSES,
    BundleVerdict,
    SweepResult,
    build_unreadable_verdict,
    validate_bundle,
)
from phasewatch.validate.verdict import BundleLocation as Where

__all__ = [
    "ACCOUNTING_FILE",
    "SWEEP_STATE_FILE",
    "SweepProgress",
    "SweepSummary",
    "read_bundle",
    "render_item_path",
    "report_sweep",
    "sweep",
]


SWEEP_VERSION = (
    f"{__version__}/2{get_custom_channels_digest()}"  # raised when a gate changes, so that no old verdict is taken over
)
BUNDLE_TIMEOUT_S = 30.0


class BundleMapper(Protocol):
    """Applies a function to each item, in whatever processes, and gives the results in order."""

    def __call__(
        self,
        fn: Callable[[StoreItem], SweepResult],
        items: Iterable[StoreItem],
        *,
        workers: int,
        timeout_s: float | None,
    ) -> Iterator[ItemResult[SweepResult]]:
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

    verdicts: tuple[BundleVerdict, ...]
    kept: int
    stage: dict[str, object]
    slowest: tuple[str, float] | None


SweepProgress = Callable[[int, int, BundleVerdict], None]  # done, in all, latest verdict


def sweep(
    store: StoreLocation,
    run: Path,
    *,
    workers: int = 2,
    full: bool = False,
    choose: Callable[[Sequence[StoreItem]], Sequence[StoreItem]] | None = None,
    tell: SweepProgress | None = None,
    mapper: BundleMapper = map_ordered,
    part: int = PART_SIZE,
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
    if not any(item.path.endswith(BUNDLE_SUFFIX) for item in items):
        check_store(store)
    if choose is not None:
        items = list(choose(items))
    atomic.make_folder(run)
    for folder in (run, run / "grids"):
        if folder.is_dir():
            atomic.sweep_temporaries(folder)
    looks: dict[str, BundleSignature] = {
        render_item_path(item): [item.bytes, item.mtime_ns, item.receipt or ""] for item in items
    }
    if not full and (kept := _load_unchanged_sweep(run, looks)) is not None:
        return kept
    parts = SweepCheckpoint(run, SWEEP_VERSION, size=part)
    if full:
        parts.clear()
    old = SweepCache()
    if not full:
        old.add(run, SWEEP_VERSION)
        parts.restore_into(old)  # after the run's own: they are newer, and a killed --force may have found rot
    unchanged = {path for path, seen in looks.items() if old.signatures.get(path) == seen and old.is_final(path)}
    verdicts: list[BundleVerdict] = []
    copies = DuplicateResolver(
        PriorVerdictLoaders(
            load_last_sweep=lambda: read_prior_verdicts(prior or run / VALIDATION_FILE),
            load_on_arrival=lambda key: _load_arrival_verdict(there, key),
        )
    )
    gridded: dict[int, tuple[str, str]] = {}
    slowest: tuple[str, float] | None = None
    with write_bins(run / "grids") as grids:
        for swept, is_fresh in _iter_results(store, items, unchanged, old, workers, mapper):
            if is_fresh:
                parts.add(swept, looks[swept.verdict.path])
            verdict, row, bins, levels = swept.verdict, swept.row, swept.bins, swept.levels
            if (
                verdict.status in USABLE_STATUSES  # what was taken over may have bins from before it rotted
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
        ruled = copies.resolve()
        atomic.remove(run / SWEEP_STATE_FILE)  # from here until all products stand, nothing vouches for the old ones
    for place, verdict in ruled.items():
        verdicts[place] = verdict
    if gone := {gridded[place] for place in ruled if place in gridded}:
        remove_episodes(run / "grids", gone)
    write_index(run / VALIDATION_FILE, verdicts)
    stage = build_accounting(verdicts)
    if not is_balanced(stage):
        raise RunError(f"{run}: the ledger does not balance: {stage}; this is a bug in phasewatch, please report it")
    atomic.write_atomic(run / ACCOUNTING_FILE, render_accounting({"validate": stage}))
    write_sweep_state(run, SWEEP_VERSION, looks)
    parts.clear()
    return SweepSummary(verdicts=tuple(verdicts), kept=len(unchanged), stage=stage, slowest=slowest)


def _load_unchanged_sweep(run: Path, looks: dict[str, BundleSignature]) -> SweepSummary | None:
    """Give what the last sweep said, if the store is as it found it and its products stand: they would be the same bytes."""
    old = SweepCache()
    old.add(run, SWEEP_VERSION)
    verdicts = (
        old.find_verdicts(list(looks)) if old.signatures == looks and not (run / SWEEP_PARTS_DIR).exists() else None
    )
    if verdicts is None or not (run / ACCOUNTING_FILE).is_file():
        return None
    return SweepSummary(verdicts=verdicts, kept=len(verdicts), stage=build_accounting(verdicts), slowest=None)


def _iter_results(
    store: StoreLocation,
    items: Sequence[StoreItem],
    unchanged: Set[str],
    old: SweepCache,
    workers: int,
    mapper: BundleMapper,
) -> Iterator[tuple[SweepResult, bool]]:
    """Give each item's result in order, and whether it was read now or taken over."""
    fresh = [item for item in items if render_item_path(item) not in unchanged]
    reading = mapper(partial(read_bundle, str(store)), fresh, workers=workers, timeout_s=BUNDLE_TIMEOUT_S)
    for item in items:
        if render_item_path(item) in unchanged:
            yield old.load_result(render_item_path(item)), False
            continue
        result = next(reading)
        if result.value is not None:
            yield result.value, True
        else:
            words = result.error or "the worker was lost"
            verdict = build_unreadable_verdict(_build_location(item), "worker-lost", words, item.bytes)
            yield SweepResult(verdict=verdict, row=None, bins=None, levels=None), True


def read_bundle(store: str, item: StoreItem) -> SweepResult:
    """Read, judge and grid one bundle; runs in a worker."""
    began_s = time.perf_counter()
    swept = _read_bundle_untimed(store, item)
    return replace(swept, seconds=time.perf_counter() - began_s)


_open_store_cached = lru_cache(maxsize=4)(open_store)  # a worker keeps its connection to an object store


def _read_bundle_untimed(store: str, item: StoreItem) -> SweepResult:
    try:
        data = _open_store_cached(store).read(item)
    except BundleError as error:
        verdict = build_unreadable_verdict(_build_location(item), error.code, error.words, item.bytes)
        return SweepResult(verdict=verdict, row=None, bins=None, levels=None)
    examined = validate_bundle(data, _build_location(item))
    if examined.episode is None or examined.binned is None:
        return SweepResult(verdict=examined.verdict, row=None, bins=None, levels=None)
    row = build_index_row(examined.episode, examined.binned)
    return SweepResult(verdict=examined.verdict, row=row, bins=examined.binned.bins, levels=examined.binned.levels)


def render_item_path(item: StoreItem) -> str:
    """Return an item's path as text that any file can hold: bytes that are not UTF-8 and controls are spelled out."""
    return escape_unprintable(item.path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))


def _build_location(item: StoreItem) -> Where:
    return Where(path=render_item_path(item), host_id=item.host_id, episode_id=item.episode_id, receipt=item.receipt)


def _load_arrival_verdict(store: BundleStore, key: tuple[str, str]) -> PriorVerdict | None:
    """Load what the receiver said of a bundle on its arrival; None if nothing that can be read."""
    text = store.read_status(*key)
    return parse_prior_verdict(text) if text is not None else None


def sample_stratified(strata: Sequence[str], names: Sequence[str], limit: int, *, seed: int = 0) -> list[int]:
    """Choose at most `limit` places, round robin over the strata.

    Args:
        strata: The stratum of each item, such as ``host/profile``.
        names: What identifies each item; its hash with the seed orders a stratum, so that the items' order does not matter.
        limit: How many.

    Returns:
        The chosen places, ascending.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for place, stratum in enumerate(strata):
        groups[stratum].append(place)
    for members in groups.values():
        members.sort(key=lambda place: _compute_sort_key(seed, names[place]))
    # In drawn order, or a limit below the number of strata would take the first hosts alone.
    queues = [groups[stratum] for stratum in sorted(groups, key=lambda stratum: _compute_sort_key(seed, stratum))]
    chosen: list[int] = []
    for turn in range(max((len(queue) for queue in queues), default=0)):
        chosen += [queue[turn] for queue in queues if turn < len(queue)]
    return sorted(chosen[:limit])


def _compute_sort_key(seed: int, name: str) -> bytes:
    return blake2b(f"{seed}:{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()


class SweepTally:
    """Counts verdicts as they come; clocks are handed in."""

    def __init__(self, began_s: float) -> None:
        self._began_s = began_s
        self._statuses: Counter[BundleStatus] = Counter()
        self._reasons: Counter[str] = Counter()
        self._done = 0

    def add(self, verdict: BundleVerdict) -> None:
        """Count one."""
        self._done += 1
        self._statuses[verdict.status] += 1
        if verdict.status in (BundleStatus.REJECTED, BundleStatus.ERRORED):
            self._reasons[verdict.reasons[0] if verdict.reasons else "?"] += 1

    def render_status(self, total: int, now_s: float) -> str:
        """Say where it stands: ``1,200/s, 40 s left; 3 rejected (receipt 2, label-end 1)``."""
        passed_s = max(now_s - self._began_s, 1e-3)
        rate = self._done / passed_s
        left_s = (total - self._done) / rate if rate else 0.0
        found = [
            f"{self._statuses[s]:,} {s}"
            for s in (BundleStatus.DEGRADED, BundleStatus.REJECTED, BundleStatus.ERRORED)
            if self._statuses[s]
        ]
        top = ", ".join(f"{code} {n:,}" for code, n in self._reasons.most_common(3))
        wrong = f"; {', '.join(found)}{f' ({top})' if top else ''}" if found else ""
        return f"{rate:,.0f}/s, {_format_duration(left_s)} left{wrong}"


def report_sweep(progress: Progress, task: str) -> SweepProgress:
    """Return a callback for `sweep` that reports the rate, the time left and the errors by reason.

    Args:
        progress: Receives the reports.
        task: Name of the task in them.
    """
    tally = SweepTally(time.monotonic())

    def report(done: int, total: int, verdict: BundleVerdict) -> None:
        tally.add(verdict)
        progress.update(task, done, total, tally.render_status(total, time.monotonic()))

    return report


def _format_duration(seconds: float) -> str:
    """Spell a time: ``45 s``, ``3 min``, ``2 h 5 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
