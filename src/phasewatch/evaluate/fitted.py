"""What is known of models before the test: how much they learnt from, and their score on validation B."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from phasewatch.errors import PhasewatchError
from phasewatch.evaluate.rows import CHOICE, Headline, MetricRow
from phasewatch.evaluate.said import Board, Said
from phasewatch.evaluate.scope import Place
from phasewatch.measures import confusion_counts, macro_f1
from phasewatch.models import checkpoint, registry
from phasewatch.train.cell import Cell
from phasewatch.train.predictions import NO_FILTER


def fitted_rows(run: Path, boards: Sequence[Board], val_b: Board | None, place: Headline) -> Iterator[MetricRow]:
    """Return the windows that each model learnt from, and the validation score by which the headline's model is chosen.

    A run without checkpoints (predictions that came from elsewhere) has no such row.

    Args:
        run: The run.
        boards: Test predictions.
        val_b: The predictions of validation B where the headline stands. Validation A stopped the training of some
            models, which therefore look better on it than they are.
        place: Where the headline stands.
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
            if is_headline and whole and model not in registry.BASELINES and val_b is not None:
                scores = {s.fold: _macro_f1(s) for s in val_b.said if (s.model, s.seed) == (model, first)}
                if sorted(scores) == board.folds:
                    value = float(np.mean([scores[fold] for fold in board.folds]))
                    yield where.row(metric=CHOICE, model=model, seed=first, value=value, why="mean over folds")


def _header(run: Path, cell: Cell) -> checkpoint.Header | None:
    try:
        return checkpoint.read_header(cell.folder(run))
    except PhasewatchError:
        return None


def _macro_f1(said: Said) -> float:
    return float(macro_f1(confusion_counts(said.shown.y_true, said.answer.y_pred)))
