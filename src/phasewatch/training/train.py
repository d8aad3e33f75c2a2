"""Train the experiments of a grid in parallel, skip finished ones, and merge their predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from traceback import extract_tb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch import atomic
from phasewatch.arrays import FloatArray
from phasewatch.artifacts import (
    BINS_PATH,
    EXPERIMENT_FILE,
    EXPERIMENT_PREDICTIONS_FILE,
    FEATURE_SCHEMA_FILE,
    FEATURES_FILE,
    LEVELS_PATH,
    MODELS_DIR,
    PREDICTIONS_FILE,
    VALIDATION_FILE,
)
from phasewatch.dataset import FoldData, file_sha256, load, read_fold
from phasewatch.errors import MachineError, ModelError, PhasewatchError, RunError, UsageError
from phasewatch.metrics import compute_pooled_macro_f1
from phasewatch.models import registry
from phasewatch.models.base import InputKind, InputVariant, PhaseModel, PostprocessingData
from phasewatch.models.checkpoint import CHECKPOINT_FILE, read_header
from phasewatch.models.smoothing import SMOOTHING_NONE, SMOOTHING_PHASE, SMOOTHING_SCHEDULE
from phasewatch.parallel.pool import map_ordered
from phasewatch.progress import NO_PROGRESS, Progress
from phasewatch.splits import Fold
from phasewatch.training.experiment import (
    Experiment,
    ExperimentRecord,
    RunDigests,
    parse_experiment,
    render_experiment,
)
from phasewatch.training.grids import HEADLINE_RECIPE, N_BEST_MODELS
from phasewatch.training.live_scores import (
    LiveScores,
    has_live_parts,
    predict_live_windows,
    score_live_windows,
    score_windows,
)
from phasewatch.training.predictions import (
    PartPredictions,
    PredictionPart,
    build_predictions_table,
    read_predictions,
    write_prediction_table,
)
from phasewatch.training.tuning import find_tuning_space, tune

__all__ = [
    "FailedExperiment",
    "FittedModel",
    "InputDigestCache",
    "TrainReport",
    "TrainingError",
    "TrainingFailure",
    "compute_run_digests",
    "find_best_models",
    "find_finished_experiments",
    "fit_and_predict",
    "fit_model",
    "merge_predictions",
    "predict_parts",
    "read_experiment_data",
    "train_experiments",
    "tune_experiment",
]

_MAX_ERROR_CHARS = 300  # of an error in a user's model; some quote a whole array
_EXPERIMENT_TIMEOUT_S = 3600.0  # an experiment takes seconds; one that takes an hour hangs


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFailure:
    """The reason why an experiment failed, for people, and the exit code for it."""

    words: str
    exit_code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedExperiment:
    """An experiment that failed, with the reason."""

    cell: Experiment
    failure: TrainingFailure

    def __str__(self) -> str:
        c = self.cell
        return f"{c.model} on {c.recipe}-{c.fold} ({c.threat}, {c.table}, seed {c.seed}): {self.failure.words}"


class TrainingError(PhasewatchError):
    """Every experiment of a grid failed; the exit code is that of the first one."""

    def __init__(self, failed: Sequence[FailedExperiment]) -> None:
        super().__init__("; ".join(map(str, failed[:3])) + (f" and {len(failed) - 3} more" if len(failed) > 3 else ""))
        self.exit_code = failed[0].failure.exit_code


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """The outcome of a grid.

    Attributes:
        trained: Experiments trained now.
        kept: Experiments finished before, with the same inputs.
        failed: Experiments that failed; the next call tries them again.
        merged: Experiments in the merged predictions.
        rows: Rows of the merged predictions.
        path: The file of the merged predictions.
    """

    trained: tuple[Experiment, ...]
    kept: tuple[Experiment, ...]
    failed: tuple[FailedExperiment, ...]
    merged: int
    rows: int
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _TrainingJob:
    run: Path
    cell: Experiment
    inputs: dict[str, str]
    trials: int = 0


def train_experiments(
    run: Path,
    cells: Sequence[Experiment],
    *,
    workers: int = 2,
    trials: int = 0,
    progress: Progress = NO_PROGRESS,
) -> TrainReport:
    """Train the experiments that are not finished, then merge the predictions of every finished one in the run.

    One failure does not stop the others: a user's model may raise any exception, and a worker may die or hang.

    Args:
        run: Folder of a run with features and splits, locked by the caller.
        cells: The experiments.
        workers: Experiments at a time, one thread each (measured: 1.2 to 1.3 times the throughput of one experiment
            with two threads).
        trials: Settings to try for each experiment on its own validation A; 0 uses the defaults.
        progress: Receives task ``train`` after each experiment, with its model and fold.

    Raises:
        UsageError: If a model is unknown, or has no settings to tune.
    """
    sources = compute_run_digests(run)
    for model in {cell.model for cell in cells}:
        registry.find_model(model)  # an unknown name is refused before any training
        if trials:
            find_tuning_space(model)
    reads = InputDigestCache(sources, partial(read_fold, run))
    jobs = [
        _TrainingJob(run=run, cell=cell, inputs=reads.get_inputs(cell), trials=trials) for cell in sorted(set(cells))
    ]
    todo: list[_TrainingJob] = []
    kept: list[Experiment] = []
    for job in jobs:
        if _is_finished(job):
            kept.append(job.cell)
        else:
            todo.append(job)
    trained: list[Experiment] = []
    failed: list[FailedExperiment] = []
    timeout_s = None if workers == 1 else _EXPERIMENT_TIMEOUT_S
    for result in map_ordered(_try_experiment, todo, workers=workers, timeout_s=timeout_s):
        cell = todo[result.index].cell
        failure = result.value
        if result.error is not None:
            failure = TrainingFailure(words=result.error, exit_code=MachineError.exit_code)
        if failure is None:
            trained.append(cell)
        else:
            failed.append(FailedExperiment(cell=cell, failure=failure))
        progress.update("train", len(kept) + len(trained) + len(failed), len(jobs), f"{cell.model} {cell.fold}")
    merged, rows = merge_predictions(run, sources)
    return TrainReport(
        trained=tuple(trained),
        kept=tuple(kept),
        failed=tuple(failed),
        merged=merged,
        rows=rows,
        path=run / PREDICTIONS_FILE,
    )


def _try_experiment(job: _TrainingJob) -> TrainingFailure | None:
    """Train one experiment; return the failure, or None.

    An unexpected exception in phasewatch's own code is not caught and shows its traceback. A user's code is input.
    """
    try:
        _train_experiment(job)
    except PhasewatchError as error:
        return TrainingFailure(words=str(error), exit_code=error.exit_code)
    except (Exception, SystemExit) as error:
        own = registry.find_source_file(job.cell.model)
        lines = [frame.lineno for frame in extract_tb(error.__traceback__) if own and frame.filename == str(own)]
        if own is None or (isinstance(error, OSError) and not lines):  # our bug, or a disk error of all experiments
            raise
        return _build_user_failure(error, f"{own}:{lines[-1]}: " if lines else "")
    return None


def _build_user_failure(error: BaseException, place: str) -> TrainingFailure:
    """Return the failure of a user's model, in one line."""
    message = " ".join(str(error).split())[:_MAX_ERROR_CHARS] or "no message"
    return TrainingFailure(words=f"{place}{type(error).__name__}: {message}", exit_code=ModelError.exit_code)


def _train_experiment(job: _TrainingJob) -> None:
    """Fit one experiment's model, and write its checkpoint, its predictions and, last, `cell.json`."""
    cell, folder = job.cell, job.cell.folder(job.run)
    atomic.make_folder(folder)
    atomic.remove(folder / EXPERIMENT_FILE)
    atomic.sweep_temporaries(folder)
    sets = read_experiment_data(job.run, cell)
    settings = tune_experiment(sets, cell, trials=job.trials) if job.trials else {}
    model = registry.create(cell.model, seed=cell.seed, settings=settings)
    fitted, parts = fit_and_predict(model, sets)
    fitted.save(folder)
    write_prediction_table(folder / EXPERIMENT_PREDICTIONS_FILE, [build_predictions_table(cell, parts)])
    names = [CHECKPOINT_FILE, *read_header(folder).files, EXPERIMENT_PREDICTIONS_FILE]
    outputs = {name: file_sha256(folder / name) for name in names}
    record = ExperimentRecord(cell=cell, inputs=job.inputs, outputs=outputs, trials=job.trials)
    atomic.write_atomic(folder / EXPERIMENT_FILE, render_experiment(record))


def read_experiment_data(run: Path, cell: Experiment) -> FoldData:
    """Load the train, validation, test and soak windows of an experiment."""
    return load(run, cell.recipe, cell.fold, cell.threat, registry.find_model(cell.model).kind, cell.table)


def tune_experiment(sets: FoldData, cell: Experiment, *, trials: int) -> dict[str, Any]:
    """Return the settings that the experiment chooses on its own validation A, of so many trials."""
    purpose = "/".join(cell.keys().values())
    return dict(tune(sets, cell.model, trials=trials, seed=cell.seed, purpose=purpose).settings)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FittedModel:
    """A model after both fits, with its predictions of windows outside the training set.

    Attributes:
        model: The final model.
        val_b: ``(n, 5)`` float64 probabilities of the selection model on validation B, which the final model has seen.
        val_b_live: The same for the windows of every second; None for a model without alarms, or without bins.
        soak_live: Predictions of the final model for every second of all soak episodes; None likewise.
    """

    model: PhaseModel
    val_b: FloatArray
    val_b_live: LiveScores | None = None
    soak_live: LiveScores | None = None


def fit_model(model: PhaseModel, sets: FoldData) -> FittedModel:
    """Fit the selection model, then the final model with its phase filter and its alarms.

    The selection model is fitted to train, with validation A for what it chooses; its probabilities on validation B
    set the temperature. The final model is fitted to all three sets. Filter and alarms are fitted to the selection
    model's probabilities on validation B and the final model's on the calibration soak: neither model was fitted to
    these windows. A random window split has neither filter nor alarms, because its parts have no consecutive windows.
    A baseline is fitted once, to train, and has neither. The windows of baseline episodes of the hosts that a model
    may see join its training set as clean ones.
    """
    train, val_a, val_b = sets.train.examples, sets.val_a.examples, sets.val_b.examples
    is_baseline_model = model.key in registry.BASELINE_MODELS
    model.fit(train, val_a, extra=None if is_baseline_model else sets.build_extra(sets.train)).calibrate(val_b)
    selected = model.predict_proba(val_b.inputs)
    if is_baseline_model:
        return FittedModel(model=model, val_b=selected)
    has_alarms = sets.fold.deal is None
    val_b_live = predict_live_windows(model, sets, sets.val_b.windows.episodes) if has_alarms else None
    extra = sets.build_extra(sets.train, sets.val_a, sets.val_b)
    model.refit([train, *([] if extra is None else [extra]), val_a, val_b])
    if not has_alarms:
        return FittedModel(model=model, val_b=selected)
    soak = sets.soak.take(sets.calibration_soak)
    soak_live = predict_live_windows(model, sets, sets.soak.windows.episodes)
    model.fit_postprocessing(
        PostprocessingData(
            train=sets.train.label_sequence,
            val_b=score_windows(sets.val_b, selected),
            soak=score_windows(soak, model.predict_proba(soak.inputs)),
            val_b_live=score_live_windows(sets, val_b_live),
            soak_live=score_live_windows(sets, soak_live, only=soak.windows.episodes),
        )
    )
    return FittedModel(model=model, val_b=selected, val_b_live=val_b_live, soak_live=soak_live)


def fit_and_predict(model: PhaseModel, sets: FoldData) -> tuple[PhaseModel, list[PartPredictions]]:
    """Fit a model on a fold; return the final model and its predictions, as the run's table holds them.

    Validation B is predicted by the selection model, every other part by the final model.
    """
    fitted = fit_model(model, sets)
    return fitted.model, predict_parts(fitted, sets)


def predict_parts(fitted: FittedModel, sets: FoldData) -> list[PartPredictions]:
    """Predict each window outside the training set, with and without smoothing, and then those of every second.

    Models that are not baselines also predict the idle windows of unseen hosts.
    """
    model, predictions = fitted.model, list[PartPredictions]()
    for name, part in (
        (PredictionPart.VAL_B, sets.val_b),
        (PredictionPart.TEST, sets.test),
        (PredictionPart.SOAK, sets.soak),
    ):
        windows = part.windows
        p = fitted.val_b if name is PredictionPart.VAL_B else model.predict_proba(part.inputs)
        predictions.append(PartPredictions(part=name, filter=SMOOTHING_NONE, windows=windows, p=p))
        if model.filter is not None:
            smoothed = {SMOOTHING_PHASE: model.filter}
            if name is PredictionPart.TEST:  # a baseline of the scores; it has no alarm
                smoothed[SMOOTHING_SCHEDULE] = model.filter.without_observations()
            predictions += [
                PartPredictions(
                    part=name, filter=key, windows=windows, p=f.run(p, windows.episode_index, windows.t_center_ns)
                )
                for key, f in smoothed.items()
            ]
    if sets.idle is not None and model.key not in registry.BASELINE_MODELS:
        p = model.predict_proba(sets.idle.inputs)
        predictions.append(
            PartPredictions(part=PredictionPart.IDLE, filter=SMOOTHING_NONE, windows=sets.idle.windows, p=p)
        )
    return predictions + _predict_live_parts(fitted, sets)


def _predict_live_parts(fitted: FittedModel, sets: FoldData) -> list[PartPredictions]:
    """Predict the windows of every second; their alarms use unsmoothed probabilities, so no other are stored."""
    if fitted.val_b_live is None or not has_live_parts(sets):
        return []
    scores = {
        PredictionPart.VAL_B_LIVE: fitted.val_b_live,
        PredictionPart.TEST_LIVE: predict_live_windows(fitted.model, sets, sets.test.windows.episodes),
        PredictionPart.SOAK_LIVE: fitted.soak_live,
    }
    return [
        PartPredictions(part=part, filter=SMOOTHING_NONE, windows=score.windows, p=score.p)
        for part, score in scores.items()
        if score is not None and len(score.windows)
    ]


def find_best_models(run: Path, cells: Sequence[Experiment], *, n: int = N_BEST_MODELS) -> tuple[str, ...]:
    """Return the `n` best models on unseen hosts, best first, by validation alone.

    The score is macro-F1 over the five phases on validation B of all folds together; the headline's model is chosen by
    the same score. Only models that the headline may name are compared: those with raw input that were trained on as
    many folds as any other.
    """
    found: dict[str, list[Experiment]] = {}
    compared = (HEADLINE_RECIPE, "realistic", InputVariant.RAW)
    for cell in cells:
        if (cell.recipe, cell.threat, cell.table) == compared and cell.model not in registry.BASELINE_MODELS:
            found.setdefault(cell.model, []).append(cell)
    whole = max(map(len, found.values()), default=0)
    scores = {
        model: compute_pooled_macro_f1(_read_val_b_decisions(run, cell) for cell in cells)
        for model, cells in found.items()
        if len(cells) == whole
    }
    return tuple(sorted(scores, key=lambda model: (-scores[model], model))[:n])


def _read_val_b_decisions(run: Path, cell: Experiment) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Return the true and the decided phase codes of an experiment on validation B, ``(n,)`` each."""
    from pyarrow.compute import field

    table = read_predictions(cell.folder(run) / EXPERIMENT_PREDICTIONS_FILE)
    rows = table.filter((field("part") == "val_b") & (field("filter") == SMOOTHING_NONE))
    return rows["y_true"].to_numpy(), rows["y_pred"].to_numpy()


def compute_run_digests(run: Path) -> RunDigests:
    """Compute the digests of the files that experiments read."""
    return RunDigests(
        features=file_sha256(run / FEATURES_FILE),
        grids=file_sha256(run / BINS_PATH) if (run / BINS_PATH).is_file() else "absent",
        levels=file_sha256(run / LEVELS_PATH) if (run / LEVELS_PATH).is_file() else "absent",
        schema=file_sha256(run / FEATURE_SCHEMA_FILE),
        validation=file_sha256(run / VALIDATION_FILE),
    )


def find_finished_experiments(run: Path, sources: RunDigests) -> Iterator[Experiment]:
    """Yield the experiments in `models/` that were trained on the run's present files, in the order of the merge."""
    found: list[Experiment] = []
    reads = InputDigestCache(sources, partial(read_fold, run))
    for path in (run / MODELS_DIR).glob(f"*/*/*/*/*/{EXPERIMENT_FILE}"):
        cell = parse_experiment(path.read_bytes(), file=str(path)).cell
        try:
            job = _TrainingJob(run=run, cell=cell, inputs=reads.get_inputs(cell))
        except (RunError, UsageError):
            continue  # its fold is gone since the splits were made again, or its model cannot be imported here
        if cell.folder(run) == path.parent and _is_finished(job, any_trials=True):
            found.append(cell)
    yield from sorted(found)


def merge_predictions(run: Path, sources: RunDigests) -> tuple[int, int]:
    """Write `predictions_v1.parquet` and return its experiments and rows; the same experiments give the same bytes."""
    cells = list(find_finished_experiments(run, sources))
    rows = 0

    def tables() -> Iterator[object]:
        nonlocal rows
        for cell in cells:
            table = read_predictions(cell.folder(run) / EXPERIMENT_PREDICTIONS_FILE)
            rows += table.num_rows
            yield table

    write_prediction_table(run / PREDICTIONS_FILE, tables())
    return len(cells), rows


class InputDigestCache:
    """The digests that experiments depend on; each fold file and each model's code is read once."""

    def __init__(self, sources: RunDigests, read: Callable[[str, str], Fold]) -> None:
        """Store the digests of the run's files, and a function that reads a fold by recipe and name."""
        self._sources, self._read = sources, read
        self._folds: dict[tuple[str, str], Fold] = {}
        self._models: dict[str, tuple[InputKind, str | None]] = {}

    def get_inputs(self, cell: Experiment) -> dict[str, str]:
        """Return the digests of one experiment's inputs.

        Raises:
            RunError: If its fold is absent.
            UsageError: If its model is unknown.
        """
        if (at := (cell.recipe, cell.fold)) not in self._folds:
            self._folds[at] = self._read(*at)
        if cell.model not in self._models:
            code = registry.find_source_file(cell.model)
            self._models[cell.model] = registry.find_model(cell.model).kind, None if code is None else file_sha256(code)
        kind, digest = self._models[cell.model]
        inputs = self._sources.select_inputs(cell, self._folds[at], kind)
        return inputs if digest is None else {**inputs, "model code": digest}


def _is_finished(job: _TrainingJob, *, any_trials: bool = False) -> bool:
    """Return whether the experiment was trained on these inputs, after as many trials, and its files are unchanged."""
    folder = job.cell.folder(job.run)
    try:
        done = parse_experiment((folder / EXPERIMENT_FILE).read_bytes(), file=str(folder / EXPERIMENT_FILE))
        if done.trials != job.trials and not any_trials:
            return False
        return done.inputs == job.inputs and all(file_sha256(folder / n) == d for n, d in done.outputs.items())
    except (FileNotFoundError, RunError):
        return False
