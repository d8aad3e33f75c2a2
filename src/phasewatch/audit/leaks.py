"""What a corpus gives away beside the phase: clock, host, neighbour, plan; each as one figure (pure).

A model that knows how late it is, on which host it runs or what its neighbour does can score without seeing any
malware. Every classifier here is answered out of fold, folds by session, so that no episode explains itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phasewatch.audit.outoffold import FOLDS, Floats, classify, deal, regress, scores, spearman
from phasewatch.models import registry
from phasewatch.models.base import Examples, InputKind, Inputs, InputSpec
from phasewatch.vocab import BIN_NS, STRIDE_BINS

ABOVE_CHANCE = 0.10  # of macro-F1, for the clock: 0.30 where all five phases occur (a plan's own gate is at 0.25)
MAX_IDLE_CORRELATION = 0.20  # above it a suspect is named
FIRST_STEP_S = 12.5  # two windows: what the guest did at the first label has ended
MAX_SINGLE = 0.95  # what one feature alone may tell of host or hour (DESIGN section 9, "Audit")
CELLS = 32  # of one feature, when it is asked alone
SHUFFLES = 999
CHANCE_P = 0.01
SUSPECTS = 5
FEWEST = 3  # sessions, hosts or episodes below which a question has no answer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Windows:
    """The windows of a store's usable episodes, of known phase, in order of episode and time.

    Attributes:
        x: ``(n, f)`` features that a defender has; NaN where nothing was known.
        levels: ``(n, l)`` means of the levels over each window, likewise.
        y: ``(n,)`` phase codes.
        t_s: ``(n,)`` middles, seconds since the first label.
        t_ns: ``(n,)`` the same on the wall clock.
        of: ``(n,)`` which episode.
        names: The features' names.
        host, session, profile, role: ``(e,)`` of each episode.
        is_idle: ``(e,)`` benign, and nothing but everyday life.
        length_s: ``(e,)``.
    """

    x: Floats
    levels: Floats
    y: NDArray[np.int64]
    t_s: NDArray[np.float64]
    t_ns: NDArray[np.int64]
    of: NDArray[np.int64]
    names: tuple[str, ...]
    host: NDArray[np.str_]
    session: NDArray[np.str_]
    profile: NDArray[np.str_]
    role: NDArray[np.str_]
    is_idle: NDArray[np.bool_]
    length_s: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """One question and its answer.

    Attributes:
        name: Stable, in kebab-case.
        question: What was tried.
        value: The figure; NaN where there was too little to ask, and `words` says so.
        unit: What the figure is.
        chance: What the same figure is without any leak, if that is known.
        limit: What it must not exceed; None where it is only reported.
        words: How much was looked at, and who is suspected.
    """

    name: str
    question: str
    value: float
    unit: str
    chance: float | None
    limit: float | None
    words: str

    @property
    def is_over(self) -> bool:
        """Whether the figure passes its limit."""
        return self.limit is not None and self.value > self.limit


def find_leaks(windows: Windows, only: Collection[str] = ()) -> tuple[Leak, ...]:
    """Ask a corpus every question, or only some, in a fixed order."""
    lab = windows.role[windows.of] == "lab"
    return tuple(ask(windows, lab) for name, ask in QUESTIONS.items() if not only or name in only)


def _phase_from_time(w: Windows, lab: NDArray[np.bool_]) -> Leak:
    name, question = "phase-from-elapsed-time", "The phase, from the time since the first label alone."
    spec = InputSpec(
        kind=InputKind.ELAPSED, names=("t_center_s",), mask="elapsed", schema_hash="", behaviour_fingerprint=""
    )

    def part(rows: NDArray[np.bool_]) -> Examples:
        return Examples(inputs=Inputs(x=w.t_s[rows, None].astype(np.float32), spec=spec), y=w.y[rows])

    fold = deal(w.session[w.of], FOLDS)
    said = np.full(len(w.y), -1)
    for number in range(FOLDS):
        test, val = lab & (fold == number), lab & (fold == (number + 1) % FOLDS)
        train = lab & ~test & ~val
        if not (test.any() and val.any() and train.any()):
            return _unanswered(name, question, "macro-F1", "fewer than five sessions")
        model = registry.create("elapsed_time").fit(part(train), part(val))
        said[test] = model.predict(part(test).inputs)
    return _phase_leak(name, question, w, lab, said, 1 / len(np.unique(w.y[lab])) + ABOVE_CHANCE)


def _phase_from_levels(w: Windows, lab: NDArray[np.bool_]) -> Leak:
    name, question = "phase-from-levels", "The phase, from the cumulative totals that are no channels."
    said = classify(w.levels, w.y, w.session[w.of], lab)
    if said is None:
        return _unanswered(name, question, "macro-F1", "fewer than five sessions")
    return _phase_leak(name, question, w, lab, said, None)


def _phase_leak(
    name: str, question: str, w: Windows, rows: NDArray[np.bool_], said: NDArray[np.int64], limit: float | None
) -> Leak:
    score, chance = scores(w.y[rows], said[rows])
    words = f"{int(rows.sum()):,} windows of {len(np.unique(w.of[rows]))} lab episodes"
    return Leak(
        name=name, question=question, value=score, unit="macro-F1", chance=chance, limit=limit, words=words
    )  # fmt: skip


def _time_from_features(w: Windows, lab: NDArray[np.bool_]) -> Leak:
    question = "How late it is in a benign idle episode, from the features."
    return _time_from(w, _idle_rows(w), "elapsed-time-from-idle", question)


def _idle_rows(w: Windows) -> NDArray[np.bool_]:
    """Mark the windows of idle episodes that are no later than a lab episode lasts.

    No phase is learnt later; and of one soak episode of ten minutes nothing that learnt from shorter ones tells the hour,
    which hides how well it is told of all others.
    """
    lab = w.length_s[w.role == "lab"]
    longest = float(lab.max()) if len(lab) else np.inf
    rows: NDArray[np.bool_] = w.is_idle[w.of] & (w.t_s <= longest)
    return rows


def _time_from_later_features(w: Windows, lab: NDArray[np.bool_]) -> Leak:
    """Ask again without the step that begins every episode: the guest clears its scratch folder and syncs."""
    return _time_from(
        w, _idle_rows(w) & (w.t_s > FIRST_STEP_S), "elapsed-time-from-idle-later",
        f"The same, of windows whose middle is later than {FIRST_STEP_S:g} s.",
    )  # fmt: skip


def _time_from(w: Windows, idle: NDArray[np.bool_], name: str, question: str) -> Leak:
    episodes = np.unique(w.of[idle])
    if len(episodes) < FEWEST:
        return _unanswered(name, question, "rank correlation", f"{len(episodes)} idle episodes")
    said = regress(w.x[idle], w.t_s[idle], w.of[idle])
    value = float(spearman(said[:, None], w.t_s[idle])[0])
    words = f"{int(idle.sum()):,} windows of {len(episodes)} idle episodes"
    if value >= MAX_IDLE_CORRELATION:
        drift = _within(w, idle)
        order = np.argsort(-np.abs(drift), kind="stable")[:SUSPECTS]
        named = ", ".join(f"{w.names[i]} {drift[i]:+.2f}" for i in order)
        words += f"; above {MAX_IDLE_CORRELATION:.2f}, so the suspects, by rank correlation within episodes: {named}"
    return Leak(name=name, question=question, value=value, unit="rank correlation", chance=0.0, limit=None, words=words)


def _within(w: Windows, idle: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Give each feature's mean rank correlation with the time inside idle episodes."""
    found = [spearman(w.x[rows], w.t_s[rows]) for rows in (idle & (w.of == e) for e in np.unique(w.of[idle]))]
    return np.asarray(np.mean(found, axis=0), np.float64)


def _time_from_one_feature(w: Windows, lab: NDArray[np.bool_]) -> Leak:
    name, question = "elapsed-time-from-one-feature", "How late it is in a benign idle episode, from any one feature."
    idle = _idle_rows(w)
    if len(np.unique(w.of[idle])) < FEWEST:
        return _unanswered(name, question, "rank correlation", "too few idle episodes", MAX_SINGLE)
    found = np.abs(spearman(w.x[idle], w.t_s[idle]))
    best = int(np.argmax(found))
    return Leak(
        name=name, question=question, value=float(found[best]), unit="rank correlation", chance=0.0, limit=MAX_SINGLE,
        words=f"the strongest of {len(w.names)} is {w.names[best]}",
    )  # fmt: skip


def _host_from_features(w: Windows, lab: NDArray[np.bool_]) -> Leak:
    name, question = "host-from-features", "On which host a window was recorded, from all features."
    hosts, codes = np.unique(w.host, return_inverse=True)
    said = classify(w.x, codes[w.of], w.session[w.of], lab) if len(hosts) > 1 else None
    if said is None:
        return _unanswered(name, question, "accuracy", "one host, or fewer than five sessions")
    truth = codes[w.of][lab]
    value = float(np.mean(said[lab] == truth))
    return Leak(
        name=name, question=question, value=value, unit="accuracy", chance=float(np.bincount(truth).max() / len(truth)),
        limit=None, words=f"{len(hosts)} hosts; chance is always naming the most frequent one",
    )  # fmt: skip


def _host_from_one_feature(w: Windows, lab: NDArray[np.bool_]) -> Leak:
    name, question = "host-from-one-feature", "On which host a window was recorded, from any one feature."
    hosts, codes = np.unique(w.host, return_inverse=True)
    fold = deal(w.session[w.of], FOLDS)
    if len(hosts) < 2 or not all((lab & (fold == number)).any() for number in range(FOLDS)):
        return _unanswered(name, question, "balanced accuracy", "one host, or fewer than five sessions", MAX_SINGLE)
    truth = codes[w.of]
    each = [_alone(w.x[lab, i], truth[lab], fold[lab], len(hosts)) for i in range(w.x.shape[1])]
    best = int(np.argmax(each))
    return Leak(
        name=name, question=question, value=each[best], unit="balanced accuracy", chance=1 / len(hosts),
        limit=MAX_SINGLE, words=f"the strongest of {len(w.names)} is {w.names[best]}",
    )  # fmt: skip


def _alone(x: Floats, truth: NDArray[np.int64], fold: NDArray[np.int64], k: int) -> float:
    """Score the best guess from one feature, cut into cells of equal frequency; a missing value is a cell too."""
    hit, total = np.zeros(k), np.zeros(k)
    for number in range(FOLDS):
        test = fold == number
        known = x[~test & np.isfinite(x)]
        edges = np.unique(np.quantile(known, np.linspace(0, 1, CELLS + 1)[1:-1])) if len(known) else np.zeros(0)
        cell = np.where(np.isfinite(x), np.searchsorted(edges, x), CELLS)
        counts = np.zeros((CELLS + 1, k))
        np.add.at(counts, (cell[~test], truth[~test]), 1.0)
        answer = (counts / np.maximum(counts.sum(axis=0), 1)).argmax(axis=1)
        np.add.at(hit, truth[test], answer[cell[test]] == truth[test])
        np.add.at(total, truth[test], 1.0)
    return float(np.mean(hit[total > 0] / total[total > 0]))


def _length_against_profile(w: Windows, lab: NDArray[np.bool_]) -> Leak:
    name, question = "length-against-profile", "Whether an episode's length tells its profile."
    is_lab = w.role == "lab"
    names, codes = np.unique(w.profile[is_lab], return_inverse=True)
    length = w.length_s[is_lab]
    if len(names) < 2 or len(length) <= len(names) or float(np.ptp(length)) == 0:
        return _unanswered(name, question, "share of variance", "one profile, or one length")
    value = _explained(length, codes)
    rng = np.random.default_rng(0)
    drawn = np.array([_explained(length, rng.permutation(codes)) for _ in range(SHUFFLES)])
    p = (1 + int((drawn >= value).sum())) / (SHUFFLES + 1)
    # The limit is what chance passes in one corpus of a hundred.
    return Leak(
        name=name, question=question, value=value, unit="share of variance", chance=float(drawn.mean()),
        limit=float(np.quantile(drawn, 1 - CHANCE_P)), words=f"{len(length)} lab episodes, permutation p = {p:.2f}",
    )  # fmt: skip


def _explained(values: NDArray[np.float64], codes: NDArray[np.int64]) -> float:
    """Give eta squared: the share of the variance that lies between groups."""
    count = np.bincount(codes)
    means = np.bincount(codes, values) / np.maximum(count, 1)
    return float((count * (means - values.mean()) ** 2).sum() / ((values - values.mean()) ** 2).sum())


def _neighbour_from_wait(w: Windows, lab: NDArray[np.bool_]) -> Leak:
    name, question = "neighbour-from-wait", "The phase of the VM beside it, from a VM's own waiting for a core."
    columns = [i for i, feature in enumerate(w.names) if feature.startswith("proc.vcpu_wait.")]
    other = _beside(w)
    rows = lab & (other >= 0)
    beside = np.where(other >= 0, w.y[np.maximum(other, 0)], 0)
    said = classify(w.x[:, columns], beside, w.session[w.of], rows) if columns and rows.any() else None
    if said is None:
        return _unanswered(name, question, "macro-F1", "too few sessions of two")
    score, chance = scores(beside[rows], said[rows])
    return Leak(
        name=name, question=question, value=score, unit="macro-F1", chance=chance, limit=None,
        words=f"{int(rows.sum()):,} windows of {len(np.unique(w.of[rows]))} episodes that had a neighbour",
    )  # fmt: skip


def _beside(w: Windows) -> NDArray[np.int64]:
    """Give for each window the neighbour's window whose middle is nearest, at most half a stride away; else −1."""
    reach_ns = BIN_NS * STRIDE_BINS // 2
    found = np.full(len(w.y), -1)
    for session in np.unique(w.session):
        members = np.flatnonzero(w.session == session)
        if len(members) != 2:
            continue
        a, b = (np.flatnonzero(w.of == member) for member in members)
        for mine, theirs in ((a, b), (b, a)):
            if not (len(mine) and len(theirs)):
                continue
            right = np.clip(np.searchsorted(w.t_ns[theirs], w.t_ns[mine]), 0, len(theirs) - 1)
            left = np.maximum(right - 1, 0)
            gap = np.abs(np.stack([w.t_ns[theirs[left]], w.t_ns[theirs[right]]]) - w.t_ns[mine])
            nearest = np.where(gap[0] <= gap[1], theirs[left], theirs[right])
            found[mine] = np.where(gap.min(axis=0) <= reach_ns, nearest, -1)
    return found


def _unanswered(name: str, question: str, unit: str, why: str, limit: float | None = None) -> Leak:
    return Leak(
        name=name, question=question, value=float("nan"), unit=unit, chance=None, limit=limit, words=f"not asked: {why}"
    )


QUESTIONS: Mapping[str, Callable[[Windows, NDArray[np.bool_]], Leak]] = {
    "phase-from-elapsed-time": _phase_from_time,
    "phase-from-levels": _phase_from_levels,
    "elapsed-time-from-idle": _time_from_features,
    "elapsed-time-from-idle-later": _time_from_later_features,
    "elapsed-time-from-one-feature": _time_from_one_feature,
    "host-from-features": _host_from_features,
    "host-from-one-feature": _host_from_one_feature,
    "length-against-profile": _length_against_profile,
    "neighbour-from-wait": _neighbour_from_wait,
}


def render_leaks(leaks: Sequence[Leak]) -> list[tuple[str, str, str, str]]:
    """Give a table's rows: question, figure, limit or chance, words."""
    rows = []
    for leak in leaks:
        figure = "—" if np.isnan(leak.value) else f"{leak.value:.2f} {leak.unit}"
        against = [f"limit {leak.limit:.2f}"] if leak.limit is not None else []
        against += [f"chance {leak.chance:.2f}"] if leak.chance is not None else []
        rows.append((leak.question, figure, ", ".join(against), leak.words))
    return rows
