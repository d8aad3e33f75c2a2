"""The baseline of a host: median and spread of its channels while it is known clean, and scaling by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import FloatArray
from phasewatch.errors import DataError
from phasewatch.features.stats import STATS
from phasewatch.types import MIN_FINITE_BINS

__all__ = [
    "BASELINE_FORMAT",
    "ChannelScaling",
    "HostBaseline",
    "build_scaling",
    "compute_scale_floors",
    "measure_baseline",
    "parse_baseline",
    "render_baseline",
]

BASELINE_FORMAT = "phasewatch-commission/1"
_MIN_SCALE_SHARE = 0.01  # of a channel's 5 to 95 % range over train: smaller noise is not amplified
_SHIFTED_STATS = np.array([stat in ("mean", "p50", "p95") for stat in STATS])  # std and slope do not move with a shift


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HostBaseline:
    """The usual values of one host while it is known clean.

    Attributes:
        host_id: The host.
        names: Full channel names.
        median, spread: ``(c,)`` float64, median and interquartile range of each channel's bins in its unit; NaN for a
            channel with fewer than `MIN_FINITE_BINS` known bins.
        bins: Number of bins measured.
    """

    host_id: str
    names: tuple[str, ...]
    median: FloatArray
    spread: FloatArray
    bins: int

    def select_channels(self, names: Sequence[str]) -> HostBaseline:
        """Return the named channels in this order; a channel that is not in the baseline is NaN."""
        place = {name: i for i, name in enumerate(self.names)}
        at = np.array([place.get(name, len(self.names)) for name in names], np.intp)
        return HostBaseline(
            host_id=self.host_id,
            names=tuple(names),
            median=np.append(self.median, np.nan)[at],
            spread=np.append(self.spread, np.nan)[at],
            bins=self.bins,
        )


def measure_baseline(host_id: str, names: Sequence[str], bins: NDArray[np.float32]) -> HostBaseline:
    """Measure the baseline of a host.

    Args:
        host_id: The host.
        names: Full names of the channels.
        bins: ``(n, c)`` float32 bins of a time in which the host is known clean; NaN where unknown.
    """
    median, spread = np.full(len(names), np.nan), np.full(len(names), np.nan)
    for i in range(len(names)):
        column = bins[:, i].astype(np.float64)
        known = column[np.isfinite(column)]
        if len(known) >= MIN_FINITE_BINS:
            low, median[i], high = np.percentile(known, [25, 50, 75])
            spread[i] = high - low
    return HostBaseline(host_id=host_id, names=tuple(names), median=median, spread=spread, bins=len(bins))


def compute_scale_floors(x: NDArray[np.float32]) -> FloatArray:
    """Compute the smallest scale of each channel: 1 % of its 5 to 95 % range over train, or 1 if that is 0 or unknown.

    Args:
        x: ``(n, c)`` or ``(n, c, t)`` float32 bins of train; NaN where unknown.

    Returns:
        ``(c,)`` float64.
    """
    floors = np.ones(x.shape[1])
    for i in range(x.shape[1]):
        column = x[:, i].astype(np.float64).ravel()
        known = column[np.isfinite(column)]
        if len(known):
            low, high = np.percentile(known, [5, 95])
            floors[i] = _MIN_SCALE_SHARE * (high - low) or 1.0
    return floors


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChannelScaling:
    """The transform ``(x − shift) / scale`` of each channel.

    Attributes:
        shift, scale: ``(c,)`` float64.
        is_missing: ``(c,)`` bool: channels that the baseline lacks.
    """

    shift: FloatArray
    scale: FloatArray
    is_missing: NDArray[np.bool_]

    def scale_bins(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scale bins: ``(n, c)`` or ``(n, c, t)`` float32 → the same shape, float32."""
        tail = (-1, *([1] * (x.ndim - 2)))
        out: NDArray[np.float32] = (
            (x.astype(np.float64) - self.shift.reshape(tail)) / self.scale.reshape(tail)
        ).astype(np.float32)
        return out

    def scale_stats(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scale stats: ``(n, 5 c)`` float32, channel-major → the stats of the scaled bins, same shape, float32."""
        shift = (self.shift[:, None] * _SHIFTED_STATS).ravel()
        out: NDArray[np.float32] = ((x.astype(np.float64) - shift) / np.repeat(self.scale, len(STATS))).astype(
            np.float32
        )
        return out


def build_scaling(reference: HostBaseline | None, floors: FloatArray) -> ChannelScaling:
    """Combine a host's baseline with the scale floors of train.

    Args:
        reference: The baseline; None if there is none.
        floors: ``(c,)`` float64 of `compute_scale_floors`. A channel without a baseline has shift 0 and this scale.
    """
    if reference is None:
        return ChannelScaling(
            shift=np.zeros(len(floors)), scale=floors.copy(), is_missing=np.ones(len(floors), np.bool_)
        )
    lacking = ~np.isfinite(reference.median)
    return ChannelScaling(
        shift=np.where(lacking, 0.0, reference.median),
        scale=np.where(lacking, floors, np.maximum(np.where(lacking, 0.0, reference.spread), floors)),
        is_missing=lacking,
    )


class _BaselineChannel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    median: float | None
    spread: float | None


class _BaselineFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: str
    host_id: str
    bins: int
    channels: tuple[_BaselineChannel, ...]


def render_baseline(reference: HostBaseline) -> bytes:
    """Render the file of a baseline."""
    rows = zip(reference.names, reference.median.tolist(), reference.spread.tolist(), strict=True)
    channels = tuple(
        _BaselineChannel(name=n, median=m, spread=s) if m == m else _BaselineChannel(name=n, median=None, spread=None)
        for n, m, s in rows
    )
    file = _BaselineFile(format=BASELINE_FORMAT, host_id=reference.host_id, bins=reference.bins, channels=channels)
    return msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n"


def parse_baseline(data: bytes, *, file: str) -> HostBaseline:
    """Parse the file of a baseline.

    Raises:
        DataError: If it is not a baseline, or has invalid numbers.
    """
    try:
        found = msgspec.json.decode(data, type=_BaselineFile)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise DataError(f"{file}: not a commissioning file: {exc}; make it with `phasewatch baseline`") from exc
    names = tuple(c.name for c in found.channels)
    if found.format != BASELINE_FORMAT or len(set(names)) != len(names):
        raise DataError(
            f"{file}: found format {found.format!r} with {len(names)} channels, expected {BASELINE_FORMAT!r}"
        )
    numbers = [(c.median, c.spread) for c in found.channels]
    if any((m is None) is not (s is None) or (s is not None and s < 0) for m, s in numbers):
        raise DataError(f"{file}: a median without its spread, or a spread below 0")
    values = np.array([[np.nan if v is None else v for v in pair] for pair in numbers], np.float64).reshape(-1, 2)
    return HostBaseline(host_id=found.host_id, names=names, median=values[:, 0], spread=values[:, 1], bins=found.bins)
