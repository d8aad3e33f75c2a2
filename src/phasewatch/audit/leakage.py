"""Leakage probes: what features reveal about elapsed time, host, neighbour and plan, one figure per probe.

A model that knows the elapsed time, its host or its neighbour's phase can score without seeing malware. Every
classifier here predicts out of fold, with folds by session, so no episode predicts itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import Float32Array
from phasewatch.artifacts import BINS_DIR, VALIDATION_FILE
from phasewatch.binning.storage import BinIndexRow, MappedBins, open_bins
from phasewatch.channels import LEVEL_CHANNELS, build_channel_mask
from phasewatch.errors import RunError
from phasewatch.features.schema import stat_names
from phasewatch.features.stats import STATS
from phasewatch.features.tables import build_window_table
from phasewatch.metrics import confusion_counts, macro_f1
from phasewatch.models import registry
from phasewatch.models.base import InputKind, InputSpec, LabelledExamples, ModelInputs
from phasewatch.models.trees import load_lightgbm
from phasewatch.profiles import IDLE_SAMPLES
from phasewatch.types import BIN_NS, STRIDE_BINS, WINDOW_BINS, SampleKind
from phasewatch.validate.index import read_index
from phasewatch.validate.verdict import USABLE_STATUSES

__all__ = [
    "LeakageResult",
    "LeakageWindows",
    "probe_leakage",
    "read_leakage_windows",
    "render_leakage",
]

_N_FOLDS = 5
# Up to this many episodes each is left out by itself: their assignment to five folds moves a figure by 0.1.
_MAX_LEAVE_ONE_OUT = 30

_PROBE_ROUNDS = 40
_PROBE_TREE_PARAMS = {
    "max_depth": 3,
    "num_leaves": 8,
    "max_bin": 31,
    "learning_rate": 0.2,
    "min_data_in_leaf": 5,
    "lambda_l2": 1.0,
    "seed": 0,
    "num_threads": 1,
    "deterministic": True,
    "force_col_wise": True,
    "feature_pre_filter": False,
    "verbose": -1,
}


def _assign_group_folds(groups: NDArray[np.str_], k: int) -> NDArray[np.int64]:
    """Assign groups to k folds: each, by descending size and then name, to the smallest fold.

    Args:
        groups: ``(n,)`` group of each row.
        k: Number of folds.

    Returns:
        ``(n,)`` fold of each row.
    """
    names, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    held, place = np.zeros(k, np.int64), np.zeros(len(names), np.int64)
    for group in np.lexsort((names, -sizes)):
        place[group] = int(np.argmin(held))
        held[place[group]] += sizes[group]
    return place[codes]


def _iterate_group_folds(
    groups: NDArray[np.str_], rows: NDArray[np.bool_], k: int = _N_FOLDS
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Yield ``(n,)`` train and test masks of each fold; groups stay together, and both lie within `rows`."""
    fold = np.full(len(groups), -1)
    fold[rows] = _assign_group_folds(groups[rows], k)
    for number in range(k):
        yield rows & (fold != number), fold == number


def _predict_classes_out_of_fold(
    x: Float32Array, y: NDArray[np.int64], groups: NDArray[np.str_], rows: NDArray[np.bool_]
) -> NDArray[np.int64] | None:
    """Predict the class of every row by trees that saw none of its session.

    Args:
        x: ``(n, f)`` features.
        y: ``(n,)`` classes.
        groups: ``(n,)`` sessions.
        rows: ``(n,)`` bool, the rows to use.

    Returns:
        ``(n,)`` classes, −1 outside `rows`; None with too few sessions or classes.
    """
    lgb = load_lightgbm()
    if len(np.unique(groups[rows])) < _N_FOLDS or len(np.unique(y[rows])) < 2:
        return None
    k = int(y[rows].max()) + 1
    predicted = np.full(len(y), -1)
    for train, test in _iterate_group_folds(groups, rows):
        count = np.bincount(y[train], minlength=k)
        weight = np.divide(1.0, count, out=np.zeros(k), where=count > 0) * len(y[train]) / max(1, (count > 0).sum())
        params = {**_PROBE_TREE_PARAMS, "objective": "multiclass", "num_class": k}
        data = lgb.Dataset(x[train], y[train], weight=weight[y[train]], params=params)
        booster = lgb.train(params, data, _PROBE_ROUNDS)
        predicted[test] = np.asarray(booster.predict(x[test], num_threads=1)).reshape(-1, k).argmax(axis=1)
    return predicted


def _predict_values_out_of_fold(
    x: Float32Array, t: NDArray[np.float64], episode: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Predict the number ``t`` ``(n,)`` of every row of ``x`` ``(n, f)`` by trees that saw none of its episode."""
    lgb = load_lightgbm()
    predicted = np.zeros(len(t))
    k = min(_MAX_LEAVE_ONE_OUT, len(np.unique(episode)))
    for train, test in _iterate_group_folds(episode.astype(str), np.ones(len(t), np.bool_), k):
        if train.any() and test.any():
            params = {**_PROBE_TREE_PARAMS, "objective": "regression"}
            booster = lgb.train(params, lgb.Dataset(x[train], t[train], params=params), _PROBE_ROUNDS)
            predicted[test] = booster.predict(x[test], num_threads=1)
    return predicted


def _compute_macro_f1_and_chance(truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> tuple[float, float]:
    """Compute macro-F1 of ``(n,)`` predictions, and of guesses drawn with the shares of the classes."""
    confusion = confusion_counts(truth, predicted)
    share = confusion.sum(axis=1) / max(1, len(truth))
    classes = tuple(int(i) for i in np.flatnonzero(share))
    # A guess drawn by share has precision and recall equal to the share.
    return float(macro_f1(confusion, classes)), float(np.mean(share[list(classes)]))


def _compute_spearman(x: NDArray[np.floating], t: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the rank correlation of each column of ``(n, f)`` with ``(n,)`` over finite rows; 0 if constant.

    Source: Spearman 1904.
    """
    from scipy.stats import rankdata

    found = np.zeros(x.shape[1])
    for i in range(x.shape[1]):
        known = np.isfinite(x[:, i])
        if known.sum() >= WINDOW_BINS // 2 and np.ptp(x[known, i]) > 0:
            a, b = rankdata(x[known, i]), rankdata(t[known])
            found[i] = np.corrcoef(a, b)[0, 1] if np.ptp(b) > 0 else 0.0
    return found


_MAX_ABOVE_CHANCE = 0.10  # in macro-F1, for elapsed time: 0.30 with five phases (a plan's own limit is 0.25)
_MAX_IDLE_CORRELATION = 0.20  # above it suspect features are named
_STARTUP_S = 12.5  # two windows: the guest's work at the first label has ended
_MAX_SINGLE_FEATURE = 0.95  # limit for one feature alone on host or elapsed time
_N_QUANTILE_BINS = 32  # of a feature that is probed alone
_N_PERMUTATIONS = 999
_PERMUTATION_ALPHA = 0.01
_MAX_SUSPECTS = 5
_MIN_GROUPS = 3  # fewer sessions, hosts or episodes leave a probe without result


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LeakageWindows:
    """The windows of known phase of a store's usable episodes, in the order (episode, time).

    Attributes:
        x: ``(n, f)`` host-side features; NaN where unknown.
        levels: ``(n, l)`` means of the cumulative levels over each window; NaN where unknown.
        y: ``(n,)`` phase codes.
        t_s: ``(n,)`` centres, seconds since the first label.
        t_ns: ``(n,)`` the same on the wall clock.
        episode_index: ``(n,)`` index of the episode.
        names: The features' names.
        host, session, profile, role: ``(e,)`` of each episode.
        is_idle: ``(e,)`` whether it is benign without load.
        length_s: ``(e,)`` seconds.
    """

    x: Float32Array
    levels: Float32Array
    y: NDArray[np.int64]
    t_s: NDArray[np.float64]
    t_ns: NDArray[np.int64]
    episode_index: NDArray[np.int64]
    names: tuple[str, ...]
    host: NDArray[np.str_]
    session: NDArray[np.str_]
    profile: NDArray[np.str_]
    role: NDArray[np.str_]
    is_idle: NDArray[np.bool_]
    length_s: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakageResult:
    """The result of one leakage probe.

    Attributes:
        name: Stable name in kebab-case.
        question: What was predicted from what.
        value: The figure; NaN with too little data, which `words` explains.
        unit: What the figure is.
        chance: The figure without any leak, if it is known.
        limit: What the figure must not exceed; None if it is only reported.
        words: Sample size and suspect features.
    """

    name: str
    question: str
    value: float
    unit: str
    chance: float | None
    limit: float | None
    words: str

    @property
    def exceeds_limit(self) -> bool:
        """Whether the figure exceeds its limit."""
        return self.limit is not None and self.value > self.limit


def probe_leakage(windows: LeakageWindows, only: Collection[str] = ()) -> tuple[LeakageResult, ...]:
    """Run every leakage probe, or only the named ones, in a fixed order."""
    lab = windows.role[windows.episode_index] == "lab"
    return tuple(probe(windows, lab) for name, probe in _LEAKAGE_PROBES.items() if not only or name in only)


def _probe_phase_from_time(w: LeakageWindows, lab: NDArray[np.bool_]) -> LeakageResult:
    name, question = "phase-from-elapsed-time", "The phase, from the time since the first label alone."
    spec = InputSpec(
        kind=InputKind.ELAPSED, names=("t_center_s",), mask="elapsed", schema_hash="", behaviour_fingerprint=""
    )

    def part(rows: NDArray[np.bool_]) -> LabelledExamples:
        return LabelledExamples(inputs=ModelInputs(x=w.t_s[rows, None].astype(np.float32), spec=spec), y=w.y[rows])

    fold = _assign_group_folds(w.session[w.episode_index], _N_FOLDS)
    predicted = np.full(len(w.y), -1)
    for number in range(_N_FOLDS):
        test, val = lab & (fold == number), lab & (fold == (number + 1) % _N_FOLDS)
        train = lab & ~test & ~val
        if not (test.any() and val.any() and train.any()):
            return _build_unanswered(name, question, "macro-F1", "fewer than five sessions")
        model = registry.create("elapsed_time").fit(part(train), part(val))
        predicted[test] = model.predict(part(test).inputs)
    return _build_phase_result(name, question, w, lab, predicted, 1 / len(np.unique(w.y[lab])) + _MAX_ABOVE_CHANCE)


def _probe_phase_from_levels(w: LeakageWindows, lab: NDArray[np.bool_]) -> LeakageResult:
    name, question = "phase-from-levels", "The phase, from the cumulative totals that are no channels."
    predicted = _predict_classes_out_of_fold(w.levels, w.y, w.session[w.episode_index], lab)
    if predicted is None:
        return _build_unanswered(name, question, "macro-F1", "fewer than five sessions")
    return _build_phase_result(name, question, w, lab, predicted, None)


def _build_phase_result(
    name: str,
    question: str,
    w: LeakageWindows,
    rows: NDArray[np.bool_],
    predicted: NDArray[np.int64],
    limit: float | None,
) -> LeakageResult:
    score, chance = _compute_macro_f1_and_chance(w.y[rows], predicted[rows])
    words = f"{int(rows.sum()):,} windows of {len(np.unique(w.episode_index[rows]))} lab episodes"
    return LeakageResult(
        name=name, question=question, value=score, unit="macro-F1", chance=chance, limit=limit, words=words
    )


def _probe_time_from_features(w: LeakageWindows, lab: NDArray[np.bool_]) -> LeakageResult:
    question = "How late it is in a benign idle episode, from the features."
    return _probe_time(w, _find_idle_rows(w), "elapsed-time-from-idle", question)


def _find_idle_rows(w: LeakageWindows) -> NDArray[np.bool_]:
    """Mark the windows of idle episodes that are no later than a lab episode lasts.

    No phase is learnt from later windows. A model of shorter episodes cannot place a soak episode of ten minutes in
    time, which would hide how well it places all others.
    """
    lab = w.length_s[w.role == "lab"]
    longest = float(lab.max()) if len(lab) else np.inf
    rows: NDArray[np.bool_] = w.is_idle[w.episode_index] & (w.t_s <= longest)
    return rows


def _probe_time_from_later_features(w: LeakageWindows, lab: NDArray[np.bool_]) -> LeakageResult:
    """Probe without the first step of every episode: the guest clears its scratch folder and syncs."""
    return _probe_time(
        w,
        _find_idle_rows(w) & (w.t_s > _STARTUP_S),
        "elapsed-time-from-idle-later",
        f"The same, of windows whose middle is later than {_STARTUP_S:g} s.",
    )


def _probe_time(w: LeakageWindows, idle: NDArray[np.bool_], name: str, question: str) -> LeakageResult:
    episodes = np.unique(w.episode_index[idle])
    if len(episodes) < _MIN_GROUPS:
        return _build_unanswered(name, question, "rank correlation", f"{len(episodes)} idle episodes")
    predicted = _predict_values_out_of_fold(w.x[idle], w.t_s[idle], w.episode_index[idle])
    value = float(_compute_spearman(predicted[:, None], w.t_s[idle])[0])
    words = f"{int(idle.sum()):,} windows of {len(episodes)} idle episodes"
    if value >= _MAX_IDLE_CORRELATION:
        drift = _correlate_within_episodes(w, idle)
        order = np.argsort(-np.abs(drift), kind="stable")[:_MAX_SUSPECTS]
        named = ", ".join(f"{w.names[i]} {drift[i]:+.2f}" for i in order)
        words += f"; above {_MAX_IDLE_CORRELATION:.2f}, so the suspects, by rank correlation within episodes: {named}"
    return LeakageResult(
        name=name, question=question, value=value, unit="rank correlation", chance=0.0, limit=None, words=words
    )


def _correlate_within_episodes(w: LeakageWindows, idle: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Compute each feature's mean rank correlation with time within idle episodes, ``(f,)``."""
    found = [
        _compute_spearman(w.x[rows], w.t_s[rows])
        for rows in (idle & (w.episode_index == e) for e in np.unique(w.episode_index[idle]))
    ]
    return np.asarray(np.mean(found, axis=0), np.float64)


def _probe_time_from_one_feature(w: LeakageWindows, lab: NDArray[np.bool_]) -> LeakageResult:
    name, question = "elapsed-time-from-one-feature", "How late it is in a benign idle episode, from any one feature."
    idle = _find_idle_rows(w)
    if len(np.unique(w.episode_index[idle])) < _MIN_GROUPS:
        return _build_unanswered(name, question, "rank correlation", "too few idle episodes", _MAX_SINGLE_FEATURE)
    found = np.abs(_compute_spearman(w.x[idle], w.t_s[idle]))
    best = int(np.argmax(found))
    return LeakageResult(
        name=name,
        question=question,
        value=float(found[best]),
        unit="rank correlation",
        chance=0.0,
        limit=_MAX_SINGLE_FEATURE,
        words=f"the strongest of {len(w.names)} is {w.names[best]}",
    )


def _probe_host_from_features(w: LeakageWindows, lab: NDArray[np.bool_]) -> LeakageResult:
    name, question = "host-from-features", "On which host a window was recorded, from all features."
    hosts, codes = np.unique(w.host, return_inverse=True)
    predicted = (
        _predict_classes_out_of_fold(w.x, codes[w.episode_index], w.session[w.episode_index], lab)
        if len(hosts) > 1
        else None
    )
    if predicted is None:
        return _build_unanswered(name, question, "accuracy", "one host, or fewer than five sessions")
    truth = codes[w.episode_index][lab]
    value = float(np.mean(predicted[lab] == truth))
    return LeakageResult(
        name=name,
        question=question,
        value=value,
        unit="accuracy",
        chance=float(np.bincount(truth).max() / len(truth)),
        limit=None,
        words=f"{len(hosts)} hosts; chance is always naming the most frequent one",
    )


def _probe_host_from_one_feature(w: LeakageWindows, lab: NDArray[np.bool_]) -> LeakageResult:
    name, question = "host-from-one-feature", "On which host a window was recorded, from any one feature."
    hosts, codes = np.unique(w.host, return_inverse=True)
    fold = _assign_group_folds(w.session[w.episode_index], _N_FOLDS)
    if len(hosts) < 2 or not all((lab & (fold == number)).any() for number in range(_N_FOLDS)):
        return _build_unanswered(
            name, question, "balanced accuracy", "one host, or fewer than five sessions", _MAX_SINGLE_FEATURE
        )
    truth = codes[w.episode_index]
    each = [_score_single_feature(w.x[lab, i], truth[lab], fold[lab], len(hosts)) for i in range(w.x.shape[1])]
    best = int(np.argmax(each))
    return LeakageResult(
        name=name,
        question=question,
        value=each[best],
        unit="balanced accuracy",
        chance=1 / len(hosts),
        limit=_MAX_SINGLE_FEATURE,
        words=f"the strongest of {len(w.names)} is {w.names[best]}",
    )


def _score_single_feature(x: Float32Array, truth: NDArray[np.int64], fold: NDArray[np.int64], k: int) -> float:
    """Compute the balanced accuracy of the best guess from one feature ``(n,)``.

    The feature is cut into bins of equal frequency; a missing value is a bin too.
    """
    hit, total = np.zeros(k), np.zeros(k)
    for number in range(_N_FOLDS):
        test = fold == number
        known = x[~test & np.isfinite(x)]
        edges = (
            np.unique(np.quantile(known, np.linspace(0, 1, _N_QUANTILE_BINS + 1)[1:-1])) if len(known) else np.zeros(0)
        )
        cell = np.where(np.isfinite(x), np.searchsorted(edges, x), _N_QUANTILE_BINS)
        counts = np.zeros((_N_QUANTILE_BINS + 1, k))
        np.add.at(counts, (cell[~test], truth[~test]), 1.0)
        answer = (counts / np.maximum(counts.sum(axis=0), 1)).argmax(axis=1)
        np.add.at(hit, truth[test], answer[cell[test]] == truth[test])
        np.add.at(total, truth[test], 1.0)
    return float(np.mean(hit[total > 0] / total[total > 0]))


def _probe_length_against_profile(w: LeakageWindows, lab: NDArray[np.bool_]) -> LeakageResult:
    name, question = "length-against-profile", "Whether an episode's length tells its profile."
    is_lab = w.role == "lab"
    names, codes = np.unique(w.profile[is_lab], return_inverse=True)
    length = w.length_s[is_lab]
    if len(names) < 2 or len(length) <= len(names) or float(np.ptp(length)) == 0:
        return _build_unanswered(name, question, "share of variance", "one profile, or one length")
    value = _compute_eta_squared(length, codes)
    rng = np.random.default_rng(0)
    drawn = np.array([_compute_eta_squared(length, rng.permutation(codes)) for _ in range(_N_PERMUTATIONS)])
    p = (1 + int((drawn >= value).sum())) / (_N_PERMUTATIONS + 1)
    # Chance exceeds the limit in one corpus of a hundred.
    return LeakageResult(
        name=name,
        question=question,
        value=value,
        unit="share of variance",
        chance=float(drawn.mean()),
        limit=float(np.quantile(drawn, 1 - _PERMUTATION_ALPHA)),
        words=f"{len(length)} lab episodes, permutation p = {p:.2f}",
    )


def _compute_eta_squared(values: NDArray[np.float64], codes: NDArray[np.int64]) -> float:
    """Compute eta squared, the share of the variance between groups, from ``(n,)`` values and group codes."""
    count = np.bincount(codes)
    means = np.bincount(codes, values) / np.maximum(count, 1)
    return float((count * (means - values.mean()) ** 2).sum() / ((values - values.mean()) ** 2).sum())


def _probe_neighbour_from_wait(w: LeakageWindows, lab: NDArray[np.bool_]) -> LeakageResult:
    name, question = "neighbour-from-wait", "The phase of the VM beside it, from a VM's own waiting for a core."
    columns = [i for i, feature in enumerate(w.names) if feature.startswith("proc.vcpu_wait.")]
    other = _find_neighbour_windows(w)
    rows = lab & (other >= 0)
    beside = np.where(other >= 0, w.y[np.maximum(other, 0)], 0)
    predicted = (
        _predict_classes_out_of_fold(w.x[:, columns], beside, w.session[w.episode_index], rows)
        if columns and rows.any()
        else None
    )
    if predicted is None:
        return _build_unanswered(name, question, "macro-F1", "too few sessions of two")
    score, chance = _compute_macro_f1_and_chance(beside[rows], predicted[rows])
    return LeakageResult(
        name=name,
        question=question,
        value=score,
        unit="macro-F1",
        chance=chance,
        limit=None,
        words=f"{int(rows.sum()):,} windows of {len(np.unique(w.episode_index[rows]))} episodes that had a neighbour",
    )


def _find_neighbour_windows(w: LeakageWindows) -> NDArray[np.int64]:
    """Return the index of the neighbour's nearest window within half a stride, ``(n,)``; −1 without."""
    reach_ns = BIN_NS * STRIDE_BINS // 2
    found = np.full(len(w.y), -1)
    for session in np.unique(w.session):
        members = np.flatnonzero(w.session == session)
        if len(members) != 2:
            continue
        a, b = (np.flatnonzero(w.episode_index == member) for member in members)
        for mine, theirs in ((a, b), (b, a)):
            if not (len(mine) and len(theirs)):
                continue
            right = np.clip(np.searchsorted(w.t_ns[theirs], w.t_ns[mine]), 0, len(theirs) - 1)
            left = np.maximum(right - 1, 0)
            gap = np.abs(np.stack([w.t_ns[theirs[left]], w.t_ns[theirs[right]]]) - w.t_ns[mine])
            nearest = np.where(gap[0] <= gap[1], theirs[left], theirs[right])
            found[mine] = np.where(gap.min(axis=0) <= reach_ns, nearest, -1)
    return found


def _build_unanswered(name: str, question: str, unit: str, why: str, limit: float | None = None) -> LeakageResult:
    return LeakageResult(
        name=name, question=question, value=float("nan"), unit=unit, chance=None, limit=limit, words=f"not asked: {why}"
    )


_LEAKAGE_PROBES: Mapping[str, Callable[[LeakageWindows, NDArray[np.bool_]], LeakageResult]] = {
    "phase-from-elapsed-time": _probe_phase_from_time,
    "phase-from-levels": _probe_phase_from_levels,
    "elapsed-time-from-idle": _probe_time_from_features,
    "elapsed-time-from-idle-later": _probe_time_from_later_features,
    "elapsed-time-from-one-feature": _probe_time_from_one_feature,
    "host-from-features": _probe_host_from_features,
    "host-from-one-feature": _probe_host_from_one_feature,
    "length-against-profile": _probe_length_against_profile,
    "neighbour-from-wait": _probe_neighbour_from_wait,
}


def render_leakage(leaks: Sequence[LeakageResult]) -> list[tuple[str, str, str, str]]:
    """Render table rows: question, figure, limit or chance, details."""
    rows = []
    for leak in leaks:
        figure = "—" if np.isnan(leak.value) else f"{leak.value:.2f} {leak.unit}"
        against = [f"limit {leak.limit:.2f}"] if leak.limit is not None else []
        against += [f"chance {leak.chance:.2f}"] if leak.chance is not None else []
        rows.append((leak.question, figure, ", ".join(against), leak.words))
    return rows


_LEAKAGE_CHANNEL_SET = "realistic"
_MAX_EPISODES = 600  # a larger store is sampled by session: the probes need no more


def read_leakage_windows(run: Path) -> LeakageWindows:
    """Read the windows of a run's usable episodes; a large store is sampled.

    Raises:
        RunError: If the run has no validation results, no bins, or no usable window.
    """
    usable = {(v.host_id, v.episode_id) for v in read_index(run / VALIDATION_FILE) if v.status in USABLE_STATUSES}
    grids = open_bins(run / BINS_DIR)
    return _build_leakage_windows(
        grids, _sample_rows([row for row in grids.rows if (row.host_id, row.episode_id) in usable])
    )


def _sample_rows(rows: list[BinIndexRow]) -> list[BinIndexRow]:
    if len(rows) <= _MAX_EPISODES:
        return rows
    by_hash = sorted(rows, key=lambda row: (sha256(row.session.encode()).digest(), row.episode_id))
    kept = {row.session for row in by_hash[:_MAX_EPISODES]}
    return [row for row in rows if row.session in kept]


def _build_leakage_windows(grids: MappedBins, rows: list[BinIndexRow]) -> LeakageWindows:
    """Build the windows of known phase.

    Raises:
        RunError: If there is none.
    """
    known = np.repeat(build_channel_mask(_LEAKAGE_CHANNEL_SET), len(STATS))
    x, levels, y, t_s, t_ns, of = [], [], [], [], [], []
    kept: list[BinIndexRow] = []
    for row in rows:
        table = build_window_table(row, np.asarray(grids.episode_bins(row)))
        is_known = table.phase >= 0
        if not is_known.any():
            continue
        x.append(table.stats[is_known][:, known])
        levels.append(_compute_level_means(np.asarray(grids.episode_levels(row)), len(table.phase))[is_known])
        y.append(table.phase[is_known].astype(np.int64))
        t_s.append(table.center_s[is_known].astype(np.float64))
        t_ns.append(table.center_ns[is_known])
        of.append(np.full(int(is_known.sum()), len(kept), np.int64))
        kept.append(row)
    if not kept:
        raise RunError("no usable episode of this run has a window of known phase; leakage cannot be probed")
    return LeakageWindows(
        x=np.concatenate(x),
        levels=np.concatenate(levels),
        y=np.concatenate(y),
        t_s=np.concatenate(t_s),
        t_ns=np.concatenate(t_ns),
        episode_index=np.concatenate(of),
        names=tuple(name for name, is_in in zip(stat_names(), known, strict=True) if is_in),
        host=np.array([row.host_id for row in kept]),
        session=np.array([f"{row.host_id}/{row.session}" for row in kept]),
        profile=np.array([row.profile for row in kept]),
        role=np.array([str(row.role) for row in kept]),
        is_idle=np.array([row.sample_kind is SampleKind.BENIGN and row.sample_name in IDLE_SAMPLES for row in kept]),
        length_s=np.array([row.n_bins * BIN_NS / 1e9 for row in kept]),
    )


def _compute_level_means(levels: np.ndarray, w: int) -> np.ndarray:
    """Compute the mean of each level over each window, ``(n_bins, l)`` → ``(w, l)``; NaN where never known."""
    total, count = np.zeros((w, len(LEVEL_CHANNELS))), np.zeros((w, len(LEVEL_CHANNELS)))
    for row in range(WINDOW_BINS):
        part = levels[row : row + STRIDE_BINS * w : STRIDE_BINS][:w]
        is_known = np.isfinite(part)
        total += np.where(is_known, part, 0.0)
        count += is_known
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0).astype(np.float32)
