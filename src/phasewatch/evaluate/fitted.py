"""What checkpoints say of their own training: how much they learnt from, and what validation A made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from phasewatch.errors import PhasewatchError
from phasewatch.evaluate.rows import CHOICE, Headline, MetricRow
from phasewatch.evaluate.said import Board
from phasewatch.evaluate.scope import Place
from phasewatch.measures import confusion_counts, macro_f1
from phasewatch.models import checkpoint, registry
from phasewatch.train.cell import Cell
from phasewatch.train.cells import read_sets
from phasewatch.train.predictions import NO_FILTER

HISTORY = "val_a_macro_f1"
# Asked of names in a file: none of them is imported.
_BASELINES = {row.key for row in registry.MODELS if row.is_baseline}


def fitted_rows(run: Path, boards: Sequence[Board], place: Headline) -> Iterator[MetricRow]:
    """Give the windows that each model learnt from, the mean over its folds; and where the headline stands, what
    validation A made of each model that could be the headline's.

    A run without checkpoints (predictions that came from elsewhere) has no such row.
    """
    for board in boards:
        if board.filter != NO_FILTER:
            continue
        where = Place(
            recipe=board.recipe, fold="pooled", threat=board.threat, table=board.table, filter=NO_FILTER, agent=None
        )
        is_headline = (board.recipe, board.threat, board.table) == (place.recipe, place.threat, place.table)
        for model in dict.fromkeys(s.model for s in board.said):
            own = [s for s in board.said if s.model == model]
            cells = [
                Cell(recipe=board.recipe, fold=s.fold, threat=board.threat, model=model, table=board.table, seed=s.seed)
                for s in own
            ]
            headers = [_header(run, cell) for cell in cells]
            sizes = [h.trained_with["train"] for h in headers if h is not None and "train" in h.trained_with]
            if len(sizes) != len(cells):
                continue
            yield where.row(
                metric="train_windows", model=model, value=float(np.mean(sizes)), unit="windows", why="mean over folds"
            )
            first = min(s.seed for s in own)
            whole = sorted(s.fold for s in own if s.seed == first) == board.folds
            if is_headline and whole and model not in _BASELINES:
                scores = [_validated(run, cell) for cell in cells if cell.seed == first]
                if None not in scores:
                    value = float(np.mean([s for s in scores if s is not None]))
                    yield where.row(metric=CHOICE, model=model, seed=first, value=value, why="mean over folds")


def _header(run: Path, cell: Cell) -> checkpoint.Header | None:
    try:
        return checkpoint.read_header(cell.folder(run))
    except PhasewatchError:
        return None


def _validated(run: Path, cell: Cell) -> float | None:
    """Give macro-F1 on validation A: the nets keep the round that was best on it, others are asked."""
    header = _header(run, cell)
    if header is not None and header.history.get(HISTORY):
        return max(header.history[HISTORY])
    try:
        model = registry.load(cell.folder(run))
        val = read_sets(run, cell).val_a
    except PhasewatchError:
        return None
    return float(macro_f1(confusion_counts(val.y, model.predict(val.inputs)))) if len(val) else None
