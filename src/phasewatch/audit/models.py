"""Checks of checkpoints and predictions: retraining, predicting again, and training on permuted labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch import metrics
from phasewatch.artifacts import EXPERIMENT_FILE, PREDICTIONS_FILE, list_split_paths
from phasewatch.audit.checks import AuditCheck, build_check, build_untested_check, collect_refusals
from phasewatch.dataset import EpisodeWindows, FoldData, load, read_fold, read_folds
from phasewatch.dataset.live_windows import compute_live_digest, list_live_windows
from phasewatch.errors import UsageError
from phasewatch.evaluation import bootstrap
from phasewatch.models import checkpoint, registry
from phasewatch.models.alarm import THETA_STEP
from phasewatch.models.base import LabelledExamples, PhaseModel
from phasewatch.models.smoothing import SMOOTHING_NONE, SMOOTHING_PHASE, SMOOTHING_SCHEDULE
from phasewatch.splits import SplitPart, find_recipe
from phasewatch.training.experiment import Experiment
from phasewatch.training.live_scores import has_live_parts, predict_live_windows
from phasewatch.training.predictions import PROBABILITY_COLUMNS, PredictionPart, read_predictions
from phasewatch.training.train import compute_run_digests, find_finished_experiments, fit_model, read_experiment_data

__all__ = [
    "N_RESAMPLES",
    "PermutationPredictions",
    "check_permuted_labels",
    "check_predictions",
    "check_retrained",
    "choose_experiments",
]

_RETRAIN_CHECK = "trained-on-train-only"
_RETRAIN_PROMISE = (
    "A model trained again on train and validation alone says the same: nothing else was fitted, scaled, stopped or "
    "calibrated on."
)
_PREDICTIONS_CHECK = "predictions"
_PREDICTIONS_PROMISE = (
    "Each prediction is what the checkpoint says of a window of its fold's test set, each window once. "
    "Windows of every second are predicted again in three episodes of each fold."
)
_EXPERIMENT_COLUMNS = ("recipe", "fold", "threat", "model", "table", "seed")
_GROUP_COLUMNS = (*_EXPERIMENT_COLUMNS, "part", "filter")
_PREDICTION_COLUMNS = ("episode_id", "t_center_ns", "y_true", "y_pred", *PROBABILITY_COLUMNS)
# In a probability: one machine gives the same bits, but other CPUs sum in another order.
_PROBABILITY_TOLERANCE = 1e-3
_N_LIVE_EPISODES = 3  # whose windows of every second each checkpoint is asked again


def choose_experiments(run: Path) -> tuple[Experiment, ...]:
    """Choose one finished experiment per model and input, of a recipe that tests and does not leak.

    The channel set `realistic` is preferred.
    """
    first: dict[tuple[str, str], Experiment] = {}
    experiments = find_finished_experiments(run, compute_run_digests(run))
    for experiment in sorted(experiments, key=lambda experiment: (experiment.threat != "realistic", experiment)):
        row = find_recipe(experiment.recipe)
        if row.tests and not row.leaky:
            first.setdefault((experiment.model, experiment.table), experiment)
    return tuple(first.values())


def check_retrained(run: Path, experiments: Sequence[Experiment]) -> AuditCheck:
    """Train some experiments again and compare both models' predictions on validation A and on the test set."""
    faults: list[str] = []
    for experiment in experiments:
        with collect_refusals(faults):
            faults += _find_retrain_faults(run, experiment)
    if not experiments:
        return build_untested_check(_RETRAIN_CHECK, _RETRAIN_PROMISE, "the run has no finished cell")
    return build_check(
        _RETRAIN_CHECK, _RETRAIN_PROMISE, faults, looked_at=_describe_checked(experiments, "cells trained again")
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _MergedPredictions:
    """The merged predictions, indexed once by experiment, part and filter: a full grid has thousands of each."""

    table: Any
    rows_by_group: Mapping[tuple[object, ...], Any]

    @classmethod
    def from_table(cls, table: Any) -> _MergedPredictions:
        """Index the rows of each experiment, part and filter."""
        import pyarrow as pa

        numbered = table.select(list(_GROUP_COLUMNS)).append_column("row", pa.array(np.arange(table.num_rows)))
        groups = numbered.group_by(list(_GROUP_COLUMNS)).aggregate([("row", "list")])
        keys = zip(*(groups[name].to_pylist() for name in _GROUP_COLUMNS), strict=True)
        lists = groups["row_list"].combine_chunks()
        return cls(
            table=table.select(list(_PREDICTION_COLUMNS)).combine_chunks(),
            rows_by_group=dict(zip(keys, lists, strict=True)),
        )

    def experiment_keys(self) -> set[tuple[object, ...]]:
        """Return the keys of the experiments with rows."""
        return {key[: len(_EXPERIMENT_COLUMNS)] for key in self.rows_by_group}

    def select_rows(self, experiment: Experiment, part: str, name: str) -> Any:
        """Return the rows of an experiment, part and filter."""
        found = self.rows_by_group.get((*_build_experiment_key(experiment), part, name))
        return self.table.slice(0, 0) if found is None else self.table.take(found.values)


def check_predictions(run: Path) -> AuditCheck:
    """Predict with every checkpoint again and compare with the merged predictions.

    An experiment whose model code cannot be imported is skipped; the promise is then untested.
    """
    faults: list[str] = []
    experiments: list[Experiment] = []
    absent: set[str] = set()
    with collect_refusals(faults):
        merged = _MergedPredictions.from_table(read_predictions(run / PREDICTIONS_FILE))
        experiments = list(find_finished_experiments(run, compute_run_digests(run)))
        known = {_build_experiment_key(experiment) for experiment in experiments}
        for key in sorted(merged.experiment_keys() - known, key=str):
            if words := _describe_import_error(run, key):
                absent.add(words)
            else:
                faults.append(f"{'/'.join(map(str, key))} has predictions and no checkpoint")
        for experiment in experiments:
            with collect_refusals(faults):
                faults += _find_prediction_faults(run, experiment, merged)
    if not experiments and not faults:
        return build_untested_check(_PREDICTIONS_CHECK, _PREDICTIONS_PROMISE, "the run has no finished cell")
    looked_at = _describe_checked(experiments, "checkpoints asked again")
    if absent and not faults:
        return build_untested_check(
            _PREDICTIONS_CHECK, _PREDICTIONS_PROMISE, f"{looked_at}, but {'; '.join(sorted(absent))}"
        )
    return build_check(_PREDICTIONS_CHECK, _PREDICTIONS_PROMISE, faults, looked_at=looked_at)


def _describe_import_error(run: Path, key: tuple[object, ...]) -> str | None:
    """Return why a trained experiment's model cannot be imported; None if it can, or if nothing was trained."""
    named = dict(zip(_EXPERIMENT_COLUMNS, key, strict=True))
    experiment = msgspec.convert(named, Experiment)
    if not (experiment.folder(run) / EXPERIMENT_FILE).is_file():
        return None
    try:
        registry.load_model_class(experiment.model)
    except UsageError as error:
        return str(error)
    return None


def _describe_checked(experiments: Sequence[Experiment], done: str) -> str:
    """Describe how many experiments were checked, and of how many only the windows, their weights not loadable."""
    asked = sum(map(_is_loadable, experiments))
    kept_none = len(experiments) - asked
    return f"{asked} {done}" + (f", of {kept_none} without weights the windows compared" if kept_none else "")


def _is_loadable(experiment: Experiment) -> bool:
    """Return whether a checkpoint can be loaded; one of a model given as module:Class never is."""
    return ":" not in experiment.model and registry.find_model(experiment.model).persist == "exact"


def _find_retrain_faults(run: Path, experiment: Experiment) -> Iterator[str]:
    sets, folder = read_experiment_data(run, experiment), experiment.folder(run)
    header, _ = checkpoint.read_checkpoint(folder)
    expected = {"train": sets.train, "val_a": sets.val_a, "val_b": sets.val_b}
    soak = sets.soak.take(sets.calibration_soak)
    if header.filter is not None:
        expected |= {"decide_val": sets.val_b, "decide_soak": soak}
    digests = {part: windows.examples.sha256() for part, windows in expected.items()}
    if header.filter is not None and sets.run is not None:
        for part, windows in (("decide_val_1s", sets.val_b), ("decide_soak_1s", soak)):
            live = list_live_windows(run, windows.windows.episodes)
            digests[part] = compute_live_digest(run, live, sets.train.inputs.spec)
    for part, digest in digests.items():
        if header.trained_on.get(part) != digest:
            yield f"{folder}: its {part} windows are not those of its fold"
            return
    if not _is_loadable(experiment):
        return  # scored by the process that fitted it: there is nothing to hold a second fit against
    model = fit_model(registry.create(experiment.model, seed=header.seed, settings=header.config), sets).model
    stored = registry.load(folder)
    if not _is_same_postprocessing(model, stored):
        yield f"{folder}: trained again its filter or alarm differs; it was set by something else"
    if not _is_same_history(model.history, stored.history):
        yield f"{folder}: trained again its history differs; it was stopped by something else"
    for part, windows in (("val_a", sets.val_a), ("test", sets.test)):
        if not len(windows):
            continue
        gap = float(np.abs(model.predict_proba(windows.inputs) - stored.predict_proba(windows.inputs)).max())
        if not gap <= _PROBABILITY_TOLERANCE:
            yield f"{folder}: trained again it differs by {gap:.3f} on {part}; it was fitted on something else"


def _is_same_history(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]) -> bool:
    return ours.keys() == theirs.keys() and all(
        len(ours[name]) == len(theirs[name])
        and np.allclose(ours[name], theirs[name], rtol=_PROBABILITY_TOLERANCE, atol=_PROBABILITY_TOLERANCE)
        for name in ours
    )


def _is_same_postprocessing(ours: PhaseModel, theirs: PhaseModel) -> bool:
    """Return whether filter and alarms are equal within what the sums of another CPU may change."""
    rules = [{(rule.kind, rule.stride_s, rule.k, rule.n): rule.theta for rule in m.alarms} for m in (ours, theirs)]
    if rules[0].keys() != rules[1].keys() or (ours.filter is None) is not (theirs.filter is None):
        return False
    one, other = ours.filter, theirs.filter
    return all(abs(rules[0][key] - rules[1][key]) <= 2 * THETA_STEP for key in rules[0]) and (
        one is None
        or other is None
        or (
            one.kappa == other.kappa
            and np.allclose(one.transitions, other.transitions)
            and np.allclose(one.prior, other.prior, atol=_PROBABILITY_TOLERANCE)
        )
    )


def _find_prediction_faults(run: Path, experiment: Experiment, merged: _MergedPredictions) -> Iterator[str]:
    """Compare the rows of each filter with the checkpoint's predictions on the same windows."""
    sets, where, folder = (
        read_experiment_data(run, experiment),
        "/".join(map(str, _build_experiment_key(experiment))),
        experiment.folder(run),
    )
    part = _choose_checked_part(experiment)
    model = registry.load(folder) if _is_loadable(experiment) else None
    asked = sets.test if part == "test" else sets.val_b  # `deploy` tests nothing
    own = set(
        read_fold(run, experiment.recipe, experiment.fold).ids(SplitPart.TEST if part == "test" else SplitPart.VAL_B)
    )
    answers: dict[str, NDArray[np.float64] | None] = {SMOOTHING_NONE: None}
    if model is not None:
        answers[SMOOTHING_NONE] = model.predict_proba(asked.inputs)
    smooth, track = checkpoint.read_header(folder).filter, asked.label_sequence
    if smooth is not None:
        filters = (
            {SMOOTHING_PHASE: smooth, SMOOTHING_SCHEDULE: smooth.without_observations()}
            if part == "test"
            else {SMOOTHING_PHASE: smooth}
        )
        for name, one in filters.items():
            p = answers[SMOOTHING_NONE]
            answers[name] = None if p is None else one.run(p, track.episode_index, track.t_center_ns)
    for name, p in answers.items():
        words = _describe_row_fault(merged.select_rows(experiment, part, name), asked.windows, p, own)
        if words:
            yield f"{where}, filter {name}: {words}"
    if smooth is not None and sets.run is not None and has_live_parts(sets):
        live_part = PredictionPart(f"{part}_1s")
        live = list_live_windows(run, asked.windows.episodes)
        answer = None if model is None else _predict_sampled_episodes(model, sets, live)
        if words := _describe_row_fault(merged.select_rows(experiment, live_part, SMOOTHING_NONE), live, answer, own):
            yield f"{where}, every second: {words}"


def _predict_sampled_episodes(model: PhaseModel, sets: FoldData, windows: EpisodeWindows) -> NDArray[np.float64]:
    """Predict the windows of a few episodes, evenly spaced among them, ``(n, 5)``; NaN for the others."""
    answer = np.full((len(windows), metrics.N_CLASSES), np.nan)
    count = len(windows.episodes)
    for number in np.unique(np.linspace(0, count - 1, min(count, _N_LIVE_EPISODES)).round().astype(np.int64)):
        scores = predict_live_windows(model, sets, [windows.episodes[number]])
        if scores is not None:
            answer[windows.episode_index == number] = scores.p
    return answer


def _describe_row_fault(
    rows: Any, asked: EpisodeWindows, answer: NDArray[np.float64] | None, own: set[str]
) -> str | None:
    """Return what is wrong with the rows of some windows, or None; an answer of NaN is not compared."""
    present = [f"{e} {t}" for e, t in zip(rows["episode_id"].to_pylist(), rows["t_center_ns"].to_pylist(), strict=True)]
    ids = [asked.episodes[i].episode_id for i in asked.episode_index]
    wanted = [f"{e} {t}" for e, t in zip(ids, asked.t_center_ns.tolist(), strict=True)]
    if sorted(present) != sorted(wanted):
        outside = set(rows["episode_id"].to_pylist()) - own
        return f"episode {min(outside)} is not in its set" if outside else "not each window once"
    place = {key: i for i, key in enumerate(present)}
    order = np.array([place[key] for key in wanted], np.intp)
    predicted = _stack_probabilities(rows)[order]
    if not np.array_equal(rows["y_true"].to_numpy().astype(np.int64)[order], asked.y):
        return "truth in the predictions is not that of the features"
    if not np.array_equal(rows["y_pred"].to_numpy().astype(np.int64)[order], predicted.argmax(axis=1)):
        return "a decision is not the likeliest phase of its row"
    gap = 0.0 if answer is None or not len(predicted) else float(np.nanmax(np.abs(answer - predicted)))
    if gap > _PROBABILITY_TOLERANCE:
        return f"its checkpoint says otherwise, by {gap:.3f}; the predictions were edited"
    return None


def _choose_checked_part(experiment: Experiment) -> PredictionPart:
    """Return the part whose predictions are compared with the checkpoint."""
    return PredictionPart.TEST if find_recipe(experiment.recipe).tests else PredictionPart.VAL_B


def _stack_probabilities(rows: Any) -> NDArray[np.float64]:
    return np.column_stack([rows[name].to_numpy().astype(np.float64) for name in PROBABILITY_COLUMNS])


def _build_experiment_key(experiment: Experiment) -> tuple[object, ...]:
    return (*experiment.keys().values(), experiment.seed)


_PERMUTATION_CHECK = "shuffled-labels"
_PERMUTATION_PROMISE = "Trained on labels permuted over the training windows, gbt scores no more than chance."
_PERMUTATION_MODEL, _PERMUTATION_RECIPE, _PERMUTATION_CHANNEL_SET = "gbt", "held_out_host", "realistic"
_MAX_ABOVE_GUESS = 0.05  # above stratified random, for the upper end of the interval
_N_GUESSES = 200  # stratified random answers, averaged
N_RESAMPLES = 2_000
_MAX_PERMUTATIONS = (
    2  # in one clean run of fifty one permutation scores above chance (measured); a leak shows in every one
)

PermutationPredictions = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], list[str], list[str]]


def check_permuted_labels(
    run: Path, *, seed: int = 0, answers: Callable[[Path, np.random.Generator], PermutationPredictions] | None = None
) -> AuditCheck:
    """Train on permuted labels over all folds of the headline's recipe, and score the test predictions.

    The promise is broken only if every one of `_MAX_PERMUTATIONS` permutations scores above chance.

    Args:
        run: The run.
        seed: Seed of the permutations.
        answers: Returns truth, decision, training class shares, host and session of every test window; trains by
            default.
    """
    ask = answers or _predict_with_permuted_labels
    faults: list[str] = []
    if not list_split_paths(run, _PERMUTATION_RECIPE):
        return build_untested_check(
            _PERMUTATION_CHECK, _PERMUTATION_PROMISE, f"the run has no fold of {_PERMUTATION_RECIPE}"
        )
    looked = ""
    with collect_refusals(faults):
        rng = np.random.default_rng([seed, int.from_bytes(b"shuffled", "big")])
        for _ in range(_MAX_PERMUTATIONS):
            truth, predicted, chance, hosts, sessions = ask(run, rng)
            high, guess = (
                _compute_upper_bound(truth, predicted, hosts, sessions),
                _compute_guess_score(truth, chance, rng),
            )
            looked += f"{', then ' if looked else ''}macro-F1 up to {high:.2f}, stratified random {guess:.2f}"
            if high <= guess + _MAX_ABOVE_GUESS:
                break
        else:
            faults.append(f"{looked}: something other than the labels tells the phase")
    return build_check(_PERMUTATION_CHECK, _PERMUTATION_PROMISE, faults, looked_at=looked)


def _predict_with_permuted_labels(run: Path, rng: np.random.Generator) -> PermutationPredictions:
    """Return truth and decision ``(n,)``, training class shares ``(n, 5)``, hosts and sessions of test windows."""
    truths, decisions, shares = [], [], []
    hosts: list[str] = []
    sessions: list[str] = []
    for fold in read_folds(run, _PERMUTATION_RECIPE):
        sets = load(
            run, _PERMUTATION_RECIPE, fold.fold, _PERMUTATION_CHANNEL_SET, registry.find_model(_PERMUTATION_MODEL).kind
        )

        def permuted(examples: LabelledExamples) -> LabelledExamples:
            return LabelledExamples(inputs=examples.inputs, y=rng.permutation(examples.y))

        model = registry.create(_PERMUTATION_MODEL).fit(permuted(sets.train.examples), permuted(sets.val_a.examples))
        truths.append(sets.test.y)
        decisions.append(model.predict(sets.test.inputs))
        prior = np.bincount(sets.train.y, minlength=metrics.N_CLASSES) / max(len(sets.train), 1)
        shares.append(np.tile(prior, (len(sets.test), 1)))
        of = [sets.test.windows.episodes[i] for i in sets.test.windows.episode_index]
        hosts += [e.host_id for e in of]
        sessions += [e.session for e in of]
    return np.concatenate(truths), np.concatenate(decisions), np.concatenate(shares), hosts, sessions


def _compute_upper_bound(
    truth: NDArray[np.int64], predicted: NDArray[np.int64], hosts: list[str], sessions: list[str]
) -> float:
    """Compute the upper end of the macro-F1 interval; the point estimate with too few sessions."""
    clusters = bootstrap.build_clusters(hosts, sessions)
    classes = tuple(int(c) for c in np.unique(truth))
    counts = bootstrap.count_confusions(clusters, truth, predicted)
    k = metrics.N_CLASSES
    weights = bootstrap.draw_weights(clusters, truth, classes=classes, resamples=N_RESAMPLES, seed=0)
    if weights is None:
        return float(metrics.macro_f1(counts.sum(axis=0).reshape(k, k), classes))
    draws = metrics.macro_f1(bootstrap.resample(weights, counts).reshape(-1, k, k), classes)
    return bootstrap.compute_interval(draws)[1]


def _compute_guess_score(truth: NDArray[np.int64], shares: NDArray[np.float64], rng: np.random.Generator) -> float:
    """Compute the mean macro-F1 of guesses drawn with the training class shares."""
    classes = tuple(int(c) for c in np.unique(truth))
    cumulative = shares.cumsum(axis=1)
    scores = []
    for _ in range(_N_GUESSES):
        drawn = (rng.random(len(truth))[:, None] > cumulative).sum(axis=1).clip(0, metrics.N_CLASSES - 1)
        scores.append(float(metrics.macro_f1(metrics.confusion_counts(truth, drawn), classes)))
    return float(np.mean(scores))
