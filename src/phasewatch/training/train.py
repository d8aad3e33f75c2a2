"""Train the cells of a grid, two at a time; finished ones stay, a killed one starts anew; then merge what they said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from traceback import extract_tb

from phasewatch import atomic
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
from phasewatch.models import registry
from phasewatch.models.base import InputKind, PhaseModel
from phasewatch.models.checkpoint import CHECKPOINT_FILE, read_header
from phasewatch.models.smoothing import SMOOTHING_NONE, SMOOTHING_PHASE, SMOOTHING_SCHEDULE
from phasewatch.parallel.pool import map_ordered
from phasewatch.splits import Fold
from phasewatch.training.experiment import (
    Experiment,
    ExperimentRecord,
    RunDigests,
    parse_experiment,
    render_experiment,
)
from phasewatch.training.grids import HEADLINE_RECIPE, MAIN_MODELS
from phasewatch.training.predictions import (
    PartPredictions,
    build_predictions_table,
    read_predictions,
    write_prediction_table,
)
from phasewatch.training.tuning import find_tuning_space, tune

MAX_ERROR_CHARS = 300  # of an error in a user's model; some quote a whole array
EXPERIMENT_TIMEOUT_S = 3600.0  # a cell takes seconds; one that takes an hour hangs


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFailure:
    """Why a cell could not be trained, and the exit code for it."""

    words: str
    exit_code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedExperiment:
    """A cell that could not be trained."""

    cell: Experiment
    failure: TrainingFailure

    def __str__(self) -> str:
        c = self.cell
        return f"{c.model} on {c.recipe}-{c.fold} ({c.threat}, {c.table}, seed {c.seed}): {self.failure.words}"


class TrainingError(PhasewatchError):
    """Not one cell of a grid could be trained; its exit code is that of the first."""

    def __init__(self, failed: Sequence[FailedExperiment]) -> None:
        super().__init__("; ".join(map(str, failed[:3])) + (f" and {len(failed) - 3} more" if len(failed) > 3 else ""))
        self.exit_code = failed[0].failure.exit_code


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What became of a grid: cells trained now, finished before, and failed; a failed one is tried again next time."""

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
    tell: Callable[[Experiment, int, int], None] | None = None,
) -> TrainReport:
    """Train what is not finished, then write `predictions_v1.parquet` from every finished cell of the run.

    Args:
        run: A run with features and splits, held by the caller's lock.
        cells: The grid.
        workers: Cells at a time, one thread each (measured: 1.2 to 1.3 times the work of one cell with two threads).
        trials: Settings to try for each cell on its own validation A; 0 takes the defaults.
        tell: Called as (cell, how many are through, of how many).

    A cell that fails costs no other: a model that a user brings may raise anything, a worker may die or hang.
    """
    sources = compute_run_digests(run)
    for model in {cell.model for cell in cells}:
        registry.find_model(model)  # a wrong name is told before anything is trained
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
    timeout_s = None if workers == 1 else EXPERIMENT_TIMEOUT_S
    for result in map_ordered(_try_experiment, todo, workers=workers, timeout_s=timeout_s):
        cell = todo[result.index].cell
        failure = result.value
        if result.error is not None:
            failure = TrainingFailure(words=result.error, exit_code=MachineError.exit_code)
        if failure is None:
            trained.append(cell)
        else:
            failed.append(FailedExperiment(cell=cell, failure=failure))
        if tell is not None:
            tell(cell, len(kept) + len(trained) + len(failed), len(jobs))
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
    """Train one cell; return why it could not be, None if it was.

    Code of phasewatch that is broken is not caught: it shows its traceback. Code that a user brings is input.
    """
    try:
        _train_experiment(job)
    except PhasewatchError as error:
        return TrainingFailure(words=str(error), exit_code=error.exit_code)
    except (Exception, SystemExit) as error:
        own = registry.find_source_file(job.cell.model)
        lines = [frame.lineno for frame in extract_tb(error.__traceback__) if own and frame.filename == str(own)]
        if own is None or (isinstance(error, OSError) and not lines):  # ours, or a disk that the next cell meets, too
            raise
        return _build_user_failure(error, f"{own}:{lines[-1]}: " if lines else "")
    return None


def _build_user_failure(error: BaseException, place: str) -> TrainingFailure:
    """Return what a user's model raised in one line."""
    words = " ".join(str(error).split())[:MAX_ERROR_CHARS] or "no message"
    return TrainingFailure(words=f"{place}{type(error).__name__}: {words}", exit_code=ModelError.exit_code)


def _train_experiment(job: _TrainingJob) -> None:
    """Fit one cell, calibrate it on validation B, and write checkpoint, predictions and, last, `cell.json`."""
    cell, folder = job.cell, job.cell.folder(job.run)
    atomic.make_folder(folder)
    atomic.remove(folder / EXPERIMENT_FILE)
    atomic.sweep_temporaries(folder)
    sets = read_experiment_data(job.run, cell)
    settings = {}
    if job.trials:
        purpose = "/".join(cell.keys().values())
        settings = tune(sets, cell.model, trials=job.trials, seed=cell.seed, purpose=purpose).settings
    model = registry.create(cell.model, seed=cell.seed, settings=settings)
    fit_model(model, sets)
    model.save(folder)
    write_prediction_table(
        folder / EXPERIMENT_PREDICTIONS_FILE, [build_predictions_table(cell, _predict_parts(model, sets))]
    )
    names = [CHECKPOINT_FILE, *read_header(folder).files, EXPERIMENT_PREDICTIONS_FILE]
    outputs = {name: file_sha256(folder / name) for name in names}
    done = ExperimentRecord(cell=cell, inputs=job.inputs, outputs=outputs, trials=job.trials)
    atomic.write_atomic(folder / EXPERIMENT_FILE, render_experiment(done))


def read_experiment_data(run: Path, cell: Experiment) -> FoldData:
    """Read what a cell learns from and is asked about."""
    return load(run, cell.recipe, cell.fold, cell.threat, registry.find_model(cell.model).kind, cell.table)


def fit_model(model: PhaseModel, sets: FoldData) -> PhaseModel:
    """Fit on train and validation A; calibrate, smooth and set the alarm by train, validation B and spared soak.

    Windows that were dealt one by one have no past to smooth over, and no hours to be quiet in.
    """
    model.fit(sets.train.examples, sets.val_a.examples).calibrate(sets.val_b.examples)
    if sets.fold.deal is None and model.key not in registry.BASELINE_MODELS:
        spared = sets.soak.take(sets.calibration_soak)
        model.fit_postprocessing(
            sets.train.label_sequence,
            (sets.val_b.inputs, sets.val_b.label_sequence),
            (spared.inputs, spared.label_sequence),
        )
    return model


def _predict_parts(model: PhaseModel, sets: FoldData) -> list[PartPredictions]:
    """Give what a model says of each window that it did not learn from, as it is and filtered."""
    said: list[PartPredictions] = []
    for name, part in (("val_b", sets.val_b), ("test", sets.test), ("soak", sets.soak)):
        p = model.predict_proba(part.inputs)
        said.append(PartPredictions(part=name, filter=SMOOTHING_NONE, data=part, p=p))
        if model.filter is not None:
            track = part.label_sequence
            smoothed = {SMOOTHING_PHASE: model.filter}
            if name == "test":  # a reference beside the scores, nothing that rings
                smoothed[SMOOTHING_SCHEDULE] = model.filter.without_observations()
            said += [
                PartPredictions(part=name, filter=key, data=part, p=f.run(p, track.episode_index, track.t_center_ns))
                for key, f in smoothed.items()
            ]
    return said


def find_best_net(run: Path, cells: Iterable[Experiment]) -> str | None:
    """Name the net of the best mean macro-F1 on validation A, over the headline's realistic cells; None without one."""
    scores: dict[str, list[float]] = {}
    for cell in cells:
        if (cell.recipe, cell.threat, cell.table) == (
            HEADLINE_RECIPE,
            "realistic",
            "raw",
        ) and cell.model in MAIN_MODELS[1:]:
            scores.setdefault(cell.model, []).append(read_header(cell.folder(run)).val_a_macro_f1)
    return max(sorted(scores), key=lambda model: fmean(scores[model]), default=None)


def compute_run_digests(run: Path) -> RunDigests:
    """Digest what every cell reads, once."""
    return RunDigests(
        features=file_sha256(run / FEATURES_FILE),
        grids=file_sha256(run / BINS_PATH) if (run / BINS_PATH).is_file() else "absent",
        levels=file_sha256(run / LEVELS_PATH) if (run / LEVELS_PATH).is_file() else "absent",
        schema=file_sha256(run / FEATURE_SCHEMA_FILE),
        validation=file_sha256(run / VALIDATION_FILE),
    )


def find_finished_experiments(run: Path, sources: RunDigests) -> Iterator[Experiment]:
    """Give the cells under `models/` that were made from the run's present files, in the order of the merge."""
    found: list[Experiment] = []
    reads = InputDigestCache(sources, partial(read_fold, run))
    for path in (run / MODELS_DIR).glob(f"*/*/*/*/*/{EXPERIMENT_FILE}"):
        cell = parse_experiment(path.read_bytes(), file=str(path)).cell
        try:
            job = _TrainingJob(run=run, cell=cell, inputs=reads.get_inputs(cell))
        except (RunError, UsageError):
            continue  # its fold is no more (the splits were made anew), or its model cannot be imported here
        if cell.folder(run) == path.parent and _is_finished(job, any_trials=True):
            found.append(cell)
    yield from sorted(found)


def merge_predictions(run: Path, sources: RunDigests) -> tuple[int, int]:
    """Write `predictions_v1.parquet`; the same cells give the same bytes. Gives cells and rows."""
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
    """What cells depend on: each fold file and each model's code is read once, however many cells there are."""

    def __init__(self, sources: RunDigests, read: Callable[[str, str], Fold]) -> None:
        """Set up with digests of the run's files, and a reader of folds by recipe and name."""
        self._sources, self._read = sources, read
        self._folds: dict[tuple[str, str], Fold] = {}
        self._models: dict[str, tuple[InputKind, str | None]] = {}

    def get_inputs(self, cell: Experiment) -> dict[str, str]:
        """Return the digests of one cell's inputs.

        Raises:
            RunError: If its fold is not there.
            UsageError: If its model is not known here.
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
    """Whether the cell was made from these inputs (after so many trials), and its files are still what was written."""
    folder = job.cell.folder(job.run)
    try:
        done = parse_experiment((folder / EXPERIMENT_FILE).read_bytes(), file=str(folder / EXPERIMENT_FILE))
        if done.trials != job.trials and not any_trials:
            return False
        return done.inputs == job.inputs and all(file_sha256(folder / n) == d for n, d in done.outputs.items())
    except (FileNotFoundError, RunError):
        return False
