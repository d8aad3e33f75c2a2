"""Validate a store in one pass: read, decode, check and bin every bundle; no bundle stops it."""

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
from phasewatch.artifacts import ACCOUNTING_FILE, BINS_DIR, VALIDATION_FILE
from phasewatch.binning.storage import build_index_row, remove_episodes, write_bins
from phasewatch.channels import get_custom_channels_digest
from phasewatch.errors import BundleError, RunError, escape_unprintable
from phasewatch.parallel.pool import ItemResult, map_ordered
from phasewatch.progress import NO_PROGRESS, Progress
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
    BundleLocation,
    BundleVerdict,
    SweepResult,
    build_unreadable_verdict,
    validate_bundle,
)

__all__ = [
    "BUNDLE_TIMEOUT_S",
    "SWEEP_VERSION",
    "BundleMapper",
    "SweepSummary",
    "read_bundle",
    "render_item_path",
    "sample_stratified",
    "sweep",
]

# Raised when a check changes, so that no old verdict is reused.
SWEEP_VERSION = f"{__version__}/2{get_custom_channels_digest()}"
BUNDLE_TIMEOUT_S = 30.0


class BundleMapper(Protocol):
    """Applies a function to each item in some processes and yields the results in order."""

    def __call__(
        self,
        fn: Callable[[StoreItem], SweepResult],
        items: Iterable[StoreItem],
        *,
        workers: int,
        timeout_s: float | None,
    ) -> Iterator[ItemResult[SweepResult]]:
        """Yield the result of each item."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSummary:
    """The result of `sweep`.

    Attributes:
        verdicts: One per bundle, in the order of the store.
        kept: Number of bundles that were unchanged since the last validation and not read again.
        stage: The data accounting; see `index.build_accounting`.
        slowest: Path and seconds of the bundle that took longest; None if none was read.
    """

    verdicts: tuple[BundleVerdict, ...]
    kept: int
    stage: dict[str, object]
    slowest: tuple[str, float] | None


def sweep(
    store: StoreLocation,
    run: Path,
    *,
    workers: int = 2,
    full: bool = False,
    choose: Callable[[Sequence[StoreItem]], Sequence[StoreItem]] | None = None,
    progress: Progress = NO_PROGRESS,
    task: str = "validate",
    mapper: BundleMapper = map_ordered,
    part: int = PART_SIZE,
    prior: Path | None = None,
) -> SweepSummary:
    """Validate every bundle of a store and bin the usable ones.

    Writes ``validation_v1.parquet``, ``grids/`` and ``ledger.json`` into the run; an equal store gives equal bytes. A
    killed validation continues where it stopped.

    Args:
        store: A folder, or a URI that `store.base.open_store` accepts.
        run: The run's folder; created if it does not exist.
        workers: Number of processes.
        full: Read unchanged bundles again, too, to detect bit rot. A bundle is unchanged if its size, time and receipt
            are.
        choose: Selects the items to validate (``--limit``).
        progress: Progress of `task`; its detail holds the rate, the time left and the errors by code.
        task: Name of the task in `progress`.
        mapper: Runs the reading in processes of this machine, or on a cluster (`parallel.ray.map_on_ray`).
        part: Number of bundles after which results are saved, so that a killed process does not lose them.
        prior: Index of verdicts that decides which of several bundles with the same telemetry was accepted before; by
            default the one in the run.

    Raises:
        StoreError: If there is no store, or it holds no bundle.
    """
    source = open_store(store)
    items = list(source.walk())
    if not any(item.path.endswith(BUNDLE_SUFFIX) for item in items):
        check_store(store)
    if choose is not None:
        items = list(choose(items))
    atomic.make_folder(run)
    for folder in (run, run / BINS_DIR):
        if folder.is_dir():
            atomic.sweep_temporaries(folder)
    signatures: dict[str, BundleSignature] = {
        render_item_path(item): [item.bytes, item.mtime_ns, item.receipt or ""] for item in items
    }
    if not full and (kept := _load_unchanged_sweep(run, signatures)) is not None:
        return kept
    parts = SweepCheckpoint(run, SWEEP_VERSION, size=part)
    if full:
        parts.clear()
    old = SweepCache()
    if not full:
        old.add(run, SWEEP_VERSION)
        parts.restore_into(old)  # after those of the run: they are newer, and may have found bit rot
    unchanged = {path for path, seen in signatures.items() if old.signatures.get(path) == seen and old.is_final(path)}
    verdicts: list[BundleVerdict] = []
    copies = DuplicateResolver(
        PriorVerdictLoaders(
            load_last_sweep=lambda: read_prior_verdicts(prior or run / VALIDATION_FILE),
            load_on_arrival=lambda key: _load_arrival_verdict(source, key),
        )
    )
    binned: dict[int, tuple[str, str]] = {}
    tally = _SweepTally(time.monotonic())
    slowest: tuple[str, float] | None = None
    with write_bins(run / BINS_DIR) as writer:
        for result, is_fresh in _iter_results(store, items, unchanged, old, workers, mapper):
            if is_fresh:
                parts.add(result, signatures[result.verdict.path])
            verdict, row, bins, levels = result.verdict, result.row, result.bins, result.levels
            if (
                verdict.status in USABLE_STATUSES  # a reused result may have bins from before bit rot
                and row is not None
                and bins is not None
                and levels is not None
                and copies.add(len(verdicts), verdict, row, bins)
            ):
                writer.add(row, bins, levels)
                binned[len(verdicts)] = row.host_id, row.episode_id
            verdicts.append(verdict)
            if result.seconds > (slowest[1] if slowest else 0.0):
                slowest = verdict.path, result.seconds
            tally.add(verdict)
            progress.update(task, len(verdicts), len(items), tally.render_status(len(items), time.monotonic()))
        replaced = copies.resolve()
        atomic.remove(run / SWEEP_STATE_FILE)  # until all results are written, none is valid
    for place, verdict in replaced.items():
        verdicts[place] = verdict
    if gone := {binned[place] for place in replaced if place in binned}:
        remove_episodes(run / BINS_DIR, gone)
    write_index(run / VALIDATION_FILE, verdicts)
    stage = build_accounting(verdicts)
    if not is_balanced(stage):
        raise RunError(
            f"{run}: the data accounting does not add up: {stage}; this is a bug in phasewatch, please report it"
        )
    atomic.write_atomic(run / ACCOUNTING_FILE, render_accounting({"validate": stage}))
    write_sweep_state(run, SWEEP_VERSION, signatures)
    parts.clear()
    return SweepSummary(verdicts=tuple(verdicts), kept=len(unchanged), stage=stage, slowest=slowest)


def _load_unchanged_sweep(run: Path, signatures: dict[str, BundleSignature]) -> SweepSummary | None:
    """Return the result of the last validation if it is complete and the store is unchanged, or else None."""
    old = SweepCache()
    old.add(run, SWEEP_VERSION)
    if old.signatures != signatures or (run / SWEEP_PARTS_DIR).exists():
        return None
    verdicts = old.find_verdicts(list(signatures))
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
    """Yield the result of each item in order, and whether it was read now."""
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
    """Read, check and bin one bundle; runs in a worker process."""
    began_s = time.perf_counter()
    result = _read_bundle_untimed(store, item)
    return replace(result, seconds=time.perf_counter() - began_s)


_open_store_cached = lru_cache(maxsize=4)(open_store)  # a worker keeps its connection to a bucket


def _read_bundle_untimed(store: str, item: StoreItem) -> SweepResult:
    try:
        data = _open_store_cached(store).read(item)
    except BundleError as error:
        verdict = build_unreadable_verdict(_build_location(item), error.code, error.words, item.bytes)
        return SweepResult(verdict=verdict, row=None, bins=None, levels=None)
    check = validate_bundle(data, _build_location(item))
    if check.episode is None or check.binned is None:
        return SweepResult(verdict=check.verdict, row=None, bins=None, levels=None)
    row = build_index_row(check.episode, check.binned)
    return SweepResult(verdict=check.verdict, row=row, bins=check.binned.bins, levels=check.binned.levels)


def render_item_path(item: StoreItem) -> str:
    """Return an item's path as printable text; other bytes are escaped."""
    return escape_unprintable(item.path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))


def _build_location(item: StoreItem) -> BundleLocation:
    return BundleLocation(
        path=render_item_path(item), host_id=item.host_id, episode_id=item.episode_id, receipt=item.receipt
    )


def _load_arrival_verdict(store: BundleStore, key: tuple[str, str]) -> PriorVerdict | None:
    """Load the receiver's verdict on a bundle; None if there is no readable one."""
    text = store.read_status(*key)
    return parse_prior_verdict(text) if text is not None else None


def sample_stratified(strata: Sequence[str], names: Sequence[str], limit: int, *, seed: int = 0) -> list[int]:
    """Draw at most `limit` items, round robin over the strata.

    Args:
        strata: Stratum of each item, such as ``host/profile``.
        names: Unique name of each item; its hash with the seed orders a stratum, whatever the order of the items.
        limit: Maximum number of items.
        seed: Seed of the draw.

    Returns:
        The indices of the drawn items, ascending.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for place, stratum in enumerate(strata):
        groups[stratum].append(place)
    for members in groups.values():
        members.sort(key=lambda place: _compute_sort_key(seed, names[place]))
    # Strata in random order: a limit below their number would otherwise select the first hosts only.
    queues = [groups[stratum] for stratum in sorted(groups, key=lambda stratum: _compute_sort_key(seed, stratum))]
    chosen: list[int] = []
    for turn in range(max((len(queue) for queue in queues), default=0)):
        chosen += [queue[turn] for queue in queues if turn < len(queue)]
    return sorted(chosen[:limit])


def _compute_sort_key(seed: int, name: str) -> bytes:
    return blake2b(f"{seed}:{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()


class _SweepTally:
    def __init__(self, began_s: float) -> None:
        self._began_s = began_s
        self._statuses: Counter[BundleStatus] = Counter()
        self._reasons: Counter[str] = Counter()
        self._done = 0

    def add(self, verdict: BundleVerdict) -> None:
        self._done += 1
        self._statuses[verdict.status] += 1
        if verdict.status in (BundleStatus.REJECTED, BundleStatus.ERRORED):
            self._reasons[verdict.reasons[0] if verdict.reasons else "?"] += 1

    def render_status(self, total: int, now_s: float) -> str:
        """Return a line such as ``1,200/s, 40 s left; 3 rejected (receipt 2, label-end 1)``."""
        passed_s = max(now_s - self._began_s, 1e-3)
        rate = self._done / passed_s
        left_s = (total - self._done) / rate if rate else 0.0
        counts = [
            f"{self._statuses[s]:,} {s}"
            for s in (BundleStatus.DEGRADED, BundleStatus.REJECTED, BundleStatus.ERRORED)
            if self._statuses[s]
        ]
        top = ", ".join(f"{code} {n:,}" for code, n in self._reasons.most_common(3))
        problems = f"; {', '.join(counts)}{f' ({top})' if top else ''}" if counts else ""
        return f"{rate:,.0f}/s, {_format_duration(left_s)} left{problems}"


def _format_duration(seconds: float) -> str:
    """Return a text such as ``45 s``, ``3 min`` or ``2 h 5 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
