"""The files of a run become plain values; a file that is absent or broken becomes a sentence, and the rest goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from phasewatch.splits import Fold, FoldCoverage
from phasewatch.training.predictions import PROBABILITY_COLUMNS
from phasewatch.types import BIN_NS, WINDOW_BINS, SourceKind

BUNDLE_STATUSES = ("accepted", "used", "degraded", "rejected", "errored")
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
ROW_COUNT_COLUMNS = tuple(f"rows_{source}" for source in SourceKind)  # quoted where they are there


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadlinePredictions:
    """Test windows of the headline's recipe and threat model, as columns of one length.

    Attributes:
        p: ``(n, 5)`` probabilities in the order of PHASES.
        agent: `on` where the guest agent ran, else `off`.
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
    """What the validator wrote, counted.

    Attributes:
        by_status, by_reason, by_origin: Bundles of each; a bundle counts under each of its reasons.
        hosts: Those of usable lab episodes.
        span_days: From the first usable episode's start to the last one's end; None when unknown.
        rows_per_s: Rows of each source a second, over the usable episodes that have it.
    """

    total: int
    by_status: tuple[tuple[str, int], ...]
    by_reason: tuple[tuple[str, str, int], ...]
    by_origin: tuple[tuple[str, int], ...]
    hosts: tuple[str, ...]
    span_days: float | None
    rows_per_s: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountingStage:
    """One stage of the ledger: bundles by status, rows by what became of them."""

    name: str
    bundles_in: int | None
    outcomes: tuple[tuple[str, int], ...]
    rows_in: int | None = None
    rows_used: int | None = None
    rows_lost: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaSummary:
    """What the models were given, as far as the page quotes it."""

    schema_hash: str
    behaviour_fingerprint: str
    n_channels: int
    n_host_channels: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReportData:
    """All that a run has to say; what is None or empty was absent or broken, and `notes` says which and why."""

    metrics: MetricTable | None
    predictions: HeadlinePredictions | None
    bundles: BundleCounts | None
    stages: tuple[AccountingStage, ...]
    folds: tuple[Fold, ...]
    schema: SchemaSummary | None
    digests: Mapping[str, str]
    notes: tuple[str, ...]
    audit: AuditReport | None = None
    splits: SplitIndex = field(default_factory=SplitIndex)


def parse_predictions(table: Any) -> HeadlinePredictions:
    """Read the columns of an arrow table of predictions.

    Rows that no picture can show are passed over: a phase that nobody knows or that there is none of, a probability
    that is no number. The evaluation names the models that have some.

    Raises:
        RunError: If a column is absent or of another type.
    """
    _check_columns(table, PREDICTION_COLUMNS, PREDICTIONS_FILE)
    try:
        labels = np.stack([np.asarray(table.column(name).to_numpy(), np.int64) for name in ("y_true", "y_pred")])
        heard = np.stack([np.asarray(table.column(name).to_numpy(), np.float64) for name in PROBABILITY_COLUMNS])
        is_phase = ((labels >= 0) & (labels < len(PROBABILITY_COLUMNS))).all(axis=0)
        table = table.take(np.flatnonzero(is_phase & np.isfinite(heard).all(axis=0)))

        def numbers(name: str) -> NDArray[np.int64]:
            return np.asarray(table.column(name).to_numpy(), np.int64)

        def words(name: str) -> tuple[str, ...]:
            return tuple("" if v is None else str(v) for v in table.column(name).to_pylist())

        p = [np.asarray(table.column(name).to_numpy(), np.float64) for name in PROBABILITY_COLUMNS]
        return HeadlinePredictions(
            model=words("model"),
            seed=numbers("seed"),
            agent=words("agent"),
            episode_id=words("episode_id"),
            host_id=words("host_id"),
            profile=words("profile"),
            sample_name=words("sample_name"),
            origin=words("origin"),
            t_center_ns=numbers("t_center_ns"),
            y_true=numbers("y_true"),
            y_pred=numbers("y_pred"),
            p=np.stack(p, axis=1),
        )
    except (TypeError, ValueError) as exc:
        raise RunError(f"{PREDICTIONS_FILE}: {exc}; make it again with `phasewatch train RUN`") from exc


def parse_validation(table: Any) -> BundleCounts:
    """Count what the validator wrote.

    Raises:
        RunError: If a column is absent.
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
    )


def _compute_row_rates(usable: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    for source in SourceKind:
        own = [r for r in usable if r.get(f"rows_{source}") and r["duration_s"]]
        if own:
            yield str(source), sum(r[f"rows_{source}"] for r in own) / sum(r["duration_s"] for r in own)


def parse_schema(data: bytes) -> SchemaSummary:
    """Read what the page quotes of `feature_schema_v1.json`.

    Raises:
        RunError: If it is not that file.
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
        raise RunError(f"{FEATURE_SCHEMA_FILE}: {exc!r}; make it again with `phasewatch features RUN`") from exc


def parse_accounting(data: bytes) -> tuple[AccountingStage, ...]:
    """Read `ledger.json`.

    Raises:
        RunError: If it is not that file.
    """
    try:
        raw = msgspec.json.decode(data)
        found = raw.get("stages", raw)
        return tuple(_parse_stage(name, entry) for name, entry in found.items() if isinstance(entry, dict))
    except (msgspec.DecodeError, AttributeError, KeyError, TypeError, ValueError) as exc:
        raise RunError(f"{ACCOUNTING_FILE}: {exc!r}; make it again with `phasewatch validate STORE --out RUN`") from exc


def _parse_stage(name: str, entry: dict[str, Any]) -> AccountingStage:
    lost = entry.get("rows_lost") or {}
    return AccountingStage(
        name=name,
        bundles_in=entry.get("in"),
        outcomes=tuple((status, int(entry[status])) for status in BUNDLE_STATUSES if entry.get(status) is not None),
        rows_in=entry.get("rows_in"),
        rows_used=entry.get("rows_used"),
        rows_lost=tuple(sorted((str(reason), int(n)) for reason, n in lost.items())),
    )


def find_stale_inputs(metrics: MetricTable, digests: Mapping[str, str]) -> tuple[str, ...]:
    """Name the inputs that have changed since the metrics were computed from them; of splits, which are many, how many."""
    changed = [n for n, digest in sorted(metrics.inputs.items()) if n in digests and digests[n] != digest]
    cuts = [name for name in changed if name.startswith(f"{SPLITS_DIR}/")]
    others = [f"another {name} than the one" for name in changed if name not in cuts]
    if cuts:
        others.append(f"other splits ({len(cuts)}, {cuts[0]} is the first) than those")
    return tuple(
        f"{METRICS_FILE} was computed from {what} in this folder: run `phasewatch evaluate RUN` again."
        for what in others
    )


def count_test_episodes(folds: Sequence[Fold]) -> tuple[FoldCoverage, ...]:
    """Add up the test episodes of each host × profile over the headline recipe's folds; other counts are left at 0."""
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
    absent = [c for c in columns if c not in table.column_names]
    if absent:
        made = COMMAND_BY_FILE[file]
        raise RunError(f"{file}: lacks the column {', '.join(absent)}; make it again with `phasewatch {made} RUN`")


HALF_WINDOW_S = WINDOW_BINS * BIN_NS / 2e9


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRibbon:
    """One episode chosen for a ribbon."""

    rank: str
    episode_id: str
    host_id: str
    profile: str
    sample_name: str
    windows: tuple[RibbonWindow, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadlineWindows:
    """The test windows behind the headline: one model, its first seed, agent off where such episodes exist."""

    predictions: HeadlinePredictions
    indices: NDArray[np.intp]
    seed: int
    agent_off: bool

    def count_episodes(self) -> dict[tuple[str, str], int]:
        """Count episodes of each (host, profile)."""
        p = self.predictions
        return dict(
            Counter((h, prof) for h, prof, _ in {(p.host_id[i], p.profile[i], p.episode_id[i]) for i in self.indices})
        )


def select_headline_windows(predictions: HeadlinePredictions, model: str) -> HeadlineWindows | None:
    """Take the windows that the headline rests on, or None where the model has none."""
    of_model = np.asarray([m == model for m in predictions.model], np.bool_)
    if not of_model.any():
        return None
    seeds = np.unique(predictions.seed[of_model])
    first = of_model & (predictions.seed == seeds[0])
    off = first & np.asarray([a == DEFAULT_HEADLINE.agent for a in predictions.agent], np.bool_)
    chosen = off if off.any() else first
    return HeadlineWindows(
        predictions=predictions,
        indices=np.flatnonzero(chosen),
        seed=int(seeds[0]),
        agent_off=bool(off.any()),
    )


def choose_episodes(of: HeadlineWindows) -> tuple[EpisodeRibbon, ...]:
    """Choose the best, the median and the worst episode by windows right, of those whose phase changes if there are three.

    An episode that is clean from end to end shows little; of two or one only what there is.
    """
    p = of.predictions
    by_episode: dict[str, list[int]] = {}
    for i in of.indices:
        by_episode.setdefault(p.episode_id[i], []).append(int(i))
    moving = {e: rows for e, rows in by_episode.items() if len({int(p.y_true[i]) for i in rows}) > 1}
    by_episode = moving if len(moving) >= 3 else by_episode
    ranked = sorted(by_episode, key=lambda e: (-float(np.mean(p.y_true[by_episode[e]] == p.y_pred[by_episode[e]])), e))
    places = {0: "only"} if len(ranked) == 1 else {0: "best", len(ranked) // 2: "median", len(ranked) - 1: "worst"}
    if len(ranked) == 2:
        places = {0: "better of two", 1: "worse of two"}
    return tuple(_build_ribbon(of, ranked[k], by_episode[ranked[k]], rank) for k, rank in sorted(places.items()))


def describe_origin(of: HeadlineWindows | None, bundles: BundleCounts | None) -> str:
    """Say whether the numbers come from real machines: of the test episodes, else of all usable bundles."""
    found: Sequence[tuple[str, int]] = ()
    if of is not None:
        pairs = {(of.predictions.origin[i], of.predictions.episode_id[i]) for i in of.indices}
        found = sorted(Counter(origin for origin, _ in pairs).items())
    elif bundles is not None:
        found = bundles.by_origin
    if not found:
        return "origin unknown"
    if len(found) == 1:
        return found[0][0] or "origin unknown"
    return " + ".join(f"{n} {origin or 'of unknown origin'}" for origin, n in found)


def _build_ribbon(of: HeadlineWindows, episode_id: str, rows: Sequence[int], rank: str) -> EpisodeRibbon:
    p = of.predictions
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
                t_s=(int(p.t_center_ns[i]) - start_ns) / 1e9 + HALF_WINDOW_S,
                truth=int(p.y_true[i]),
                decided=int(p.y_pred[i]),
                p=tuple(float(v) for v in p.p[i]),
            )
            for i in ordered
        ),
    )
