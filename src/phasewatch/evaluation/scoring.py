"""Scores of models on the same test windows, and the same scores on every bootstrap resample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from phasewatch import metrics, profiles
from phasewatch.arrays import FloatArray
from phasewatch.evaluation import bootstrap
from phasewatch.evaluation.bootstrap import ResampleWeights, SessionClusters
from phasewatch.evaluation.metric_table import MetricNote, MetricRow, NoteCode
from phasewatch.types import SampleKind

__all__ = [
    "BootstrapScores",
    "EvaluationSettings",
    "EvaluationWindows",
    "F1Scores",
    "IntervalColumns",
    "MetricKey",
    "ModelOutput",
    "PredictionSet",
    "ResampleSelection",
    "ScoringSet",
    "ValueColumns",
    "build_interval",
    "build_scoring_set",
    "build_settings",
    "compute_gap_p_value",
    "compute_score_terms",
    "count_profiles",
    "mean_over_seeds",
    "resample_counts",
    "score_models",
    "select_resamples",
]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluationWindows:
    """Test windows that some models were all scored on, in the order (host, episode, time); every array is ``(n,)``."""

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
        """Return the windows that a boolean mask or indices select."""
        return EvaluationWindows(**{name: getattr(self, name)[rows] for name in self.__slots__})

    @classmethod
    def concatenate(cls, parts: Sequence[EvaluationWindows]) -> EvaluationWindows:
        """Concatenate windows; at least one part."""
        return cls(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in cls.__slots__})

    def is_same_as(self, other: EvaluationWindows) -> bool:
        """Return whether episodes, times and truths are equal, in the same order."""
        names = ("episode_id", "y_true", "t_center_ns")
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)

    def window_ids(self) -> list[tuple[str, int]]:
        """Return each window's episode id and centre time."""
        return list(zip(self.episode_id.tolist(), self.t_center_ns.tolist(), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelOutput:
    """The output of one model and seed on `EvaluationWindows`.

    Attributes:
        probabilities: ``(n, 5)``.
        y_pred: ``(n,)`` decided phase codes.
    """

    model: str
    seed: int
    probabilities: FloatArray
    y_pred: NDArray[np.int64]

    def select(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> ModelOutput:
        """Return the output on the windows that a boolean mask or indices select."""
        return ModelOutput(
            model=self.model, seed=self.seed, probabilities=self.probabilities[rows], y_pred=self.y_pred[rows]
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PredictionSet:
    """Windows × models: some test windows and the outputs of all models that cover every one of them."""

    windows: EvaluationWindows
    outputs: tuple[ModelOutput, ...]

    def __len__(self) -> int:
        return len(self.windows)

    def select(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> PredictionSet:
        """Return the windows that a boolean mask or indices select, with their outputs."""
        return PredictionSet(windows=self.windows.select(rows), outputs=tuple(o.select(rows) for o in self.outputs))

    def select_agent(self, agent: str | None) -> PredictionSet | None:
        """Return the windows of episodes with the agent ``on`` or ``off`` (None: both), or None without any."""
        if agent is None:
            return self
        mask = self.windows.agent == agent
        return self.select(mask) if mask.any() else None

    def align(self, other: PredictionSet) -> tuple[PredictionSet, PredictionSet] | None:
        """Return both sets on their common windows, in the order of this set; None without common windows."""
        index = {key: i for i, key in enumerate(other.windows.window_ids())}
        common = [(i, index[key]) for i, key in enumerate(self.windows.window_ids()) if key in index]
        if not common:
            return None
        own, others = (np.array(rows, np.intp) for rows in zip(*common, strict=True))
        return self.select(own), other.select(others)

    def group_by_model(self) -> dict[str, list[ModelOutput]]:
        """Return the outputs of each model, one per seed."""
        groups: dict[str, list[ModelOutput]] = {}
        for output in self.outputs:
            groups.setdefault(output.model, []).append(output)
        return groups


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
    """The columns that all rows of one scored set share."""

    recipe: str
    fold: str
    channel_set: str
    input: str
    smoothing: str
    agent: str | None

    def with_agent(self, agent: str | None) -> MetricKey:
        """Return this key for episodes with the agent ``on`` or ``off``; None for both."""
        return replace(self, agent=agent)

    def row(self, *, note: MetricNote | None = None, **columns: object) -> MetricRow:
        """Build a row with this key.

        Floats are rounded to ten decimals: below that the order of a sum shows, which differs between machines.
        """
        rounded = {k: round(float(v), 10) + 0.0 if isinstance(v, float) else v for k, v in columns.items()}
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
    """Settings of an evaluation.

    Attributes:
        malicious: Registered malicious profiles.
        profiles: All registered profiles.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.
    """

    malicious: tuple[str, ...]
    profiles: tuple[str, ...]
    resamples: int = bootstrap.N_RESAMPLES
    seed: int = 0


def build_settings(*, resamples: int = bootstrap.N_RESAMPLES, seed: int = 0) -> EvaluationSettings:
    """Build the settings for the registered profiles."""
    return EvaluationSettings(
        malicious=tuple(p.name for p in profiles.PROFILES if p.kind != SampleKind.BENIGN),
        profiles=tuple(p.name for p in profiles.PROFILES),
        resamples=resamples,
        seed=seed,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoringSet:
    """Predictions with the clusters and weights of the bootstrap; a part keeps the weights of the whole.

    Attributes:
        predictions: Windows and outputs.
        clusters: The session of each window.
        weights: The resamples of the whole set; None if they cannot be drawn.
        classes: Phase codes with at least one true window, over which macro-F1 is the mean.
    """

    predictions: PredictionSet
    clusters: SessionClusters
    weights: ResampleWeights | None
    classes: tuple[int, ...]

    @property
    def windows(self) -> EvaluationWindows:
        """The windows of the predictions."""
        return self.predictions.windows

    @property
    def outputs(self) -> tuple[ModelOutput, ...]:
        """The outputs of the predictions."""
        return self.predictions.outputs

    def counts(self) -> dict[str, int]:
        """Return the sample size as columns of a row."""
        return {
            "n_windows": len(self.windows),
            "n_episodes": len(set(self.windows.episode_id)),
            "n_sessions": len(set(self.clusters.cluster_index.tolist())),
            "n_hosts": len(set(self.windows.host_id)),
        }

    def select(self, rows: NDArray[np.bool_]) -> ScoringSet:
        """Return the windows of a boolean mask ``(n,)``; host numbers and weights stay those of the whole set."""
        part = self.predictions.select(rows)
        return ScoringSet(
            predictions=part,
            clusters=SessionClusters(
                cluster_index=self.clusters.cluster_index[rows], host_index=self.clusters.host_index
            ),
            weights=self.weights,
            classes=tuple(int(c) for c in np.unique(part.windows.y_true)),
        )


def build_scoring_set(predictions: PredictionSet, rules: EvaluationSettings) -> ScoringSet:
    """Number the sessions of the windows and draw the bootstrap weights that every score over them shares."""
    windows = predictions.windows
    clusters = bootstrap.build_clusters(windows.host_id.tolist(), windows.session.tolist())
    classes = tuple(int(c) for c in np.unique(windows.y_true))
    weights = bootstrap.draw_weights(
        clusters, windows.y_true, classes=classes, resamples=rules.resamples, seed=rules.seed
    )
    return ScoringSet(predictions=predictions, clusters=clusters, weights=weights, classes=classes)


def count_profiles(scope: ScoringSet, rules: EvaluationSettings) -> dict[str, int]:
    """Return how many malicious profiles have windows in a set, and how many are registered, as columns of a row."""
    tested = set(rules.malicious) & set(scope.windows.profile)
    return {"n_profiles_tested": len(tested), "n_profiles": len(rules.malicious)}


# ``(5, 3)`` phase → its state, 0 or 1.
_PHASE_TO_STATE = np.equal.outer(metrics.STATE_BY_PHASE, range(len(metrics.STATES))).astype(np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class F1Scores:
    """Scores of one confusion matrix ``()``, or of each of ``B`` resamples.

    Attributes:
        macro_f1: ``(...)`` mean F1 over the classes of the set.
        macro_f1_3class: ``(...)`` the same over three states.
        f1: ``(..., 5)`` F1 of each phase.
    """

    macro_f1: FloatArray
    macro_f1_3class: FloatArray
    f1: FloatArray

    @classmethod
    def from_confusion(cls, confusion: FloatArray, classes: tuple[int, ...]) -> F1Scores:
        """Compute the scores of confusion matrices, ``(..., 5, 5)``."""
        return cls.from_terms(compute_score_terms(confusion), classes)

    @classmethod
    def from_terms(cls, terms: FloatArray, classes: tuple[int, ...]) -> F1Scores:
        """Compute the scores of sums of `compute_score_terms`, ``(..., 13)``."""
        k = metrics.N_CLASSES
        hits, either, state_hits = np.split(terms, (k, 2 * k), axis=-1)
        f1 = metrics.compute_f1_from_terms(hits, either)
        # The windows of a state are those of its phases.
        states = metrics.compute_f1_from_terms(state_hits, either @ _PHASE_TO_STATE)
        return cls(
            macro_f1=_average_classes(f1, classes),
            macro_f1_3class=_average_classes(states, metrics.list_states_of_classes(classes)),
            f1=f1,
        )


def compute_score_terms(confusion: FloatArray) -> FloatArray:
    """Compute the sums that all scores are ratios of, ``(..., 5, 5)`` → ``(..., 13)``.

    They are the F1 terms of the phases, then the hits of the states. The other terms of the states are sums of the
    phases' terms, so they need no column of their own in the resampling.
    """
    states = metrics.f1_terms(metrics.merge_into_three_states(confusion))[..., : len(metrics.STATES)]
    terms: FloatArray = np.concatenate((metrics.f1_terms(confusion), states), axis=-1)
    return terms


def _average_classes(f1: FloatArray, classes: tuple[int, ...]) -> FloatArray:
    """Average F1 over the classes, ``(..., k)`` → ``(...)``.

    A product with 1/k is five times as fast as numpy's mean over a short axis.
    """
    share = np.zeros(f1.shape[-1])
    share[list(classes)] = 1 / len(classes)
    mean: FloatArray = f1 @ share
    return mean


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BootstrapScores:
    """Scores of one model and seed.

    Attributes:
        point: The scores of the windows as they are.
        draws: The scores of each resample, ``(B, ...)``; None without resamples.
    """

    seed: int
    point: F1Scores
    draws: F1Scores | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ResampleSelection:
    """The resamples that the intervals of a set rest on.

    Attributes:
        mask: ``(B,)`` whether a resample keeps all classes of the set; None if there is no interval.
        note: Why there is no interval; None if there is one.
        sessions: Number of sessions of the set.
        hosts: Number of hosts that they belong to.
        tail_share: Share of the resamples to leave out on either side.
    """

    mask: NDArray[np.bool_] | None
    note: MetricNote | None
    sessions: int
    hosts: int
    tail_share: float = 0.0


def select_resamples(scope: ScoringSet) -> ResampleSelection:
    """Select the resamples that keep all classes of a set.

    The weights of the whole set keep its own classes. A part (one profile, one host) has fewer sessions: resamples
    that lose one of its classes are left out, for all models alike, which equals drawing them again.
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
    """Compute the scores of each model on the windows and on every selected resample, one entry per seed."""
    k = metrics.N_CLASSES
    counts = [bootstrap.count_confusions(scope.clusters, scope.windows.y_true, a.y_pred) for a in scope.outputs]
    drawn = resample_counts(scope, kept, [compute_score_terms(c.reshape(-1, k, k)) for c in counts])
    scores: dict[str, list[BootstrapScores]] = {}
    for i, output in enumerate(scope.outputs):
        scores.setdefault(output.model, []).append(
            BootstrapScores(
                seed=output.seed,
                point=F1Scores.from_confusion(counts[i].sum(axis=0).reshape(k, k), scope.classes),
                draws=None if drawn is None else F1Scores.from_terms(drawn[i], scope.classes),
            )
        )
    return scores


def resample_counts(
    scope: ScoringSet, kept: ResampleSelection, counts: Sequence[FloatArray]
) -> list[FloatArray] | None:
    """Resample the cluster counts of several outputs by the same weights, each ``(C, m)`` → ``(B selected, m)``."""
    if kept.mask is None or scope.weights is None:
        return None
    together = bootstrap.resample(scope.weights, np.concatenate(counts, axis=1))
    if not kept.mask.all():
        together = together[kept.mask]
    return np.split(together, len(counts), axis=1)


def mean_over_seeds(draws: Sequence[FloatArray | None]) -> FloatArray | None:
    """Average over seeds within each resample, ``(B, ...)`` each; None without resamples."""
    known = [d for d in draws if d is not None]
    if not known:
        return None
    mean: FloatArray = np.mean(np.stack(known), axis=0)
    return mean


def compute_gap_p_value(draws: FloatArray | None, kept: ResampleSelection) -> float | None:
    """Return the p-value of "no difference" for the gaps of ``(B,)`` resamples; None without resamples.

    It agrees with `build_interval` of the same resamples.
    """
    return None if draws is None else bootstrap.compute_paired_p_value(draws, kept.sessions, kept.hosts)


def build_interval(draws: FloatArray | None, kept: ResampleSelection) -> IntervalColumns:
    """Return the interval columns of a row, or the note that explains why it has no interval."""
    if draws is None:
        return {"note": kept.note}
    low, high = bootstrap.compute_interval(draws, kept.tail_share)
    return {"low": low, "high": high}
