"""Measures of alarms and their intervals: rates, shares, medians, the chance line, precision at a base rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import BoolArray, FloatArray
from phasewatch.evaluation import bootstrap
from phasewatch.evaluation.alarms import EpisodeOutcomes
from phasewatch.evaluation.metric_table import MetricNote, NoteCode
from phasewatch.evaluation.scoring import EvaluationSettings, IntervalColumns
from phasewatch.models.alarm import AlarmKind

__all__ = [
    "EpisodeBootstrap",
    "FalseAlarmRate",
    "ResampleMeasure",
    "build_median_measure",
    "build_ratio_measure",
    "compute_binomial_interval",
    "compute_chance_recall",
    "compute_poisson_interval",
    "compute_precision",
    "measure_once",
    "unite_intervals",
]

# ``(b, E)`` how often each resample drew each episode → ``(b,)`` the measure of each resample.
ResampleMeasure = Callable[[NDArray[np.float32]], FloatArray]


@dataclass(frozen=True, slots=True, kw_only=True)
class FalseAlarmRate:
    """False alarms per VM-hour, a mean over seeds, with two intervals.

    Attributes:
        count: Number of false alarms.
        per_hour: False alarms per VM-hour.
        poisson: The exact Poisson interval.
        sessions: The interval of the session bootstrap, or the note that explains why there is none.
    """

    count: float
    per_hour: float
    poisson: IntervalColumns
    sessions: IntervalColumns

    @property
    def union(self) -> IntervalColumns:
        """The interval from the lower of the two low ends to the higher of the two high ends.

        Neither alone is enough: Poisson's ignores sessions, and the session bootstrap cannot see beyond its sample.
        """
        return unite_intervals(self.poisson, self.sessions)


def unite_intervals(exact: IntervalColumns, sessions: IntervalColumns) -> IntervalColumns:
    """Return the union of an exact interval and that of the session bootstrap; the exact one if that is missing."""
    low, high = sessions.get("low"), sessions.get("high")
    if low is None or high is None:
        return exact
    return {"low": min(exact["low"], low), "high": max(exact["high"], high)}


def compute_poisson_interval(count: float) -> tuple[float, float]:
    """Return the exact 95 % interval of a Poisson mean. Source: Garwood 1936, by the gamma distribution's quantiles."""
    from scipy.special import gammaincinv

    tail = (1 - bootstrap.CONFIDENCE_LEVEL) / 2
    return (float(gammaincinv(count, tail)) if count else 0.0), float(gammaincinv(count + 1, 1 - tail))


def compute_binomial_interval(count: float, n: float) -> tuple[float, float]:
    """Return the exact 95 % interval of a share, `count` of `n`. Source: Clopper and Pearson 1934."""
    from scipy.special import betaincinv

    tail = (1 - bootstrap.CONFIDENCE_LEVEL) / 2
    low = float(betaincinv(count, n - count + 1, tail)) if count > 0 else 0.0
    return low, float(betaincinv(count + 1, n - count, 1 - tail)) if count < n else 1.0


def compute_chance_recall(kind: AlarmKind, within_s: float, per_hour: float, time_in_alarm: float) -> float:
    """Compute the share of onsets that an alarm blind to everything would announce in time.

    It starts as often per quiet hour as the alarm does and is on for the same share of the time. The activity alarm
    also announces an onset by being on already; the infection alarm must start (`compute_detection_delays`).

    Args:
        kind: The alarm.
        within_s: Seconds after the onset.
        per_hour: False alarms per quiet VM-hour.
        time_in_alarm: Share of quiet time with the alarm on.
    """
    silent = exp(-per_hour * within_s / 3600)
    return 1.0 - silent * (1.0 - time_in_alarm if kind is AlarmKind.ACTIVITY else 1.0)


def compute_precision(recall: float, false_alarms_per_hour: float, *, days: float) -> float:
    """Compute the share of true alarms where each VM is infected once in so many days; 0 if nothing is announced.

    Source: Axelsson 2000, "The base-rate fallacy and the difficulty of intrusion detection".
    """
    true_per_hour = recall / (24.0 * days)
    both = true_per_hour + false_alarms_per_hour
    return true_per_hour / both if both else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class EpisodeBootstrap:
    """Session resamples of a set of episodes, drawn once for all measures over them."""

    outcomes: EpisodeOutcomes
    rules: EvaluationSettings

    @cached_property
    def _clusters(self) -> bootstrap.SessionClusters:
        episodes = self.outcomes.episodes
        return bootstrap.build_clusters([e.host_id for e in episodes], [e.session for e in episodes])

    @cached_property
    def _times(self) -> NDArray[np.float32] | None:
        """``(B, E)`` how often each resample drew each episode; None if they cannot be drawn."""
        one_class = np.zeros(len(self._clusters.cluster_index), np.int64)
        weights = bootstrap.draw_weights(
            self._clusters, one_class, classes=(0,), resamples=self.rules.resamples, seed=self.rules.seed
        )
        return None if weights is None else weights.counts[:, self._clusters.cluster_index].astype(np.float32)

    def build_interval(self, keep: BoolArray, measures: Sequence[ResampleMeasure]) -> IntervalColumns:
        """Return the interval of a measure's mean over seeds, or the note that explains why it has none."""
        used = np.unique(self._clusters.cluster_index[keep])
        sessions, hosts = len(used), len(np.unique(self._clusters.host_index[used]))
        if note := bootstrap.explain_missing_interval(sessions, hosts):
            return {"note": note}
        if self._times is None:
            text = "almost no resample can be drawn"
            return {"note": MetricNote(code=NoteCode.RESAMPLES_LOSE_EPISODES, text=text)}
        draws = np.mean([measure(self._times) for measure in measures], axis=0)
        draws = draws[~np.isnan(draws)]  # a resample without such an episode has no measure
        if 2 * len(draws) < len(self._times):
            text = "most resamples draw no such episode"
            return {"note": MetricNote(code=NoteCode.RESAMPLES_LOSE_EPISODES, text=text)}
        # Never between a number and infinity: the ends are draws themselves.
        tail = 100 * bootstrap.compute_tail_share(sessions, hosts)
        low, high = (float(end) for end in np.percentile(draws, [tail, 100 - tail], method="inverted_cdf"))
        if not np.isfinite(high):
            text = f"from {low:.0f} up to never: in some resamples more than half are missed"
            return {"note": MetricNote(code=NoteCode.UNBOUNDED_INTERVAL, text=text)}
        return {"low": low, "high": high}


def build_median_measure(values: FloatArray) -> ResampleMeasure:
    """Build the lower median of the values ``(E,)``, infinity included, NaN left out, each as often as drawn."""
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]

    def measure(times: NDArray[np.float32]) -> FloatArray:
        if not len(order):
            return np.full(len(times), np.nan)
        reached = np.cumsum(times[:, order], axis=1)  # whole numbers far below 2^24: exact
        total = reached[:, -1]
        first = (reached >= total[:, None] / 2).argmax(axis=1)
        medians: FloatArray = np.where(total > 0, values[order][first], np.nan)
        return medians

    return measure


def build_ratio_measure(above: FloatArray, below: FloatArray) -> ResampleMeasure:
    """Build the ratio of two sums over episodes, ``(E,)`` each, NaN where the lower sum is 0."""

    def measure(times: NDArray[np.float32]) -> FloatArray:
        sums = times.astype(np.float64) @ np.column_stack([above, below])
        ratio: FloatArray = np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] > 0)
        return ratio

    return measure


def measure_once(measure: ResampleMeasure, n: int) -> float:
    """Measure the `n` episodes as they are, each drawn once."""
    return float(measure(np.ones((1, n), np.float32))[0])
