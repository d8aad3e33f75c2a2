"""Parse the files of a run into the plain values that the report needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.artifacts import (
    ACCOUNTING_FILE,
    FEATURE_SCHEMA_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    SPLITS_DIR,
    VALIDATION_FILE,
)
from phasewatch.audit.checks import AuditReport
from phasewatch.dataset import SplitIndex
from phasewatch.errors import RunError
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE, MetricTable
from phasewatch.report.charts import RibbonWindow
from phasewatch.report.layout import render_count
from phasewatch.splits import Fold, FoldCoverage
from phasewatch.training.predictions import PROBABILITY_COLUMNS
from phasewatch.types import WINDOW_S, SourceKind

__all__ = [
    "COMMAND_BY_FILE",
    "PREDICTION_COLUMNS",
    "ROW_COUNT_COLUMNS",
    "VALIDATION_COLUMNS",
    "AccountingStage",
    "BundleCounts",
    "EpisodeRibbon",
    "HeadlinePredictions",
    "HeadlineWindows",
    "ReportData",
    "SchemaSummary",
    "choose_episodes",
    "count_test_episodes",
    "describe_origin",
    "find_stale_inputs",
    "parse_accounting",
    "parse_predictions",
    "parse_schema",
    "parse_validation",
    "select_headline_windows",
]

_BUNDLE_STATUSES = ("accepted", "used", "degraded", "rejected", "errored")
COMMAND_BY_FILE = {
    METRICS_FILE: "evaluate",
    PREDICTIONS_FILE: "train",
    ACCOUNTING_FILE: "validate",
    VALIDATION_FILE: "validate",
    FEATURE_SCHEMA_FILE: "features",
    SPLITS_DIR: "split",
}
PREDICTION_COLUMNS = (
    "model",
    "seed",
    "agent",
    "episode_id",
    "host_id",
    "profile",
    "sample_name",
    "origin",
    "t_center_ns",
    "y_true",
    "y_pred",
    *PROBABILITY_COLUMNS,
)
VALIDATION_COLUMNS = ("host_id", "origin", "role", "status", "reasons", "started_wall_ns", "duration_s")
ROW_COUNT_COLUMNS = tuple(f"rows_{source}" for source in SourceKind)  # optional columns


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadlinePredictions:
    """Test windows of the headline's split and channel set, as columns of length n.

    Attributes:
        agent: `on` if the guest agent ran in the episode, else `off`.
        seed: ``(n,)`` int64 seed of the model.
        t_center_ns: ``(n,)`` int64 centre of the window, nanoseconds since the epoch.
        y_true, y_pred: ``(n,)`` int64 codes of the true and of the predicted phase.
        p: ``(n, 5)`` float64 probabilities in the order of PHASES.
    """

    model: Sequence[str]
    seed: NDArray[np.int64]
    agent: Sequence[str]
    episode_id: Sequence[str]
    host_id: Sequence[str]
    profile: Sequence[str]
    sample_name: Sequence[str]
    origin: Sequence[str]
    t_center_ns: NDArray[np.int64]
    y_true: NDArray[np.int64]
    y_pred: NDArray[np.int64]
    p: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleCounts:
    """Counts over the table of validated bundles.

    Attributes:
        by_status, by_reason, by_origin: Number of bundles; a bundle counts once for each of its reasons.
        hosts: Hosts of the usable lab episodes.
        span_days: Days from the start of the first usable episode to the end of the last; None if unknown.
        rows_per_s: Rows per second of each source, over the usable episodes that have the source.
        first_day, last_day: Days in UTC on which the first and the last usable episode started; empty if unknown.
        vm_hours: Total length of the usable episodes.
    """

    total: int
    by_status: tuple[tuple[str, int], ...]
    by_reason: tuple[tuple[str, str, int], ...]
    by_origin: tuple[tuple[str, int], ...]
    hosts: tuple[str, ...]
    span_days: float | None
    rows_per_s: tuple[tuple[str, float], ...] = ()
    first_day: str = ""
    last_day: str = ""
    vm_hours: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountingStage:
    """One stage of the data accounting: bundles by outcome, and rows in, used and lost."""

    name: str
    bundles_in: int | None
    outcomes: tuple[tuple[str, int], ...]
    rows_in: int | None = None
    rows_used: int | None = None
    rows_lost: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaSummary:
    """The parts of the feature schema that the report quotes."""

    schema_hash: str
    behaviour_fingerprint: str
    n_channels: int
    n_host_channels: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReportData:
    """The data of a run; missing or unreadable parts are None or empty, and `notes` gives the reasons."""

    metrics: MetricTable | None
    predictions: HeadlinePredictions | None
    bundles: BundleCounts | None
    stages: tuple[AccountingStage, ...]
    folds: tuple[Fold, ...]
    schema: SchemaSummary | None
    digests: Mapping[str, str]
    notes: tuple[str, ...]
    audit: AuditReport | None = None
    corpus: str | None = None
    splits: SplitIndex = field(default_factory=SplitIndex)


def parse_predictions(table: Any) -> HeadlinePredictions:
    """Parse an arrow table of predictions.

    Rows with an unknown or invalid phase or a non-finite probability are skipped; the evaluation lists the models that
    have such rows.

    Raises:
        RunError: If a column is missing or has another type.
    """
    _check_columns(table, PREDICTION_COLUMNS, PREDICTIONS_FILE)
    try:
        labels = np.stack([np.asarray(table.column(name).to_numpy(), np.int64) for name in ("y_true", "y_pred")])
        probabilities = np.stack(
            [np.asarray(table.column(name).to_numpy(), np.float64) for name in PROBABILITY_COLUMNS]
        )
        is_phase = ((labels >= 0) & (labels < len(PROBABILITY_COLUMNS))).all(axis=0)
        table = table.take(np.flatnonzero(is_phase & np.isfinite(probabilities).all(axis=0)))

        def numbers(name: str) -> NDArray[np.int64]:
            return np.asarray(table.column(name).to_numpy(), np.int64)

        def texts(name: str) -> tuple[str, ...]:
            return tuple("" if v is None else str(v) for v in table.column(name).to_pylist())

        p = [np.asarray(table.column(name).to_numpy(), np.float64) for name in PROBABILITY_COLUMNS]
        return HeadlinePredictions(
            model=texts("model"),
            seed=numbers("seed"),
            agent=texts("agent"),
            episode_id=texts("episode_id"),
            host_id=texts("host_id"),
            profile=texts("profile"),
            sample_name=texts("sample_name"),
            origin=texts("origin"),
            t_center_ns=numbers("t_center_ns"),
            y_true=numbers("y_true"),
            y_pred=numbers("y_pred"),
            p=np.stack(p, axis=1),
        )
    except (TypeError, ValueError) as exc:
        raise RunError(f"{PREDICTIONS_FILE}: {exc}; write it again with `phasewatch train RUN`") from exc


def parse_validation(table: Any) -> BundleCounts:
    """Count the bundles of an arrow table of validation results by status, reason and origin.

    Raises:
        RunError: If a column is missing.
    """
    _check_columns(table, VALIDATION_COLUMNS, VALIDATION_FILE)
    rows = table.to_pylist()
    usable = [r for r in rows if r["status"] in ("accepted", "degraded")]
    lab = [r for r in usable if r["role"] == "lab"]
    reasons = Counter((str(r["status"]), str(reason)) for r in rows for reason in r["reasons"] or ())
    starts = [(r["started_wall_ns"], r["duration_s"]) for r in usable if r["started_wall_ns"] is not None]
    span = max(s + (d or 0) * 1e9 for s, d in starts) - min(s for s, _ in starts) if starts else None
    return BundleCounts(
        total=len(rows),
        by_status=_count_values(r["status"] for r in rows),
        by_reason=tuple((s, reason, n) for (s, reason), n in sorted(reasons.items(), key=lambda kv: (-kv[1], kv[0]))),
        by_origin=_count_values(r["origin"] for r in usable),
        hosts=tuple(sorted({str(r["host_id"]) for r in lab})),
        span_days=None if span is None else span / 86_400e9,
        rows_per_s=tuple(_compute_row_rates(usable)),
        first_day=_render_day(min(s for s, _ in starts)) if starts else "",
        last_day=_render_day(max(s for s, _ in starts)) if starts else "",
        vm_hours=sum(r["duration_s"] or 0.0 for r in usable) / 3600,
    )


def _render_day(wall_ns: int) -> str:
    return datetime.fromtimestamp(wall_ns / 1e9, UTC).date().isoformat()


def _compute_row_rates(usable: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    for source in SourceKind:
        having = [r for r in usable if r.get(f"rows_{source}") and r["duration_s"]]
        if having:
            yield str(source), sum(r[f"rows_{source}"] for r in having) / sum(r["duration_s"] for r in having)


def parse_schema(data: bytes) -> SchemaSummary:
    """Parse the parts of `feature_schema_v2.json` that the report quotes.

    Raises:
        RunError: If the data is not a feature schema.
    """
    try:
        raw = msgspec.json.decode(data)
        channels = raw["channels"]
        return SchemaSummary(
            schema_hash=str(raw["schema_hash"]),
            behaviour_fingerprint=str(raw["behaviour_fingerprint"]),
            n_channels=len(channels),
            n_host_channels=sum(1 for c in channels if c["trust"] == "host"),
        )
    except (msgspec.DecodeError, KeyError, TypeError) as exc:
        raise RunError(f"{FEATURE_SCHEMA_FILE}: {exc!r}; write it again with `phasewatch features RUN`") from exc


def parse_accounting(data: bytes) -> tuple[AccountingStage, ...]:
    """Parse `ledger.json`, the data accounting of a run.

    Raises:
        RunError: If the data is not a data accounting file.
    """
    try:
        raw = msgspec.json.decode(data)
        stages = raw.get("stages", raw)
        return tuple(_parse_stage(name, entry) for name, entry in stages.items() if isinstance(entry, dict))
    except (msgspec.DecodeError, AttributeError, KeyError, TypeError, ValueError) as exc:
        raise RunError(
            f"{ACCOUNTING_FILE}: {exc!r}; write it again with `phasewatch validate STORE --out RUN`"
        ) from exc


def _parse_stage(name: str, entry: dict[str, Any]) -> AccountingStage:
    lost = entry.get("rows_lost") or {}
    return AccountingStage(
        name=name,
        bundles_in=entry.get("in"),
        outcomes=tuple((status, int(entry[status])) for status in _BUNDLE_STATUSES if entry.get(status) is not None),
        rows_in=entry.get("rows_in"),
        rows_used=entry.get("rows_used"),
        rows_lost=tuple(sorted((str(reason), int(n)) for reason, n in lost.items())),
    )


def find_stale_inputs(metrics: MetricTable, digests: Mapping[str, str]) -> tuple[str, ...]:
    """List the input files that changed since the metrics were computed; changed splits are counted.

    Args:
        metrics: The metrics with the digests of their inputs.
        digests: SHA-256 digests of the present files by name.

    Returns:
        One sentence per changed input.
    """
    changed = [n for n, digest in sorted(metrics.inputs.items()) if n in digests and digests[n] != digest]
    splits = [name for name in changed if name.startswith(f"{SPLITS_DIR}/")]
    stale = [f"another version of {name}" for name in changed if name not in splits]
    if splits:
        stale.append(f"other versions of {render_count(len(splits), 'split')} (first: {splits[0]})")
    return tuple(f"{METRICS_FILE} was computed from {what}: run `phasewatch evaluate RUN` again." for what in stale)


def count_test_episodes(folds: Sequence[Fold]) -> tuple[FoldCoverage, ...]:
    """Sum the test episodes of each host and profile over the folds of the headline's split; other counts are 0."""
    tested: Counter[tuple[str, str]] = Counter()
    for fold in folds:
        if fold.recipe == DEFAULT_HEADLINE.recipe:
            for c in fold.coverage:
                tested[c.host_id, c.profile] += c.test
    return tuple(
        FoldCoverage(host_id=h, profile=p, train=0, val_a=0, val_b=0, test=n, embargoed=0)
        for (h, p), n in sorted(tested.items())
    )


def _count_values(values: Any) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(Counter("not readable" if v is None else str(v) for v in values).items()))


def _check_columns(table: Any, columns: Sequence[str], file: str) -> None:
    missing = [c for c in columns if c not in table.column_names]
    if missing:
        command = COMMAND_BY_FILE[file]
        raise RunError(f"{file}: missing column {', '.join(missing)}; write it again with `phasewatch {command} RUN`")


_HALF_WINDOW_S = WINDOW_S / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRibbon:
    """One episode shown window by window; `rank` is its position by accuracy."""

    rank: str
    episode_id: str
    host_id: str
    profile: str
    sample_name: str
    windows: tuple[RibbonWindow, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadlineWindows:
    """Test windows of one model: its first seed, and episodes without the guest agent if there are any.

    Attributes:
        indices: ``(m,)`` int64 row numbers in `predictions`.
    """

    predictions: HeadlinePredictions
    indices: NDArray[np.intp]
    seed: int
    agent_off: bool

    def count_episodes(self) -> dict[tuple[str, str], int]:
        """Return the number of episodes by host and profile."""
        p = self.predictions
        return dict(
            Counter((h, prof) for h, prof, _ in {(p.host_id[i], p.profile[i], p.episode_id[i]) for i in self.indices})
        )


def select_headline_windows(predictions: HeadlinePredictions, model: str) -> HeadlineWindows | None:
    """Select the test windows of a model, or return None if it has none."""
    is_model = np.asarray([m == model for m in predictions.model], np.bool_)
    if not is_model.any():
        return None
    seeds = np.unique(predictions.seed[is_model])
    first = is_model & (predictions.seed == seeds[0])
    off = first & np.asarray([a == DEFAULT_HEADLINE.agent for a in predictions.agent], np.bool_)
    chosen = off if off.any() else first
    return HeadlineWindows(
        predictions=predictions,
        indices=np.flatnonzero(chosen),
        seed=int(seeds[0]),
        agent_off=bool(off.any()),
    )


def choose_episodes(windows: HeadlineWindows) -> tuple[EpisodeRibbon, ...]:
    """Choose the best, the median and the worst episode by accuracy.

    Only episodes with more than one phase are ranked if there are at least three of them. With fewer than three
    episodes, all are returned.
    """
    p = windows.predictions
    by_episode: dict[str, list[int]] = {}
    for i in windows.indices:
        by_episode.setdefault(p.episode_id[i], []).append(int(i))
    changing = {e: rows for e, rows in by_episode.items() if len({int(p.y_true[i]) for i in rows}) > 1}
    by_episode = changing if len(changing) >= 3 else by_episode
    ranked = sorted(by_episode, key=lambda e: (-float(np.mean(p.y_true[by_episode[e]] == p.y_pred[by_episode[e]])), e))
    ranks = {0: "only"} if len(ranked) == 1 else {0: "best", len(ranked) // 2: "median", len(ranked) - 1: "worst"}
    if len(ranked) == 2:
        ranks = {0: "better of two", 1: "worse of two"}
    return tuple(_build_ribbon(windows, ranked[k], by_episode[ranked[k]], rank) for k, rank in sorted(ranks.items()))


def describe_origin(windows: HeadlineWindows | None, bundles: BundleCounts | None) -> str:
    """Render the origin (recorded or simulated) of the test episodes; without any, of all usable bundles."""
    counts: Sequence[tuple[str, int]] = ()
    if windows is not None:
        p = windows.predictions
        pairs = {(p.origin[i], p.episode_id[i]) for i in windows.indices}
        counts = sorted(Counter(origin for origin, _ in pairs).items())
    elif bundles is not None:
        counts = bundles.by_origin
    if not counts:
        return "origin unknown"
    if len(counts) == 1:
        return counts[0][0] or "origin unknown"
    return " + ".join(f"{n} {origin or 'of unknown origin'}" for origin, n in counts)


def _build_ribbon(windows: HeadlineWindows, episode_id: str, rows: Sequence[int], rank: str) -> EpisodeRibbon:
    p = windows.predictions
    ordered = sorted(rows, key=lambda i: int(p.t_center_ns[i]))
    start_ns = int(p.t_center_ns[ordered[0]])
    return EpisodeRibbon(
        rank=rank,
        episode_id=episode_id,
        host_id=p.host_id[ordered[0]],
        profile=p.profile[ordered[0]],
        sample_name=p.sample_name[ordered[0]],
        windows=tuple(
            RibbonWindow(
                t_s=(int(p.t_center_ns[i]) - start_ns) / 1e9 + _HALF_WINDOW_S,
                truth=int(p.y_true[i]),
                decided=int(p.y_pred[i]),
                p=tuple(float(v) for v in p.p[i]),
            )
            for i in ordered
        ),
    )
