"""Read predictions, score every board of them, write `metrics_v1.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phasewatch import atomic, profiles
from phasewatch.channels import CHANNELS
from phasewatch.dataset import file_sha256
from phasewatch.dataset.splits import group_of
from phasewatch.dataset.tensors import GRIDS
from phasewatch.errors import RunError
from phasewatch.evaluate import across, shift
from phasewatch.evaluate.board import build_rows, scope_of
from phasewatch.evaluate.bootstrap import RESAMPLES
from phasewatch.evaluate.calibration import abstention_rows, calibration_rows, least_confidence
from phasewatch.evaluate.explain import importance_rows
from phasewatch.evaluate.fitted import fitted_rows
from phasewatch.evaluate.operator import DAMAGE, operator_rows
from phasewatch.evaluate.rows import (
    METRICS,
    Headline,
    MetricRow,
    Metrics,
    chosen,
    headline,
    parse_metrics,
    render_metrics,
)
from phasewatch.evaluate.said import Board, join, parse_boards
from phasewatch.evaluate.scope import Place, Rules
from phasewatch.evaluate.shift import Recorded
from phasewatch.grid.files import INDEX as GRID_INDEX
from phasewatch.grid.files import open_grids, rows_by_id
from phasewatch.split import Fold, parse_fold
from phasewatch.train.predictions import NO_FILTER, PREDICTIONS, read_table
from phasewatch.vocab import SampleKind

AGENTS = ("off", "on", None)  # null = both
POOLED = "pooled"
SCHEDULE = "schedule"  # a reference row: its filter has no emissions, so no alarm of it means anything

__all__ = ["headline", "read_metrics", "score"]


def score(run: Path, *, resamples: int = RESAMPLES, seed: int = 0) -> Metrics:
    """Score the test predictions of a run and write `metrics_v1.json`; see `rescore`."""
    metrics = rescore(run, resamples=resamples, seed=seed)
    atomic.write_whole(run / METRICS, render_metrics(metrics))
    return metrics


def rescore(run: Path, *, resamples: int = RESAMPLES, seed: int = 0) -> Metrics:
    """Score the test predictions of a run.

    A board pools the folds of a recipe, or is one fold. Models stand on a board together only if they answered for
    exactly its windows: who was trained on one fold alone is compared on that fold alone. What cannot be scored
    (predictions of another split, probabilities that are no numbers) is said in a note, and the rest is scored.

    Raises:
        RunError: If there are no test predictions, or two models saw other truths for the same window.
    """
    rules = Rules(
        malicious=tuple(p.name for p in profiles.PROFILES if p.kind != SampleKind.BENIGN),
        profiles=tuple(p.name for p in profiles.PROFILES),
        resamples=resamples,
        seed=seed,
    )
    path = run / PREDICTIONS
    table = read_table(path)
    folds, digests = _read_folds(run)
    index = run / GRIDS / GRID_INDEX
    if index.is_file():
        digests[f"{GRIDS}/{GRID_INDEX}"] = file_sha256(index)
    rows: list[MetricRow] = []
    with _one_thread():
        boards = list(parse_boards(table, folds))
        if not boards:
            raise RunError(f"{path}: no test rows; train a recipe that holds something out")
        val_b = {b.key: b for b in parse_boards(table, {}, part="val_b")}
        for board in boards:
            rows += _score_board(board, val_b.get(board.key), rules)
        rows += across.build_gaps(boards, rules)
        rows += _operate(boards, val_b, table, read_recorded(run), rules)
        home = Headline()
        rows += fitted_rows(run, boards, val_b.get((home.recipe, home.threat, home.table, NO_FILTER)), home)
        rows += importance_rows(run, chosen(rows), rules)
    return Metrics(inputs={PREDICTIONS: file_sha256(path), **digests}, metrics=tuple(rows))


def read_metrics(run: Path) -> Metrics:
    """Read `metrics_v1.json`.

    Raises:
        RunError: If it is absent or not one.
    """
    path = run / METRICS
    if not path.is_file():
        raise RunError(f"{path}: absent; make it with `phasewatch evaluate {run}`")
    return parse_metrics(path.read_bytes(), file=str(path))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Multiply with one thread: the products are small, and on a busy machine idle BLAS threads cost ten times the work."""
    try:
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
    except ImportError:  # comes with scikit-learn; without it numbers are the same, only later
        yield
        return
    with threadpool_limits(1):
        yield


def _read_folds(run: Path) -> tuple[dict[tuple[str, str], Fold], dict[str, str]]:
    """Read the cuts that the run has, with the digests of their files."""
    paths = sorted((run / "splits").glob("*.json"))
    folds = [parse_fold(path.read_bytes(), file=str(path)) for path in paths]
    digests = {f"splits/{path.name}": file_sha256(path) for path in paths}
    return {(fold.recipe, fold.fold): fold for fold in folds}, digests


def _score_board(board: Board, val_b: Board | None, rules: Rules) -> list[MetricRow]:
    """Score the models that answered for all folds together, then those of each fold; then say what could not be."""
    rows: list[MetricRow] = []
    keys = {"recipe": board.recipe, "threat": board.threat, "table": board.table, "filter": board.filter}
    own = across.own_agent(board.threat)
    for agent in AGENTS:
        # By profile, host and sample where the threat model is at home, or the numbers of a full grid are too many.
        rows += _build(board, board.folds, Place(**keys, fold=POOLED, agent=agent), rules, parts=agent == own)
    if board.filter == NO_FILTER and board.recipe == Headline().recipe:
        for fold in board.folds:
            rows += _build(board, [fold], Place(**keys, fold=fold, agent=own), rules, parts=False)
    place = Place(**keys, fold=POOLED, agent=None)
    if (joined := join(board, board.folds)) is not None and (chosen := joined.of_agent(own)) is not None:
        scope = scope_of(chosen.shown, chosen.answers, rules)
        rows += calibration_rows(place.at(own), scope)
        if board.filter == NO_FILTER:
            rows += abstention_rows(place.at(own), scope, least_confidence(chosen, board, val_b))
    rows += [place.row(metric="note", model=None, why=words) for words in board.refused]
    return rows


def _build(board: Board, folds: Sequence[str], place: Place, rules: Rules, *, parts: bool) -> list[MetricRow]:
    joined = join(board, folds) if folds else None
    chosen = joined.of_agent(place.agent) if joined is not None else None
    if chosen is None:
        return []
    parts = parts and board.filter == NO_FILTER
    details = place.fold == POOLED and (parts or place.agent != AGENTS[1])
    return build_rows(place, chosen.shown, chosen.answers, rules, parts=parts, details=details)


def _operate(
    boards: Sequence[Board],
    val_b: Mapping[tuple[str, str, str, str], Board],
    table: Any,
    recorded: Mapping[str, Recorded],
    rules: Rules,
) -> list[MetricRow]:
    """Take the operator's view on the boards that hold out a host; those that need the agent on its episodes."""
    rows: list[MetricRow] = []
    wanted = [b for b in boards if b.recipe in shift.RECIPES and b.filter != SCHEDULE]
    soak = {b.key: b for b in parse_boards(_only(table, wanted), {}, part="soak")} if recorded else {}
    for board in wanted:
        place = Place(
            recipe=board.recipe, fold=POOLED, threat=board.threat, table=board.table, filter=board.filter, agent=None
        )
        if not recorded:
            rows.append(
                place.row(metric="note", model=None, why="no operator's view: the run has no grids with labels")
            )
            continue
        parts = shift.Parts(test=board, val_b=val_b.get(board.key), soak=soak.get(board.key))
        rows += operator_rows(parts, recorded, rules, agent=across.own_agent(board.threat))
    return rows


def _only(table: Any, boards: Sequence[Board]) -> Any:
    """Keep the rows of these boards: soak stands in every cell, and a full grid has thousands."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return table.filter(pc.is_in(table["recipe"], pa.array(sorted({b.recipe for b in boards}), pa.string())))


def read_recorded(run: Path) -> dict[str, Recorded]:
    """Read label spans and the rates of damage from the run's grids; nothing where there are none."""
    folder = run / GRIDS
    if not (folder / GRID_INDEX).is_file():
        return {}
    grids = open_grids(folder)
    names = [c.full_name for c in CHANNELS]
    columns = [names.index(name) for _, name, _ in DAMAGE]
    return {
        row.episode_id: Recorded(
            spans=row.spans, t0_ns=row.t0_ns, rates=grids.bins_of(row)[:, columns], group=group_of(row.profile, row.sample_name),
        )
        for row in rows_by_id(grids).values()
    }  # fmt: skip
