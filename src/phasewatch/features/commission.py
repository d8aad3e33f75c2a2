"""A VM's clean day as the zero of its channels: measured on clean bins, applied to bins or to their stats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.errors import DataError
from phasewatch.features.stats import STATS
from phasewatch.vocab import MIN_FINITE

FORMAT = "phasewatch-commission/1"
FLOOR_SHARE = 0.01  # of a channel's 5 to 95 % range over train: noise below it is not stretched
_SHIFTED = np.array([stat in ("mean", "p50", "p95") for stat in STATS])  # std and slope do not move with a shift

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """What is usual on one host while it is known clean.

    Attributes:
        host_id: Whose clean day it is.
        names: Full channel names.
        median, spread: ``(c,)`` in each channel's unit, median and interquartile range of its bins; NaN for a channel
            with fewer than `MIN_FINITE` known bins.
        bins: How many bins were looked at.
    """

    host_id: str
    names: tuple[str, ...]
    median: Floats
    spread: Floats
    bins: int

    def take(self, names: Sequence[str]) -> Reference:
        """Give the named channels in this order; one that it never saw is NaN."""
        place = {name: i for i, name in enumerate(self.names)}
        at = np.array([place.get(name, len(self.names)) for name in names], np.intp)
        return Reference(
            host_id=self.host_id,
            names=tuple(names),
            median=np.append(self.median, np.nan)[at],
            spread=np.append(self.spread, np.nan)[at],
            bins=self.bins,
        )


def measure(host_id: str, names: Sequence[str], bins: NDArray[np.float32]) -> Reference:
    """Measure a host's clean bins, ``(n, c)``."""
    median, spread = np.full(len(names), np.nan), np.full(len(names), np.nan)
    for i in range(len(names)):
        column = bins[:, i].astype(np.float64)
        known = column[np.isfinite(column)]
        if len(known) >= MIN_FINITE:
            low, median[i], high = np.percentile(known, [25, 50, 75])
            spread[i] = high - low
    return Reference(host_id=host_id, names=tuple(names), median=median, spread=spread, bins=len(bins))


def floors_of(x: NDArray[np.float32]) -> Floats:
    """Give each channel's smallest scale from train, ``(n, c)`` or ``(n, c, t)`` → ``(c,)``.

    It is 1 % of the channel's 5 to 95 % range, or 1 where that is 0 or nothing is known.
    """
    floors = np.ones(x.shape[1])
    for i in range(x.shape[1]):
        column = x[:, i].astype(np.float64).ravel()
        known = column[np.isfinite(column)]
        if len(known):
            low, high = np.percentile(known, [5, 95])
            floors[i] = FLOOR_SHARE * (high - low) or 1.0
    return floors


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Affine:
    """``(x − shift) / scale`` for each channel, ``(c,)`` each; `lacking` marks those that the clean day did not show."""

    shift: Floats
    scale: Floats
    lacking: NDArray[np.bool_]

    def bins(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Apply to bins, ``(n, c)`` or ``(n, c, t)``."""
        tail = (-1, *([1] * (x.ndim - 2)))
        out: NDArray[np.float32] = (
            (x.astype(np.float64) - self.shift.reshape(tail)) / self.scale.reshape(tail)
        ).astype(np.float32)
        return out

    def stats(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Apply to the five stats of each channel, ``(n, 5 c)`` channel-major: what the stats of the mapped bins are."""
        shift = (self.shift[:, None] * _SHIFTED).ravel()
        out: NDArray[np.float32] = ((x.astype(np.float64) - shift) / np.repeat(self.scale, len(STATS))).astype(
            np.float32
        )
        return out


def affine_of(reference: Reference | None, floors: Floats) -> Affine:
    """Join a host's clean day with train's floors; a channel that it lacks keeps shift 0 and its floor as scale."""
    if reference is None:
        return Affine(shift=np.zeros(len(floors)), scale=floors.copy(), lacking=np.ones(len(floors), np.bool_))
    lacking = ~np.isfinite(reference.median)
    return Affine(
        shift=np.where(lacking, 0.0, reference.median),
        scale=np.where(lacking, floors, np.maximum(np.where(lacking, 0.0, reference.spread), floors)),
        lacking=lacking,
    )


class _Channel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    median: float | None
    spread: float | None


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: str
    host_id: str
    bins: int
    channels: tuple[_Channel, ...]


def render_reference(reference: Reference) -> bytes:
    """Give the bytes of a host's file (`phasewatch commission`)."""
    rows = zip(reference.names, reference.median.tolist(), reference.spread.tolist(), strict=True)
    channels = tuple(
        _Channel(name=n, median=m, spread=s) if m == m else _Channel(name=n, median=None, spread=None)
        for n, m, s in rows
    )
    file = _File(format=FORMAT, host_id=reference.host_id, bins=reference.bins, channels=channels)
    return msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n"


def parse_reference(data: bytes, *, file: str) -> Reference:
    """Read a host's file.

    Raises:
        DataError: If it is none, or holds numbers that cannot be.
    """
    try:
        found = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise DataError(f"{file}: not a commissioning file: {exc}; make it with `phasewatch commission`") from exc
    names = tuple(c.name for c in found.channels)
    if found.format != FORMAT or len(set(names)) != len(names):
        raise DataError(f"{file}: found format {found.format!r} with {len(names)} channels, expected {FORMAT!r}")
    numbers = [(c.median, c.spread) for c in found.channels]
    if any((m is None) is not (s is None) or (s is not None and s < 0) for m, s in numbers):
        raise DataError(f"{file}: a median without its spread, or a spread below 0")
    values = np.array([[np.nan if v is None else v for v in pair] for pair in numbers], np.float64).reshape(-1, 2)
    return Reference(host_id=found.host_id, names=names, median=values[:, 0], spread=values[:, 1], bins=found.bins)
