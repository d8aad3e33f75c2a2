"""Read predictions, score every board of them, write `metrics_v1.json`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from phasewatch import atomic, profiles
from phasewatch.dataset import file_sha256
from phasewatch.errors import RunError
from phasewatch.evaluate import across
from phasewatch.evaluate.board import build_rows
from phasewatch.evaluate.bootstrap import RESAMPLES
from phasewatch.evaluate.rows import METRICS, MetricRow, Metrics, headline, parse_metrics, render_metrics
from phasewatch.evaluate.said import Board, join, parse_boards
from phasewatch.evaluate.scope import Place, Rules
from phasewatch.split import Fold, parse_fold
from phasewatch.train.predictions import NO_FILTER, PREDICTIONS, read_table
from phasewatch.vocab import SampleKind

AGENTS = ("off", "on", None)  # null = both
POOLED = "pooled"

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
    rows: list[MetricRow] = []
    with _one_thread():
        boards = list(parse_boards(table, folds))
        if not boards:
            raise RunError(f"{path}: no test rows; train a recipe that holds something out")
        for board in boards:
            rows += _score_board(board, rules)
        rows += across.build_gaps(boards, rules)
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


def _score_board(board: Board, rules: Rules) -> list[MetricRow]:
    """Score the models that answered for all folds together, then those of each fold; then say what could not be."""
    rows: list[MetricRow] = []
    keys = {"recipe": board.recipe, "threat": board.threat, "table": board.table, "filter": board.filter}
    rows += _pooled(board, board.folds, Place(**keys, fold=POOLED, agent=None), AGENTS, rules)
    own = across.AGENT_ON if across.needs_agent(board.threat) else across.AGENT_OFF
    if board.filter == NO_FILTER:
        for fold in board.folds:
            rows += _pooled(board, [fold], Place(**keys, fold=fold, agent=None), (own,), rules)
    place = Place(**keys, fold=POOLED, agent=None)
    rows += [place.row(metric="note", model=None, why=words) for words in board.refused]
    return rows


def _pooled(
    board: Board, folds: Sequence[str], place: Place, agents: Sequence[str | None], rules: Rules
) -> Iterator[MetricRow]:
    joined = join(board, folds) if folds else None
    for agent in agents if joined is not None else ():
        chosen = joined.of_agent(agent) if joined is not None else None
        if chosen is not None:
            whole = place.fold == POOLED
            yield from build_rows(
                place.at(agent), chosen.shown, chosen.answers, rules, parts=whole and board.filter == NO_FILTER, details=whole,
            )  # fmt: skip
