"""Odd episodes for the oracle, drawn by hypothesis: jitter, gaps, resets, nulls, missing sources, wrong clocks, big
counters."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from tests.factories.bundles import BOOT0, MONO0, T0, S, bare, with_clocks

from phasewatch.bundle.model import Episode, SourceRows
from phasewatch.channels import list_raw_fields
from phasewatch.types import ClockBase, SourceKind

MS = 1_000_000
# Steps between readings in ms: the ordinary, equal stamps, a step back, just at and around the 2.5 s that make a gap.
STEPS_MS = st.sampled_from([500, 500, 500, 480, 530, 100, 1000, 0, -300, 2400, 2500, 2501, 3100, 6000])
STARTS = (0, 1, 2**53 - 3, 2**62, 2**63 - 4_000)


@st.composite
def source_rows(draw: st.DrawFn, source: SourceKind) -> SourceRows:
    """Draw the readings of one source."""
    steps = draw(st.lists(STEPS_MS, min_size=0, max_size=45))
    at_ms = [draw(st.integers(-4000, 3000))]
    for step in steps:
        at_ms.append(at_ms[-1] + step)
    rng = random.Random(draw(st.integers(0, 2**32)))
    mono_ms = list(at_ms)
    if draw(st.booleans()):  # stamps taken a moment apart, and a clock that steps once
        moved = draw(st.sampled_from([0, 240, 260, -700, 5000]))
        middle = rng.randrange(len(at_ms))
        mono_ms = [t + rng.randrange(-3, 4) for t in at_ms]
        at_ms = [t + moved if i >= middle else t for i, t in enumerate(at_ms)]
    order = sorted(range(len(at_ms)), key=lambda i: rng.random()) if draw(st.booleans()) else range(len(at_ms))
    n = len(at_ms)
    p_null, p_reset = draw(st.sampled_from([(0, 0), (0, 0), (0.2, 0), (0, 0.1), (0.5, 0.05)]))
    columns, present = [], np.ones((n, len(list_raw_fields(source))), np.bool_)
    shared = [rng.random() >= p_null for _ in range(n)]
    for f, spec in enumerate(list_raw_fields(source)):
        if spec.type == "float":
            columns.append(np.array([rng.choice([0.0, 0.1, 0.3, 1e-30, 1e300, rng.random()]) for _ in range(n)]))
        elif spec.nature == "counter":
            count, counts = rng.choice(STARTS), []
            for _ in range(n):
                count = (
                    rng.randrange(100)
                    if rng.random() < p_reset
                    else min(count + rng.choice([0, 0, 1, 3, 77]), 2**63 - 1)
                )
                counts.append(count)
            columns.append(np.array(counts, np.int64))
        else:
            columns.append(np.array([rng.choice([0, 5, rng.randrange(2**40)]) for _ in range(n)], np.int64))
        kind = rng.random()
        if kind < 0.3:
            present[:, f] = shared
        elif kind < 0.6:
            present[:, f] = [rng.random() >= p_null for _ in range(n)]
    rows = SourceRows(
        source=source,
        fields=tuple(spec.field for spec in list_raw_fields(source)),
        t_wall_ns=np.array([T0 + t * MS for t in at_ms], np.int64),
        t_mono_ns=np.array([MONO0 + t * MS for t in mono_ms], np.int64),
        seq=np.arange(n, dtype=np.int64),
        columns=tuple(columns),
        present=present,
    )
    picked = np.array(list(order), np.intp)
    return replace(
        rows,
        t_wall_ns=rows.t_wall_ns[picked],
        t_mono_ns=rows.t_mono_ns[picked],
        seq=rows.seq[picked],
        columns=tuple(c[picked] for c in rows.columns),
        present=rows.present[picked],
    )


@st.composite
def episodes(draw: st.DrawFn) -> Episode:
    """Draw an episode of 1 to 26 s."""
    sources = draw(st.sets(st.sampled_from(list(SourceKind)), min_size=0, max_size=4))
    phases = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["clean", "armed", "infecting", "active", "dormant", "unknown"]),
                st.sampled_from([0.5, 1.0, 2.5, 5.0, 2.123456789]),
            ),
            min_size=2,
            max_size=8,
        )
    )
    whole = bare(*[draw(source_rows(source)) for source in sorted(sources)], phases=phases)
    pairs = {
        ClockBase.MONOTONIC: ((MONO0, T0), (MONO0 + 3600 * S, T0 + 3600 * S + 12_345)),
        ClockBase.BOOTTIME: ((BOOT0, T0), (BOOT0 + 3600 * S, T0 + 3600 * S - 54_321)),
    }
    base, rows = {}, dict(whole.rows)
    for source in whole.rows:
        stamped = draw(st.sampled_from(["unix"] * 6 + ["monotonic", "boottime", "nonsense"]))
        declared = draw(st.sampled_from(["as it is", "unix", "guest"])) if stamped != "unix" else "as it is"
        by = {"unix": 0, "monotonic": MONO0 - T0, "boottime": BOOT0 - T0, "nonsense": 10**12 - T0}[stamped]
        rows[source] = replace(rows[source], t_wall_ns=rows[source].t_wall_ns + by)
        names = {"as it is": "unix" if stamped == "nonsense" else stamped}
        base[source] = ClockBase(names.get(declared, declared))
    return replace(with_clocks(whole, base=base, pairs=pairs), rows=rows)
