"""The bins of a run on disk: two time-major arrays for memory mapping, and an index of the episodes."""

from __future__ import annotations

import io
import json
import mmap
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from phasewatch.artifacts import BINS_FILE, BINS_INDEX_FILE, LEVELS_FILE
from phasewatch.atomic import make_folder, open_atomic
from phasewatch.binning.align import EpisodeBins
from phasewatch.bundle.model import Episode
from phasewatch.channels import BASE_CHANNELS, CHANNELS, LEVEL_CHANNELS, ChannelSpec
from phasewatch.errors import RunError
from phasewatch.identity import find_contested_ids
from phasewatch.parquet import check_footer
from phasewatch.types import BIN_NS, EpisodeOrigin, EpisodeRole, Phase, SampleKind

if TYPE_CHECKING:
    import pyarrow as pa


__all__ = [
    "BinIndexRow",
    "ChannelSummary",
    "MappedBins",
    "build_index_row",
    "index_rows_by_id",
    "map_bins",
    "open_bins",
    "release_pages",
    "remove_episodes",
    "summarise_channels",
    "write_bins",
]

_HEADER_BYTES = 128
_ROW_GROUP_SIZE = 10_000
_MAX_WIDENED_BYTES = 1 << 30  # of bins that are read into memory, because an earlier version made them
_RELEASE_ROWS = 500  # episodes copied before their pages are released


@dataclass(frozen=True, slots=True, kw_only=True)
class BinIndexRow:
    """The place of one episode's bins, its metadata and its labels; further attributes are those of the manifest.

    Attributes:
        offset: First row in both arrays.
        n_bins: Number of rows.
        t0_ns: Wall stamp of the start of the first bin.
        spans: Tuples (phase, start, end) by the wall clock, in ns.
        flagged: Tuples (bin, flags) of the bins with flags.
    """

    episode_id: str
    host_id: str
    offset: int
    n_bins: int
    t0_ns: int
    profile: str
    sample_name: str
    sample_kind: SampleKind
    origin: EpisodeOrigin
    role: EpisodeRole
    session: str
    agent: bool
    arch: str
    accel: str
    spans: tuple[tuple[Phase, int, int], ...]
    flagged: tuple[tuple[int, int], ...]

    @property
    def bin_flags(self) -> NDArray[np.uint8]:
        """``(n_bins,)`` uint8 flags."""
        flags = np.zeros(self.n_bins, np.uint8)
        for number, flag in self.flagged:
            flags[number] = flag
        return flags


def build_index_row(episode: Episode, binned: EpisodeBins) -> BinIndexRow:
    """Return the index row of an episode; the writer fills in the offset."""
    m, ends = episode.manifest, [mark.t_wall_ns for mark in episode.marks[1:]]
    return BinIndexRow(
        episode_id=m.episode_id,
        host_id=m.host.host_id,
        offset=0,
        n_bins=len(binned.bins),
        t0_ns=episode.t0_ns,
        profile=m.profile,
        sample_name=m.sample_name,
        sample_kind=m.sample_kind,
        origin=m.origin,
        role=m.role,
        session=m.session,
        agent=m.agent,
        arch=m.host.arch,
        accel=m.host.accel,
        spans=tuple(
            (mark.phase, mark.t_wall_ns, end) for mark, end in zip(episode.marks, ends, strict=False) if mark.phase
        ),
        flagged=tuple((int(i), int(binned.flags[i])) for i in np.flatnonzero(binned.flags)),
    )


class BinWriter:
    """Write episodes in the order of (host_id, episode_id); `write_bins` creates the writer."""

    def __init__(self, bins: BinaryIO, levels: BinaryIO, index: Any) -> None:
        self._bins, self._levels, self._index = bins, levels, index
        self._rows: list[BinIndexRow] = []
        self._last = ("", "")
        self.n_bins = 0
        self.n_episodes = 0

    def add(self, row: BinIndexRow, bins: NDArray[np.float32], levels: NDArray[np.float32]) -> None:
        """Append one episode.

        Args:
            row: Its index row.
            bins: ``(n_bins, n_channels)`` float32.
            levels: ``(n_bins, n_level_channels)`` float32.

        Raises:
            ValueError: If the episode is out of order, or the arrays do not match the row.
        """
        key = (row.host_id, row.episode_id)
        if key <= self._last:
            raise ValueError(f"episode {'/'.join(key)} must come after {'/'.join(self._last)}")
        if bins.shape != (row.n_bins, len(CHANNELS)) or levels.shape != (row.n_bins, len(LEVEL_CHANNELS)):
            raise ValueError(f"{row.n_bins} bins, but arrays of {bins.shape} and {levels.shape}")
        self._bins.write(np.ascontiguousarray(bins, "<f4").tobytes())
        self._levels.write(np.ascontiguousarray(levels, "<f4").tobytes())
        fields = {name: getattr(row, name) for name in row.__dataclass_fields__}
        self._rows.append(BinIndexRow(**{**fields, "offset": self.n_bins}))
        self._last = key
        self.n_bins += row.n_bins
        self.n_episodes += 1
        if len(self._rows) >= _ROW_GROUP_SIZE:
            self.flush()

    def flush(self) -> None:
        """Write the pending index rows to the file."""
        if self._rows:
            self._index.write_table(_build_table(self._rows))
            self._rows = []


@contextmanager
def write_bins(folder: Path, *, inputs: Mapping[str, str] | None = None) -> Iterator[BinWriter]:
    """Yield a writer of the three files of a folder; they are published when the block succeeds, the index last.

    Args:
        folder: Created if it does not exist.
        inputs: SHA-256 by name of the files that the bins were made from; stored in the index.
    """
    import pyarrow.parquet as pq

    make_folder(folder)
    with ExitStack() as stack:
        # The stack unwinds in reverse order: the index is entered first and published last.
        index_file = stack.enter_context(open_atomic(folder / BINS_INDEX_FILE))
        bins = stack.enter_context(open_atomic(folder / BINS_FILE))
        levels = stack.enter_context(open_atomic(folder / LEVELS_FILE))
        for file, width in ((bins, len(CHANNELS)), (levels, len(LEVEL_CHANNELS))):
            file.write(_render_npy_header(0, width))
        schema = _build_schema()
        index = pq.ParquetWriter(index_file, schema, compression="zstd", compression_level=1, write_statistics=False)
        writer = BinWriter(bins, levels, index)
        yield writer
        writer.flush()
        totals = {"n_bins": writer.n_bins, "n_episodes": writer.n_episodes, "inputs": dict(inputs or {})}
        index.add_key_value_metadata({"phasewatch.grids": json.dumps(totals, sort_keys=True)})
        index.close()
        for file, width in ((bins, len(CHANNELS)), (levels, len(LEVEL_CHANNELS))):
            file.seek(0)
            file.write(_render_npy_header(writer.n_bins, width))


def _render_npy_header(n: int, width: int) -> bytes:
    """Return the header of a float32 .npy file (version 1.0), always 128 bytes long so that it can be replaced."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({n}, {width}), }}"
    return (
        b"\x93NUMPY\x01\x00"
        + (_HEADER_BYTES - 10).to_bytes(2, "little")
        + text.ljust(_HEADER_BYTES - 11).encode()
        + b"\n"
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MappedBins:
    """The bins of a run, mapped into memory.

    Attributes:
        folder: Their folder.
        bins: ``(N, n_channels)`` float32, all episodes one after the other.
        levels: ``(N, n_level_channels)`` float32, likewise.
        rows: One per episode, in the order of (host_id, episode_id).
        inputs: SHA-256 by name of the files that they were made from.
    """

    folder: Path
    bins: NDArray[np.float32]
    levels: NDArray[np.float32]
    rows: tuple[BinIndexRow, ...]
    inputs: Mapping[str, str]

    def episode_bins(self, row: BinIndexRow) -> NDArray[np.float32]:
        """Return a view of one episode's bins, ``(n_bins, n_channels)`` float32."""
        return self.bins[row.offset : row.offset + row.n_bins]

    def release_pages(self) -> None:
        """Release the memory pages of both arrays; see `release_pages`."""
        release_pages(self.bins)
        release_pages(self.levels)

    def episode_levels(self, row: BinIndexRow) -> NDArray[np.float32]:
        """Return a view of one episode's levels, ``(n_bins, n_level_channels)`` float32."""
        return self.levels[row.offset : row.offset + row.n_bins]


def index_rows_by_id(mapped: MappedBins) -> dict[str, BinIndexRow]:
    """Return the row of each episode; if several hosts claim an id, the owner's row, if any (`identity.pick_owner`)."""
    contested = find_contested_ids((row.host_id, row.episode_id) for row in mapped.rows)
    return {row.episode_id: row for row in mapped.rows if (row.host_id, row.episode_id) not in contested}


def open_bins(folder: Path) -> MappedBins:
    """Map the bins of a run into memory and read their index.

    Raises:
        RunError: If a file is missing or malformed, or the files do not match each other.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(folder / BINS_INDEX_FILE)
        check_footer(parquet.metadata, (folder / BINS_INDEX_FILE).stat().st_size)
        totals = json.loads((parquet.metadata.metadata or {})[b"phasewatch.grids"])
        table = parquet.read()
        rows = tuple(_parse_table(table))
        bins, levels = map_bins(folder), _map_npy(folder / LEVELS_FILE)
        n, inputs = int(totals["n_bins"]), totals["inputs"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError, pa.ArrowException) as exc:
        raise RunError(
            f"{folder}: no readable bins here ({exc}); make them with `phasewatch validate STORE --out RUN`"
        ) from exc
    if (
        bins.shape != (n, len(CHANNELS))
        or levels.shape != (n, len(LEVEL_CHANNELS))
        or sum(row.n_bins for row in rows) != n
    ):
        raise RunError(
            f"{folder}: the index lists {n:,} bins of {len(CHANNELS)} channels, the arrays are {bins.shape} and "
            f"{levels.shape}; make them again with `phasewatch validate STORE --out RUN`"
        )
    return MappedBins(folder=folder, bins=bins, levels=levels, rows=rows, inputs=inputs)


def remove_episodes(folder: Path, gone: Set[tuple[str, str]]) -> None:
    """Rewrite the bins of a folder without some episodes.

    Args:
        folder: The folder of the bins.
        gone: (host_id, episode_id) of the episodes to remove.
    """
    old = open_bins(folder)
    with write_bins(folder, inputs=old.inputs) as writer:
        for number, row in enumerate(old.rows, 1):
            if (row.host_id, row.episode_id) not in gone:
                writer.add(row, old.episode_bins(row), old.episode_levels(row))
            if number % _RELEASE_ROWS == 0:
                old.release_pages()


def map_bins(folder: Path) -> NDArray[np.float32]:
    """Map only the bins of a run, ``(N, n_channels)`` float32, for worker processes that have their index rows.

    Bins of an earlier version have the base channels alone. They are read into memory, with NaN for the others.
    """
    bins = _map_npy(folder / BINS_FILE)
    if bins.shape[1] != len(BASE_CHANNELS) or CHANNELS[: len(BASE_CHANNELS)] != BASE_CHANNELS:
        return bins
    if bins.nbytes > _MAX_WIDENED_BYTES:
        raise RunError(
            f"{folder}: {bins.nbytes >> 20:,} MiB of bins from an earlier version; make them again with "
            "`phasewatch validate STORE --out RUN --force`"
        )
    unknown = np.full((len(bins), len(CHANNELS) - len(BASE_CHANNELS)), np.nan, np.float32)
    return np.concatenate([bins, unknown], axis=1)


def release_pages(mapped: NDArray[np.float32]) -> None:
    """Release the pages of a mapped array that were read so far; call it from time to time while streaming.

    Args:
        mapped: ``(n, c)`` float32.
    """
    pages = getattr(mapped, "_mmap", None)  # None if the file has no rows and was read instead
    if pages is not None:
        pages.madvise(mmap.MADV_DONTNEED)


def _map_npy(path: Path) -> NDArray[np.float32]:
    """Map a .npy file of shape ``(n, c)`` float32; one without rows cannot be mapped and is read."""
    with path.open("rb") as file:
        head = io.BytesIO(file.read(_HEADER_BYTES))
    np.lib.format.read_magic(head)
    shape, _, _ = np.lib.format.read_array_header_1_0(head)
    mapped: NDArray[np.float32] = np.load(path, mmap_mode="r" if shape[0] else None, allow_pickle=False)
    return mapped


_TEXT_COLUMNS = ("profile", "sample_name", "sample_kind", "origin", "role", "session", "arch", "accel")


def _build_schema() -> pa.Schema:
    """Return the columns of the index."""
    import pyarrow as pa

    columns = [("episode_id", pa.string()), ("host_id", pa.string()), ("offset", pa.int64()), ("n_bins", pa.int32())]
    columns += [("t0_ns", pa.int64()), ("bin_ns", pa.int64()), *((name, pa.string()) for name in _TEXT_COLUMNS)]
    columns += [("agent", pa.bool_()), ("span_phase", pa.list_(pa.string()))]
    columns += [("span_start_ns", pa.list_(pa.int64())), ("span_end_ns", pa.list_(pa.int64()))]
    return pa.schema([*columns, ("flagged_bin", pa.list_(pa.int32())), ("flagged_flags", pa.list_(pa.uint8()))])


def _build_table(rows: Sequence[BinIndexRow]) -> pa.Table:
    """Convert index rows to a table."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {
        name: [getattr(row, name) for row in rows]
        for name in ("episode_id", "host_id", "offset", "n_bins", "t0_ns", "agent")
    }
    columns |= {name: [str(getattr(row, name)) for row in rows] for name in _TEXT_COLUMNS}
    columns["bin_ns"] = [BIN_NS] * len(rows)
    for place, name in enumerate(("span_phase", "span_start_ns", "span_end_ns")):
        columns[name] = [[span[place] if place else str(span[0]) for span in row.spans] for row in rows]
    for place, name in enumerate(("flagged_bin", "flagged_flags")):
        columns[name] = [[flag[place] for flag in row.flagged] for row in rows]
    return pa.Table.from_pydict(columns, schema=_build_schema())


def _parse_table(table: pa.Table) -> Iterator[BinIndexRow]:
    """Yield the index rows of a table."""
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    for i in range(table.num_rows):
        at = {name: values[i] for name, values in columns.items()}
        if at["bin_ns"] != BIN_NS:
            raise ValueError(f"bins of {at['bin_ns']} ns, not {BIN_NS}")
        spans = zip(at["span_phase"], at["span_start_ns"], at["span_end_ns"], strict=True)
        yield BinIndexRow(
            episode_id=at["episode_id"],
            host_id=at["host_id"],
            offset=at["offset"],
            n_bins=at["n_bins"],
            t0_ns=at["t0_ns"],
            profile=at["profile"],
            sample_name=at["sample_name"],
            sample_kind=SampleKind(at["sample_kind"]),
            origin=EpisodeOrigin(at["origin"]),
            role=EpisodeRole(at["role"]),
            session=at["session"],
            agent=at["agent"],
            arch=at["arch"],
            accel=at["accel"],
            spans=tuple((Phase(phase), start, end) for phase, start, end in spans),
            flagged=tuple(zip(at["flagged_bin"], at["flagged_flags"], strict=True)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelSummary:
    """The values of one channel over all bins of some episodes, in its unit.

    Attributes:
        known_share: Share of the bins with a value.
        varying_share: Share of the episodes with values in which it is not constant.
        low, median, p95, high: Minimum, median, 95 % quantile and maximum; NaN without values.
    """

    channel: ChannelSpec
    known_share: float
    varying_share: float
    low: float
    median: float
    p95: float
    high: float

    @property
    def is_constant(self) -> bool:
        """Whether it never changed, or has no values."""
        return not self.low < self.high


def summarise_channels(
    episodes: Sequence[NDArray[np.float32]], channels: Sequence[ChannelSpec] = CHANNELS
) -> tuple[ChannelSummary, ...]:
    """Summarise every channel over some episodes.

    Args:
        episodes: One ``(n_bins, c)`` float32 array each, NaN where unknown.
        channels: The channels of the columns.
    """
    bins = np.concatenate([np.asarray(e) for e in episodes]) if episodes else np.zeros((0, len(channels)), np.float32)
    summaries = []
    for i, channel in enumerate(channels):
        column = bins[:, i]
        values = column[np.isfinite(column)].astype(np.float64)
        spans = [np.ptp(known) for e in episodes if len(known := e[:, i][np.isfinite(e[:, i])])]
        low, median, p95, high = np.quantile(values, (0, 0.5, 0.95, 1)) if len(values) else [np.nan] * 4
        summaries.append(
            ChannelSummary(
                channel=channel,
                known_share=len(values) / max(1, len(column)),
                varying_share=float(np.mean(np.array(spans) > 0)) if spans else 0.0,
                low=float(low),
                median=float(median),
                p95=float(p95),
                high=float(high),
            )
        )
    return tuple(summaries)
