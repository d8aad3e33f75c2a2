"""Checks of shortcuts that a corpus teaches: `splices`, `load` and `idle`, one row per model and number.

The rows of every model are kept; the model of the headline decides the check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.artifacts import PREDICTIONS_FILE, RunEpisode, read_run_episodes
from phasewatch.audit.checks import AuditCheck, AuditRow, AuditSubject, CheckOutcome, build_untested_check
from phasewatch.audit.shortcuts import (
    MAX_AUC_DROP,
    MAX_RECALL_DROP,
    MIN_IDLE_CLEAN,
    MIN_IDLE_QUIET,
    AnsweredWindows,
    SpliceGroup,
    Stratum,
    measure_idle,
    measure_load_gaps,
    measure_splices,
)
from phasewatch.errors import RunError
from phasewatch.evaluation.metric_table import HeadlineKey
from phasewatch.models.registry import BASELINE_MODELS
from phasewatch.models.smoothing import SMOOTHING_NONE
from phasewatch.profiles import IDLE_SAMPLES
from phasewatch.training.experiment import Experiment
from phasewatch.training.grids import REPEATED_RECIPES
from phasewatch.training.predictions import PROBABILITY_COLUMNS, read_predictions
from phasewatch.types import BENIGN_PROFILE, Phase

__all__ = [
    "IDLE_CHECK",
    "LOAD_CHECK",
    "SHORTCUT_BASELINES",
    "SPLICE_CHECK",
    "RunPredictions",
    "SpliceAnswers",
    "build_idle_check",
    "build_load_check",
    "build_splice_check",
    "check_shortcuts",
    "list_subjects",
]

SPLICE_CHECK, LOAD_CHECK, IDLE_CHECK = "splices", "load", "idle"
SHORTCUT_BASELINES = ("load_only", "duration_only", "elapsed_time")

_SPLICE_PROMISE = (
    "The headline's model does not take what lasts for benign: with durations exchanged, the AUC of p(active) falls by "
    f"at most {MAX_AUC_DROP:.2f} and the recall of long activity by at most {MAX_RECALL_DROP:.2f}, or by no more than "
    "chance explains."
)
_LOAD_PROMISE = (
    "The headline's model scores above rules that know only whether a load runs, how long it has run, or the time; in "
    "windows with and without a load, too."
)
_IDLE_PROMISE = (
    "The headline's model calls idle clean machines quiet in at least "
    f"{MIN_IDLE_QUIET:.0%} of windows. Called clean in less than {MIN_IDLE_CLEAN:.0%}, its five-phase scores are "
    "withdrawn."
)
_PROMISES = {SPLICE_CHECK: _SPLICE_PROMISE, LOAD_CHECK: _LOAD_PROMISE, IDLE_CHECK: _IDLE_PROMISE}
_TEXT_COLUMNS = (
    "recipe",
    "fold",
    "model",
    "table",
    "part",
    "agent",
    "episode_id",
    "session",
    "host_id",
    "profile",
    "sample_name",
)
_PARTS = ("test", "soak", "idle")
_RECIPES = REPEATED_RECIPES[::-1]  # that hold out a host; the harder one first
_PURE = 1.0  # purity of a window that lies in one phase

# Returns the output for the counterfactual windows of some test episodes, or None where the model cannot be asked.
SpliceAnswers = Callable[[Experiment, Sequence[RunEpisode]], "AnsweredWindows | None"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunPredictions:
    """Unsmoothed predictions of one channel set, for the recipes that hold out a host.

    Attributes:
        texts: Column → ``(n,)`` text.
        seed, t_center_ns, y: ``(n,)`` int64.
        purity: ``(n,)`` float32.
        p: ``(n, 5)`` probabilities.
    """

    texts: Mapping[str, NDArray[np.object_]]
    seed: NDArray[np.int64]
    t_center_ns: NDArray[np.int64]
    y: NDArray[np.int64]
    purity: NDArray[np.float32]
    p: NDArray[np.float64]

    @classmethod
    def from_table(cls, table: Any, channel_set: str) -> RunPredictions:
        """Select the rows of the merged predictions, a pyarrow table, that the checks need."""
        import pyarrow as pa
        import pyarrow.compute as pc

        rows = table.filter(
            pc.and_(
                pc.and_(pc.equal(table["threat"], channel_set), pc.equal(table["filter"], SMOOTHING_NONE)),
                pc.and_(
                    pc.is_in(table["recipe"], pa.array(sorted(_RECIPES), pa.string())),
                    pc.is_in(table["part"], pa.array(sorted(_PARTS), pa.string())),
                ),
            )
        )
        return cls(
            texts={name: _decode(rows[name]) for name in _TEXT_COLUMNS},
            seed=rows["seed"].to_numpy().astype(np.int64),
            t_center_ns=rows["t_center_ns"].to_numpy().astype(np.int64),
            y=rows["y_true"].to_numpy().astype(np.int64),
            purity=rows["purity"].to_numpy().astype(np.float32),
            p=np.column_stack([rows[name].to_numpy().astype(np.float64) for name in PROBABILITY_COLUMNS]),
        )

    def list_episodes(self, part: str) -> set[str]:
        """Return the ids of the episodes with windows in a part."""
        return set(self.texts["episode_id"][self.texts["part"] == part].tolist())

    def find(self, part: str, recipe: str, model: str, table: str | None) -> NDArray[np.intp]:
        """Return the rows of a part and model, ordered by seed, episode and time; any input with None."""
        marks = (self.texts["part"] == part) & (self.texts["recipe"] == recipe) & (self.texts["model"] == model)
        if table is not None:
            marks &= self.texts["table"] == table
        at = np.flatnonzero(marks)
        order = np.lexsort((self.t_center_ns[at], self.texts["episode_id"][at].astype(str), self.seed[at]))
        return at[order]

    def find_idle(self, subject: AuditSubject) -> NDArray[np.intp]:
        """Return the rows of a model about idle clean machines of the hosts that the row's fold holds out.

        They are the idle test and soak episodes and the baseline episodes, in any part.
        """
        own = (
            (self.texts["recipe"] == subject.recipe)
            & (self.texts["model"] == subject.model)
            & (self.texts["table"] == subject.input)
        )
        is_idle = (self.texts["profile"] == BENIGN_PROFILE) & np.isin(self.texts["sample_name"], IDLE_SAMPLES)
        tested = own & (self.texts["part"] == "test")
        pairs = set(zip(self.texts["fold"][tested].tolist(), self.texts["host_id"][tested].tolist(), strict=True))
        at = np.flatnonzero(own & is_idle & (self.y == Phase.CLEAN.code))
        of = zip(self.texts["fold"][at].tolist(), self.texts["host_id"][at].tolist(), strict=True)
        kept: NDArray[np.intp] = at[np.fromiter((pair in pairs for pair in of), np.bool_, len(at))]
        return kept

    def take(self, at: NDArray[np.intp], group: NDArray[np.object_] | None = None) -> AnsweredWindows:
        """Return the windows of some rows, in their order."""
        empty = np.full(len(at), "", dtype=object)
        return AnsweredWindows(
            host=self.texts["host_id"][at],
            session=self.texts["session"][at],
            episode=self.texts["episode_id"][at],
            y=self.y[at],
            p=self.p[at],
            group=empty if group is None else group,
        )


def _decode(column: Any) -> NDArray[np.object_]:
    """Decode a pyarrow column of text; a run's millions of rows hold few distinct texts."""
    encoded = column.combine_chunks().dictionary_encode()
    values = np.array([*encoded.dictionary.to_pylist(), ""], dtype=object)
    decoded: NDArray[np.object_] = values[encoded.indices.to_numpy(zero_copy_only=False)]
    return decoded


def list_subjects(
    predictions: RunPredictions, key: HeadlineKey, order: Sequence[str] = _RECIPES
) -> tuple[AuditSubject, ...]:
    """List each model and input that is not a baseline, on the first recipe in order with its test predictions.

    The headline's model comes first.
    """
    is_test = predictions.texts["part"] == "test"
    names = ("recipe", "model", "table")
    found = set(zip(*(predictions.texts[name][is_test].tolist() for name in names), strict=True))
    subjects: dict[tuple[str, str], AuditSubject] = {}
    for recipe, model, table in sorted(found, key=lambda row: (order.index(row[0]), row)):
        if model not in (*BASELINE_MODELS, *SHORTCUT_BASELINES):
            subjects.setdefault(
                (model, table), AuditSubject(recipe=recipe, channel_set=key.channel_set, model=model, input=table)
            )
    return tuple(sorted(subjects.values(), key=lambda s: (not _is_headline(s, key), s.model, s.input)))


def _is_headline(subject: AuditSubject, key: HeadlineKey) -> bool:
    return (subject.model, subject.input) == (key.model, key.input)


def check_shortcuts(run: Path, key: HeadlineKey, answers: SpliceAnswers) -> tuple[AuditCheck, ...]:
    """Check every model of the headline's channel set for the shortcuts `splices`, `load` and `idle`.

    Args:
        run: A run with predictions.
        key: The headline.
        answers: Predicts the counterfactual windows of the test episodes of an experiment.
    """
    checks: dict[str, AuditCheck] = {}
    try:
        predictions = RunPredictions.from_table(read_predictions(run / PREDICTIONS_FILE), key.channel_set)
        episodes = {e.episode_id: e for e in read_run_episodes(run, only=predictions.list_episodes("test"))}
        checks[LOAD_CHECK] = build_load_check(predictions, {i: e.has_load for i, e in episodes.items()}, key)
        checks[IDLE_CHECK] = build_idle_check(predictions, key)
        checks[SPLICE_CHECK] = build_splice_check(predictions, episodes, key, answers)
    except RunError as error:
        for name, promise in _PROMISES.items():
            checks.setdefault(name, build_untested_check(name, promise, str(error)))
    return tuple(checks[name] for name in _PROMISES)


def build_load_check(predictions: RunPredictions, loads: Mapping[str, bool | None], key: HeadlineKey) -> AuditCheck:
    """Check every model against the baselines that know only a load or the time (`measure_load_gaps`).

    Args:
        predictions: Predictions of the test windows.
        loads: Whether a benign load ran in each test episode; None if the run does not know.
        key: The headline.
    """
    rows: list[AuditRow] = []
    reasons: list[str] = []
    for subject in list_subjects(predictions, key, _order_by_baselines(predictions)):
        at = _select_agent(predictions, predictions.find("test", subject.recipe, subject.model, subject.input), key)
        seeds = np.unique(predictions.seed[at])
        first = at[predictions.seed[at] == seeds[0]]
        windows = predictions.take(first, _list_strata(loads, predictions.texts["episode_id"][first]))
        own = [_decide(predictions, at, seed) for seed in seeds]
        others, missing = _align_baselines(predictions, subject, first)
        if missing and _is_headline(subject, key):
            reasons.append(f"{subject.recipe} has no predictions of {', '.join(missing)} on these windows")
        if any(len(one) != len(first) for one in own):
            continue  # seeds on other folds: the training did not finish
        rows += measure_load_gaps(subject, windows, own, others, is_headline=_is_headline(subject, key))
    if not any(row.stratum for row in rows if row.is_headline):
        reasons.append("the run does not know which windows had a load")
    return _conclude(LOAD_CHECK, _LOAD_PROMISE, rows, reasons, _describe_load)


def _order_by_baselines(predictions: RunPredictions) -> tuple[str, ...]:
    """Return the recipes, those with the most baselines first; of equals the harder one."""
    is_test = predictions.texts["part"] == "test"
    found = set(zip(predictions.texts["recipe"][is_test], predictions.texts["model"][is_test], strict=True))
    return tuple(sorted(_RECIPES, key=lambda recipe: -sum((recipe, name) in found for name in SHORTCUT_BASELINES)))


def _select_agent(predictions: RunPredictions, at: NDArray[np.intp], key: HeadlineKey) -> NDArray[np.intp]:
    """Select the rows with the headline's agent state; all rows if there are none."""
    kept = at[predictions.texts["agent"][at] == key.agent]
    return kept if len(kept) else at


def _decide(predictions: RunPredictions, at: NDArray[np.intp], seed: int) -> NDArray[np.int64]:
    decided: NDArray[np.int64] = predictions.p[at[predictions.seed[at] == seed]].argmax(axis=1)
    return decided


def _list_strata(loads: Mapping[str, bool | None], episode_ids: NDArray[np.object_]) -> NDArray[np.object_]:
    """Return the `Stratum` of each window, ``(n,)`` text; empty where the load of its episode is not known."""
    names = {None: "", True: str(Stratum.WITH_LOAD), False: str(Stratum.WITHOUT_LOAD)}
    return np.array([names[loads[i]] for i in episode_ids], dtype=object)


def _align_baselines(
    predictions: RunPredictions, subject: AuditSubject, windows: NDArray[np.intp]
) -> tuple[dict[str, list[NDArray[np.int64]]], list[str]]:
    """Return the decisions of each baseline on the same windows, one array per seed, and the baselines without them."""
    ids = _window_keys(predictions, windows)
    found: dict[str, list[NDArray[np.int64]]] = {}
    missing = []
    for name in SHORTCUT_BASELINES:
        at = predictions.find("test", subject.recipe, name, None)
        of_seed = []
        for seed in np.unique(predictions.seed[at]):
            own = at[predictions.seed[at] == seed]
            index = dict(zip(_window_keys(predictions, own), own.tolist(), strict=True))
            if all(window in index for window in ids):
                places = np.array([index[window] for window in ids], np.intp)
                of_seed.append(predictions.p[places].argmax(axis=1).astype(np.int64))
        if of_seed:
            found[name] = of_seed
        else:
            missing.append(name)
    return found, missing


def _window_keys(predictions: RunPredictions, at: NDArray[np.intp]) -> list[tuple[str, int]]:
    return list(zip(predictions.texts["episode_id"][at].tolist(), predictions.t_center_ns[at].tolist(), strict=True))


def build_idle_check(predictions: RunPredictions, key: HeadlineKey) -> AuditCheck:
    """Check how every model calls the windows of idle clean machines (`measure_idle`)."""
    rows: list[AuditRow] = []
    for subject in list_subjects(predictions, key):
        at = _select_agent(predictions, predictions.find_idle(subject), key)
        if len(at):
            rows += measure_idle(subject, predictions.take(at), is_headline=_is_headline(subject, key))
    reasons = [] if any(row.is_headline for row in rows) else ["the run has no idle clean windows of the test hosts"]
    return _conclude(IDLE_CHECK, _IDLE_PROMISE, rows, reasons, _describe_idle)


def build_splice_check(
    predictions: RunPredictions, episodes: Mapping[str, RunEpisode], key: HeadlineKey, answers: SpliceAnswers
) -> AuditCheck:
    """Check every model on counterfactual sequences (`measure_splices`); of several seeds, on the lowest.

    Args:
        predictions: Predictions of the real test windows.
        episodes: Test episodes by id.
        key: The headline.
        answers: Predicts the counterfactual windows of the test episodes of an experiment.
    """
    rows: list[AuditRow] = []
    for subject in list_subjects(predictions, key):
        at = predictions.find("test", subject.recipe, subject.model, subject.input)
        at = at[predictions.seed[at] == predictions.seed[at].min()]
        parts = list(_score_splices(predictions, at, subject, episodes, answers))
        if parts:
            rows += measure_splices(subject, AnsweredWindows.concatenate(parts), is_headline=_is_headline(subject, key))
    reasons = [] if any(row.is_headline for row in rows) else ["no counterfactual could be built, or no model be asked"]
    return _conclude(SPLICE_CHECK, _SPLICE_PROMISE, rows, reasons, _describe_splices)


def _score_splices(
    predictions: RunPredictions,
    at: NDArray[np.intp],
    subject: AuditSubject,
    episodes: Mapping[str, RunEpisode],
    answers: SpliceAnswers,
) -> Iterator[AnsweredWindows]:
    """Yield the counterfactual windows of each fold, and the real windows of the episodes that they were made of."""
    for fold in sorted(set(predictions.texts["fold"][at].tolist())):
        rows = at[predictions.texts["fold"][at] == fold]
        experiment = Experiment(
            recipe=subject.recipe,
            fold=fold,
            threat=subject.channel_set,
            model=subject.model,
            table=subject.input,
            seed=int(predictions.seed[rows[0]]),
        )
        ids = sorted(set(predictions.texts["episode_id"][rows].tolist()))
        spliced = answers(experiment, [episodes[i] for i in ids])
        if spliced is None or not len(spliced):
            continue
        yield spliced
        yield _select_real(predictions, rows, spliced)


def _select_real(predictions: RunPredictions, rows: NDArray[np.intp], spliced: AnsweredWindows) -> AnsweredWindows:
    """Select the pure windows of the same activity and load in the episodes that counterfactuals were made of."""
    group = np.full(len(rows), "", dtype=object)
    ids, is_pure = predictions.texts["episode_id"][rows], predictions.purity[rows] >= _PURE
    for kinds, phase, name in (
        ((SpliceGroup.LONG_ACTIVITY, SpliceGroup.SHORT_ACTIVITY), Phase.ACTIVE, SpliceGroup.REAL_ACTIVITY),
        ((SpliceGroup.SHORT_LOAD,), Phase.CLEAN, SpliceGroup.REAL_LOAD),
    ):
        sources = set(spliced.episode[np.isin(spliced.group, [str(kind) for kind in kinds])].tolist())
        is_source = np.array([i in sources for i in ids.tolist()], np.bool_)
        group[is_source & is_pure & (predictions.y[rows] == phase.code)] = str(name)
    kept = group != ""
    return predictions.take(rows[kept], group[kept])


def _conclude(
    name: str,
    promise: str,
    rows: Sequence[AuditRow],
    reasons: Sequence[str],
    describe: Callable[[Sequence[AuditRow]], str],
) -> AuditCheck:
    """Build the check from its rows: the headline's model decides, and what it was not asked leaves it untested."""
    own = [row for row in rows if row.is_headline and row.limit is not None and row.metric not in _WITHDRAWING]
    fate = CheckOutcome.KEPT
    if any(row.holds is False for row in own):
        fate = CheckOutcome.BROKEN
    elif reasons or any(row.holds is None for row in own):
        fate = CheckOutcome.UNTESTED
    others = {(row.model, row.input) for row in rows if not row.is_headline}
    failing = sorted({f"{r.model} ({r.input})" for r in rows if not r.is_headline and r.holds is False})
    unasked = sorted({f"{r.metric}: {r.note}" for r in own if r.holds is None and r.note})
    words = [describe([row for row in rows if row.is_headline]), *reasons, *unasked]
    if others:
        words.append(f"{len(others)} other models asked" + (f", of which {', '.join(failing)} fail" if failing else ""))
    return AuditCheck(name=name, promise=promise, fate=fate, words="; ".join(filter(None, words)), rows=tuple(rows))


_WITHDRAWING = ("idle_called_clean",)  # withdraws a number and breaks no promise


def _describe_splices(rows: Sequence[AuditRow]) -> str:
    of = {row.metric: row for row in rows}
    if not of:
        return ""
    parts = (
        f"{words} {of[f'{name}_real'].rendered_value} real and {of[f'{name}_counterfactual'].rendered_value} spliced"
        for name, words in (
            ("splice_auc", "AUC of p(active)"),
            ("splice_recall", "recall of active (long)"),
            ("splice_false_activity", "busy benign called active"),
        )
    )
    return f"{rows[0].model} ({rows[0].input}): {', '.join(parts)}"


def _describe_load(rows: Sequence[AuditRow]) -> str:
    if not rows:
        return ""
    parts = (
        f"{row.rendered_value} above {row.compared_to}"
        + (f" {row.stratum.replace('_', ' ')} (three classes)" if row.stratum else "")
        for row in rows
    )
    return f"{rows[0].model} ({rows[0].input}), macro-F1: {', '.join(parts)}"


def _describe_idle(rows: Sequence[AuditRow]) -> str:
    of = {row.metric: row for row in rows}
    if not of:
        return ""
    quiet, clean = of["idle_called_quiet"], of["idle_called_clean"]
    words = (
        f"{quiet.model} ({quiet.input}): {quiet.n_windows} idle clean windows called quiet {quiet.rendered_value}, "
        f"clean {clean.rendered_value}"
    )
    if clean.holds is False:
        words += (
            f", below {clean.limit:.2f}: armed and dormant cannot be told from clean idle machines on this corpus, so "
            "its five-phase scores are withdrawn"
        )
    return words
