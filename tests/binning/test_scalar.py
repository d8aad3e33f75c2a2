"""A bin from one new reading has the bits of the same bin from arrays."""

from __future__ import annotations

import random

import numpy as np
import pytest

from phasewatch.binning import stream
from phasewatch.binning.stream import StreamBinner
from phasewatch.channels import list_raw_fields
from phasewatch.types import SourceKind

STEP_NS = 500_000_000


def build_rows(source: SourceKind, n: int, seed: int) -> list[tuple[int | float | None, ...]]:
    """Build readings with unknown values, falling counters, lost ticks, steps of the clock and huge numbers."""
    rng, rows, t_ns = random.Random(seed), [], 250_000_000
    specs = list_raw_fields(source)
    values: list[int | float] = [0] * len(specs)
    for seq in range(n):
        for at, spec in enumerate(specs):
            values[at] = rng.random() if spec.type == "float" else int(values[at]) + rng.choice((0, 3, 10**6, 10**13))
            if rng.random() < 0.02:
                values[at] = rng.choice((0, 2**62, -(2**62)))
        row = [None if rng.random() < 0.1 else value for value in values]
        rows.append((t_ns, t_ns + rng.choice((0, 0, 0, 7, -(10**9))), seq, *row))
        t_ns += STEP_NS * rng.choice((1, 1, 1, 1, 1, 0, 2, 7)) + rng.randrange(1000)
    return rows


def close_all(source: SourceKind, rows: list[tuple[int | float | None, ...]]) -> np.ndarray:
    binner = StreamBinner(0)
    for row in rows:
        binner.add(source, row)
    return np.array([closed.values for closed in binner.close_until(int(rows[-1][0] or 0) + 10 * STEP_NS)])


@pytest.mark.parametrize("source", [SourceKind.PROC, SourceKind.NETFLOW, SourceKind.QMP])
@pytest.mark.parametrize("seed", range(4))
def test_both_ways_give_the_same_bits(source: SourceKind, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = build_rows(source, 60, seed)
    scalar = close_all(source, rows)
    monkeypatch.setattr(stream, "fill_from_one_reading", lambda *_, **__: None)

    arrays = close_all(source, rows)

    assert np.isfinite(arrays).any()
    assert np.array_equal(scalar.view(np.uint32), arrays.view(np.uint32))
