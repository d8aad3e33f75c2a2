"""The test windows that models were scored on, what they said of them, and their confusions resampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from phasewatch import metrics
from phasewatch.arrays import FloatArray
from phasewatch.evaluation import bootstrap
from phasewatch.evaluation.bootstrap import ResampleWeights, SessionClusters
from phasewatch.evaluation.metric_table import MetricNote, MetricRow, NoteCode


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluationWindows:
    """The test windows that some models were all scored on, in the order (host, episode, time). All are ``(n,)``."""

    episode_id: NDArray[np.object_]
    session: NDArray[np.object_]
    host_id: NDArray[np.object_]
    profile: NDArray[np.object_]
    sample_name: NDArray[np.object_]
    origin: NDArray[np.object_]
    agent: NDArray[np.object_]
    t_center_ns: NDArray[np.int64]
    y_true: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y_true)

    def select(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> EvaluationWindows:
        """Give the marked windows, or those at these places."""
        return EvaluationWindows(**{name: getattr(self, name)[rows] for name in self.__slots__})

    def window_ids(self) -> list[tuple[str, int]]:
        """Name each window by its episode and its time."""
        return list(zip(self.episode_id.tolist(), self.t_center_ns.tolist(), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelOutput:
    """What one model with one seed said of them: ``(n, 5)`` probabilities and ``(n,)`` decisions."""

    model: str
    seed: int
    probabilities: FloatArray
    y_pred: NDArray[np.int64]

    def select(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> ModelOutput:
        """Give the marked windows, or those at these places."""
        return ModelOutput(
            model=self.model, seed=self.seed, probabilities=self.probabilities[rows], y_pred=self.y_pred[rows]
        )


class IntervalColumns(TypedDict, total=False):
    """The columns of a row that give its interval, or the note on why it has none."""

    low: float
    high: float
    note: MetricNote | None


class ValueColumns(IntervalColumns):
    """The value of a row beside its interval columns."""

    value: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricKey:
    """Where the rows of a board belong."""

    recipe: str
    fold: str
    channel_set: str
    input: str
    smoothing: str
    agent: str | None

    def with_agent(self, agent: str | None) -> MetricKey:
        """Give this place for the episodes whose agent was `on` or `off`; None for both."""
        return replace(self, agent=agent)

    def row(self, *, note: MetricNote | None = None, **columns: object) -> MetricRow:
        """Build a row with this key.

        Floats are rounded to ten decimals: below that the order of a sum shows, which differs between machines.
        """
        rounded = {k: round(v, 10) + 0.0 if isinstance(v, float) else v for k, v in columns.items()}
        return MetricRow(
            recipe=self.recipe,
            fold=self.fold,
            channel_set=self.channel_set,
            input=self.input,
            smoothing=self.smoothing,
            agent=self.agent,
            note=note.text if note is not None else None,
            code=note.code if note is not None else None,
            **rounded,  # type: ignore[arg-type]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """What holds for every board: the malicious profiles that are registered, and how intervals are drawn."""

    malicious: tuple[str, ...]
    profiles: tuple[str, ...]
    resamples: int = bootstrap.N_RESAMPLES
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoringSet:
    """Some windows of a board, the clusters and weights of the whole board beside them."""

    windows: EvaluationWindows
    outputs: Sequence[ModelOutput]
    clusters: SessionClusters
    weights: ResampleWeights | None
    classes: tuple[int, ...]

    def counts(self) -> dict[str, int]:
        """Give how much a number stands on."""
        return {
            "n_windows": len(self.windows),
            "n_episodes": len(set(self.windows.episode_id)),
            "n_sessions": len(set(self.clusters.cluster_index.tolist())),
            "n_hosts": len(set(self.windows.host_id)),
        }

    def select(self, rows: NDArray[np.bool_]) -> ScoringSet:
        """Give the marked windows; clusters and weights stay those of the whole board."""
        shown = self.windows.select(rows)
        return ScoringSet(
            windows=shown,
            outputs=[a.select(rows) for a in self.outputs],
            clusters=SessionClusters(
                cluster_index=self.clusters.cluster_index[rows], host_index=self.clusters.host_index
            ),
            weights=self.weights,
            classes=tuple(int(c) for c in np.unique(shown.y_true)),
        )


def group_by_model(scope: ScoringSet) -> dict[str, list[ModelOutput]]:
    """Group the answers by model, one for each seed."""
    found: dict[str, list[ModelOutput]] = {}
    for answer in scope.outputs:
        found.setdefault(answer.model, []).append(answer)
    return found


def count_profiles(scope: ScoringSet, rules: EvaluationSettings) -> dict[str, int]:
    """Return how many malicious profiles have windows in a set, and how many are registered, as columns of a row."""
    tested = set(rules.malicious) & set(scope.windows.profile)
    return {"n_profiles_tested": len(tested), "n_profiles": len(rules.malicious)}


_PHASE_TO_STATE = np.equal.outer(metrics.STATE_BY_PHASE, range(len(metrics.STATES))).astype(
    np.float64
)  # phase → its state, 0/1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class F1Scores:
    """Scores of one confusion, or of each resample's: the two macro-F1 over the scope's classes, and F1 of each phase."""

    macro_f1: FloatArray
    macro_f1_3class: FloatArray
    f1: FloatArray

    @classmethod
    def from_confusion(cls, confusion: FloatArray, classes: tuple[int, ...]) -> F1Scores:
        """Score ``(..., 5, 5)`` counts."""
        return cls.from_terms(compute_score_terms(confusion), classes)

    @classmethod
    def from_terms(cls, terms: FloatArray, classes: tuple[int, ...]) -> F1Scores:
        """Score ``(..., 13)`` sums of `compute_score_terms`."""
        k = metrics.N_CLASSES
        hits, either, state_hits = np.split(terms, (k, 2 * k), axis=-1)
        f1 = metrics.compute_f1_from_terms(hits, either)
        states = metrics.compute_f1_from_terms(
            state_hits, either @ _PHASE_TO_STATE
        )  # a state's windows are those of its phases
        return cls(
            macro_f1=_average_classes(f1, classes),
            macro_f1_3class=_average_classes(states, metrics.list_states_of_classes(classes)),
            f1=f1,
        )


def compute_score_terms(confusion: FloatArray) -> FloatArray:
    """Give what all scores are ratios of, ``(..., 5, 5)`` → ``(..., 13)``: F1's terms of the phases, the states' hits.

    What else the states need is a sum of the phases' terms: a column that is not resampled costs nothing.
    """
    states = metrics.f1_terms(metrics.merge_into_three_states(confusion))[..., : len(metrics.STATES)]
    terms: FloatArray = np.concatenate((metrics.f1_terms(confusion), states), axis=-1)
    return terms


def _average_classes(f1: FloatArray, classes: tuple[int, ...]) -> FloatArray:
    """Average over the classes: a product with 1/k is five times as fast as numpy's mean over a short axis."""
    share = np.zeros(f1.shape[-1])
    share[list(classes)] = 1 / len(classes)
    mean: FloatArray = f1 @ share
    return mean


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BootstrapScores:
    """One answer's scores, and those of every resample; without resamples `draws` is None."""

    seed: int
    point: F1Scores
    draws: F1Scores | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ResampleSelection:
    """The resamples ``(B,)`` that keep all classes of a part; None with the words why there is no interval.

    Attributes:
        sessions: Number of sessions of the part.
        hosts: Number of hosts that they belong to.
        tail_share: Share of the resamples to leave out on either side.
    """

    mask: NDArray[np.bool_] | None
    note: MetricNote | None
    sessions: int
    hosts: int
    tail_share: float = 0.0


def select_resamples(scope: ScoringSet) -> ResampleSelection:
    """Find the resamples that a part's intervals rest on.

    The whole board's weights keep its own classes. A part (one profile, one host) has fewer sessions: resamples that
    lose one of its classes are left out, for all models alike, which is the same as drawing them again.
    """
    sessions = len(np.unique(scope.clusters.cluster_index))
    hosts = len(np.unique(scope.clusters.host_index[np.unique(scope.clusters.cluster_index)]))
    note = bootstrap.explain_missing_interval(sessions, hosts)
    if note is None and scope.weights is None:
        text = "almost no resample keeps a window of each class"
        note = MetricNote(code=NoteCode.RESAMPLES_LOSE_CLASSES, text=text)
    if note is not None or scope.weights is None:
        return ResampleSelection(mask=None, note=note, sessions=sessions, hosts=hosts)
    truth = bootstrap.sum_by_cluster(
        scope.clusters, (scope.windows.y_true[:, None] == np.asarray(scope.classes)).astype(np.float64)
    )
    rows: NDArray[np.bool_] = np.all(bootstrap.resample(scope.weights, truth) > 0, axis=1)
    if 2 * rows.sum() < len(rows):
        note = MetricNote(code=NoteCode.RESAMPLES_LOSE_CLASSES, text="most resamples lose one of the classes")
        return ResampleSelection(mask=None, note=note, sessions=sessions, hosts=hosts)
    return ResampleSelection(
        mask=rows, note=None, sessions=sessions, hosts=hosts, tail_share=bootstrap.compute_tail_share(sessions, hosts)
    )


def score_models(scope: ScoringSet, kept: ResampleSelection) -> dict[str, list[BootstrapScores]]:
    """Score each model's answers, and their resamples, one for each seed."""
    k = metrics.N_CLASSES
    counts = [bootstrap.count_confusions(scope.clusters, scope.windows.y_true, a.y_pred) for a in scope.outputs]
    drawn = resample_counts(scope, kept, [compute_score_terms(c.reshape(-1, k, k)) for c in counts])
    found: dict[str, list[BootstrapScores]] = {}
    for i, answer in enumerate(scope.outputs):
        found.setdefault(answer.model, []).append(
            BootstrapScores(
                seed=answer.seed,
                point=F1Scores.from_confusion(counts[i].sum(axis=0).reshape(k, k), scope.classes),
                draws=None if drawn is None else F1Scores.from_terms(drawn[i], scope.classes),
            )
        )
    return found


def resample_counts(
    scope: ScoringSet, kept: ResampleSelection, counts: Sequence[FloatArray]
) -> list[FloatArray] | None:
    """Resample the clusters' counts of several answers by the same weights, each ``(C, m)`` → ``(B kept, m)``."""
    if kept.mask is None or scope.weights is None:
        return None
    together = bootstrap.resample(scope.weights, np.concatenate(counts, axis=1))
    if not kept.mask.all():
        together = together[kept.mask]
    return np.split(together, len(counts), axis=1)


def mean_over_seeds(draws: Sequence[FloatArray | None]) -> FloatArray | None:
    """Average inside each resample; None without resamples."""
    found = [d for d in draws if d is not None]
    if not found:
        return None
    mean: FloatArray = np.mean(np.stack(found), axis=0)
    return mean


def compute_gap_p_value(draws: FloatArray | None, kept: ResampleSelection) -> float | None:
    """Return the p-value of "no difference" that goes with `build_interval` of the same resamples; None without resamples."""
    return None if draws is None else bootstrap.compute_paired_p_value(draws, kept.sessions, kept.hosts)


def build_interval(draws: FloatArray | None, kept: ResampleSelection) -> IntervalColumns:
    """Return the interval columns of a row, or the note that explains why it has no interval."""
    if draws is None:
        return {"note": kept.note}
    low, high = bootstrap.compute_interval(draws, kept.tail_share)
    return {"low": low, "high": high}
