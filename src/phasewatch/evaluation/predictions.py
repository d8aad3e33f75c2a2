"""A table of predictions becomes boards: who said what of which test windows, and in words what cannot be scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.artifacts import PREDICTIONS_FILE
from phasewatch.errors import RunError
from phasewatch.evaluation.scoring import EvaluationWindows, ModelOutput
from phasewatch.models import registry
from phasewatch.splits import Fold, SplitPart
from phasewatch.training.predictions import PROBABILITY_COLUMNS
from phasewatch.types import PHASES

GROUP_COLUMNS = ("recipe", "threat", "table", "filter")
EXPERIMENT_COLUMNS = ("model", "seed", "fold")
EPISODE_COLUMNS = ("episode_id", "session", "host_id", "profile", "sample_name", "origin", "agent")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelPredictions:
    """The rows of one model with one seed on one fold, in the order (host, episode, time)."""

    model: str
    seed: int
    fold: str
    windows: EvaluationWindows
    output: ModelOutput


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PredictionGroup:
    """All that was said under one recipe, threat model, table and filter.

    Attributes:
        predictions: What can be scored.
        refused: What cannot, in words: predictions of another split, probabilities that are no numbers.
    """

    recipe: str
    threat: str
    table: str
    filter: str
    predictions: tuple[ModelPredictions, ...]
    refused: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells boards apart."""
        return self.recipe, self.threat, self.table, self.filter

    @property
    def folds(self) -> list[str]:
        """The folds that anybody answered for, sorted."""
        return sorted({s.fold for s in self.predictions})


def parse_prediction_groups(
    table: Any, folds: Mapping[tuple[str, str], Fold], *, part: str = "test"
) -> Iterator[PredictionGroup]:
    """Group a part's rows into boards, one after the other.

    Args:
        table: `predictions_v1.parquet`.
        folds: (recipe, fold) → the cut, as far as the run has its file; test rows of other episodes are refused.
        part: ``test``, ``val_b`` or ``soak``.
    """
    import pyarrow.compute as pc

    rows = _PredictionColumns.from_arrow(table.filter(pc.equal(table["part"], part)))
    order = {row.key: i for i, row in enumerate(registry.BUILTIN_MODELS)}
    for keys, of_board in rows.groups(GROUP_COLUMNS, np.arange(len(rows))):
        said, refused = [], []
        cells = list(rows.groups(EXPERIMENT_COLUMNS, of_board))
        for cell, at in sorted(cells, key=lambda c: (order.get(c[0]["model"], len(order)), *c[0].values())):
            one = rows.read_predictions(cell, at)
            fold = folds.get((keys["recipe"], cell["fold"])) if part == "test" else None
            if words := explain_rejection(one, fold):
                refused.append(f"{one.model} (seed {one.seed}, fold {one.fold}) is not scored: {words}")
            else:
                said.append(one)
        yield PredictionGroup(**keys, predictions=tuple(said), refused=tuple(refused))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _PredictionColumns:
    """Columns of a table, its words as sorted values and codes: a full grid has millions of rows and few words."""

    words: Mapping[str, NDArray[np.object_]]
    codes: Mapping[str, NDArray[np.int64]]
    numbers: Mapping[str, NDArray[Any]]

    @classmethod
    def from_arrow(cls, table: Any) -> _PredictionColumns:
        words, codes = {}, {}
        for name in dict.fromkeys((*GROUP_COLUMNS, *EXPERIMENT_COLUMNS, *EPISODE_COLUMNS)):
            column = table[name].combine_chunks().dictionary_encode()
            values = np.array(column.dictionary.to_pylist(), dtype=object)
            rank = np.argsort(values) if len(values) else np.zeros(0, np.intp)
            words[name] = values[rank]
            codes[name] = np.argsort(rank)[column.indices.to_numpy(zero_copy_only=False)].astype(np.int64)
        numbers = {n: table[n].to_numpy() for n in ("t_center_ns", "y_true", "y_pred", *PROBABILITY_COLUMNS)}
        return cls(words=words, codes=codes, numbers=numbers)

    def __len__(self) -> int:
        return len(self.numbers["y_true"])

    def groups(self, names: Sequence[str], at: NDArray[np.intp]) -> Iterator[tuple[dict[str, Any], NDArray[np.intp]]]:
        """Give the distinct values of some columns, sorted, each with its rows."""
        if not len(at):
            return
        keys = np.column_stack([self.codes[name][at] for name in names])
        distinct, of = np.unique(keys, axis=0, return_inverse=True)
        order = np.argsort(of, kind="stable")
        ends = np.cumsum(np.bincount(of.ravel(), minlength=len(distinct)))[:-1]
        for row, own in zip(distinct, np.split(at[order.ravel()], ends), strict=True):
            yield {name: self.words[name][code] for name, code in zip(names, row, strict=True)}, own

    def read_predictions(self, cell: Mapping[str, Any], at: NDArray[np.intp]) -> ModelPredictions:
        """Read one cell's rows, in the order (host, episode, time)."""
        keys = (self.numbers["t_center_ns"], self.codes["episode_id"], self.codes["host_id"])
        at = at[np.lexsort([key[at] for key in keys])]
        return ModelPredictions(
            model=cell["model"],
            seed=int(cell["seed"]),
            fold=cell["fold"],
            windows=EvaluationWindows(
                **{name: self.words[name][self.codes[name][at]] for name in EPISODE_COLUMNS},
                t_center_ns=self.numbers["t_center_ns"][at].astype(np.int64),
                y_true=self.numbers["y_true"][at].astype(np.int64),
            ),
            output=ModelOutput(
                model=cell["model"],
                seed=int(cell["seed"]),
                probabilities=np.column_stack(
                    [self.numbers[name][at].astype(np.float64) for name in PROBABILITY_COLUMNS]
                ),
                y_pred=self.numbers["y_pred"][at].astype(np.int64),
            ),
        )


def explain_rejection(said: ModelPredictions, fold: Fold | None) -> str:
    """Say why rows cannot be scored; nothing where they can."""
    p = said.output.probabilities
    if broken := int((~np.isfinite(p).all(axis=1)).sum()):
        return f"{broken} of {len(p)} windows have probabilities that are no numbers; train it again"
    labels = np.column_stack([said.windows.y_true, said.output.y_pred])
    if strange := int(((labels < 0) | (labels >= len(PHASES))).any(axis=1).sum()):
        return f"{strange} of {len(p)} windows have a truth or a decision that is no phase; train it again"
    if twice := int(_mark_duplicates(said.windows).sum()):
        return f"{twice} of {len(p)} windows stand there more than once; train it again"
    if fold is None or fold.leaky:
        return ""
    tested, asked = set(fold.ids(SplitPart.TEST)), set(said.windows.episode_id)
    if strangers := asked - tested:
        return f"episode {min(strangers)} is not in this fold's test set: {PREDICTIONS_FILE} is of another split; train again"
    if lacking := tested - asked:
        return f"{len(lacking)} of {len(tested)} test episodes have no prediction; train again"
    return ""


def _mark_duplicates(shown: EvaluationWindows) -> NDArray[np.bool_]:
    """Mark the windows that are the one before them, in the order (host, episode, time)."""
    same: NDArray[np.bool_] = np.diff(shown.t_center_ns) == 0
    for ids in (shown.episode_id, shown.host_id):
        same = same & (ids[1:] == ids[:-1]).astype(np.bool_)
    return same


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PredictionSet:
    """Windows of some folds in one order, and those models' answers that cover all of them."""

    windows: EvaluationWindows
    outputs: tuple[ModelOutput, ...]

    def select(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> PredictionSet:
        """Give the marked windows, or those at these places."""
        return PredictionSet(windows=self.windows.select(rows), outputs=tuple(a.select(rows) for a in self.outputs))

    def select_agent(self, agent: str | None) -> PredictionSet | None:
        """Give the windows of episodes with the agent `on` or `off` (None: both), or None without any."""
        if agent is None:
            return self
        asked = self.windows.agent == agent
        return self.select(asked) if asked.any() else None


def pool_folds(board: PredictionGroup, folds: Sequence[str]) -> PredictionSet | None:
    """Pool folds: models that answered for all of them stand together, the others are left out.

    Raises:
        RunError: If two models saw other windows or other truths.
    """
    by_model: dict[tuple[str, int], list[ModelPredictions]] = {}
    for s in board.predictions:
        if s.fold in folds:
            by_model.setdefault((s.model, s.seed), []).append(s)
    whole = [parts for parts in by_model.values() if [p.fold for p in parts] == list(folds)]
    if not whole:
        return None
    shown = _concatenate_windows([s.windows for s in whole[0]])
    for parts in whole[1:]:
        theirs = _concatenate_windows([s.windows for s in parts])
        same = all(
            np.array_equal(getattr(theirs, name), getattr(shown, name))
            for name in ("episode_id", "y_true", "t_center_ns")
        )
        if not same:
            raise RunError(
                f"{PREDICTIONS_FILE}: {parts[0].model} (seed {parts[0].seed}) and {whole[0][0].model} were scored on different "
                f"windows of {board.recipe}; train them again on the same features"
            )
    order = np.lexsort((shown.t_center_ns, shown.episode_id.astype(str), shown.host_id.astype(str)))
    answers = tuple(
        ModelOutput(
            model=parts[0].model,
            seed=parts[0].seed,
            probabilities=np.concatenate([s.output.probabilities for s in parts]),
            y_pred=np.concatenate([s.output.y_pred for s in parts]),
        )
        for parts in whole
    )
    return PredictionSet(windows=shown, outputs=answers).select(order)


def _concatenate_windows(parts: Sequence[EvaluationWindows]) -> EvaluationWindows:
    return EvaluationWindows(
        **{name: np.concatenate([getattr(p, name) for p in parts]) for name in EvaluationWindows.__slots__}
    )
