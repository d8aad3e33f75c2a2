"""Write the feature tables of a run, one row for each window and each episode, and the schema of their columns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.artifacts import EPISODE_FEATURES_FILE, FEATURE_SCHEMA_FILE, FEATURES_FILE
from phasewatch.atomic import open_atomic, write_atomic
from phasewatch.binning.storage import BinIndexRow, MappedBins, map_bins, release_pages
from phasewatch.channels import BASE_CHANNELS
from phasewatch.features.derived import derive_history, derived_features
from phasewatch.features.fingerprint import behaviour_fingerprint
from phasewatch.features.schema import feature_names, render_schema, schema_hash, stat_names
from phasewatch.features.stats import STATS, episode_stats, window_stats
from phasewatch.features.windows import (
    LabelSpan,
    combine_window_flags,
    compute_centers_s,
    compute_window_starts,
    label_windows,
    n_windows,
)
from phasewatch.identity import find_contested_ids
from phasewatch.parallel.pool import map_ordered
from phasewatch.types import STRIDE_NS, BundleStatus

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "EPISODE_ID_TAKEN",
    "ID_COLUMNS",
    "ROW_GROUP_SIZE",
    "FeatureCount",
    "ParallelSettings",
    "WindowTable",
    "build_window_table",
    "write_feature_tables",
]

ROW_GROUP_SIZE = 100_000
EPISODE_ID_TAKEN = "episode-id-taken"

ID_COLUMNS = ("episode_id", "host_id", "profile", "sample_name", "sample_kind", "origin", "role")
_WINDOW_NUMBERS = {"t_center_s": "<f4", "t_center_ns": "<i8", "phase": "<i1", "purity": "<f4", "flags": "<u1"}
_EPISODE_NUMBERS = {"n_windows": "<i4"}
_DERIVED_TOGETHER = 10  # episodes whose derived columns are computed at once, at a third of the cost of one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSettings:
    """Settings of the parallel computation; they do not change the bytes of the tables.

    Attributes:
        workers: Number of processes.
        chunk_size: Episodes computed at once; afterwards their memory-mapped pages are released.
        min_parallel_episodes: With fewer episodes no processes are started, because that would take longer.
    """

    workers: int = 1
    chunk_size: int = 100
    min_parallel_episodes: int = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureCount:
    """Counts for the data accounting.

    Attributes:
        episodes: Rows of the episode table.
        windows: Rows of the window table.
        without_windows: Episodes too short for one window; they have a row in the episode table.
        left_out: Status → episodes with bins that were not used; ``episode-id-taken`` if another host has an episode of
            the same id.
        unknown_windows: Windows without a label; they are in the table, and in no split.
    """

    episodes: int
    windows: int
    without_windows: int
    left_out: Mapping[str, int]
    unknown_windows: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowTable:
    """The rows of one episode in the window table.

    Attributes:
        center_ns: ``(w,)`` int64 centres of the windows on the wall clock, ns.
        center_s: ``(w,)`` float32 centres of the windows since the first label, s.
        phase, purity, flags: ``(w,)`` int8, float32 and uint8, as in `features.windows`.
        stats: ``(w, 365)`` float32, five statistics of each channel.
        derived: ``(w, 83)`` float32, the derived columns.
    """

    center_ns: NDArray[np.int64]
    center_s: NDArray[np.float32]
    phase: NDArray[np.int8]
    purity: NDArray[np.float32]
    flags: NDArray[np.uint8]
    stats: NDArray[np.float32]
    derived: NDArray[np.float32]


def build_window_table(
    row: BinIndexRow, bins: NDArray[np.float32], derived: NDArray[np.float32] | None = None
) -> WindowTable:
    """Build the windows of one episode.

    Args:
        row: Index row of the episode.
        bins: Its ``(n, c)`` float32 bins.
        derived: Its ``(w, d)`` derived columns, where they were computed for several episodes at once.
    """
    w = n_windows(row.n_bins)
    starts = compute_window_starts(row.t0_ns, w)
    spans = [LabelSpan(phase=phase, start_ns=start, end_ns=end) for phase, start, end in row.spans]
    labels = label_windows(spans, starts)
    return WindowTable(
        center_ns=starts + STRIDE_NS,
        center_s=compute_centers_s(w),
        phase=labels.phase,
        purity=labels.purity,
        flags=combine_window_flags(row.bin_flags, labels.is_mixed),
        stats=window_stats(bins).reshape(w, bins.shape[1] * len(STATS)),
        derived=derived_features(bins) if derived is None else derived,
    )


def write_feature_tables(
    folder: Path,
    grids: MappedBins,
    statuses: Mapping[tuple[str, str], BundleStatus],
    *,
    include_degraded: bool = True,
    inputs: Mapping[str, str] | None = None,
    row_group: int = ROW_GROUP_SIZE,
    spread: ParallelSettings = ParallelSettings(),
) -> FeatureCount:
    """Write the two feature tables and the schema of a run.

    Args:
        folder: Folder of the run.
        grids: Bins of the run.
        statuses: (host_id, episode_id) → status of its validation; other episodes are not used.
        include_degraded: Whether episodes with missing or repaired parts are used.
        inputs: Name → sha256 of the inputs; stored in both tables.
        row_group: Rows of a row group, which are held in memory.
        spread: Settings of the parallel computation.

    Raises:
        MachineError: If a worker was lost.
    """
    wanted = {BundleStatus.ACCEPTED, BundleStatus.DEGRADED} if include_degraded else {BundleStatus.ACCEPTED}
    taken = find_contested_ids(statuses)
    used: list[BinIndexRow] = []
    left_out: dict[str, int] = {}
    for row in sorted(grids.rows, key=lambda r: (r.host_id, r.episode_id)):
        status = statuses.get((row.host_id, row.episode_id))
        if (row.host_id, row.episode_id) in taken:
            left_out[EPISODE_ID_TAKEN] = left_out.get(EPISODE_ID_TAKEN, 0) + 1
        elif status in wanted:
            used.append(row)
        else:
            key = str(status) if status else "not listed"
            left_out[key] = left_out.get(key, 0) + 1
    n_all = n_short = n_unknown = 0
    with (
        _open_table(folder / FEATURES_FILE, feature_names(), _WINDOW_NUMBERS, row_group, inputs) as windows,
        _open_table(folder / EPISODE_FEATURES_FILE, stat_names(), _EPISODE_NUMBERS, row_group, inputs) as episodes,
    ):
        for row, table, whole in _iter_features(used, grids, spread):
            w = len(table.phase)
            numbers: dict[str, NDArray[Any]] = {
                "t_center_s": table.center_s,
                "t_center_ns": table.center_ns,
                "phase": table.phase,
                "purity": table.purity,
                "flags": table.flags,
            }
            windows.add(row, numbers, np.concatenate([table.stats, table.derived], axis=1))
            episodes.add(row, {"n_windows": np.array([w], np.int32)}, whole)
            n_all, n_short = n_all + w, n_short + (w == 0)
            n_unknown += int(np.count_nonzero(table.phase < 0))
    write_atomic(
        folder / FEATURE_SCHEMA_FILE,
        render_schema(behaviour_fingerprint(), behaviour_fingerprint(BASE_CHANNELS)).encode(),
    )
    return FeatureCount(
        episodes=len(used), windows=n_all, without_windows=n_short, left_out=left_out, unknown_windows=n_unknown
    )


_EpisodeFeatures = tuple[WindowTable, NDArray[np.float32]]  # windows of an episode, and its stats ``(1, 5 c)``


def _iter_features(
    rows: Sequence[BinIndexRow], grids: MappedBins, spread: ParallelSettings
) -> Iterator[tuple[BinIndexRow, WindowTable, NDArray[np.float32]]]:
    """Yield each episode with its windows and its stats ``(1, 5 c)``, in order."""
    chunks = [tuple(rows[at : at + spread.chunk_size]) for at in range(0, len(rows), spread.chunk_size)]
    if spread.workers == 1 or len(rows) < spread.min_parallel_episodes:
        results: Iterator[list[_EpisodeFeatures]] = (_compute_chunk(grids.bins, chunk) for chunk in chunks)
    else:
        computing = map_ordered(partial(_compute_chunk_in_worker, str(grids.folder)), chunks, workers=spread.workers)
        results = (result.unwrap("features") for result in computing)
    for chunk, made in zip(chunks, results, strict=True):
        for row, (table, whole) in zip(chunk, made, strict=True):
            yield row, table, whole


def _compute_chunk_in_worker(folder: str, rows: Sequence[BinIndexRow]) -> list[_EpisodeFeatures]:
    """Compute a chunk in a worker process, from its own memory map."""
    return _compute_chunk(_map_bins_cached(folder), rows)


@lru_cache(maxsize=1)
def _map_bins_cached(folder: str) -> NDArray[np.float32]:
    return map_bins(Path(folder))


def _compute_chunk(mapped: NDArray[np.float32], rows: Sequence[BinIndexRow]) -> list[_EpisodeFeatures]:
    made = []
    for at in range(0, len(rows), _DERIVED_TOGETHER):
        some = rows[at : at + _DERIVED_TOGETHER]
        bins = [np.asarray(mapped[row.offset : row.offset + row.n_bins]) for row in some]
        ends = np.cumsum([n_windows(row.n_bins) for row in some])[:-1]
        for row, own, derived in zip(some, bins, np.split(derive_history(bins), ends), strict=True):
            made.append((build_window_table(row, own, derived), episode_stats(own).reshape(1, -1)))
    release_pages(mapped)
    return made


class _TableWriter:
    """Collect rows by column until a row group is full, then write it; memory use is constant."""

    def __init__(self, file: Any, names: Sequence[str], numbers: Mapping[str, str], row_group: int) -> None:
        self._file, self._size, self._held = file, row_group, 0
        self._names = tuple(names)
        self._ids: dict[str, list[str]] = {name: [] for name in ID_COLUMNS}
        self._numbers = {name: np.empty(row_group, kind) for name, kind in numbers.items()}
        self._features = np.empty((len(self._names), row_group), np.float32)

    def add(self, row: BinIndexRow, numbers: Mapping[str, NDArray[Any]], stats: NDArray[np.float32]) -> None:
        """Append the rows of one episode."""
        done = 0
        while done < len(stats):
            take = min(len(stats) - done, self._size - self._held)
            into, of = slice(self._held, self._held + take), slice(done, done + take)
            for name in ID_COLUMNS:
                self._ids[name] += [str(getattr(row, name))] * take
            for name, values in self._numbers.items():
                values[into] = numbers[name][of]
            self._features[:, into] = stats[of].T
            self._held, done = self._held + take, done + take
            if self._held == self._size:
                self.flush()

    def flush(self) -> None:
        """Write the collected rows as one row group."""
        import pyarrow as pa

        if not self._held:
            return
        columns: list[Any] = [pa.array(self._ids[name], pa.string()) for name in ID_COLUMNS]
        columns += [pa.array(values[: self._held]) for values in self._numbers.values()]
        columns += [pa.array(column[: self._held]) for column in self._features]
        names = [*ID_COLUMNS, *self._numbers, *self._names]
        self._file.write_table(pa.table(columns, names=names), row_group_size=self._size)
        self._ids, self._held = {name: [] for name in ID_COLUMNS}, 0


@contextmanager
def _open_table(
    path: Path, names: Sequence[str], numbers: Mapping[str, str], row_group: int, inputs: Mapping[str, str] | None
) -> Iterator[_TableWriter]:
    """Open a table for writing; the file appears when the block ends without an exception."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: list[tuple[str, pa.DataType]] = [(name, pa.string()) for name in ID_COLUMNS]
    columns += [(name, pa.from_numpy_dtype(np.dtype(kind))) for name, kind in numbers.items()]
    columns += [(name, pa.float32()) for name in names]
    with open_atomic(path) as raw:
        file = pq.ParquetWriter(
            raw,
            pa.schema(columns),
            compression="zstd",
            compression_level=1,
            use_dictionary=list(ID_COLUMNS),
            write_statistics=False,
        )
        sink = _TableWriter(file, names, numbers, row_group)
        yield sink
        sink.flush()
        facts = {"schema_hash": schema_hash(), "inputs": dict(inputs or {})}
        file.add_key_value_metadata({"phasewatch.features": json.dumps(facts, sort_keys=True)})
        file.close()
