"""The behaviour fingerprint: a digest of the features of built-in episodes; equal digests mean equal feature bits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from phasewatch.binning.align import bin_episode
from phasewatch.bundle.model import BUNDLE_FORMAT, ClockMetadata, Episode, HostMetadata, LabelMark, Manifest, SourceRows
from phasewatch.channels import (
    BASE_CHANNELS,
    CHANNELS,
    ChannelSpec,
    RawFieldSpec,
    has_extended_channels,
    list_raw_fields,
)
from phasewatch.features.context import context_features
from phasewatch.features.derived import derived_features
from phasewatch.features.schema import list_column_channels, schema_hash
from phasewatch.features.stats import episode_stats, window_stats
from phasewatch.types import ChannelGroup, ClockBase, EpisodeOrigin, EpisodeRole, Phase, SampleKind, SourceKind

__all__ = [
    "FeatureDigests",
    "behaviour_fingerprint",
    "build_golden_episodes",
    "compute_column_digests",
    "compute_feature_digests",
]

_SECOND_NS = 1_000_000_000
_WALL_START_NS = 1_700_000_000 * _SECOND_NS + 123_456_789
_MONO_START_NS = 1_000 * _SECOND_NS + 987_654_321
_BOOT_START_NS = 70_000 * _SECOND_NS
_LENGTH_S = 31  # an odd number of half windows, so that the last bins are in no window


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureDigests:
    """The two digests that a model and the features that it is given must share.

    Attributes:
        schema_hash: Digest of the meaning of the columns, from `features.schema.schema_hash`.
        behaviour_fingerprint: Digest of what the code computes, from `behaviour_fingerprint`.
    """

    schema_hash: str
    behaviour_fingerprint: str


def compute_feature_digests(channels: Iterable[str]) -> FeatureDigests:
    """Return the digests of the features of some channels.

    They cover the base channels alone unless one of the channels is extended. So a model of base channels stays valid
    when extended channels change (docs/adr/0085).

    Args:
        channels: Full names of the channels that a model's columns need.
    """
    group = CHANNELS if has_extended_channels(channels) else BASE_CHANNELS
    return FeatureDigests(schema_hash=schema_hash(group), behaviour_fingerprint=behaviour_fingerprint(group))


def compute_column_digests(columns: Iterable[str]) -> FeatureDigests:
    """Return the digests of the features of a model's columns: of a table's columns, or the channels of a tensor."""
    names = set(columns)
    return compute_feature_digests(names.union(*(list_column_channels(name) for name in names)))


def behaviour_fingerprint(channels: Sequence[ChannelSpec] = CHANNELS) -> str:
    """Return the sha256 over bins and features of the golden episodes, as little-endian float32.

    For each episode: bins, statistics of the windows and of the episode, derived and context columns.

    Args:
        channels: The channels whose bins and statistics count; `CHANNELS` or `BASE_CHANNELS`.

    Source: docs/formats/run.md.
    """
    chosen = {channel.full_name for channel in channels}
    return _compute_fingerprint(tuple(channel.full_name in chosen for channel in CHANNELS))


@cache
def _compute_fingerprint(chosen: tuple[bool, ...]) -> str:
    digest = hashlib.sha256()
    for _, episode in build_golden_episodes():
        bins = bin_episode(episode).bins
        own = bins[:, chosen]
        columns = (window_stats(own), episode_stats(own), derived_features(bins), context_features(bins))
        for values in (own, *columns):
            digest.update(np.ascontiguousarray(values, "<f4").tobytes())
    return digest.hexdigest()


def build_golden_episodes() -> Iterator[tuple[str, Episode]]:
    """Yield the golden episodes with their names; each covers one rule of the arithmetic and uses integers alone."""
    base = 2**53 + 1
    yield "jitter", _build_episode(1)
    yield "no ticks from the guest, none from the card", _build_episode(2, sources=(SourceKind.PROC, SourceKind.QMP))
    yield "counters beyond 53 bits", _build_episode(3, start=base)
    yield (
        "gaps just over and just under 2.5 s",
        _map_sources(_build_episode(4), _drop_rows(lambda i: 20 <= i < 24 or 40 <= i < 45)),
    )
    yield "resets", _build_episode(5, wrap=2_000)
    yield "counters that wrap at 32 bits", _build_episode(6, start=2**32 - 5_000, wrap=2**32)
    yield "nulls", _map_sources(_build_episode(7), _set_nulls(lambda i, f: (i * 7 + f * 3) % 4 == 0))
    yield (
        "balloon fields every third tick",
        _map_sources(_build_episode(8), _set_nulls(lambda i, f: f > 10 and i % 3 > 0)),
    )
    yield "ten ticks a second", _build_episode(9, period_ns=_SECOND_NS // 10, jitter_ns=_SECOND_NS // 25)
    yield "stamps out of order, and twice", _build_episode(10, jitter_ns=3 * _SECOND_NS // 2)
    yield (
        "sources that begin late and end early",
        _map_sources(_build_episode(11), _drop_rows(lambda i: i < 17 or i > 43)),
    )
    yield (
        "a clock that claims to be Unix time",
        _restamp_clock(_build_episode(12), ClockBase.UNIX, -_WALL_START_NS + _MONO_START_NS),
    )
    yield (
        "a clock with another name",
        _restamp_clock(_build_episode(13), ClockBase.BOOTTIME, -_WALL_START_NS + _BOOT_START_NS),
    )
    yield "a step of the wall clock", _map_sources(_build_episode(14), _step_clock)
    yield (
        "readings on the edges of bins, and gaps of exactly 2.5 s",
        _map_sources(_build_episode(15, jitter_ns=0), _align_to_bin_edges),
    )
    yield "monotonic stamps that stand still and step back", _map_sources(_build_episode(16), _break_monotonic_clock)
    yield "exactly one window", _build_episode(17, bins=20)
    yield "one bin short of a window", _build_episode(18, bins=19)
    yield "just enough bins for stats", _build_episode(19, bins=10)
    yield "one bin too few for stats", _build_episode(20, bins=9)
    yield "ten bins, and one of them unknown", _map_sources(_build_episode(21, bins=10), _drop_rows(lambda i: i < 5))
    yield "sources that end after ten bins", _map_sources(_build_episode(22), _drop_rows(lambda i: i > 9))
    yield "a step of the wall clock at the last reading", _map_sources(_build_episode(23), _step_clock_at_end)


def _build_episode(
    seed: int,
    *,
    sources: tuple[SourceKind, ...] = tuple(SourceKind),
    period_ns: int = _SECOND_NS // 2,
    jitter_ns: int = _SECOND_NS // 20,
    start: int = 0,
    wrap: int = 2**62,
    bins: int = 2 * _LENGTH_S,
) -> Episode:
    """Build an episode whose ticks and increments come from a small integer generator."""
    # The extended fields have a generator of their own, so that the base fields are those of earlier versions.
    draw, draw_extended = _IntegerGenerator(seed), _IntegerGenerator(seed + 1_000)
    rows = {}
    for source in sources:
        step_ns = 2 * period_ns if source is SourceKind.GUEST else period_ns
        n = (bins * _SECOND_NS // 2 + 3 * _SECOND_NS) // step_ns
        at = [-2 * _SECOND_NS + i * step_ns + draw.draw_below(2 * jitter_ns + 1) - jitter_ns for i in range(n)]
        columns = [
            _draw_column(draw if spec.group is ChannelGroup.BASE else draw_extended, spec, n, start=start, wrap=wrap)
            for spec in list_raw_fields(source)
        ]
        rows[source] = SourceRows(
            source=source,
            fields=tuple(spec.field for spec in list_raw_fields(source)),
            t_wall_ns=np.array([_WALL_START_NS + t for t in at], np.int64),
            t_mono_ns=np.array([_MONO_START_NS + t for t in at], np.int64),
            seq=np.arange(n, dtype=np.int64),
            columns=tuple(columns),
            present=np.ones((n, len(columns)), np.bool_),
        )
    marks = tuple(
        LabelMark(
            t_wall_ns=_WALL_START_NS + int(s * _SECOND_NS), t_mono_ns=_MONO_START_NS + int(s * _SECOND_NS), phase=phase
        )
        for s, phase in ((0, Phase.CLEAN), (2, Phase.INFECTING), (4, Phase.ACTIVE), (bins / 2, None))
    )
    return Episode(manifest=_build_manifest(sources), marks=marks, rows=rows)


def _draw_column(
    draw: _IntegerGenerator, spec: RawFieldSpec, n: int, *, start: int, wrap: int
) -> NDArray[np.float64] | NDArray[np.int64]:
    """Draw ``(n,)`` readings of one raw field."""
    if spec.type == "float":
        return np.array([draw.draw_below(1025) / 1024 for _ in range(n)])
    if spec.unit == "1/1000":
        return np.array([draw.draw_below(1001) for _ in range(n)], np.int64)
    if spec.nature == "counter":
        value, counts = start, []
        for _ in range(n):
            value = (value + draw.draw_below(400)) % wrap
            counts.append(value)
        return np.array(counts, np.int64)
    return np.array([start + draw.draw_below(100_000) for _ in range(n)], np.int64)


@dataclass(slots=True)
class _IntegerGenerator:
    """A linear congruential generator (Knuth's MMIX constants), which is the same on every machine and version."""

    state: int

    def draw_below(self, bound: int) -> int:
        """Draw an integer in [0, bound)."""
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) % bound


def _map_sources(episode: Episode, change: Callable[[SourceRows], SourceRows]) -> Episode:
    return replace(episode, rows={source: change(rows) for source, rows in episode.rows.items()})


def _drop_rows(is_lost: Callable[[int], bool]) -> Callable[[SourceRows], SourceRows]:
    """Return a function that removes some rows of a source."""

    def change(rows: SourceRows) -> SourceRows:
        kept = np.array([i for i in range(len(rows)) if not is_lost(i)], np.intp)
        return replace(
            rows,
            t_wall_ns=rows.t_wall_ns[kept],
            t_mono_ns=rows.t_mono_ns[kept],
            seq=rows.seq[kept],
            columns=tuple(c[kept] for c in rows.columns),
            present=rows.present[kept],
        )

    return change


def _set_nulls(is_null: Callable[[int, int], bool]) -> Callable[[SourceRows], SourceRows]:
    """Return a function that sets some fields of some rows to null."""

    def change(rows: SourceRows) -> SourceRows:
        shape = rows.present.shape
        here = [[not is_null(i, f) for f in range(shape[1])] for i in range(shape[0])]
        return replace(rows, present=np.array(here, np.bool_))

    return change


def _step_clock(rows: SourceRows) -> SourceRows:
    """Step the wall clock forward by 0.75 s in the middle."""
    middle = rows.t_mono_ns > _MONO_START_NS + 15 * _SECOND_NS
    return replace(rows, t_wall_ns=rows.t_wall_ns + middle * (3 * _SECOND_NS // 4))


def _step_clock_at_end(rows: SourceRows) -> SourceRows:
    """Step the wall clock forward by 0.75 s before the last reading of a source."""
    last = np.arange(len(rows)) == len(rows) - 1
    return replace(rows, t_wall_ns=rows.t_wall_ns + last * (3 * _SECOND_NS // 4))


def _align_to_bin_edges(rows: SourceRows) -> SourceRows:
    """Insert one gap of exactly 2.5 s, and one that is a nanosecond longer."""
    late = (np.arange(len(rows)) == 40).astype(np.int64)
    moved = replace(rows, t_wall_ns=rows.t_wall_ns + late, t_mono_ns=rows.t_mono_ns + late)
    return _drop_rows(lambda i: 20 <= i < 24 or 36 <= i < 40)(moved)


def _break_monotonic_clock(rows: SourceRows) -> SourceRows:
    """Repeat some stamps of the monotonic clock, and step others back."""
    mono = rows.t_mono_ns.copy()
    mono[20::9] = mono[19::9][: len(mono[20::9])]
    mono[30::11] = mono[29::11][: len(mono[30::11])] - 1
    return replace(rows, t_mono_ns=mono)


def _restamp_clock(episode: Episode, declared: ClockBase, by_ns: int) -> Episode:
    """Stamp every row with another clock, and declare it in the manifest as the recorder does."""
    moved = _map_sources(episode, lambda rows: replace(rows, t_wall_ns=rows.t_wall_ns + by_ns))
    manifest = _build_manifest(tuple(episode.rows), declared)
    return replace(moved, manifest=manifest)


def _build_manifest(sources: tuple[SourceKind, ...], base: ClockBase = ClockBase.UNIX) -> Manifest:
    hour, drift = 3600 * _SECOND_NS, 7_001  # ns per hour, so that re-basing has something to round
    host = HostMetadata(
        host_id="golden",
        arch="x86_64",
        accel="tcg",
        machine="none",
        cpu="none",
        vcpus=1,
        mem_mib=1,
        disk="none",
        nic="none",
        hypervisor="none",
        guest_kernel="none",
        recorder="none",
    )
    pairs = {
        ClockBase.MONOTONIC: ((_MONO_START_NS, _WALL_START_NS), (_MONO_START_NS + hour, _WALL_START_NS + hour + drift)),
        ClockBase.BOOTTIME: ((_BOOT_START_NS, _WALL_START_NS), (_BOOT_START_NS + hour, _WALL_START_NS + hour - drift)),
    }
    return Manifest(
        format=BUNDLE_FORMAT,
        episode_id="00000000-0000-7000-8000-000000000000",
        host=host,
        profile="benign",
        sample_name="golden",
        sample_kind=SampleKind.BENIGN,
        origin=EpisodeOrigin.SIMULATED,
        role=EpisodeRole.LAB,
        started_wall_ns=_WALL_START_NS,
        duration_s=float(_LENGTH_S),
        session="golden",
        neighbours=(),
        plan_seed=0,
        plan=(),
        agent=SourceKind.GUEST in sources,
        nominal_hz={},
        rows_emitted={},
        channels_available=(),
        fields={},
        clocks=ClockMetadata(base=dict.fromkeys(sources, base), pairs=pairs),
        recording=None,
        members={},
    )
