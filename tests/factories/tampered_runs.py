"""Hands that cheat: they change a trained run as somebody would who hides it, digests included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from phasewatch.artifacts import EXPERIMENT_FILE, EXPERIMENT_PREDICTIONS_FILE
from phasewatch.dataset import FoldData, file_sha256, load
from phasewatch.models import checkpoint, registry
from phasewatch.training.experiment import Experiment, parse_experiment, render_experiment
from phasewatch.training.live_scores import predict_live_windows
from phasewatch.training.predictions import build_predictions_table, write_prediction_table
from phasewatch.training.train import FittedModel, compute_run_digests, merge_predictions, predict_parts


def seal(run: Path, cell: Experiment) -> None:
    """Build a tampered cell's own digests fit again, as somebody who hides it would."""
    folder = cell.folder(run)
    done = parse_experiment((folder / EXPERIMENT_FILE).read_bytes(), file="")
    outputs = {name: file_sha256(folder / name) for name in done.outputs}
    (folder / EXPERIMENT_FILE).write_bytes(render_experiment(msgspec.structs.replace(done, outputs=outputs)))
    merge_predictions(run, compute_run_digests(run))


def refit(run: Path, cell: Experiment, cheat: Callable[..., FittedModel]) -> None:
    """Train a cell in a way that sees what it must not, and put it in the honest one's place."""
    sets = load(run, cell.recipe, cell.fold, cell.threat, registry.find_model(cell.model).kind)
    honest = dict(checkpoint.read_header(cell.folder(run)).trained_on)
    fitted = cheat(registry.create(cell.model, seed=cell.seed), sets)
    fitted.model.trained_on = honest
    # It may have stopped on other windows than those that it claims.
    n = len(sets.val_b)
    val_b = fitted.val_b if len(fitted.val_b) == n else fitted.model.predict_proba(sets.val_b.inputs)
    live = predict_live_windows(fitted.model, sets, sets.val_b.windows.episodes)
    put_model(run, cell, replace(fitted, val_b=val_b, val_b_live=live), sets)


def put_model(run: Path, cell: Experiment, fitted: FittedModel, sets: FoldData) -> None:
    """Put a model and its predictions in the place of a cell's own."""
    folder = cell.folder(run)
    fitted.model.save(folder)
    table = build_predictions_table(cell, predict_parts(fitted, sets))
    write_prediction_table(folder / EXPERIMENT_PREDICTIONS_FILE, [table])
    seal(run, cell)


def edit_predictions(run: Path, cell: Experiment, change: Callable[[pa.Table], pa.Table]) -> None:
    """Replace a cell's predictions by what a function makes of them."""
    path = cell.folder(run) / EXPERIMENT_PREDICTIONS_FILE
    table = change(pq.read_table(path))
    pq.write_table(table, path)
    seal(run, cell)
