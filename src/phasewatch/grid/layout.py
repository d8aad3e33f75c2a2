"""Which raw fields make which columns of the grid: the channel tables, sorted for the binner once instead of per episode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import CHANNELS, LEVELS, ChannelSpec, raw_fields
from phasewatch.grid.ranges import Range, channel_range
from phasewatch.vocab import Kind, Source

_ORDER = (Kind.RATE, Kind.DELTA, Kind.RATIO, Kind.GAUGE, Kind.COUNT)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unit:
    """One column to be made: its place among all columns (levels after channels), kind, raw columns, scale and range.

    Compared by identity: the standard ones are made once, and hashing a few hundred per episode would cost.
    """

    row: int
    kind: Kind
    columns: tuple[int, ...]
    scale: float
    is_float: bool
    range: Range


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """Columns of one kind and number type that are computed together.

    Attributes:
        kind: Of all of them.
        start, stop: Their rows in the group's result.
        columns: Raw columns, one tuple for each field of the kind (two for a ratio).
        scales: ``(k, 1)`` float64.
    """

    kind: Kind
    start: int
    stop: int
    columns: tuple[tuple[int, ...], ...]
    scales: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Columns of one source that share their readings.

    Attributes:
        blocks: The work, kind by kind.
        rows: ``(k,)`` place of each result row among all columns.
        n_spanning: How many of the rows span from reading to reading (rates, changes, ratios); these come first.
        least, most: ``(k, 1)`` float64: a value outside of them is no measurement.
    """

    blocks: tuple[Block, ...]
    rows: NDArray[np.intp]
    n_spanning: int
    least: NDArray[np.float64]
    most: NDArray[np.float64]


def units_of(source: Source, tables: Sequence[Sequence[ChannelSpec]]) -> tuple[Unit, ...]:
    """Give the units of one source, over the tables laid end to end."""
    raw = {spec.field: (i, spec.type == "float") for i, spec in enumerate(raw_fields(source))}
    return tuple(
        Unit(
            row=row,
            kind=channel.kind,
            columns=tuple(raw[field][0] for field in channel.fields),
            scale=channel.scale,
            is_float=any(raw[field][1] for field in channel.fields),
            range=channel_range(channel),
        )
        for row, channel in enumerate(channel for table in tables for channel in table)
        if channel.source is source
    )


@cache
def standard_units(source: Source) -> tuple[Unit, ...]:
    """Give the units of one source for the registered channels and levels."""
    return units_of(source, (CHANNELS, LEVELS))


@cache
def standard_group(source: Source) -> Group:
    """Give the group of a source whose every field is there in every row."""
    return group_of(standard_units(source))


@lru_cache(maxsize=256)
def group_of(units: tuple[Unit, ...]) -> Group:
    """Sort units that share their readings into blocks."""
    ordered = sorted(units, key=lambda u: (_ORDER.index(u.kind), u.is_float))
    blocks: list[Block] = []
    start = 0
    while start < len(ordered):
        head = ordered[start]
        same = [u for u in ordered if u.kind is head.kind and u.is_float == head.is_float]
        blocks.append(
            Block(
                kind=head.kind,
                start=start,
                stop=start + len(same),
                columns=tuple(zip(*(u.columns for u in same), strict=True)),
                scales=np.array([[u.scale] for u in same]),
            )
        )
        start += len(same)
    return Group(
        blocks=tuple(blocks),
        rows=np.array([u.row for u in ordered], np.intp),
        n_spanning=sum(u.kind in _ORDER[:3] for u in ordered),
        least=np.array([[u.range[0]] for u in ordered]),
        most=np.array([[u.range[1]] for u in ordered]),
    )
