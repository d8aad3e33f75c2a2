"""Checkpoints and predictions: made again from train and validation alone, and held against what the run has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.audit.checks import Check, collecting, judge, untested
from phasewatch.dataset import WindowSet, read_fold
from phasewatch.models import checkpoint, registry
from phasewatch.models.alarm import THETA_STEP
from phasewatch.models.base import PhaseModel
from phasewatch.models.filter import PHASE, SCHEDULE
from phasewatch.train.cell import Cell
from phasewatch.train.cells import finished_cells, learn, read_sets, read_sources
from phasewatch.train.predictions import NO_FILTER, PREDICTIONS, PROBABILITIES, read_table

REPEATED = "trained-on-train-only"
REPEATED_PROMISE = (
    "A model trained again on train and validation alone says the same: nothing else was fitted, scaled, stopped or "
    "calibrated on."
)
SAID = "predictions"
SAID_PROMISE = "Each prediction is what the checkpoint says of a window of its fold's test set, each window once."
TOLERANCE = 1e-3  # of a probability; the same bits are expected on the same machine, other CPUs sum in another order


def chosen_cells(run: Path) -> tuple[Cell, ...]:
    """Choose one finished cell of each model and table: of a recipe that is not leaky, realistic where there is one."""
    first: dict[tuple[str, str], Cell] = {}
    cells = finished_cells(run, read_sources(run))
    for cell in sorted(cells, key=lambda cell: (cell.threat != "realistic", cell)):
        if not read_fold(run, cell.recipe, cell.fold).leaky:
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
    return judge(REPEATED, REPEATED_PROMISE, faults, looked_at=f"{len(cells)} cells trained again")


def check_said(run: Path) -> Check:
    """Ask every checkpoint again, and hold its answers against the merged predictions."""
    faults: list[str] = []
    cells: list[Cell] = []
    with collecting(faults):
        table = read_table(run / PREDICTIONS)
        cells = list(finished_cells(run, read_sources(run)))
        known = {_key(cell) for cell in cells}
        faults += [f"{'/'.join(map(str, key))} has predictions and no checkpoint" for key in _keys_of(table) - known]
        for cell in cells:
            with collecting(faults):
                faults += _said(run, cell, table)
    if not cells and not faults:
        return untested(SAID, SAID_PROMISE, "the run has no finished cell")
    return judge(SAID, SAID_PROMISE, faults, looked_at=f"{len(cells)} checkpoints asked again")


def _repeat(run: Path, cell: Cell) -> Iterator[str]:
    sets, folder = read_sets(run, cell), cell.folder(run)
    header, _ = checkpoint.read(folder)
    expected = {"train": sets.train, "val_a": sets.val_a, "val_b": sets.val_b}
    for part, windows in expected.items():
        if header.trained_on.get(part) != windows.examples.sha256():
            yield f"{folder}: its {part} windows are not those of its fold"
            return
    if registry.row_of(cell.model).persist == "none":
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


def _said(run: Path, cell: Cell, table: Any) -> Iterator[str]:
    """Hold a cell's test rows, as it said them and filtered, against its checkpoint."""
    sets, where = read_sets(run, cell), "/".join(map(str, _key(cell)))
    test, rows = sets.test, _rows_of(table, cell)
    if not len(test):
        if rows.num_rows:
            yield f"{where}: has {rows.num_rows} test rows, and its fold tests nothing"
        return
    if (order := _order(rows, test)) is None:
        outside = set(rows["episode_id"].to_pylist()) - {e.episode_id for e in test.windows.episodes}
        words = f"episode {min(outside)} is not in its test set" if outside else "not each test window once"
        yield f"{where}: {words}"
        return
    said = _matrix(rows)[order]
    if not np.array_equal(rows["y_true"].to_numpy().astype(np.int64)[order], test.y):
        yield f"{where}: truth in the predictions is not that of the features"
    elif not np.array_equal(rows["y_pred"].to_numpy().astype(np.int64)[order], said.argmax(axis=1)):
        yield f"{where}: a decision is not the likeliest phase of its row"
    elif registry.row_of(cell.model).persist == "exact":
        stored = registry.load(cell.folder(run))
        gap = float(np.abs(stored.predict_proba(test.inputs) - said).max())
        if not gap <= TOLERANCE:
            yield f"{where}: its checkpoint says otherwise, by {gap:.3f}; the predictions were edited"
        if stored.filter is not None:
            for name, smooth in ((PHASE, stored.filter), (SCHEDULE, stored.filter.schedule())):
                rows = _rows_of(table, cell, name)
                order = _order(rows, test)
                expected = smooth.run(stored.predict_proba(test.inputs), test.track.of, test.track.t_center_ns)
                if order is None or not np.abs(expected - _matrix(rows)[order]).max() <= TOLERANCE:
                    yield f"{where}: its {name} filter says otherwise; the filtered predictions were edited"


def _order(rows: Any, test: WindowSet) -> NDArray[np.intp] | None:
    """Find where each test window stands among the rows; None unless each stands there once and no other does."""
    told = list(zip(rows["episode_id"].to_pylist(), rows["t_center_ns"].to_pylist(), strict=True))
    ids = [test.windows.episodes[i].episode_id for i in test.windows.of]
    asked = list(zip(ids, test.windows.t_center_ns.tolist(), strict=True))
    if sorted(told) != sorted(asked):
        return None
    place = {key: i for i, key in enumerate(told)}
    return np.array([place[key] for key in asked], np.intp)


def _matrix(rows: Any) -> NDArray[np.float64]:
    return np.column_stack([rows[name].to_numpy().astype(np.float64) for name in PROBABILITIES])


def _key(cell: Cell) -> tuple[object, ...]:
    return (*cell.keys().values(), cell.seed)


def _keys_of(table: Any) -> set[tuple[object, ...]]:
    names = ["recipe", "fold", "threat", "model", "table", "seed"]
    return {tuple(row[n] for n in names) for row in table.group_by(names).aggregate([]).to_pylist()}


def _rows_of(table: Any, cell: Cell, filter_: str = NO_FILTER) -> Any:
    import pyarrow.compute as pc

    wanted = {**cell.keys(), "seed": cell.seed, "part": "test", "filter": filter_}
    for name, value in wanted.items():
        table = table.filter(pc.equal(table[name], value))
    return table
