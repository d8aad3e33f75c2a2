"""Derived columns of a window: ratios of channels, and the shape of their bursts.

A ratio says what a rate alone cannot: bytes per disk write, packets per connection. A burst column describes how
activity is spread over the bins of a window: how often it starts, how regular it is, and what happens at once.
No logarithm or exponential is used, because their bits differ between processors; sums run from the first bin to the
last in float64, so that a window has the same bits live, offline and at every stride.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from phasewatch.arrays import Float32Array, FloatArray
from phasewatch.binning.align import to_float32
from phasewatch.channels import CHANNEL_NAMES
from phasewatch.features.windows import n_windows
from phasewatch.types import BIN_NS, MIN_FINITE_BINS, STRIDE_BINS, WINDOW_BINS

__all__ = [
    "BURST_FEATURES",
    "DERIVED_FEATURES",
    "RATIO_FEATURES",
    "DerivedFeature",
    "derive_history",
    "derived_features",
]

_BIN_S = BIN_NS / 1e9
_MIN_LAG, _MAX_LAG = 3, 40  # bins: a rhythm has a period of 1.5 s or more; a window of 10 s shows up to 9.5 s
_MIN_STARTS = 3  # with fewer starts there is no interval to compare with another
_MIN_VARIATION = 1e-12  # sum of squares below which a series counts as constant
_FEW_PRODUCTS = 50_000  # up to here one large array is faster than a loop over the bins; the bits are the same
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivedFeature:
    """A column that is computed from one or more channels of a window.

    Attributes:
        name: Name of the column, ``ratio.*`` or ``burst.*``.
        unit: Its unit.
        formula: How it is computed from the bins of the window, in words and channel names.
        channels: Full names of the channels that it needs; a channel set has the column if it has them all.
    """

    name: str
    unit: str
    formula: str
    channels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Ratio:
    """A ratio ``mean(above) / (mean(below) + floor)``; the floor keeps a quiet denominator from ruling the column."""

    name: str
    unit: str
    above: str
    below: str
    floor: float

    def describe(self) -> DerivedFeature:
        return DerivedFeature(
            name=f"ratio.{self.name}",
            unit=self.unit,
            formula=f"mean({self.above}) / (mean({self.below}) + {self.floor:g})",
            channels=(self.above, self.below),
        )


_RATIOS = (
    _Ratio("disk_write_size", "B", "qmp.blk_wr_bytes", "qmp.blk_wr_ops", 0.05),
    _Ratio("disk_read_size", "B", "qmp.blk_rd_bytes", "qmp.blk_rd_ops", 0.05),
    _Ratio("disk_write_per_flush", "B", "qmp.blk_wr_bytes", "qmp.blk_flush_ops", 0.02),
    _Ratio("net_out_to_in", "1", "netflow.out_bytes", "netflow.in_bytes", 10.0),
    _Ratio("net_out_size", "B", "netflow.out_bytes", "netflow.out_pkts", 0.1),
    _Ratio("net_in_size", "B", "netflow.in_bytes", "netflow.in_pkts", 0.1),
    _Ratio("net_out_per_flow", "B", "netflow.out_bytes", "netflow.new_flows", 0.02),
    _Ratio("net_in_per_flow", "B", "netflow.in_bytes", "netflow.new_flows", 0.02),
    _Ratio("net_packets_per_flow", "1", "netflow.out_pkts", "netflow.new_flows", 0.02),
    _Ratio("net_refused_per_connection", "1", "netflow.rst_in", "netflow.syn_out", 0.02),
    _Ratio("net_dns_per_flow", "1", "netflow.dns_queries", "netflow.new_flows", 0.02),
    _Ratio("net_connections_per_flow", "1", "netflow.syn_out", "netflow.new_flows", 0.02),
    _Ratio("net_in_packets_to_out", "1", "netflow.in_pkts", "netflow.out_pkts", 0.1),
    _Ratio("net_in_packets_per_connection", "1", "netflow.in_pkts", "netflow.syn_out", 0.02),
    _Ratio("disk_write_per_cpu", "B/core-s", "qmp.blk_wr_bytes", "proc.vcpu_run", 0.01),
    _Ratio("net_out_per_cpu", "B/core-s", "netflow.out_bytes", "proc.vcpu_run", 0.01),
    _Ratio("disk_read_to_write", "1", "qmp.blk_rd_bytes", "qmp.blk_wr_bytes", 1000.0),
    _Ratio("net_in_to_disk_write", "1", "netflow.in_bytes", "qmp.blk_wr_bytes", 1000.0),
    _Ratio("net_out_to_disk_read", "1", "netflow.out_bytes", "qmp.blk_rd_bytes", 1000.0),
    _Ratio("cpu_switches", "1/core-s", "proc.vcpu_vcs", "proc.vcpu_run", 0.01),
    _Ratio("cpu_wait", "1", "proc.vcpu_wait", "proc.vcpu_run", 0.01),
    _Ratio("jit_blocks_per_cpu", "1/core-s", "qmp.jit_tb", "proc.vcpu_run", 0.01),
    _Ratio("jit_flushes_per_cpu", "1/core-s", "qmp.jit_tlb_partial", "proc.vcpu_run", 0.01),
)


@dataclass(frozen=True, slots=True)
class _Activity:
    """A bin is active if its channel exceeds a threshold in the channel's unit."""

    name: str
    channel: str
    above: float

    @property
    def formula(self) -> str:
        return f"{self.channel} > {self.above:g}"


_SENDING = _Activity("sending", "netflow.out_pkts", 0.0)
_CONNECTING = _Activity("connecting", "netflow.syn_out", 0.0)
_RESOLVING = _Activity("resolving", "netflow.dns_queries", 0.0)
_WRITING = _Activity("disk_write", "qmp.blk_wr_bytes", 0.0)
_READING = _Activity("disk_read", "qmp.blk_rd_bytes", 0.0)
_CPU_BUSY = _Activity("cpu", "proc.vcpu_run", 0.15)
_DOWNLOADING = _Activity("download", "netflow.in_bytes", 3000.0)
_UPLOADING = _Activity("upload", "netflow.out_bytes", 3000.0)
_CPU_ABOVE_10 = _Activity("cpu_above_10", "proc.vcpu_run", 0.1)
_CPU_ABOVE_50 = _Activity("cpu_above_50", "proc.vcpu_run", 0.5)
# The first five have columns of their starts, the first six but two columns of what they share.
_ACTIVITIES = (
    _SENDING,
    _CONNECTING,
    _RESOLVING,
    _WRITING,
    _CPU_BUSY,
    _DOWNLOADING,
    _READING,
    _UPLOADING,
    _CPU_ABOVE_10,
    _CPU_ABOVE_50,
)
_N_STARTING = 5
_COINCIDING = (_CPU_BUSY, _SENDING, _DOWNLOADING, _WRITING, _READING, _UPLOADING)
_PAIRS = tuple((a, b) for i, a in enumerate(_COINCIDING) for b in _COINCIDING[i:])

_CPU = "proc.vcpu_run"
_QUANTILES = (0.05, 0.25, 0.75)
_QUANTILES_COLUMN = np.array(_QUANTILES)[:, None]
_RHYTHMS = (("cpu", _CPU, ""), ("net_out", "netflow.out_bytes", "sqrt "), ("disk_write", "qmp.blk_wr_bytes", "sqrt "))
_BURST_SIZES = (("net_out", "netflow.out_bytes"), ("net_in", "netflow.in_bytes"))


def _describe_bursts() -> Iterator[DerivedFeature]:
    """Yield the burst columns in the order of `_compute_bursts`."""

    def column(name: str, unit: str, formula: str, *channels: str) -> DerivedFeature:
        return DerivedFeature(name=f"burst.{name}", unit=unit, formula=formula, channels=tuple(dict.fromkeys(channels)))

    for q in _QUANTILES:
        yield column(f"cpu_p{100 * q:.0f}", "cores", f"{100 * q:.0f} % quantile of {_CPU} over the bins", _CPU)
    for activity in (_CPU_ABOVE_10, _CPU_ABOVE_50):
        yield column(f"{activity.name}_share", "1", f"share of bins with {activity.formula}", _CPU)
    yield column("cpu_change", "cores", f"mean absolute change of {_CPU} from one bin to the next", _CPU)
    for name, channel, root in _RHYTHMS:
        series = f"autocorrelation of {root}{channel}"
        lags = f"lags of {_MIN_LAG} bins to {_MAX_LAG}, at most one less than there are"
        yield column(f"{name}_autocorrelation_peak", "1", f"largest {series} at {lags}; 0 if constant", channel)
        yield column(f"{name}_period", "s", f"lag of the largest {series}; 0 if constant", channel)
        yield column(f"{name}_autocorrelation_next", "1", f"{series} at a lag of one bin; 0 if constant", channel)
    for activity in _ACTIVITIES[:_N_STARTING]:
        starts = f"starts of {activity.formula}"
        few = f"−1 with fewer than {_MIN_STARTS}"
        yield column(f"{activity.name}_starts", "1/min", f"{starts} per minute", activity.channel)
        yield column(
            f"{activity.name}_length", "s", f"time with {activity.formula} per start; 0 without", activity.channel
        )
        yield column(f"{activity.name}_interval", "s", f"mean interval between {starts}; {few}", activity.channel)
        yield column(
            f"{activity.name}_irregularity",
            "1",
            f"standard deviation over mean of the intervals between {starts}; {few}",
            activity.channel,
        )
    for a, b in _PAIRS:
        name = f"{a.name}_share" if a is b else f"{a.name}_and_{b.name}"
        formula = a.formula if a is b else f"{a.formula} and {b.formula}"
        yield column(name, "1", f"share of bins with {formula}", a.channel, b.channel)
    for name, channel in _BURST_SIZES:
        yield column(f"{name}_median", "B/s", f"median of {channel} over the bins in which it is above 0", channel)
        yield column(
            f"{name}_variation",
            "1",
            f"standard deviation over mean of {channel} over the bins in which it is above 0; −1 without",
            channel,
        )


RATIO_FEATURES = tuple(ratio.describe() for ratio in _RATIOS)
BURST_FEATURES = tuple(_describe_bursts())
DERIVED_FEATURES = (*RATIO_FEATURES, *BURST_FEATURES)


def _list_channels(features: Sequence[DerivedFeature]) -> tuple[str, ...]:
    """Return the channels of some columns in the order of CHANNELS."""
    needed = {name for feature in features for name in feature.channels}
    return tuple(name for name in CHANNEL_NAMES if name in needed)


_BURST_CHANNELS = _list_channels(BURST_FEATURES)
_CHANNELS = (*_BURST_CHANNELS, *(name for name in _list_channels(RATIO_FEATURES) if name not in _BURST_CHANNELS))
_PLACE = {name: i for i, name in enumerate(_CHANNELS)}
_COLUMNS = np.array([CHANNEL_NAMES.index(name) for name in _CHANNELS], np.intp)
_NEEDS = np.array([[name in feature.channels for name in _CHANNELS] for feature in DERIVED_FEATURES])
_ABOVE = np.array([_PLACE[ratio.above] for ratio in _RATIOS], np.intp)
_BELOW = np.array([_PLACE[ratio.below] for ratio in _RATIOS], np.intp)
_FLOORS = np.array([ratio.floor for ratio in _RATIOS])[:, None]
_CPU_ROW = _PLACE[_CPU]
_ACTIVITY_ROWS = np.array([_PLACE[activity.channel] for activity in _ACTIVITIES], np.intp)
_THRESHOLDS = np.array([activity.above for activity in _ACTIVITIES])[:, None, None]
_COINCIDING_ROWS = np.array([_ACTIVITIES.index(activity) for activity in _COINCIDING], np.intp)
_UPPER = np.triu_indices(len(_COINCIDING))
_RHYTHM_ROWS = np.array([_PLACE[channel] for _, channel, _ in _RHYTHMS], np.intp)
_BURST_SIZE_ROWS = np.array([_PLACE[channel] for _, channel in _BURST_SIZES], np.intp)


def derived_features(bins: Float32Array, stride_bins: int = STRIDE_BINS) -> Float32Array:
    """Compute the derived columns of every window of an episode.

    Args:
        bins: ``(n, 73)`` float32 bins of all channels from the episode's first bin on; NaN where unknown.
        stride_bins: Bins from one window's start to the next. A window has the same bits at every stride.

    Returns:
        ``(w, d)`` float32 in the order of `DERIVED_FEATURES`. A ratio uses the means of the known bins; in a burst
        column an unknown bin counts as 0. A column is NaN if one of its channels has fewer than `MIN_FINITE_BINS`
        known bins in the window, or if its value is not finite.

    Source: docs/reference/features.md.
    """
    return derive_history([bins], WINDOW_BINS, stride_bins)


def derive_history(
    episodes: Sequence[Float32Array],
    horizon_bins: int = WINDOW_BINS,
    stride_bins: int = STRIDE_BINS,
    *,
    with_bursts: bool = True,
    newest_only: bool = False,
) -> Float32Array:
    """Compute the derived columns over a time that ends with each window of some episodes.

    The windows of several episodes at once cost less than one episode after another, and have the same bits.

    Args:
        episodes: Bins of each episode, as `derived_features`.
        horizon_bins: Bins to look back from the end of a window: `WINDOW_BINS` or a larger multiple of ten. Where the
            episode began later, the bins since its start are used.
        stride_bins: As `derived_features`.
        with_bursts: Whether the burst columns are computed; otherwise only the ratios are returned.
        newest_only: Whether only the window that ends with the last bin of each episode is computed.

    Returns:
        ``(w, d)`` float32 in the order of `DERIVED_FEATURES` or `RATIO_FEATURES`, the windows of all episodes one
        after the other.
    """
    used = [bins for bins in episodes if len(bins) >= WINDOW_BINS]
    width = len(DERIVED_FEATURES) if with_bursts else len(RATIO_FEATURES)
    if not used:
        return np.empty((0, width), np.float32)
    history = _build_history(used, horizon_bins, stride_bins, newest_only=newest_only)
    out = np.empty((width, len(history.present)))
    with np.errstate(all="ignore"):  # what is not finite becomes NaN
        out[: len(_RATIOS)] = _compute_ratios(history)
        if with_bursts:
            _compute_bursts(history, out[len(_RATIOS) :])
        if history.has_gaps:
            unknown = (history.known < MIN_FINITE_BINS).astype(np.float32)
            out[(_NEEDS[:width].astype(np.float32) @ unknown) > 0.0] = np.nan
        out[~(np.abs(out) <= _LARGEST)] = np.nan
    return to_float32(out.T)


@dataclass(frozen=True, slots=True, eq=False)
class _BinHistory:
    """The bins of some episodes, and where the horizon of each window lies in them.

    Attributes:
        x: ``(k, n)`` float64 bins of the channels in `_CHANNELS`, with zeros before each episode so that every horizon
            fits; 0 where unknown.
        begins: ``(w,)`` int64 first column of each horizon.
        horizon: Bins of a horizon.
        known: ``(k, w)`` int64 known bins.
        present: ``(w,)`` int64 bins since the start of the episode, at most `horizon`.
        has_gaps: Whether any bin is unknown.
    """

    x: FloatArray
    begins: NDArray[np.int64]
    horizon: int
    known: NDArray[np.int64]
    present: NDArray[np.int64]
    has_gaps: bool


def _build_history(
    episodes: Sequence[Float32Array], horizon: int, stride: int, *, newest_only: bool = False
) -> _BinHistory:
    ahead = horizon - WINDOW_BINS
    if newest_only:
        episodes = [bins[-horizon:] for bins in episodes]
        last = [np.array([len(bins)]) for bins in episodes]  # of each window: one more than its last bin
    else:
        last = [WINDOW_BINS + stride * np.arange(n_windows(len(bins), stride)) for bins in episodes]
    lengths = np.array([ahead + ends[-1] for ends in last])
    starts = np.cumsum(lengths) - lengths
    x = np.zeros((len(_CHANNELS), lengths.sum()))
    for bins, start, length in zip(episodes, starts, lengths, strict=True):
        x[:, start + ahead : start + length] = bins[: length - ahead].T[_COLUMNS]
    length_so_far = np.concatenate(last)
    begins = np.repeat(starts, [len(ends) for ends in last]) + length_so_far - WINDOW_BINS
    present = np.minimum(length_so_far, horizon)
    finite = np.isfinite(x)
    has_gaps = not finite.all()
    known = np.broadcast_to(present, (len(x), len(present)))
    if has_gaps:
        x[~finite] = 0.0
        count = np.zeros((len(x), x.shape[1] + 1), np.int64)
        np.cumsum(finite, axis=1, out=count[:, 1:])
        known = count[:, begins + horizon] - count[:, begins] - (horizon - present)  # zeros before are no readings
    return _BinHistory(x=x, begins=begins, horizon=horizon, known=known, present=present, has_gaps=has_gaps)


def _compute_ratios(history: _BinHistory) -> FloatArray:
    """Compute the ratio columns, ``(23, w)``; sums run over ten bins each, then over the tens, first to last."""
    x, n = history.x, history.x.shape[1] - STRIDE_BINS + 1
    tens = x[:, :n] + x[:, 1 : n + 1]
    for i in range(2, STRIDE_BINS):
        tens += x[:, i : n + i]
    total = tens[:, history.begins]
    for later in range(STRIDE_BINS, history.horizon, STRIDE_BINS):
        total += tens[:, history.begins + later]
    total /= history.known
    ratio: FloatArray = total[_ABOVE] / (total[_BELOW] + _FLOORS)
    return ratio


def _compute_bursts(history: _BinHistory, out: FloatArray) -> None:
    """Write the burst columns into ``(60, w)`` float64."""
    h, present = history.horizon, history.present
    windows = sliding_window_view(history.x[: len(_BURST_CHANNELS)], h, axis=1)
    x = windows[:, history.begins]  # (k, w, h)
    is_absent = None  # bins before the start of the episode, (w, h)
    if (present < h).any():
        is_absent = np.arange(h) < (h - present)[:, None]
    cpu = x[_CPU_ROW]
    active = x[_ACTIVITY_ROWS] > _THRESHOLDS
    held = np.add.reduce(active.view(np.uint8), axis=-1, dtype=np.uint8)  # h < 256, and counts are exact in any order
    out[0:3] = _compute_quantiles(cpu, is_absent, present)
    out[3:5] = held[-2:] / present
    change = np.abs(cpu[:, 1:] - cpu[:, :-1])
    if is_absent is not None:
        change[is_absent[:, :-1]] = 0.0
    out[5] = _sum_bins(change) / (present - 1)
    out[6:15] = _compute_rhythms(x[_RHYTHM_ROWS], is_absent, present)
    out[15:35] = _compute_starts(active[:_N_STARTING], held[:_N_STARTING], present)
    together = active[_COINCIDING_ROWS].transpose(1, 0, 2).astype(np.float32)  # counts are exact in float32
    out[35:56] = (together @ together.transpose(0, 2, 1))[:, _UPPER[0], _UPPER[1]].T / present
    out[56:60] = _compute_burst_sizes(x[_BURST_SIZE_ROWS])


def _sum_bins(x: FloatArray) -> FloatArray:
    """Sum along the last axis from the first bin to the last; a cumulative sum has a fixed order."""
    total: FloatArray = np.cumsum(x, axis=-1)[..., -1]
    return total


def _compute_quantiles(x: FloatArray, is_absent: NDArray[np.bool_] | None, present: NDArray[np.int64]) -> FloatArray:
    """Interpolate linearly between the order statistics of each row: ``(w, h)`` → ``(3, w)``."""
    ordered = x.copy() if is_absent is None else np.where(is_absent, np.inf, x)
    ordered.sort(axis=-1)
    rank = (present - 1) * _QUANTILES_COLUMN
    below = rank.astype(np.int64)
    row = np.arange(len(x))
    low = ordered[row, below]
    quantile: FloatArray = low + (rank - below) * (ordered[row, below + 1] - low)
    return quantile


def _compute_rhythms(series: FloatArray, is_absent: NDArray[np.bool_] | None, present: NDArray[np.int64]) -> FloatArray:
    """Compute peak, period and next-bin autocorrelation of each rhythm: ``(n, w, h)`` → ``(3 n, w)``."""
    np.sqrt(np.maximum(series[1:], 0.0), out=series[1:])
    series -= (_sum_bins(series) / present)[..., None]
    if is_absent is not None:
        series[:, is_absent] = 0.0
    n, w, h = series.shape
    lags = min(_MAX_LAG, h - 1) + 1
    products = _sum_products(series.reshape(n * w, h), lags)
    varies = products[0] > _MIN_VARIATION
    correlation = products / np.where(varies, products[0], 1.0)
    if is_absent is not None:
        correlation[np.tile(np.arange(lags)[:, None] >= present, n)] = -np.inf
    searched = correlation[_MIN_LAG:]
    best = searched.argmax(axis=0)
    found = np.stack((searched[best, np.arange(n * w)], (best + _MIN_LAG) * _BIN_S, correlation[1]))
    found[:, ~varies] = 0.0
    return found.reshape(3, n, w).transpose(1, 0, 2).reshape(3 * n, w)


def _sum_products(x: FloatArray, lags: int) -> FloatArray:
    """Sum the products of each row with itself moved by 0, 1, … bins, first bin to last: ``(m, h)`` → ``(lags, m)``."""
    m, h = x.shape
    ahead = np.zeros((h + lags - 1, m))
    ahead[:h] = x.T
    if m * h * lags <= _FEW_PRODUCTS:  # all products at once
        moved = sliding_window_view(ahead, lags, axis=0)  # (h, m, lags)
        total: FloatArray = np.cumsum(ahead[:h, :, None] * moved, axis=0)[-1].T
        return total
    total, product = np.zeros((lags, m)), np.empty((lags, m))
    for t in range(h):
        total += np.multiply(ahead[t], ahead[t : t + lags], out=product)
    return total


def _compute_starts(active: NDArray[np.bool_], held: NDArray[np.uint8], present: NDArray[np.int64]) -> FloatArray:
    """Compute rate, length, interval and irregularity of the starts of each activity: ``(n, w, h)`` → ``(4 n, w)``."""
    n, w, h = active.shape
    starts = active.copy()
    starts[..., 1:] &= ~active[..., :-1]
    owner, at = np.divmod(np.flatnonzero(starts), h)
    count = np.bincount(owner, minlength=n * w)
    gap = np.diff(at)
    follows = owner[1:] == owner[:-1]
    gap, owner = gap[follows], owner[1:][follows]
    total = np.bincount(owner, gap, n * w)  # sums of whole numbers are exact in any order
    squares = np.bincount(owner, gap * gap, n * w)
    has_few = count < _MIN_STARTS
    intervals = np.maximum(count - 1, 1)
    length = total / intervals
    spread = np.sqrt(np.maximum(intervals * squares - total * total, 0.0)) / total
    out = np.empty((n, 4, w))
    out[:, 0] = count.reshape(n, w) * (60.0 / _BIN_S) / present
    out[:, 1] = held * _BIN_S / np.maximum(count, 1).reshape(n, w)
    out[:, 2] = np.where(has_few, -1.0, length * _BIN_S).reshape(n, w)
    out[:, 3] = np.where(has_few, -1.0, spread).reshape(n, w)
    return out.reshape(4 * n, w)


def _compute_burst_sizes(x: FloatArray) -> FloatArray:
    """Compute median and variation of the values above 0 in each row: ``(n, w, h)`` → ``(2 n, w)``."""
    n, w, h = x.shape
    x = x.reshape(n * w, h)
    on = x > 0.0
    count = np.add.reduce(on.view(np.uint8), axis=-1, dtype=np.uint8).astype(np.int64)
    divisor = np.maximum(count, 1)
    ordered = np.where(on, x, np.inf)
    ordered.sort(axis=-1)
    row = np.arange(n * w)
    low, high = ordered[row, (divisor - 1) // 2], ordered[row, divisor // 2]
    mean = _sum_bins(np.where(on, x, 0.0)) / divisor
    deviation = np.where(on, x - mean[:, None], 0.0)
    deviation *= deviation
    spread = np.sqrt(_sum_bins(deviation) / divisor)
    found = np.stack((low + 0.5 * (high - low), spread / mean))
    found[0, count == 0], found[1, count == 0] = 0.0, -1.0
    return found.reshape(2, n, w).transpose(1, 0, 2).reshape(2 * n, w)
