"""The files of a run become plain values; a file that is absent or broken becomes a sentence, and the rest goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.audit.checks import Audit
from phasewatch.dataset import SplitIndex
from phasewatch.errors import RunError
from phasewatch.evaluate.rows import METRICS, Headline, Metrics
from phasewatch.split import Coverage, Fold
from phasewatch.train.predictions import PREDICTIONS, PROBABILITIES
from phasewatch.vocab import Source

LEDGER = "ledger.json"
OUTCOMES = ("accepted", "used", "degraded", "rejected", "errored")
VALIDATION, SCHEMA = "validation_v1.parquet", "feature_schema_v1.json"
MADE_BY = {
    METRICS: "evaluate",
    PREDICTIONS: "train",
    LEDGER: "validate",
    VALIDATION: "validate",
    SCHEMA: "features",
    "splits": "split",
}
PLACE = Headline()  # the recipe, threat model, table and agent that the page is about
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
    *PROBABILITIES,
)
VALIDATION_COLUMNS = ("host_id", "origin", "role", "status", "reasons", "started_wall_ns", "duration_s")
ROWS_COLUMNS = tuple(f"rows_{source}" for source in Source)  # quoted where they are there


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictions:
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
class Bundles:
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
class Stage:
    """One stage of the ledger: bundles by status, rows by what became of them."""

    name: str
    taken: int | None
    outcomes: tuple[tuple[str, int], ...]
    rows_in: int | None = None
    rows_used: int | None = None
    rows_lost: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """What the models were given, as far as the page quotes it."""

    schema_hash: str
    behaviour_fingerprint: str
    n_channels: int
    n_host_channels: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """All that a run has to say; what is None or empty was absent or broken, and `notes` says which and why."""

    metrics: Metrics | None
    predictions: Predictions | None
    bundles: Bundles | None
    stages: tuple[Stage, ...]
    folds: tuple[Fold, ...]
    schema: Schema | None
    digests: Mapping[str, str]
    notes: tuple[str, ...]
    audit: Audit | None = None
    splits: SplitIndex = field(default_factory=SplitIndex)


def parse_predictions(table: Any) -> Predictions:
    """Read the columns of an arrow table of predictions.

    Rows that no picture can show are passed over: a phase that nobody knows or that there is none of, a probability
    that is no number. The evaluation names the models that have some.

    Raises:
        RunError: If a column is absent or of another type.
    """
    _need(table, PREDICTION_COLUMNS, PREDICTIONS)
    try:
        labels = np.stack([np.asarray(table.column(name).to_numpy(), np.int64) for name in ("y_true", "y_pred")])
        heard = np.stack([np.asarray(table.column(name).to_numpy(), np.float64) for name in PROBABILITIES])
        is_phase = ((labels >= 0) & (labels < len(PROBABILITIES))).all(axis=0)
        table = table.take(np.flatnonzero(is_phase & np.isfinite(heard).all(axis=0)))

        def numbers(name: str) -> NDArray[np.int64]:
            return np.asarray(table.column(name).to_numpy(), np.int64)

        def words(name: str) -> tuple[str, ...]:
            return tuple("" if v is None else str(v) for v in table.column(name).to_pylist())

        p = [np.asarray(table.column(name).to_numpy(), np.float64) for name in PROBABILITIES]
        return Predictions(
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
        raise RunError(f"{PREDICTIONS}: {exc}; make it again with `phasewatch train RUN`") from exc


def parse_validation(table: Any) -> Bundles:
    """Count what the validator wrote.

    Raises:
        RunError: If a column is absent.
    """
    _need(table, VALIDATION_COLUMNS, VALIDATION)
    rows = table.to_pylist()
    usable = [r for r in rows if r["status"] in ("accepted", "degraded")]
    lab = [r for r in usable if r["role"] == "lab"]
    reasons = Counter((str(r["status"]), str(reason)) for r in rows for reason in r["reasons"] or ())
    starts = [(r["started_wall_ns"], r["duration_s"]) for r in usable if r["started_wall_ns"] is not None]
    span = max(s + (d or 0) * 1e9 for s, d in starts) - min(s for s, _ in starts) if starts else None
    return Bundles(
        total=len(rows),
        by_status=_counted(r["status"] for r in rows),
        by_reason=tuple((s, reason, n) for (s, reason), n in sorted(reasons.items(), key=lambda kv: (-kv[1], kv[0]))),
        by_origin=_counted(r["origin"] for r in usable),
        hosts=tuple(sorted({str(r["host_id"]) for r in lab})),
        span_days=None if span is None else span / 86_400e9,
        rows_per_s=tuple(_rates(usable)),
    )


def _rates(usable: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    for source in Source:
        own = [r for r in usable if r.get(f"rows_{source}") and r["duration_s"]]
        if own:
            yield str(source), sum(r[f"rows_{source}"] for r in own) / sum(r["duration_s"] for r in own)


def parse_schema(data: bytes) -> Schema:
    """Read what the page quotes of `feature_schema_v1.json`.

    Raises:
        RunError: If it is not that file.
    """
    try:
        raw = msgspec.json.decode(data)
        channels = raw["channels"]
        return Schema(
            schema_hash=str(raw["schema_hash"]),
            behaviour_fingerprint=str(raw["behaviour_fingerprint"]),
            n_channels=len(channels),
            n_host_channels=sum(1 for c in channels if c["trust"] == "host"),
        )
    except (msgspec.DecodeError, KeyError, TypeError) as exc:
        raise RunError(f"{SCHEMA}: {exc!r}; make it again with `phasewatch features RUN`") from exc


def parse_ledger(data: bytes) -> tuple[Stage, ...]:
    """Read `ledger.json`.

    Raises:
        RunError: If it is not that file.
    """
    try:
        raw = msgspec.json.decode(data)
        found = raw.get("stages", raw)
        return tuple(_stage(name, entry) for name, entry in found.items() if isinstance(entry, dict))
    except (msgspec.DecodeError, AttributeError, KeyError, TypeError, ValueError) as exc:
        raise RunError(f"{LEDGER}: {exc!r}; make it again with `phasewatch validate STORE --out RUN`") from exc


def _stage(name: str, entry: dict[str, Any]) -> Stage:
    lost = entry.get("rows_lost") or {}
    return Stage(
        name=name,
        taken=entry.get("in"),
        outcomes=tuple((status, int(entry[status])) for status in OUTCOMES if entry.get(status) is not None),
        rows_in=entry.get("rows_in"),
        rows_used=entry.get("rows_used"),
        rows_lost=tuple(sorted((str(reason), int(n)) for reason, n in lost.items())),
    )


def stale(metrics: Metrics, digests: Mapping[str, str]) -> tuple[str, ...]:
    """Name the inputs that have changed since the metrics were computed from them; of splits, which are many, how many."""
    changed = [n for n, digest in sorted(metrics.inputs.items()) if n in digests and digests[n] != digest]
    cuts = [name for name in changed if name.startswith("splits/")]
    others = [f"another {name} than the one" for name in changed if name not in cuts]
    if cuts:
        others.append(f"other splits ({len(cuts)}, {cuts[0]} is the first) than those")
    return tuple(
        f"{METRICS} was computed from {what} in this folder: run `phasewatch evaluate RUN` again." for what in others
    )


def coverage_of(folds: Sequence[Fold]) -> tuple[Coverage, ...]:
    """Add up the test episodes of each host × profile over the headline recipe's folds; other counts are left at 0."""
    tested: Counter[tuple[str, str]] = Counter()
    for fold in folds:
        if fold.recipe == PLACE.recipe:
            for c in fold.coverage:
                tested[c.host_id, c.profile] += c.test
    return tuple(
        Coverage(host_id=h, profile=p, train=0, val_a=0, val_b=0, test=n, embargoed=0)
        for (h, p), n in sorted(tested.items())
    )


def _counted(values: Any) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(Counter("not readable" if v is None else str(v) for v in values).items()))


def _need(table: Any, columns: Sequence[str], file: str) -> None:
    absent = [c for c in columns if c not in table.column_names]
    if absent:
        made = MADE_BY[file]
        raise RunError(f"{file}: lacks the column {', '.join(absent)}; make it again with `phasewatch {made} RUN`")
