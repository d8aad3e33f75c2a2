"""A swept run's grids become the windows that the leak checks ask, and the answers checks of the audit."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import numpy as np

from phasewatch.audit.checks import REPORTED, Check, Fate, judge, untested
from phasewatch.audit.leaks import Leak, Windows, find_leaks
from phasewatch.channels import LEVELS, mask_of
from phasewatch.errors import RunError
from phasewatch.features.schema import feature_names
from phasewatch.features.stats import STATS
from phasewatch.features.tables import windows_of
from phasewatch.grid.files import GridRow, Grids, open_grids
from phasewatch.validate.index import INDEX, read_index
from phasewatch.validate.verdict import USABLE
from phasewatch.vocab import BIN_NS, STRIDE_BINS, WINDOW_BINS, SampleKind

PREFIX = "leak-"
THREAT = "realistic"
MOST_EPISODES = 600  # of a larger store a sample by session is asked: the questions need no more
_IDLE = "idle"


def read_windows(run: Path) -> Windows:
    """Read the windows of a swept run's usable episodes, of a large store's those of a sample.

    Raises:
        RunError: If it has no verdicts or no grids, or not one usable window.
    """
    usable = {(v.host_id, v.episode_id) for v in read_index(run / INDEX) if v.status in USABLE}
    grids = open_grids(run / "grids")
    return gather(grids, _sampled([row for row in grids.rows if (row.host_id, row.episode_id) in usable]))


def _sampled(rows: list[GridRow]) -> list[GridRow]:
    if len(rows) <= MOST_EPISODES:
        return rows
    by_hash = sorted(rows, key=lambda row: (sha256(row.session.encode()).digest(), row.episode_id))
    kept = {row.session for row in by_hash[:MOST_EPISODES]}
    return [row for row in rows if row.session in kept]


def gather(grids: Grids, rows: list[GridRow]) -> Windows:
    """Cut episodes into windows of known phase.

    Raises:
        RunError: If there is not one.
    """
    known = np.repeat(mask_of(THREAT), len(STATS))
    x, levels, y, t_s, t_ns, of = [], [], [], [], [], []
    kept: list[GridRow] = []
    for row in rows:
        table = windows_of(row, np.asarray(grids.bins_of(row)))
        is_known = table.phase >= 0
        if not is_known.any():
            continue
        x.append(table.stats[is_known][:, known])
        levels.append(_means(np.asarray(grids.levels_of(row)), len(table.phase))[is_known])
        y.append(table.phase[is_known].astype(np.int64))
        t_s.append(table.center_s[is_known].astype(np.float64))
        t_ns.append(table.center_ns[is_known])
        of.append(np.full(int(is_known.sum()), len(kept), np.int64))
        kept.append(row)
    if not kept:
        raise RunError("no usable episode of this run has a window of known phase; there is nothing to ask for leaks")
    return Windows(
        x=np.concatenate(x), levels=np.concatenate(levels), y=np.concatenate(y), t_s=np.concatenate(t_s),
        t_ns=np.concatenate(t_ns), of=np.concatenate(of),
        names=tuple(name for name, is_in in zip(feature_names(), known, strict=True) if is_in),
        host=np.array([row.host_id for row in kept]),
        session=np.array([f"{row.host_id}/{row.session}" for row in kept]),
        profile=np.array([row.profile for row in kept]),
        role=np.array([str(row.role) for row in kept]),
        is_idle=np.array([row.sample_kind is SampleKind.BENIGN and row.sample_name == _IDLE for row in kept]),
        length_s=np.array([row.n_bins * BIN_NS / 1e9 for row in kept]),
    )  # fmt: skip


def _means(levels: np.ndarray, w: int) -> np.ndarray:
    """Give the mean of each level over each window, ``(w, l)``; NaN where it was never known."""
    total, count = np.zeros((w, len(LEVELS))), np.zeros((w, len(LEVELS)))
    for row in range(WINDOW_BINS):
        part = levels[row : row + STRIDE_BINS * w : STRIDE_BINS][:w]
        is_known = np.isfinite(part)
        total += np.where(is_known, part, 0.0)
        count += is_known
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0).astype(np.float32)


def check_leaks(run: Path) -> tuple[Check, ...]:
    """Make a check of every question; one without a limit is kept whatever its figure, which stands in its words."""
    try:
        leaks = find_leaks(read_windows(run))
    except RunError as exc:
        return (untested(f"{PREFIX}checks", "Nothing but the telemetry tells the phase.", str(exc)),)
    return tuple(_check(leak) for leak in leaks)


def _check(leak: Leak) -> Check:
    name, asked = PREFIX + leak.name, leak.question
    if np.isnan(leak.value):
        return untested(name, asked, leak.words)
    chance = f", chance {leak.chance:.2f}" if leak.chance is not None else ""
    found = f"{leak.value:.2f} {leak.unit}{chance}; {leak.words}"
    if leak.limit is None:
        return Check(name=name, promise=f"{asked} {REPORTED}", fate=Fate.KEPT, words=found)
    promise = f"{asked} At most {leak.limit:.2f}."
    return judge(name, promise, [found] if leak.is_over else [], looked_at=found)
