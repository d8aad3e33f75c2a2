"""The test windows that models were scored on, what they said of them, and their confusions resampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from phasewatch import measures
from phasewatch.evaluate import bootstrap
from phasewatch.evaluate.bootstrap import Clusters, Floats, Weights
from phasewatch.evaluate.rows import MetricRow


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shown:
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

    def take(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> Shown:
        """Give the marked windows, or those at these places."""
        return Shown(**{name: getattr(self, name)[rows] for name in self.__slots__})

    def window_ids(self) -> list[tuple[str, int]]:
        """Name each window by its episode and its time."""
        return list(zip(self.episode_id.tolist(), self.t_center_ns.tolist(), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """What one model with one seed said of them: ``(n, 5)`` probabilities and ``(n,)`` decisions."""

    model: str
    seed: int
    probabilities: Floats
    y_pred: NDArray[np.int64]

    def take(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> Answer:
        """Give the marked windows, or those at these places."""
        return Answer(
            model=self.model, seed=self.seed, probabilities=self.probabilities[rows], y_pred=self.y_pred[rows]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the rows of a board belong."""

    recipe: str
    fold: str
    threat: str
    table: str
    filter: str
    agent: str | None

    def at(self, agent: str | None) -> Place:
        """Give this place for the episodes whose agent was `on` or `off`; None for both."""
        return replace(self, agent=agent)

    def row(self, **more: object) -> MetricRow:
        """Make a row of this board.

        Scores are rounded to ten decimals: below that the order of a sum shows, which differs between machines.
        """
        rounded = {k: round(v, 10) + 0.0 if isinstance(v, float) else v for k, v in more.items()}
        return MetricRow(
            recipe=self.recipe, fold=self.fold, threat=self.threat, table=self.table, filter=self.filter,
            agent=self.agent, **rounded,  # type: ignore[arg-type]
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What holds for every board: the malicious profiles that are registered, and how intervals are drawn."""

    malicious: tuple[str, ...]
    profiles: tuple[str, ...]
    resamples: int = bootstrap.RESAMPLES
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scope:
    """Some windows of a board, the clusters and weights of the whole board beside them."""

    shown: Shown
    answers: Sequence[Answer]
    clusters: Clusters
    weights: Weights | None
    classes: tuple[int, ...]

    def counts(self) -> dict[str, int]:
        """Give how much a number stands on."""
        return {
            "n_windows": len(self.shown),
            "n_episodes": len(set(self.shown.episode_id)),
            "n_sessions": len(set(self.clusters.of.tolist())),
            "n_hosts": len(set(self.shown.host_id)),
        }

    def take(self, rows: NDArray[np.bool_]) -> Scope:
        """Give the marked windows; clusters and weights stay those of the whole board."""
        shown = self.shown.take(rows)
        return Scope(
            shown=shown,
            answers=[a.take(rows) for a in self.answers],
            clusters=Clusters(of=self.clusters.of[rows], host=self.clusters.host),
            weights=self.weights,
            classes=tuple(int(c) for c in np.unique(shown.y_true)),
        )


def models_of(scope: Scope) -> dict[str, list[Answer]]:
    """Group the answers by model, one for each seed."""
    found: dict[str, list[Answer]] = {}
    for answer in scope.answers:
        found.setdefault(answer.model, []).append(answer)
    return found


def tested(scope: Scope, rules: Rules) -> str:
    """Say how many malicious profiles these windows test, as metrics are named: ``5of6``."""
    return f"{len(set(rules.malicious) & set(scope.shown.profile))}of{len(rules.malicious)}"


_FOLD = np.equal.outer(measures.STATE_OF, range(len(measures.STATES))).astype(np.float64)  # phase → its state, 0/1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Values:
    """Scores of one confusion, or of each resample's: the two macro-F1 over the scope's classes, and F1 of each phase."""

    macro_f1: Floats
    macro_f1_3: Floats
    f1: Floats

    @classmethod
    def of(cls, confusion: Floats, classes: tuple[int, ...]) -> Values:
        """Score ``(..., 5, 5)`` counts."""
        return cls.of_terms(terms_of(confusion), classes)

    @classmethod
    def of_terms(cls, terms: Floats, classes: tuple[int, ...]) -> Values:
        """Score ``(..., 13)`` sums of `terms_of`."""
        k = measures.N_CLASSES
        hits, either, state_hits = np.split(terms, (k, 2 * k), axis=-1)
        f1 = measures.f1_of(hits, either)
        states = measures.f1_of(state_hits, either @ _FOLD)  # a state's windows are those of its phases
        return cls(
            macro_f1=_mean_over(f1, classes), macro_f1_3=_mean_over(states, measures.state_classes(classes)), f1=f1
        )


def terms_of(confusion: Floats) -> Floats:
    """Give what all scores are ratios of, ``(..., 5, 5)`` → ``(..., 13)``: F1's terms of the phases, the states' hits.

    What else the states need is a sum of the phases' terms: a column that is not resampled costs nothing.
    """
    states = measures.f1_terms(measures.three_states(confusion))[..., : len(measures.STATES)]
    terms: Floats = np.concatenate((measures.f1_terms(confusion), states), axis=-1)
    return terms


def _mean_over(f1: Floats, classes: tuple[int, ...]) -> Floats:
    """Average over the classes: a product with 1/k is five times as fast as numpy's mean over a short axis."""
    share = np.zeros(f1.shape[-1])
    share[list(classes)] = 1 / len(classes)
    mean: Floats = f1 @ share
    return mean


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """One answer's scores, and those of every resample; without resamples `draws` is None."""

    seed: int
    point: Values
    draws: Values | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kept:
    """The resamples ``(B,)`` that keep all classes of a part; None with the words why there is no interval.

    Attributes:
        sessions: Number of sessions of the part.
        hosts: Number of hosts that they belong to.
        tail: Share of the resamples to leave out on either side.
    """

    rows: NDArray[np.bool_] | None
    why: str | None
    sessions: int
    hosts: int
    tail: float = 0.0


def keep_resamples(scope: Scope) -> Kept:
    """Find the resamples that a part's intervals rest on.

    The whole board's weights keep its own classes. A part (one profile, one host) has fewer sessions: resamples that
    lose one of its classes are left out, for all models alike, which is the same as drawing them again.
    """
    sessions = len(np.unique(scope.clusters.of))
    hosts = len(np.unique(scope.clusters.host[np.unique(scope.clusters.of)]))
    if why := bootstrap.no_interval(sessions, hosts):
        return Kept(rows=None, why=why, sessions=sessions, hosts=hosts)
    if scope.weights is None:
        words = "hardly a resample keeps a window of each class"
        return Kept(rows=None, why=words, sessions=sessions, hosts=hosts)
    truth = bootstrap.sums(
        scope.clusters, (scope.shown.y_true[:, None] == np.asarray(scope.classes)).astype(np.float64)
    )
    rows: NDArray[np.bool_] = np.all(bootstrap.resample(scope.weights, truth) > 0, axis=1)
    if 2 * rows.sum() < len(rows):
        return Kept(rows=None, why="most resamples lose one of the classes", sessions=sessions, hosts=hosts)
    return Kept(rows=rows, why=None, sessions=sessions, hosts=hosts, tail=bootstrap.tail_of(sessions, hosts))


def score_answers(scope: Scope, kept: Kept) -> dict[str, list[Scored]]:
    """Score each model's answers, and their resamples, one for each seed."""
    k = measures.N_CLASSES
    counts = [bootstrap.confusions(scope.clusters, scope.shown.y_true, a.y_pred) for a in scope.answers]
    drawn = draw(scope, kept, [terms_of(c.reshape(-1, k, k)) for c in counts])
    found: dict[str, list[Scored]] = {}
    for i, answer in enumerate(scope.answers):
        found.setdefault(answer.model, []).append(
            Scored(
                seed=answer.seed,
                point=Values.of(counts[i].sum(axis=0).reshape(k, k), scope.classes),
                draws=None if drawn is None else Values.of_terms(drawn[i], scope.classes),
            )
        )
    return found


def draw(scope: Scope, kept: Kept, counts: Sequence[Floats]) -> list[Floats] | None:
    """Resample the clusters' counts of several answers by the same weights, each ``(C, m)`` → ``(B kept, m)``."""
    if kept.rows is None or scope.weights is None:
        return None
    together = bootstrap.resample(scope.weights, np.concatenate(counts, axis=1))
    if not kept.rows.all():
        together = together[kept.rows]
    return np.split(together, len(counts), axis=1)


def mean_over_seeds(draws: Sequence[Floats | None]) -> Floats | None:
    """Average inside each resample; None without resamples."""
    found = [d for d in draws if d is not None]
    if not found:
        return None
    mean: Floats = np.mean(np.stack(found), axis=0)
    return mean


def p_of_gap(draws: Floats | None, kept: Kept) -> float | None:
    """Return the p-value of "no difference" that goes with `span` of the same resamples; None without resamples."""
    return None if draws is None else bootstrap.paired_p(draws, kept.sessions, kept.hosts)


def span(draws: Floats | None, kept: Kept) -> dict[str, object]:
    """Give a row's interval, or why there is none."""
    if draws is None:
        return {"why": kept.why}
    low, high = bootstrap.interval(draws, kept.tail)
    return {"low": low, "high": high}
