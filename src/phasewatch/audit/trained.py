"""Checkpoints and predictions: made again from train and validation alone, and held against what the run has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.audit.checks import Check, collecting, judge, untested
from phasewatch.dataset import WindowSet, read_fold
from phasewatch.errors import UsageError
from phasewatch.models import checkpoint, registry
from phasewatch.models.alarm import THETA_STEP
from phasewatch.models.base import PhaseModel
from phasewatch.models.filter import NONE, PHASE, SCHEDULE
from phasewatch.split import Part, recipe_of
from phasewatch.train.cell import DONE, Cell
from phasewatch.train.cells import finished_cells, learn, read_sets, read_sources
from phasewatch.train.predictions import PREDICTIONS, PROBABILITIES, read_table

REPEATED = "trained-on-train-only"
REPEATED_PROMISE = (
    "A model trained again on train and validation alone says the same: nothing else was fitted, scaled, stopped or "
    "calibrated on."
)
SAID = "predictions"
SAID_PROMISE = "Each prediction is what the checkpoint says of a window of its fold's test set, each window once."
_CELL = ("recipe", "fold", "threat", "model", "table", "seed")
_PLACE = (*_CELL, "part", "filter")
_SAID = ("episode_id", "t_center_ns", "y_true", "y_pred", *PROBABILITIES)
TOLERANCE = 1e-3  # of a probability; the same bits are expected on the same machine, other CPUs sum in another order


def chosen_cells(run: Path) -> tuple[Cell, ...]:
    """Choose one finished cell of each model and table: of a recipe that tests and does not leak, realistic if there is one."""
    first: dict[tuple[str, str], Cell] = {}
    cells = finished_cells(run, read_sources(run))
    for cell in sorted(cells, key=lambda cell: (cell.threat != "realistic", cell)):
        row = recipe_of(cell.recipe)
        if row.tests and not row.leaky:
            first.setdefault((cell.model, cell.table), cell)
    return tuple(first.values())


def check_repeated(run: Path, cells: Sequence[Cell]) -> Check:
    """Train some cells again and compare what both say of validation A and of the test set."""
    faults: list[str] = []
    for cell in cells:
        with collecting(faults):
            faults += _repeat(run, cell)
    if not cells:
        return untested(REPEATED, REPEATED_PROMISE, "the run has no finished cell")
    return judge(REPEATED, REPEATED_PROMISE, faults, looked_at=_counted(cells, "cells trained again"))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Told:
    """The merged predictions, and which rows are whose: looked up once, for the grid has thousands of cells and filters."""

    table: Any
    places: Mapping[tuple[object, ...], Any]

    @classmethod
    def of(cls, table: Any) -> Told:
        """Find the rows of each cell, part and filter."""
        import pyarrow as pa

        numbered = table.select(list(_PLACE)).append_column("row", pa.array(np.arange(table.num_rows)))
        groups = numbered.group_by(list(_PLACE)).aggregate([("row", "list")])
        keys = zip(*(groups[name].to_pylist() for name in _PLACE), strict=True)
        lists = groups["row_list"].combine_chunks()
        return cls(table=table.select(list(_SAID)).combine_chunks(), places=dict(zip(keys, lists, strict=True)))

    def cells(self) -> set[tuple[object, ...]]:
        """Name the cells that have rows."""
        return {key[: len(_CELL)] for key in self.places}

    def rows(self, cell: Cell, part: str, name: str) -> Any:
        """Give the rows of a cell's part and filter."""
        found = self.places.get((*_key(cell), part, name))
        return self.table.slice(0, 0) if found is None else self.table.take(found.values)


def check_said(run: Path) -> Check:
    """Ask every checkpoint again, and hold its answers against the merged predictions.

    A cell of a model whose code is not here can be neither asked nor accused: then the promise is untested.
    """
    faults: list[str] = []
    cells: list[Cell] = []
    absent: set[str] = set()
    with collecting(faults):
        told = Told.of(read_table(run / PREDICTIONS))
        cells = list(finished_cells(run, read_sources(run)))
        known = {_key(cell) for cell in cells}
        for key in sorted(told.cells() - known, key=str):
            if words := _not_importable(run, key):
                absent.add(words)
            else:
                faults.append(f"{'/'.join(map(str, key))} has predictions and no checkpoint")
        for cell in cells:
            with collecting(faults):
                faults += _said(run, cell, told)
    if not cells and not faults:
        return untested(SAID, SAID_PROMISE, "the run has no finished cell")
    looked_at = _counted(cells, "checkpoints asked again")
    if absent and not faults:
        return untested(SAID, SAID_PROMISE, f"{looked_at}, but {'; '.join(sorted(absent))}")
    return judge(SAID, SAID_PROMISE, faults, looked_at=looked_at)


def _not_importable(run: Path, key: tuple[object, ...]) -> str:
    """Say why a trained cell's model cannot be had here; empty if it can, or if nothing was trained."""
    named = dict(zip(_CELL, key, strict=True))
    cell = msgspec.convert(named, Cell)
    if not (cell.folder(run) / DONE).is_file():
        return ""
    try:
        registry.class_of(cell.model)
    except UsageError as error:
        return str(error)
    return ""


def _counted(cells: Sequence[Cell], done: str) -> str:
    """Say how many cells were looked at, and of how many only the windows: those whose weights nobody can load."""
    asked = sum(map(_can_be_asked, cells))
    kept_none = len(cells) - asked
    return f"{asked} {done}" + (f", of {kept_none} without weights the windows compared" if kept_none else "")


def _can_be_asked(cell: Cell) -> bool:
    """Whether its checkpoint can be loaded: one of a model that was given as module:Class never is."""
    return ":" not in cell.model and registry.row_of(cell.model).persist == "exact"


def _repeat(run: Path, cell: Cell) -> Iterator[str]:
    sets, folder = read_sets(run, cell), cell.folder(run)
    header, _ = checkpoint.read(folder)
    expected = {"train": sets.train, "val_a": sets.val_a, "val_b": sets.val_b}
    if header.filter is not None:
        expected |= {"decide_val": sets.val_b, "decide_soak": sets.soak.take(sets.spared_soak)}
    for part, windows in expected.items():
        if header.trained_on.get(part) != windows.examples.sha256():
            yield f"{folder}: its {part} windows are not those of its fold"
            return
    if not _can_be_asked(cell):
        return  # scored by the process that fitted it: there is nothing to hold a second fit against
    model = registry.create(cell.model, seed=header.seed, settings=header.config)
    learn(model, sets)
    stored = registry.load(folder)
    if not _decides_alike(model, stored):
        yield f"{folder}: trained again its filter or alarm differs; it was set by something else"
    if not _alike(model.history, stored.history):
        yield f"{folder}: trained again its history differs; it was stopped by something else"
    for part, windows in (("val_a", sets.val_a), ("test", sets.test)):
        if not len(windows):
            continue
        gap = float(np.abs(model.predict_proba(windows.inputs) - stored.predict_proba(windows.inputs)).max())
        if not gap <= TOLERANCE:
            yield f"{folder}: trained again it differs by {gap:.3f} on {part}; it was fitted on something else"


def _alike(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]) -> bool:
    return ours.keys() == theirs.keys() and all(
        len(ours[name]) == len(theirs[name]) and np.allclose(ours[name], theirs[name], rtol=TOLERANCE, atol=TOLERANCE)
        for name in ours
    )


def _decides_alike(ours: PhaseModel, theirs: PhaseModel) -> bool:
    """Whether filter and alarm are the same but for what another CPU's sums may change."""
    if ours.alarm.keys() != theirs.alarm.keys() or (ours.filter is None) is not (theirs.filter is None):
        return False
    one, other = ours.filter, theirs.filter
    return all(abs(ours.alarm[n].theta - theirs.alarm[n].theta) <= 2 * THETA_STEP for n in ours.alarm) and (
        one is None
        or other is None
        or (
            one.kappa == other.kappa
            and np.allclose(one.transitions, other.transitions)
            and np.allclose(one.prior, other.prior, atol=TOLERANCE)
        )
    )


def _said(run: Path, cell: Cell, told: Told) -> Iterator[str]:
    """Hold the rows of each filter against what the checkpoint says of the same windows."""
    sets, where, folder = read_sets(run, cell), "/".join(map(str, _key(cell))), cell.folder(run)
    part = asked_part(cell)
    asked = sets.test if part == "test" else sets.val_b  # `deploy` tests nothing
    own = set(read_fold(run, cell.recipe, cell.fold).ids(Part.TEST if part == "test" else Part.VAL_B))
    answers: dict[str, NDArray[np.float64] | None] = {NONE: None}
    if _can_be_asked(cell):
        answers[NONE] = registry.load(folder).predict_proba(asked.inputs)
    smooth, track = checkpoint.read_header(folder).filter, asked.track
    if smooth is not None:
        filters = {PHASE: smooth, SCHEDULE: smooth.schedule()} if part == "test" else {PHASE: smooth}
        for name, one in filters.items():
            p = answers[NONE]
            answers[name] = None if p is None else one.run(p, track.of, track.t_center_ns)
    for name, p in answers.items():
        words = _fault(told.rows(cell, part, name), asked, p, own)
        if words:
            yield f"{where}, filter {name}: {words}"


def _fault(rows: Any, asked: WindowSet, answer: NDArray[np.float64] | None, own: set[str]) -> str:
    """Say what is wrong with the rows of some windows; empty where nothing is."""
    told = [f"{e} {t}" for e, t in zip(rows["episode_id"].to_pylist(), rows["t_center_ns"].to_pylist(), strict=True)]
    ids = [asked.windows.episodes[i].episode_id for i in asked.windows.of]
    wanted = [f"{e} {t}" for e, t in zip(ids, asked.windows.t_center_ns.tolist(), strict=True)]
    if sorted(told) != sorted(wanted):
        outside = set(rows["episode_id"].to_pylist()) - own
        return f"episode {min(outside)} is not in its set" if outside else "not each window once"
    place = {key: i for i, key in enumerate(told)}
    order = np.array([place[key] for key in wanted], np.intp)
    said = _matrix(rows)[order]
    if not np.array_equal(rows["y_true"].to_numpy().astype(np.int64)[order], asked.y):
        return "truth in the predictions is not that of the features"
    if not np.array_equal(rows["y_pred"].to_numpy().astype(np.int64)[order], said.argmax(axis=1)):
        return "a decision is not the likeliest phase of its row"
    gap = 0.0 if answer is None or not len(said) else float(np.abs(answer - said).max())
    return "" if gap <= TOLERANCE else f"its checkpoint says otherwise, by {gap:.3f}; the predictions were edited"


def asked_part(cell: Cell) -> str:
    """Name the part whose predictions are held against the checkpoint."""
    return "test" if recipe_of(cell.recipe).tests else "val_b"


def _matrix(rows: Any) -> NDArray[np.float64]:
    return np.column_stack([rows[name].to_numpy().astype(np.float64) for name in PROBABILITIES])


def _key(cell: Cell) -> tuple[object, ...]:
    return (*cell.keys().values(), cell.seed)
