"""Train the cells of a grid, two at a time; finished ones stay, a killed one starts anew; then merge what they said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from traceback import extract_tb

from phasewatch import atomic
from phasewatch.dataset import Sets, file_sha256, load, read_fold, tensors
from phasewatch.dataset.run import FEATURES, SCHEMA, VALIDATION
from phasewatch.errors import MachineError, ModelError, PhasewatchError, RunError, UsageError
from phasewatch.grid.files import GRIDS, LEVELS_FILE
from phasewatch.models import registry
from phasewatch.models.base import InputKind, PhaseModel
from phasewatch.models.checkpoint import HEADER, read_header
from phasewatch.models.filter import NONE, PHASE, SCHEDULE
from phasewatch.split import Fold
from phasewatch.train.cell import DONE, MODELS, Cell, Done, Sources, parse_done, render_done
from phasewatch.train.grid import HEADLINE, SIX
from phasewatch.train.predictions import PREDICTIONS, Said, build_table, read_table, write_table
from phasewatch.train.tune import space_of, tune
from phasewatch.workers import map_ordered

BINS, LEVELS = (f"{tensors.GRIDS}/{name}" for name in (GRIDS, LEVELS_FILE))
CELL_PREDICTIONS = "predictions.parquet"
MAX_WORDS = 300  # of an error in a user's model; some quote a whole array
TIMEOUT_S = 3600.0  # a cell takes seconds; one that takes an hour hangs


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a cell could not be trained, and the exit code for it."""

    words: str
    exit_code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedCell:
    """A cell that could not be trained."""

    cell: Cell
    failure: Failure

    def __str__(self) -> str:
        c = self.cell
        return f"{c.model} on {c.recipe}-{c.fold} ({c.threat}, {c.table}, seed {c.seed}): {self.failure.words}"


class TrainingError(PhasewatchError):
    """Not one cell of a grid could be trained; its exit code is that of the first."""

    def __init__(self, failed: Sequence[FailedCell]) -> None:
        super().__init__("; ".join(map(str, failed[:3])) + (f" and {len(failed) - 3} more" if len(failed) > 3 else ""))
        self.exit_code = failed[0].failure.exit_code


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What became of a grid: cells trained now, finished before, and failed; a failed one is tried again next time."""

    trained: tuple[Cell, ...]
    kept: tuple[Cell, ...]
    failed: tuple[FailedCell, ...]
    merged: int
    rows: int
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    run: Path
    cell: Cell
    inputs: dict[str, str]
    trials: int = 0


def train_cells(
    run: Path,
    cells: Sequence[Cell],
    *,
    workers: int = 2,
    trials: int = 0,
    tell: Callable[[Cell, int, int], None] | None = None,
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
    sources = read_sources(run)
    for model in {cell.model for cell in cells}:
        registry.row_of(model)  # a wrong name is told before anything is trained
        if trials:
            space_of(model)
    reads = InputDigests(sources, partial(read_fold, run))
    jobs = [_Job(run=run, cell=cell, inputs=reads.of(cell), trials=trials) for cell in sorted(set(cells))]
    todo: list[_Job] = []
    kept: list[Cell] = []
    for job in jobs:
        if _is_finished(job):
            kept.append(job.cell)
        else:
            todo.append(job)
    trained: list[Cell] = []
    failed: list[FailedCell] = []
    timeout_s = None if workers == 1 else TIMEOUT_S
    for result in map_ordered(try_cell, todo, workers=workers, timeout_s=timeout_s):
        cell = todo[result.index].cell
        failure = result.value
        if result.error is not None:
            failure = Failure(words=result.error, exit_code=MachineError.exit_code)
        if failure is None:
            trained.append(cell)
        else:
            failed.append(FailedCell(cell=cell, failure=failure))
        if tell is not None:
            tell(cell, len(kept) + len(trained) + len(failed), len(jobs))
    merged, rows = merge(run, sources)
    return TrainReport(
        trained=tuple(trained), kept=tuple(kept), failed=tuple(failed), merged=merged, rows=rows, path=run / PREDICTIONS
    )


def try_cell(job: _Job) -> Failure | None:
    """Train one cell; return why it could not be, None if it was.

    Code of phasewatch that is broken is not caught: it shows its traceback. Code that a user brings is input.
    """
    try:
        train_cell(job)
    except PhasewatchError as error:
        return Failure(words=str(error), exit_code=error.exit_code)
    except (Exception, SystemExit) as error:
        own = registry.code_of(job.cell.model)
        lines = [frame.lineno for frame in extract_tb(error.__traceback__) if own and frame.filename == str(own)]
        if own is None or (isinstance(error, OSError) and not lines):  # ours, or a disk that the next cell meets, too
            raise
        return _authors_error(error, f"{own}:{lines[-1]}: " if lines else "")
    return None


def _authors_error(error: BaseException, place: str) -> Failure:
    """Return what a user's model raised in one line."""
    words = " ".join(str(error).split())[:MAX_WORDS] or "no message"
    return Failure(words=f"{place}{type(error).__name__}: {words}", exit_code=ModelError.exit_code)


def train_cell(job: _Job) -> None:
    """Fit one cell, calibrate it on validation B, and write checkpoint, predictions and, last, `cell.json`."""
    cell, folder = job.cell, job.cell.folder(job.run)
    atomic.make_folder(folder)
    atomic.remove(folder / DONE)
    atomic.sweep_temporaries(folder)
    sets = read_sets(job.run, cell)
    settings = {}
    if job.trials:
        purpose = "/".join(cell.keys().values())
        settings = tune(sets, cell.model, trials=job.trials, seed=cell.seed, purpose=purpose).settings
    model = registry.create(cell.model, seed=cell.seed, settings=settings)
    learn(model, sets)
    model.save(folder)
    write_table(folder / CELL_PREDICTIONS, [build_table(cell, said_of(model, sets))])
    names = [HEADER, *read_header(folder).files, CELL_PREDICTIONS]
    outputs = {name: file_sha256(folder / name) for name in names}
    done = Done(cell=cell, inputs=job.inputs, outputs=outputs, trials=job.trials)
    atomic.write_whole(folder / DONE, render_done(done))


def read_sets(run: Path, cell: Cell) -> Sets:
    """Read what a cell learns from and is asked about."""
    return load(run, cell.recipe, cell.fold, cell.threat, registry.row_of(cell.model).kind, cell.table)


def learn(model: PhaseModel, sets: Sets) -> PhaseModel:
    """Fit on train and validation A; calibrate, smooth and set the alarm by train, validation B and spared soak.

    Windows that were dealt one by one have no past to smooth over, and no hours to be quiet in.
    """
    model.fit(sets.train.examples, sets.val_a.examples).calibrate(sets.val_b.examples)
    if sets.fold.deal is None and model.key not in registry.BASELINES:
        spared = sets.soak.take(sets.spared_soak)
        model.decide(sets.train.track, (sets.val_b.inputs, sets.val_b.track), (spared.inputs, spared.track))
    return model


def said_of(model: PhaseModel, sets: Sets) -> list[Said]:
    """Give what a model says of each window that it did not learn from, as it is and filtered."""
    said: list[Said] = []
    for name, part in (("val_b", sets.val_b), ("test", sets.test), ("soak", sets.soak)):
        p = model.predict_proba(part.inputs)
        said.append(Said(part=name, filter=NONE, data=part, p=p))
        if model.filter is not None:
            track = part.track
            smoothed = {PHASE: model.filter}
            if name == "test":  # a reference beside the scores, nothing that rings
                smoothed[SCHEDULE] = model.filter.schedule()
            said += [
                Said(part=name, filter=key, data=part, p=f.run(p, track.of, track.t_center_ns))
                for key, f in smoothed.items()
            ]
    return said


def best_net(run: Path, cells: Iterable[Cell]) -> str | None:
    """Name the net of the best mean macro-F1 on validation A, over the headline's realistic cells; None without one."""
    scores: dict[str, list[float]] = {}
    for cell in cells:
        if (cell.recipe, cell.threat, cell.table) == (HEADLINE, "realistic", "raw") and cell.model in SIX[1:]:
            scores.setdefault(cell.model, []).append(read_header(cell.folder(run)).val_a_macro_f1)
    return max(sorted(scores), key=lambda model: fmean(scores[model]), default=None)


def read_sources(run: Path) -> Sources:
    """Digest what every cell reads, once."""
    return Sources(
        features=file_sha256(run / FEATURES),
        grids=file_sha256(run / BINS) if (run / BINS).is_file() else "absent",
        levels=file_sha256(run / LEVELS) if (run / LEVELS).is_file() else "absent",
        schema=file_sha256(run / SCHEMA),
        validation=file_sha256(run / VALIDATION),
    )


def finished_cells(run: Path, sources: Sources) -> Iterator[Cell]:
    """Give the cells under `models/` that were made from the run's present files, in the order of the merge."""
    found: list[Cell] = []
    reads = InputDigests(sources, partial(read_fold, run))
    for path in (run / MODELS).glob(f"*/*/*/*/*/{DONE}"):
        cell = parse_done(path.read_bytes(), file=str(path)).cell
        try:
            job = _Job(run=run, cell=cell, inputs=reads.of(cell))
        except (RunError, UsageError):
            continue  # its fold is no more (the splits were made anew), or its model cannot be imported here
        if cell.folder(run) == path.parent and _is_finished(job, any_trials=True):
            found.append(cell)
    yield from sorted(found)


def merge(run: Path, sources: Sources) -> tuple[int, int]:
    """Write `predictions_v1.parquet`; the same cells give the same bytes. Gives cells and rows."""
    cells = list(finished_cells(run, sources))
    rows = 0

    def tables() -> Iterator[object]:
        nonlocal rows
        for cell in cells:
            table = read_table(cell.folder(run) / CELL_PREDICTIONS)
            rows += table.num_rows
            yield table

    write_table(run / PREDICTIONS, tables())
    return len(cells), rows


class InputDigests:
    """What cells depend on: each fold file and each model's code is read once, however many cells there are."""

    def __init__(self, sources: Sources, read: Callable[[str, str], Fold]) -> None:
        """Set up with digests of the run's files, and a reader of folds by recipe and name."""
        self._sources, self._read = sources, read
        self._folds: dict[tuple[str, str], Fold] = {}
        self._models: dict[str, tuple[InputKind, str | None]] = {}

    def of(self, cell: Cell) -> dict[str, str]:
        """Return the digests of one cell's inputs.

        Raises:
            RunError: If its fold is not there.
            UsageError: If its model is not known here.
        """
        if (at := (cell.recipe, cell.fold)) not in self._folds:
            self._folds[at] = self._read(*at)
        if cell.model not in self._models:
            code = registry.code_of(cell.model)
            self._models[cell.model] = registry.row_of(cell.model).kind, None if code is None else file_sha256(code)
        kind, digest = self._models[cell.model]
        inputs = self._sources.of(cell, self._folds[at], kind)
        return inputs if digest is None else {**inputs, "model code": digest}


def _is_finished(job: _Job, *, any_trials: bool = False) -> bool:
    """Whether the cell was made from these inputs (after so many trials), and its files are still what was written."""
    folder = job.cell.folder(job.run)
    try:
        done = parse_done((folder / DONE).read_bytes(), file=str(folder / DONE))
        if done.trials != job.trials and not any_trials:
            return False
        return done.inputs == job.inputs and all(file_sha256(folder / n) == d for n, d in done.outputs.items())
    except (FileNotFoundError, RunError):
        return False
