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
from phasewatch.audit.checks import AuditCheck, AuditSubject, build_check, build_untested_check, collect_refusals
from phasewatch.dataset import EpisodeWindows, FoldData, load, read_folds
from phasewatch.dataset.live_windows import compute_live_digest, list_live_windows
from phasewatch.errors import UsageError
from phasewatch.evaluation import bootstrap
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE, HeadlineKey, has_metrics, read_metrics, select_headline
from phasewatch.models import checkpoint, registry
from phasewatch.models.alarm import THETA_STEP
from phasewatch.models.base import LabelledExamples, ModelInputs, PhaseModel
from phasewatch.models.smoothing import SMOOTHING_NONE, SMOOTHING_PHASE
from phasewatch.parallel.pool import map_ordered
from phasewatch.splits import find_recipe
from phasewatch.training.experiment import Experiment, ExperimentRecord, parse_experiment
from phasewatch.training.grids import REPEATED_RECIPES
from phasewatch.training.live_scores import has_live_alarms, has_live_parts, predict_live_windows
from phasewatch.training.predictions import PROBABILITY_COLUMNS, PredictionPart, read_predictions
from phasewatch.training.train import (
    FittedModel,
    compute_run_digests,
    find_finished_experiments,
    fit_and_predict,
    predict_parts,
    read_experiment_data,
    tune_experiment,
)

__all__ = [
    "N_RESAMPLES",
    "MergedPredictions",
    "PermutationPredictions",
    "check_permuted_labels",
    "check_predictions",
    "check_retrained",
    "choose_experiments",
    "read_headline_key",
]

_RETRAIN_CHECK = "trained-on-train-only"
_RETRAIN_PROMISE = (
    "Every fold of the headline's model, and one of each other model, trained again on train and validation alone, "
    "says the same: nothing else was fitted, scaled, stopped or calibrated on."
)
_PREDICTIONS_CHECK = "predictions"
_PREDICTIONS_PROMISE = (
    "Each experiment learnt from the windows of its fold with the settings of its record, and each of its predictions "
    "of test and soak is what its checkpoint says of that window alone, each window once. Windows of every second are "
    "predicted again in three episodes of each part."
)
# Predicted by the selection model, which no checkpoint keeps; retraining says it again.
_SELECTION_PARTS = (PredictionPart.VAL_B, PredictionPart.VAL_B_LIVE)
_LIVE_PARTS = (PredictionPart.VAL_B_LIVE, PredictionPart.TEST_LIVE, PredictionPart.SOAK_LIVE)
_EXPERIMENT_COLUMNS = ("recipe", "fold", "threat", "model", "table", "seed")
_GROUP_COLUMNS = (*_EXPERIMENT_COLUMNS, "part", "filter")
_PREDICTION_COLUMNS = ("episode_id", "t_center_ns", "y_true", "y_pred", *PROBABILITY_COLUMNS)
# In a probability: one machine gives the same bits, but other CPUs sum in another order.
_PROBABILITY_TOLERANCE = 1e-3
_N_LIVE_EPISODES = 3  # whose windows of every second each checkpoint is asked again


def read_headline_key(run: Path) -> HeadlineKey:
    """Return the headline's key of a run; the default before it was scored."""
    return select_headline(read_metrics(run).metrics) if has_metrics(run) else DEFAULT_HEADLINE


def choose_experiments(run: Path, key: HeadlineKey | None = None) -> tuple[Experiment, ...]:
    """Choose the finished experiments to train again.

    They are every fold and seed of the headline's model, channel set and input on the headline's recipe and those that
    are repeated, and one experiment of each other model and input, of a recipe that tests and does not leak; there the
    channel set `realistic` is preferred.

    Args:
        run: The run.
        key: The headline; read from the run if None.
    """
    key = key if key is not None else read_headline_key(run)
    chosen: list[Experiment] = []
    first: dict[tuple[str, str], Experiment] = {}
    experiments = find_finished_experiments(run, compute_run_digests(run))
    for experiment in sorted(experiments, key=lambda experiment: (experiment.threat != "realistic", experiment)):
        row = find_recipe(experiment.recipe)
        if not row.tests or row.leaky:
            continue
        if _is_of_headline(experiment, key):
            chosen.append(experiment)
        else:
            first.setdefault((experiment.model, experiment.table), experiment)
    answered = {(experiment.model, experiment.table) for experiment in chosen}
    return (*chosen, *(e for at, e in first.items() if at not in answered))


def _is_of_headline(experiment: Experiment, key: HeadlineKey) -> bool:
    return (experiment.model, experiment.threat, experiment.table) == (key.model, key.channel_set, key.input) and (
        experiment.recipe in (key.recipe, *REPEATED_RECIPES)
    )


def check_retrained(
    run: Path, experiments: Sequence[Experiment], merged: MergedPredictions | None = None, *, workers: int = 1
) -> AuditCheck:
    """Train some experiments again and compare the models' predictions, and those of validation B in the run.

    Args:
        run: The run.
        experiments: Finished experiments.
        merged: The run's predictions; read if None.
        workers: Number of processes.
    """
    faults: list[str] = []
    if not experiments:
        return build_untested_check(_RETRAIN_CHECK, _RETRAIN_PROMISE, "the run has no finished cell")
    with collect_refusals(faults):
        answers = merged if merged is not None else MergedPredictions.read(run)
        faults += _collect_faults(_find_retrain_faults, run, experiments, answers, workers=workers)
    return build_check(
        _RETRAIN_CHECK, _RETRAIN_PROMISE, faults, looked_at=_describe_checked(experiments, "cells trained again")
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MergedPredictions:
    """The merged predictions, indexed once by experiment, part and filter: a full grid has thousands of each."""

    table: Any
    rows_by_group: Mapping[tuple[object, ...], Any]
    parts_by_experiment: Mapping[tuple[object, ...], frozenset[tuple[str, str]]]

    @classmethod
    def read(cls, run: Path) -> MergedPredictions:
        """Read and index the predictions of a run.

        Raises:
            RunError: If they cannot be read.
        """
        return cls.from_table(read_predictions(run / PREDICTIONS_FILE))

    @classmethod
    def from_table(cls, table: Any) -> MergedPredictions:
        """Index the rows of each experiment, part and filter."""
        import pyarrow as pa

        numbered = table.select(list(_GROUP_COLUMNS)).append_column("row", pa.array(np.arange(table.num_rows)))
        groups = numbered.group_by(list(_GROUP_COLUMNS)).aggregate([("row", "list")])
        keys = list(zip(*(groups[name].to_pylist() for name in _GROUP_COLUMNS), strict=True))
        lists = groups["row_list"].combine_chunks()
        parts: dict[tuple[object, ...], set[tuple[str, str]]] = {}
        for *experiment, part, smoothing in keys:
            parts.setdefault(tuple(experiment), set()).add((part, smoothing))
        return cls(
            table=table.select(list(_PREDICTION_COLUMNS)).combine_chunks(),
            rows_by_group=dict(zip(keys, (one.values for one in lists), strict=True)),
            parts_by_experiment={key: frozenset(found) for key, found in parts.items()},
        )

    def experiment_keys(self) -> set[tuple[object, ...]]:
        """Return the keys of the experiments with rows."""
        return set(self.parts_by_experiment)

    def list_parts(self, experiment: Experiment) -> frozenset[tuple[str, str]]:
        """Return the parts and filters of an experiment that have rows."""
        return self.parts_by_experiment.get(_build_experiment_key(experiment), frozenset())

    def list_answered(self) -> dict[AuditSubject, set[str]]:
        """Return the folds with test predictions of each model, by recipe, channel set and input."""
        found: dict[AuditSubject, set[str]] = {}
        for key, parts in self.parts_by_experiment.items():
            named = dict(zip(_EXPERIMENT_COLUMNS, map(str, key), strict=True))
            if any(part == "test" for part, _ in parts):
                subject = AuditSubject(
                    recipe=named["recipe"], channel_set=named["threat"], model=named["model"], input=named["table"]
                )
                found.setdefault(subject, set()).add(named["fold"])
        return found

    def select_experiment(self, experiment: Experiment) -> MergedPredictions:
        """Return the predictions of one experiment alone, which are small enough to send to another process."""
        import pyarrow as pa

        parts = sorted(self.list_parts(experiment))
        tables = [self.select_rows(experiment, part, name) for part, name in parts]
        ends = np.cumsum([0, *(table.num_rows for table in tables)])
        key = _build_experiment_key(experiment)
        return MergedPredictions(
            table=pa.concat_tables([self.table.slice(0, 0), *tables]).combine_chunks(),
            rows_by_group={(*key, *at): pa.array(np.arange(*ends[i : i + 2])) for i, at in enumerate(parts)},
            parts_by_experiment={key: frozenset(parts)},
        )

    def select_rows(self, experiment: Experiment, part: str, name: str) -> Any:
        """Return the rows of an experiment, part and filter."""
        found = self.rows_by_group.get((*_build_experiment_key(experiment), part, name))
        return self.table.slice(0, 0) if found is None else self.table.take(found)


def check_predictions(run: Path, merged: MergedPredictions | None = None, *, workers: int = 1) -> AuditCheck:
    """Predict with every checkpoint again and compare with the merged predictions; compare what it learnt from.

    An experiment whose model code cannot be imported is skipped; the promise is then untested.

    Args:
        run: The run.
        merged: The run's predictions; read if None.
        workers: Number of processes.
    """
    faults: list[str] = []
    experiments: list[Experiment] = []
    absent: set[str] = set()
    with collect_refusals(faults):
        merged = merged if merged is not None else MergedPredictions.read(run)
        experiments = list(find_finished_experiments(run, compute_run_digests(run)))
        known = {_build_experiment_key(experiment) for experiment in experiments}
        for key in sorted(merged.experiment_keys() - known, key=str):
            if words := _describe_import_error(run, key):
                absent.add(words)
            else:
                faults.append(f"{'/'.join(map(str, key))} has predictions and no checkpoint")
        faults += _collect_faults(_find_prediction_faults, run, experiments, merged, workers=workers)
    if not experiments and not faults:
        return build_untested_check(_PREDICTIONS_CHECK, _PREDICTIONS_PROMISE, "the run has no finished cell")
    looked_at = _describe_checked(experiments, "checkpoints asked again")
    if absent and not faults:
        return build_untested_check(
            _PREDICTIONS_CHECK, _PREDICTIONS_PROMISE, f"{looked_at}, but {'; '.join(sorted(absent))}"
        )
    return build_check(_PREDICTIONS_CHECK, _PREDICTIONS_PROMISE, faults, looked_at=looked_at)


_FindFaults = Callable[[Path, Experiment, MergedPredictions], Iterator[str]]


def _collect_faults(
    find: _FindFaults, run: Path, experiments: Sequence[Experiment], merged: MergedPredictions, *, workers: int
) -> list[str]:
    """Return the faults of some experiments, in their order, whatever the number of processes."""
    jobs = ((find, run, experiment, merged.select_experiment(experiment)) for experiment in experiments)
    faults: list[str] = []
    for result in map_ordered(_find_experiment_faults, jobs, workers=workers):
        faults += [result.error] if result.error is not None else result.value or []
    return faults


def _find_experiment_faults(job: tuple[_FindFaults, Path, Experiment, MergedPredictions]) -> list[str]:
    find, run, experiment, merged = job
    faults: list[str] = []
    with collect_refusals(faults):
        faults += find(run, experiment, merged)
    return faults


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


def _find_learning_faults(run: Path, experiment: Experiment, sets: FoldData) -> Iterator[str]:
    """Compare what a checkpoint says that it learnt from, and with which settings, with its fold and its record."""
    folder = experiment.folder(run)
    header = checkpoint.read_header(folder)
    expected = {part: examples.sha256() for part, examples in _list_training_sets(experiment, sets).items()}
    if header.filter is not None:
        soak = sets.soak.take(sets.calibration_soak)
        expected |= {"decide_val": expected["val_b"], "decide_soak": soak.examples.sha256()}
        if has_live_alarms(sets):
            for part, windows in (("decide_val_1s", sets.val_b), ("decide_soak_1s", soak)):
                live = list_live_windows(run, windows.windows.episodes)
                expected[part] = compute_live_digest(run, live, sets.train.inputs.spec)
    if strange := sorted(header.trained_on.keys() - expected.keys()):
        yield f"{folder}: it learnt from {strange[0]} windows, which its fold does not have"
    for part, digest in expected.items():
        if header.trained_on.get(part) != digest:
            yield f"{folder}: its {part} windows are not those of its fold"
            return
    if (header.mask, header.table, header.seed) != (experiment.threat, experiment.table, experiment.seed):
        yield f"{folder}: its channel set, input or seed is not that of its folder"
    if _read_record(run, experiment).trials == 0 and _is_built_in(experiment):
        defaults = msgspec.to_builtins(registry.create(experiment.model, seed=experiment.seed).config)
        if header.config != defaults:
            changed = sorted(name for name in defaults if header.config.get(name) != defaults[name])
            yield f"{folder}: was trained with another {', '.join(changed) or 'setting'} than its record says"


def _list_training_sets(experiment: Experiment, sets: FoldData) -> dict[str, LabelledExamples]:
    """Return the windows that `fit_model` may show a model, by the names under which it records their digests."""
    parts = {"train": sets.train.examples, "val_a": sets.val_a.examples, "val_b": sets.val_b.examples}
    if experiment.model not in registry.BASELINE_MODELS:
        train, *validation = parts.values()
        if (extra := sets.build_extra(sets.train)) is not None:
            parts["extra"] = extra
        refit_extra = sets.build_extra(sets.train, sets.val_a, sets.val_b)
        added = [] if refit_extra is None else [refit_extra]
        parts["refit"] = LabelledExamples.concatenate([train, *added, *validation])
    return parts


def _is_built_in(experiment: Experiment) -> bool:
    """Return whether the model is of this package: the defaults of another may have changed with its version."""
    return experiment.model in {row.key for row in registry.BUILTIN_MODELS}


def _read_record(run: Path, experiment: Experiment) -> ExperimentRecord:
    path = experiment.folder(run) / EXPERIMENT_FILE
    return parse_experiment(path.read_bytes(), file=str(path))


def _find_retrain_faults(run: Path, experiment: Experiment, merged: MergedPredictions) -> Iterator[str]:
    sets, folder = read_experiment_data(run, experiment), experiment.folder(run)
    if faults := list(_find_learning_faults(run, experiment, sets)):
        yield from faults
        return
    if not _is_loadable(experiment):
        return  # scored by the process that fitted it: there is nothing to hold a second fit against
    header = checkpoint.read_header(folder)
    settings = header.config
    if trials := _read_record(run, experiment).trials:
        settings = tune_experiment(sets, experiment, trials=trials)
        if msgspec.to_builtins(registry.create(experiment.model, settings=settings).config) != header.config:
            yield f"{folder}: validation A chooses other settings of {trials}; they were chosen by something else"
    model, parts = fit_and_predict(registry.create(experiment.model, seed=header.seed, settings=settings), sets)
    stored = registry.load(folder)
    if not _is_same_postprocessing(model, stored):
        yield f"{folder}: trained again its filter or alarm differs; it was set by something else"
    if not _is_same_history(model.history, stored.history):
        yield f"{folder}: trained again its history differs; it was stopped by something else"
    if abs(model.val_a_macro_f1 - stored.val_a_macro_f1) > _PROBABILITY_TOLERANCE:
        yield f"{folder}: trained again its macro-F1 on validation A differs; another model was chosen by it"
    for part, windows in (("val_a", sets.val_a), ("test", sets.test)):
        if not len(windows):
            continue
        gap = float(np.abs(model.predict_proba(windows.inputs) - stored.predict_proba(windows.inputs)).max())
        if not gap <= _PROBABILITY_TOLERANCE:
            yield f"{folder}: trained again it differs by {gap:.3f} on {part}; it was fitted on something else"
    for one in parts:
        if one.part in (*_SELECTION_PARTS, *_LIVE_PARTS):
            rows = merged.select_rows(experiment, one.part, one.filter)
            if words := _describe_row_fault(rows, one.windows, one.p, "trained again the model"):
                yield f"{folder}, {one.part}, filter {one.filter}: {words}"


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


def _find_prediction_faults(run: Path, experiment: Experiment, merged: MergedPredictions) -> Iterator[str]:
    """Compare the rows of each part and filter with the checkpoint's predictions on the same windows."""
    sets, where = read_experiment_data(run, experiment), "/".join(map(str, _build_experiment_key(experiment)))
    yield from _find_learning_faults(run, experiment, sets)
    asked: dict[tuple[str, str], tuple[EpisodeWindows, NDArray[np.float64] | None]] = {}
    model = registry.load(experiment.folder(run)) if _is_loadable(experiment) else None
    if model is not None:
        # What stands in the place of the selection model's answers is not compared.
        unknown = np.full((len(sets.val_b), metrics.N_CLASSES), 1.0 / metrics.N_CLASSES)
        for one in predict_parts(FittedModel(model=model, val_b=unknown), sets):
            asked[one.part, one.filter] = one.windows, None if one.part in _SELECTION_PARTS else one.p
        yield from _find_batch_faults(where, model, sets, asked)
    else:
        smoothing = [SMOOTHING_NONE]
        if checkpoint.read_header(experiment.folder(run)).filter is not None:
            smoothing.append(SMOOTHING_PHASE)
        for part, windows in (("val_b", sets.val_b), ("test", sets.test), ("soak", sets.soak)):
            asked |= {(part, name): (windows.windows, None) for name in smoothing}
    if checkpoint.read_header(experiment.folder(run)).filter is not None and sets.run is not None:
        asked |= _list_live_answers(run, model, sets)
    for (part, name), (answered, answer) in asked.items():
        if words := _describe_row_fault(merged.select_rows(experiment, part, name), answered, answer):
            yield f"{where}, {part}, filter {name}: {words}"
    if model is not None and (strange := sorted(merged.list_parts(experiment) - asked.keys())):
        yield f"{where}: has predictions of {strange[0][0]}, filter {strange[0][1]}, which its fold does not have"


def _list_live_answers(
    run: Path, model: PhaseModel | None, sets: FoldData
) -> dict[tuple[str, str], tuple[EpisodeWindows, NDArray[np.float64] | None]]:
    """Return the windows of every second that a fold must have, with the answers for a few episodes of each part."""
    if not has_live_parts(sets):
        return {}
    found: dict[tuple[str, str], tuple[EpisodeWindows, NDArray[np.float64] | None]] = {}
    for part, windows in zip(_LIVE_PARTS, (sets.val_b, sets.test, sets.soak), strict=True):
        live = list_live_windows(run, windows.windows.episodes)
        if len(live):
            answer = None
            if model is not None and part not in _SELECTION_PARTS:
                answer = _predict_sampled_episodes(model, sets, live)
            found[part, SMOOTHING_NONE] = live, answer
    return found


def _predict_sampled_episodes(model: PhaseModel, sets: FoldData, windows: EpisodeWindows) -> NDArray[np.float64]:
    """Predict the windows of a few episodes, evenly spaced among them, ``(n, 5)``; NaN for the others."""
    answer = np.full((len(windows), metrics.N_CLASSES), np.nan)
    count = len(windows.episodes)
    for number in np.unique(np.linspace(0, count - 1, min(count, _N_LIVE_EPISODES)).round().astype(np.int64)):
        scores = predict_live_windows(model, sets, [windows.episodes[number]])
        if scores is not None:
            answer[windows.episode_index == number] = scores.p
    return answer


def _find_batch_faults(
    where: str,
    model: PhaseModel,
    sets: FoldData,
    asked: Mapping[tuple[str, str], tuple[EpisodeWindows, NDArray[np.float64] | None]],
) -> Iterator[str]:
    """Find answers that depend on the other windows of a batch: ask in halves, the last window first."""
    part, inputs = ("test", sets.test.inputs) if len(sets.test) else ("soak", sets.soak.inputs)
    _, answer = asked[part, SMOOTHING_NONE]
    if answer is None or len(inputs) < 2:
        return
    x, half = inputs.x[::-1], len(inputs) // 2
    halves = (ModelInputs(x=np.ascontiguousarray(rows), spec=inputs.spec) for rows in (x[:half], x[half:]))
    again = np.concatenate([model.predict_proba(rows) for rows in halves])[::-1]
    gap = float(np.abs(again - answer).max())
    if not gap <= _PROBABILITY_TOLERANCE:
        yield f"{where}, {part}: asked in halves it differs by {gap:.3f}; it reads more than the window itself"


def _describe_row_fault(
    rows: Any, asked: EpisodeWindows, answer: NDArray[np.float64] | None, who: str = "its checkpoint"
) -> str | None:
    """Return what is wrong with the rows of some windows, or None; an answer of NaN is not compared."""
    present = [f"{e} {t}" for e, t in zip(rows["episode_id"].to_pylist(), rows["t_center_ns"].to_pylist(), strict=True)]
    ids = [asked.episodes[i].episode_id for i in asked.episode_index]
    wanted = [f"{e} {t}" for e, t in zip(ids, asked.t_center_ns.tolist(), strict=True)]
    if sorted(present) != sorted(wanted):
        outside = set(rows["episode_id"].to_pylist()) - set(ids)
        return f"episode {min(outside)} is not in its set" if outside else "not each window once"
    place = {key: i for i, key in enumerate(present)}
    order = np.array([place[key] for key in wanted], np.intp)
    predicted = _stack_probabilities(rows)[order]
    if not np.array_equal(rows["y_true"].to_numpy().astype(np.int64)[order], asked.y):
        return "truth in the predictions is not that of the features"
    if not np.array_equal(rows["y_pred"].to_numpy().astype(np.int64)[order], predicted.argmax(axis=1)):
        return "a decision is not the likeliest phase of its row"
    gap = 0.0 if answer is None or not len(predicted) else float(np.nanmax(np.abs(answer - predicted)))
    if not gap <= _PROBABILITY_TOLERANCE:
        return f"{who} says otherwise, by {gap:.3f}; the predictions were edited"
    return None


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
