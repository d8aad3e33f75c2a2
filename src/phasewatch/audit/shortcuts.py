"""Numbers that show whether a model learnt a shortcut of the corpus: how long a load lasts, or whether one runs.

Every interval is a session bootstrap within hosts (ADR 16), and every difference is paired: both sides are computed on
the same resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from phasewatch import metrics
from phasewatch.arrays import FloatArray
from phasewatch.audit.checks import IDLE_CLEAN_METRIC, AuditRow, AuditSubject, LimitKind
from phasewatch.evaluation import bootstrap
from phasewatch.types import Phase

__all__ = [
    "MAX_AUC_DROP",
    "MAX_RECALL_DROP",
    "MIN_IDLE_CLEAN",
    "MIN_IDLE_QUIET",
    "AnsweredWindows",
    "SpliceGroup",
    "Stratum",
    "compute_auc",
    "measure_idle",
    "measure_load_gaps",
    "measure_splices",
]

MAX_AUC_DROP = 0.05  # of p(active), real against counterfactual durations
MAX_RECALL_DROP = 0.10  # of active, real against long activity
MIN_IDLE_QUIET, MIN_IDLE_CLEAN = 0.95, 0.85
_N_RESAMPLES = 2_000
_ACTIVE, _CLEAN = Phase.ACTIVE.code, Phase.CLEAN.code
_LOUD = (Phase.INFECTING.code, Phase.ACTIVE.code)


class SpliceGroup(StrEnum):
    """The windows that the splice check compares."""

    REAL_ACTIVITY = "real_activity"
    REAL_LOAD = "real_load"
    SHORT_ACTIVITY = "short_activity"
    SHORT_LOAD = "short_load"
    LONG_ACTIVITY = "long_activity"


class Stratum(StrEnum):
    """Whether a benign load ran during a window."""

    WITH_LOAD = "with_load"
    WITHOUT_LOAD = "without_load"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AnsweredWindows:
    """Windows with a model's output; every array is ``(n, ...)``.

    Attributes:
        host, session, episode: Host, session and episode of each window, text.
        y: ``(n,)`` int64 phase codes.
        p: ``(n, 5)`` probabilities.
        group: ``(n,)`` text by which windows are compared: a `SpliceGroup` or a `Stratum`; empty for none.
    """

    host: NDArray[np.object_]
    session: NDArray[np.object_]
    episode: NDArray[np.object_]
    y: NDArray[np.int64]
    p: FloatArray
    group: NDArray[np.object_]

    def __len__(self) -> int:
        return len(self.y)

    @property
    def decided(self) -> NDArray[np.int64]:
        """``(n,)`` the most probable phase of each window; ties go to the lower code."""
        code: NDArray[np.int64] = self.p.argmax(axis=1)
        return code

    def select(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> AnsweredWindows:
        """Return the windows that a boolean mask or indices select."""
        return AnsweredWindows(**{name: getattr(self, name)[rows] for name in self.__slots__})

    @classmethod
    def concatenate(cls, parts: Sequence[AnsweredWindows]) -> AnsweredWindows:
        """Concatenate windows; at least one part."""
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Resamples:
    """The sessions of some windows, and the resamples of them.

    Attributes:
        weights: ``(B, C)`` float64 how often each resample drew each session; the first row is all ones, the windows
            as they are. Only that row exists where there can be no interval.
        note: Why there is no interval; None where there is one.
    """

    clusters: bootstrap.SessionClusters
    weights: FloatArray
    tail_share: float
    note: str | None
    counts: Mapping[str, int]

    @classmethod
    def draw(cls, windows: AnsweredWindows, classes: Sequence[int]) -> _Resamples:
        clusters = bootstrap.build_clusters(windows.host.tolist(), windows.session.tolist())
        sessions, hosts = len(clusters), len(np.unique(clusters.host_index))
        missing = bootstrap.explain_missing_interval(sessions, hosts)
        drawn = None
        if missing is None:
            drawn = bootstrap.draw_weights(clusters, windows.y, classes=classes, resamples=_N_RESAMPLES, seed=0)
        whole = np.ones((1, sessions))
        note = None if drawn is not None else "almost no resample keeps each class"
        return cls(
            clusters=clusters,
            weights=whole if drawn is None else np.concatenate([whole, drawn.counts.astype(np.float64)]),
            tail_share=bootstrap.compute_tail_share(sessions, hosts) if drawn is not None else 0.0,
            note=missing.text if missing is not None else note,
            counts={
                "n_windows": len(windows),
                "n_episodes": len(np.unique(windows.episode.astype(str))),
                "n_sessions": sessions,
                "n_hosts": hosts,
            },
        )

    def sum(self, columns: FloatArray) -> FloatArray:
        """Sum ``(n, m)`` columns of the windows over each resample, ``(B, m)``."""
        total: FloatArray = self.weights @ bootstrap.sum_by_cluster(self.clusters, columns)
        return total

    def share(self, hits: NDArray[np.bool_], of: NDArray[np.bool_]) -> FloatArray:
        """Compute the share of hits among the windows marked in `of`, for each resample, ``(B,)``; NaN without any."""
        total = self.sum(np.column_stack([hits & of, of]).astype(np.float64))
        return _divide(total[:, 0], total[:, 1])

    def auc(self, score: FloatArray, positive: NDArray[np.bool_], negative: NDArray[np.bool_]) -> FloatArray:
        """Compute the area under the ROC curve for each resample, ``(B,)``; see `compute_auc`."""
        wins = _count_wins(score, positive, negative, self.clusters)
        sizes = self.sum(np.column_stack([positive, negative]).astype(np.float64))
        return _divide(((self.weights @ wins) * self.weights).sum(axis=1), sizes[:, 0] * sizes[:, 1])

    def build_row(
        self,
        subject: AuditSubject,
        draws: FloatArray,
        *,
        metric: str,
        is_headline: bool,
        limit: float | None = None,
        limit_kind: LimitKind | None = None,
        compared_to: str | None = None,
        stratum: str | None = None,
    ) -> AuditRow:
        """Build the row of a number from its ``(B,)`` values; the first is that of the windows as they are."""
        value, drawn = float(draws[0]), draws[1:][np.isfinite(draws[1:])]
        low, high, note = None, None, self.note
        if note is None and 2 * len(drawn) < len(draws):
            note = "most resamples lose one side of the comparison"
        if note is None:
            low, high = bootstrap.compute_interval(drawn, self.tail_share)
        if np.isnan(value):
            note = "no window of one side"
        return AuditRow(
            metric=metric,
            recipe=subject.recipe,
            channel_set=subject.channel_set,
            model=subject.model,
            input=subject.input,
            is_headline=is_headline,
            compared_to=compared_to,
            stratum=stratum,
            value=None if np.isnan(value) else value,
            low=low,
            high=high,
            limit=limit,
            limit_kind=limit_kind,
            holds=_judge(value, low, limit, limit_kind),
            note=note,
            **self.counts,
        )


def _judge(value: float, low: float | None, limit: float | None, kind: LimitKind | None) -> bool | None:
    """Return whether a limit is kept; None without one, or where the data cannot say.

    A difference breaks an upper limit only if it also is above 0 beyond doubt: its interval excludes 0.
    """
    if kind is None or limit is None or np.isnan(value):
        return None
    if kind is LimitKind.AT_LEAST:
        return value >= limit
    if kind is LimitKind.ABOVE:
        return None if low is None else low > limit
    if value <= limit:
        return True
    return None if low is None else low <= 0.0


def _divide(a: FloatArray, b: FloatArray) -> FloatArray:
    ratio: FloatArray = np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)
    return ratio


def compute_auc(score: FloatArray, positive: NDArray[np.bool_], negative: NDArray[np.bool_]) -> float:
    """Compute the area under the ROC curve: the share of pairs in which the positive window scores higher.

    Args:
        score: ``(n,)``; a tie counts one half.
        positive, negative: ``(n,)`` the windows of the two sides.

    Returns:
        A number in [0, 1]; NaN if a side is empty.

    Source: Mann and Whitney 1947.
    """
    one = bootstrap.SessionClusters(cluster_index=np.zeros(len(score), np.int64), host_index=np.zeros(1, np.int64))
    pairs = float(positive.sum()) * float(negative.sum())
    return float(_count_wins(score, positive, negative, one)[0, 0]) / pairs if pairs else float("nan")


def _count_wins(
    score: FloatArray, positive: NDArray[np.bool_], negative: NDArray[np.bool_], clusters: bootstrap.SessionClusters
) -> FloatArray:
    """Count the pairs that positives of each session win against negatives of each session, ``(C, C)``; ties half."""
    size = len(clusters)
    ours, own = score[positive], clusters.cluster_index[positive]
    wins = np.zeros((size, size))
    for other in np.unique(clusters.cluster_index[negative]):
        theirs = np.sort(score[negative & (clusters.cluster_index == other)])
        beaten = (np.searchsorted(theirs, ours, "left") + np.searchsorted(theirs, ours, "right")) / 2.0
        wins[:, other] = np.bincount(own, weights=beaten, minlength=size)
    return wins


def measure_splices(subject: AuditSubject, windows: AnsweredWindows, *, is_headline: bool) -> tuple[AuditRow, ...]:
    """Compare a model's output on real windows with its output on counterfactual ones.

    Three numbers, each real, counterfactual and their difference: the AUC of p(active) of active against busy benign
    windows (`SHORT_ACTIVITY` against `SHORT_LOAD`: both last as long as a phase), the recall of active (`LONG_ACTIVITY`
    against real activity), and the share of busy benign windows called active (`SHORT_LOAD` against real loads).

    Args:
        subject: The model.
        windows: Windows of all groups; `group` is a `SpliceGroup`, and `y` is active or clean.
        is_headline: Whether it is the model of the headline.
    """
    kinds = {kind: windows.group == str(kind) for kind in SpliceGroup}
    drawn = _Resamples.draw(windows, [c for c in (_CLEAN, _ACTIVE) if (windows.y == c).any()])
    score, active = windows.p[:, _ACTIVE], windows.decided == _ACTIVE

    def rows(name: str, real: FloatArray, spliced: FloatArray, fall: FloatArray, limit: float | None) -> list[AuditRow]:
        kind = LimitKind.AT_MOST if limit is not None else None
        of = [(f"{name}_real", real), (f"{name}_counterfactual", spliced)]
        return [
            *(drawn.build_row(subject, draws, metric=metric, is_headline=is_headline) for metric, draws in of),
            drawn.build_row(
                subject, fall, metric=f"{name}_change", is_headline=is_headline, limit=limit, limit_kind=kind
            ),
        ]

    g = SpliceGroup
    auc = [
        drawn.auc(score, kinds[a], kinds[b])
        for a, b in ((g.REAL_ACTIVITY, g.REAL_LOAD), (g.SHORT_ACTIVITY, g.SHORT_LOAD))
    ]
    recall = [drawn.share(active, kinds[kind]) for kind in (g.REAL_ACTIVITY, g.LONG_ACTIVITY)]
    false = [drawn.share(active, kinds[kind]) for kind in (g.REAL_LOAD, g.SHORT_LOAD)]
    return (
        *rows("splice_auc", auc[0], auc[1], auc[0] - auc[1], MAX_AUC_DROP),
        *rows("splice_recall", recall[0], recall[1], recall[0] - recall[1], MAX_RECALL_DROP),
        *rows("splice_false_activity", false[0], false[1], false[1] - false[0], None),
    )


def measure_idle(subject: AuditSubject, windows: AnsweredWindows, *, is_headline: bool) -> tuple[AuditRow, ...]:
    """Measure the shares of idle clean windows that a model calls quiet (neither infecting nor active) and clean."""
    drawn = _Resamples.draw(windows, (_CLEAN,))
    every = np.ones(len(windows), np.bool_)
    return tuple(
        drawn.build_row(
            subject,
            drawn.share(hits, every),
            metric=metric,
            is_headline=is_headline,
            limit=limit,
            limit_kind=LimitKind.AT_LEAST,
        )
        for metric, hits, limit in (
            ("idle_called_quiet", ~np.isin(windows.decided, _LOUD), MIN_IDLE_QUIET),
            (IDLE_CLEAN_METRIC, windows.decided == _CLEAN, MIN_IDLE_CLEAN),
        )
    )


def measure_load_gaps(
    subject: AuditSubject,
    windows: AnsweredWindows,
    decided: Sequence[NDArray[np.int64]],
    baselines: Mapping[str, Sequence[NDArray[np.int64]]],
    *,
    is_headline: bool,
) -> tuple[AuditRow, ...]:
    """Compare a model's macro-F1 with that of baselines that know a load's presence, its duration or the time alone.

    Args:
        subject: The model.
        windows: The test windows; `group` is a `Stratum`, or empty where the load is not known.
        decided: The model's decisions, ``(n,)`` codes a seed.
        baselines: Name → decisions of the baseline on the same windows, ``(n,)`` codes a seed.
        is_headline: Whether it is the model of the headline.

    Returns:
        The gap in five-phase macro-F1 over all windows, then the gap in three-class macro-F1 in each stratum that has
        windows, for each baseline.
    """
    rows = []
    strata: list[Stratum | None] = [None, *(s for s in Stratum if (windows.group == str(s)).any())]
    for stratum in strata:
        kept = np.ones(len(windows), np.bool_) if stratum is None else windows.group == str(stratum)
        part = windows.select(kept)
        classes = tuple(int(c) for c in np.unique(part.y))
        drawn = _Resamples.draw(part, classes)
        own = _score_decisions(drawn, part, [d[kept] for d in decided], classes, merged=stratum is not None)
        for name, theirs in baselines.items():
            other = _score_decisions(drawn, part, [d[kept] for d in theirs], classes, merged=stratum is not None)
            rows.append(
                drawn.build_row(
                    subject,
                    own - other,
                    metric="macro_f1_gap" if stratum is None else "macro_f1_3class_gap",
                    is_headline=is_headline,
                    limit=0.0,
                    limit_kind=LimitKind.ABOVE,
                    compared_to=name,
                    stratum=None if stratum is None else str(stratum),
                )
            )
    return tuple(rows)


def _score_decisions(
    drawn: _Resamples,
    windows: AnsweredWindows,
    decided: Sequence[NDArray[np.int64]],
    classes: tuple[int, ...],
    *,
    merged: bool,
) -> FloatArray:
    """Compute the macro-F1 of each resample, ``(B,)``, mean over seeds; with `merged` over the three states."""
    k = metrics.N_CLASSES
    scores = []
    for one in decided:
        counts = drawn.weights @ bootstrap.count_confusions(drawn.clusters, windows.y, one)
        confusion = counts.reshape(-1, k, k)
        if merged:
            confusion = metrics.merge_into_three_states(confusion)
        of = metrics.list_states_of_classes(classes) if merged else classes
        scores.append(np.asarray(metrics.macro_f1(confusion, of), np.float64))
    mean: FloatArray = np.mean(np.stack(scores), axis=0)
    return mean
