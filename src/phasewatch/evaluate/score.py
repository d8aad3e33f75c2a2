"""Read predictions, score every board of them, write `metrics_v1.json`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch import atomic, profiles
from phasewatch.dataset import file_sha256
from phasewatch.errors import RunError
from phasewatch.evaluate.board import build_rows
from phasewatch.evaluate.bootstrap import RESAMPLES
from phasewatch.evaluate.rows import METRICS, MetricRow, Metrics, headline, parse_metrics, render_metrics
from phasewatch.evaluate.scope import Answer, Place, Rules, Shown
from phasewatch.models import registry
from phasewatch.train.predictions import PREDICTIONS, PROBABILITIES, read_table
from phasewatch.vocab import SampleKind

AGENTS = ("off", "on", None)  # null = both
POOLED = "pooled"

__all__ = ["headline", "read_metrics", "score"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Said:
    """The test rows of one model with one seed on one fold, in the order (host, episode, time)."""

    model: str
    seed: int
    fold: str
    shown: Shown
    t_center_ns: NDArray[np.int64]
    answer: Answer


def score(run: Path, *, resamples: int = RESAMPLES, seed: int = 0) -> Metrics:
    """Score the test predictions of a run and write `metrics_v1.json`; see `rescore`."""
    metrics = rescore(run, resamples=resamples, seed=seed)
    atomic.write_whole(run / METRICS, render_metrics(metrics))
    return metrics


def rescore(run: Path, *, resamples: int = RESAMPLES, seed: int = 0) -> Metrics:
    """Score the test predictions of a run.

    A board pools the folds of a recipe, or is one fold. Models stand on a board together only if they answered for
    exactly its windows: who was trained on one fold alone is compared on that fold alone.

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
    rows: list[MetricRow] = []
    with _one_thread():
        for keys, said in _boards(table, path):
            folds = sorted({s.fold for s in said})
            for fold in (POOLED, *folds):
                for agent in AGENTS:
                    place = Place(**keys, fold=fold, agent=agent)
                    rows += _score_board(place, said, folds if fold == POOLED else [fold], rules, path)
    return Metrics(inputs={PREDICTIONS: file_sha256(path)}, metrics=tuple(rows))


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


def _boards(table: Any, path: Path) -> Iterator[tuple[dict[str, str], list[_Said]]]:
    """Group the test rows by recipe, threat model, table and filter; in each, by model, seed and fold."""
    import pyarrow.compute as pc

    test = table.filter(pc.equal(table["part"], "test"))
    if not test.num_rows:
        raise RunError(f"{path}: no test rows; train a recipe that holds something out")
    groups = ["recipe", "threat", "table", "filter"]
    cells = ["model", "seed", "fold"]
    order = {row.key: i for i, row in enumerate(registry.MODELS)}
    for keys in _distinct(test, groups):
        board = _where(test, keys)
        each = sorted(_distinct(board, cells), key=lambda c: (order.get(c["model"], len(order)), c["seed"], c["fold"]))
        yield keys, [_parse_said(_where(board, cell), cell) for cell in each]


def _score_board(
    place: Place, said: Sequence[_Said], folds: Sequence[str], rules: Rules, path: Path
) -> list[MetricRow]:
    """Score the models that answered for all these folds."""
    by_model: dict[tuple[str, int], list[_Said]] = {}
    for s in said:
        if s.fold in folds:
            by_model.setdefault((s.model, s.seed), []).append(s)
    whole = [parts for parts in by_model.values() if [p.fold for p in parts] == list(folds)]
    if not whole:
        return []
    shown = _join([s.shown for s in whole[0]])
    asked = np.ones(len(shown), np.bool_) if place.agent is None else shown.agent == place.agent
    if not asked.any():
        return []
    answers: list[Answer] = []
    for parts in whole:
        theirs = _join([s.shown for s in parts])
        if not (
            np.array_equal(theirs.episode_id, shown.episode_id)
            and np.array_equal(theirs.y_true, shown.y_true)
            and all(np.array_equal(a.t_center_ns, b.t_center_ns) for a, b in zip(parts, whole[0], strict=True))
        ):
            raise RunError(
                f"{path}: {parts[0].model} (seed {parts[0].seed}) and {whole[0][0].model} were scored on different windows "
                f"of {place.recipe}; train them again on the same features"
            )
        answers.append(
            Answer(
                model=parts[0].model,
                seed=parts[0].seed,
                probabilities=np.concatenate([s.answer.probabilities for s in parts])[asked],
                y_pred=np.concatenate([s.answer.y_pred for s in parts])[asked],
            )
        )
    return build_rows(place, shown.take(asked), answers, rules, parts=place.fold == POOLED)


def _distinct(table: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    found = table.select(names).group_by(list(names)).aggregate([]).to_pylist()
    return sorted(({n: row[n] for n in names} for row in found), key=lambda row: [row[n] for n in names])


def _where(table: Any, keys: dict[str, Any]) -> Any:
    import pyarrow.compute as pc

    for name, value in keys.items():
        table = table.filter(pc.equal(table[name], value))
    return table


def _parse_said(table: Any, cell: dict[str, Any]) -> _Said:
    table = table.sort_by([("host_id", "ascending"), ("episode_id", "ascending"), ("t_center_ns", "ascending")])

    def text(name: str) -> NDArray[np.object_]:
        return np.array(table[name].to_pylist(), dtype=object)

    y_pred = table["y_pred"].to_numpy().astype(np.int64)
    return _Said(
        model=cell["model"],
        seed=cell["seed"],
        fold=cell["fold"],
        t_center_ns=table["t_center_ns"].to_numpy(),
        shown=Shown(
            episode_id=text("episode_id"),
            session=text("session"),
            host_id=text("host_id"),
            profile=text("profile"),
            sample_name=text("sample_name"),
            origin=text("origin"),
            agent=text("agent"),
            y_true=table["y_true"].to_numpy().astype(np.int64),
        ),
        answer=Answer(
            model=cell["model"],
            seed=cell["seed"],
            probabilities=np.column_stack([table[name].to_numpy().astype(np.float64) for name in PROBABILITIES]),
            y_pred=y_pred,
        ),
    )


def _join(parts: Sequence[Shown]) -> Shown:
    return Shown(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in Shown.__slots__})
