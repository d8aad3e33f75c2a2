"""Score recorded episodes, labelled or not, with any checkpoint, run or edge bundle: bundles in, one table out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch import atomic
from phasewatch.errors import BundleError, MismatchError, StoreError, UsageError
from phasewatch.features.windows import MIXED, label_windows, spans_of, window_flags, window_starts
from phasewatch.live.models import Candidate
from phasewatch.live.scorer import Scorer, channels_of
from phasewatch.live.tracker import Decision, Judge
from phasewatch.models.base import Table
from phasewatch.models.filter import NONE, PHASE
from phasewatch.store.base import Place, Store, StoreItem, check_store, find_bundle, open_store
from phasewatch.store.disk import SUFFIX
from phasewatch.train.predictions import PROBABILITIES
from phasewatch.validate.verdict import Examined, examine
from phasewatch.validate.verdict import Place as Where
from phasewatch.vocab import BIN_NS, WINDOW_BINS

PART = "predict"
_TEXT = (
    "threat", "model", "table", "filter", "part", "role", "agent", "episode_id", "session", "host_id", "profile",
    "sample_name", "sample_kind", "origin",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What was scored.

    Attributes:
        silent: Windows of which the model's channels knew nothing: nothing is said of them.
        failed: Bundles that could not be used, each with the reason.
        alarms: Alarms raised.
    """

    path: Path
    model: str
    threat: str
    episodes: int
    windows: int
    silent: int
    alarms: int
    failed: tuple[tuple[str, str], ...]


def choose_offline(candidates: Sequence[Candidate], threat: str = "") -> Scorer:
    """Load the model with the largest mask, or that of a named one; a recording may hold the guest's word, too.

    Raises:
        UsageError: If there is no model for that mask.
    """
    fits = [c for c in candidates if not threat or c.threat == threat]
    if not fits:
        there = ", ".join(sorted({c.threat for c in candidates}))
        raise UsageError(f"--threat {threat}: the model is there for {there}")
    plain = [c for c in fits if c.spec.table is not Table.COMMISSIONED]
    if not plain:
        raise MismatchError(
            f"{fits[0].where}: learnt from numbers of each host's clean day; predict takes models of raw numbers"
        )
    return min(plain, key=lambda c: (-len(channels_of(c.spec)), c.model != "gbt", c.seed)).scorer()


def predict(
    source: Place, scorer: Scorer, out: Path, *, tell: Callable[[str, int, int], None] | None = None
) -> Predicted:
    """Score every usable bundle of a store, or one bundle, and write the table whole.

    Args:
        source: A store, or one ``.tar.zst``, as a path or a URI.
        scorer: From `choose_offline`.
        out: Where the parquet goes.
        tell: Called as (path, how many, of how many).

    Returns:
        Counts. A bundle that cannot be used is named in `failed` and loses nothing else.

    Raises:
        UsageError: If `out` is called anything but ``.parquet``.
        StoreError: If there is nothing at all to score.
    """
    import pyarrow.parquet as pq

    if out.suffix != ".parquet":
        raise UsageError(f"--out {out}: the table is a parquet file; name it X.parquet")
    store, items = _items(source)
    failed: list[tuple[str, str]] = []
    episodes = windows = silent = alarms = 0
    atomic.make_folder(out.absolute().parent)
    with atomic.writer(out.absolute()) as file:
        with pq.ParquetWriter(
            file, schema(), compression="zstd", compression_level=1, use_dictionary=list(_TEXT)
        ) as table:
            for number, item in enumerate(items, 1):
                try:
                    found = _examine(store, item)
                except BundleError as exc:
                    failed.append((item.path, str(exc)))
                    continue
                finally:
                    if tell is not None:
                        tell(item.path, number, len(items))
                if found.episode is None or found.grid is None:
                    failed.append((item.path, found.verdict.detail))
                    continue
                said, of = judge(found, scorer)
                episodes, windows, silent = episodes + 1, windows + len(said), silent + of - len(said)
                alarms += sum(d.raised for d in said)
                for name, beliefs in ((NONE, False), (PHASE, True)):
                    if said and (not beliefs or scorer.filter is not None):
                        table.write_table(_rows(found, scorer, said, name, beliefs=beliefs))
    return Predicted(
        path=out, model=scorer.model, threat=scorer.threat, episodes=episodes, windows=windows, silent=silent,
        alarms=alarms, failed=tuple(failed),
    )  # fmt: skip


def judge(found: Examined, scorer: Scorer) -> tuple[list[Decision], int]:
    """Decide on every window of an episode as the watcher would; gives the decisions, and how many windows there are."""
    if found.episode is None or found.grid is None:
        return [], 0
    bins = found.grid.bins
    p, known = scorer.probabilities(bins), scorer.known(bins)
    flags = window_flags(found.grid.flags, np.zeros(len(p), np.bool_))
    starts = window_starts(found.episode.t0_ns, len(p))
    one = Judge(scorer)
    return [
        one.decide(j, int(starts[j]), p[j], known=float(known[j]), flags=int(flags[j])) for j in range(len(p)) if known[j] > 0.0
    ], len(p)  # fmt: skip


def schema() -> Any:
    """Give the columns: those of a run's predictions, what share of the model's readings was known, and the alarm."""
    import pyarrow as pa

    return pa.schema(
        [(name, pa.string()) for name in _TEXT]
        + [("seed", pa.int64()), ("t_center_ns", pa.int64()), ("purity", pa.float32()), ("flags", pa.uint8())]
        + [("y_true", pa.int8()), ("y_pred", pa.int8())]
        + [(name, pa.float32()) for name in PROBABILITIES]
        + [("known", pa.float32()), ("alarm", pa.bool_())]
    )


def _items(source: Place) -> tuple[Store, tuple[StoreItem, ...]]:
    if found := find_bundle(source):
        return found[0], (found[1],)
    if str(source).endswith(SUFFIX) and not (isinstance(source, Path) and source.is_dir()):
        raise StoreError(
            f"{source}: there is no such bundle; name a store, or one <host_id>/<episode_id>{SUFFIX} of it"
        )
    store = open_store(source)
    check_store(source)
    return store, tuple(store.walk())


def _examine(store: Store, item: StoreItem) -> Examined:
    place = Where(path=item.path, host_id=item.host_id, episode_id=item.episode_id, receipt=item.receipt)
    return examine(store.read(item), place)


def _rows(found: Examined, scorer: Scorer, said: Sequence[Decision], name: str, *, beliefs: bool) -> Any:
    import pyarrow as pa

    if found.episode is None:
        raise ValueError("an episode that could not be read has no rows")
    m = found.episode.manifest
    labels = label_windows(spans_of(found.episode.marks), np.array([d.t_start_ns for d in said], np.int64))
    p = np.array([d.belief if beliefs else d.p for d in said], np.float64).astype(np.float32)
    texts = {
        "threat": scorer.threat, "model": scorer.model, "table": str(scorer.spec.table), "filter": name, "part": PART,
        "role": str(m.role), "agent": "on" if m.agent else "off", "episode_id": m.episode_id, "session": m.session,
        "host_id": m.host.host_id, "profile": m.profile, "sample_name": m.sample_name,
        "sample_kind": str(m.sample_kind), "origin": str(m.origin),
    }  # fmt: skip
    columns: dict[str, Any] = {key: pa.array([value] * len(said), pa.string()) for key, value in texts.items()}
    columns |= {
        "seed": pa.array([scorer.seed] * len(said), pa.int64()),
        "t_center_ns": pa.array([d.t_start_ns + WINDOW_BINS * BIN_NS // 2 for d in said], pa.int64()),
        "purity": pa.array(labels.purity),
        # A watcher knows no labels; here they are, and the rows are read beside those of a run.
        "flags": pa.array(
            np.array([d.flags for d in said], np.uint8) | np.where(labels.is_mixed, MIXED, 0).astype(np.uint8)
        ),
        "y_true": pa.array(labels.phase),
        "y_pred": pa.array(p.argmax(axis=1).astype(np.int8)),
        "known": pa.array([d.known for d in said], pa.float32()),
        "alarm": pa.array([d.alarm if beliefs == (scorer.filter is not None) else None for d in said], pa.bool_()),
    }
    columns |= {column: pa.array(_column(p, i)) for i, column in enumerate(PROBABILITIES)}
    return pa.table({key: columns[key] for key in schema().names}, schema=schema())


def _column(p: NDArray[np.float32], i: int) -> NDArray[np.float32]:
    return np.ascontiguousarray(p[:, i])
