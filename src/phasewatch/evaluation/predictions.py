"""Predictions of a run, grouped by recipe, channel set, input and smoothing; folds pool into one `PredictionSet`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.artifacts import PREDICTIONS_FILE
from phasewatch.errors import RunError
from phasewatch.evaluation.scoring import EvaluationWindows, MetricKey, ModelOutput, PredictionSet
from phasewatch.models import registry
from phasewatch.splits import Fold, SplitPart
from phasewatch.training.predictions import PROBABILITY_COLUMNS, PredictionPart
from phasewatch.types import PHASES

__all__ = [
    "ModelPredictions",
    "PredictionGroup",
    "parse_prediction_groups",
]


_TEST_PARTS = (PredictionPart.TEST, PredictionPart.TEST_LIVE)
_GROUP_COLUMNS = ("recipe", "threat", "table", "filter")
_EXPERIMENT_COLUMNS = ("model", "seed", "fold")
_EPISODE_COLUMNS = ("episode_id", "session", "host_id", "profile", "sample_name", "origin", "agent")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelPredictions:
    """The predictions of one model and seed on one fold, in the order (host, episode, time)."""

    model: str
    seed: int
    fold: str
    windows: EvaluationWindows
    output: ModelOutput


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PredictionGroup:
    """All predictions of one recipe, channel set, input and smoothing.

    Attributes:
        predictions: Those that can be scored.
        refused: Why the others cannot, one sentence each: of another split, or with broken probabilities.
    """

    recipe: str
    threat: str
    table: str
    filter: str
    predictions: tuple[ModelPredictions, ...]
    refused: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Recipe, channel set, input and smoothing; unique within a run."""
        return self.recipe, self.threat, self.table, self.filter

    def build_metric_key(self, *, fold: str = "pooled", agent: str | None = None) -> MetricKey:
        """Build the key of this group's metric rows."""
        return MetricKey(
            recipe=self.recipe,
            fold=fold,
            channel_set=self.threat,
            input=self.table,
            smoothing=self.filter,
            agent=agent,
        )

    @property
    def folds(self) -> list[str]:
        """The folds with predictions of any model, sorted."""
        return sorted({s.fold for s in self.predictions})

    def pool(self, folds: Sequence[str] | None = None) -> PredictionSet | None:
        """Pool folds; models that did not predict all of them are left out.

        Args:
            folds: Names of folds, sorted; None pools all folds of the group.

        Returns:
            The windows of these folds in the order (host, episode, time), or None if no model predicted all of them.

        Raises:
            RunError: If two models were scored on other windows or other truths.
        """
        names = self.folds if folds is None else list(folds)
        by_model: dict[tuple[str, int], list[ModelPredictions]] = {}
        for s in self.predictions:
            if s.fold in names:
                by_model.setdefault((s.model, s.seed), []).append(s)
        complete = [parts for parts in by_model.values() if names and [p.fold for p in parts] == names]
        if not complete:
            return None
        windows = EvaluationWindows.concatenate([s.windows for s in complete[0]])
        for parts in complete[1:]:
            others = EvaluationWindows.concatenate([s.windows for s in parts])
            if not windows.is_same_as(others):
                raise RunError(
                    f"{PREDICTIONS_FILE}: {parts[0].model} (seed {parts[0].seed}) and {complete[0][0].model} were "
                    f"scored on different windows of {self.recipe}; train them again on the same features"
                )
        order = np.lexsort((windows.t_center_ns, windows.episode_id.astype(str), windows.host_id.astype(str)))
        outputs = tuple(
            ModelOutput(
                model=parts[0].model,
                seed=parts[0].seed,
                probabilities=np.concatenate([s.output.probabilities for s in parts]),
                y_pred=np.concatenate([s.output.y_pred for s in parts]),
            )
            for parts in complete
        )
        return PredictionSet(windows=windows, outputs=outputs).select(order)


def parse_prediction_groups(
    table: Any, folds: Mapping[tuple[str, str], Fold], *, part: str = "test"
) -> Iterator[PredictionGroup]:
    """Yield the groups of one part of the predictions.

    Args:
        table: An Arrow table in the format of `predictions_v1.parquet`.
        folds: (recipe, fold) → split, as far as the run has its file; test predictions of other episodes are refused.
        part: ``test``, ``val_b``, ``soak`` or ``idle``; ``test_1s`` and so on for windows every second.
    """
    import pyarrow.compute as pc

    rows = _PredictionColumns.from_arrow(table.filter(pc.equal(table["part"], part)))
    order = {row.key: i for i, row in enumerate(registry.BUILTIN_MODELS)}
    for keys, group_rows in rows.groups(_GROUP_COLUMNS, np.arange(len(rows))):
        accepted, refused = [], []
        experiments = list(rows.groups(_EXPERIMENT_COLUMNS, group_rows))
        experiments.sort(key=lambda e: (order.get(e[0]["model"], len(order)), *e[0].values()))
        for experiment, at in experiments:
            one = rows.read_predictions(experiment, at)
            fold = folds.get((keys["recipe"], experiment["fold"])) if part in _TEST_PARTS else None
            fault = _explain_rejection(one, fold)
            if fault is None:
                accepted.append(one)
            else:
                refused.append(f"{one.model} (seed {one.seed}, fold {one.fold}) is not scored: {fault}")
        yield PredictionGroup(**keys, predictions=tuple(accepted), refused=tuple(refused))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _PredictionColumns:
    """Columns of a table of ``n`` rows, texts as sorted values and codes: millions of rows hold few distinct texts.

    Attributes:
        texts: Column → its distinct texts, sorted.
        codes: Column → ``(n,)`` index of each row's text.
        numbers: Column → ``(n,)`` values.
    """

    texts: Mapping[str, NDArray[np.object_]]
    codes: Mapping[str, NDArray[np.int64]]
    numbers: Mapping[str, NDArray[Any]]

    @classmethod
    def from_arrow(cls, table: Any) -> _PredictionColumns:
        texts, codes = {}, {}
        for name in dict.fromkeys((*_GROUP_COLUMNS, *_EXPERIMENT_COLUMNS, *_EPISODE_COLUMNS)):
            column = table[name].combine_chunks().dictionary_encode()
            values = np.array(column.dictionary.to_pylist(), dtype=object)
            rank = np.argsort(values) if len(values) else np.zeros(0, np.intp)
            texts[name] = values[rank]
            codes[name] = np.argsort(rank)[column.indices.to_numpy(zero_copy_only=False)].astype(np.int64)
        numbers = {n: table[n].to_numpy() for n in ("t_center_ns", "y_true", "y_pred", *PROBABILITY_COLUMNS)}
        return cls(texts=texts, codes=codes, numbers=numbers)

    def __len__(self) -> int:
        return len(self.numbers["y_true"])

    def groups(self, names: Sequence[str], at: NDArray[np.intp]) -> Iterator[tuple[dict[str, Any], NDArray[np.intp]]]:
        """Yield the distinct values of some columns, sorted, each with the indices of its rows among `at`."""
        if not len(at):
            return
        keys = np.column_stack([self.codes[name][at] for name in names])
        distinct, inverse = np.unique(keys, axis=0, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        ends = np.cumsum(np.bincount(inverse.ravel(), minlength=len(distinct)))[:-1]
        for row, own in zip(distinct, np.split(at[order.ravel()], ends), strict=True):
            yield {name: self.texts[name][code] for name, code in zip(names, row, strict=True)}, own

    def read_predictions(self, experiment: Mapping[str, Any], at: NDArray[np.intp]) -> ModelPredictions:
        """Read the rows `at` of one experiment, in the order (host, episode, time)."""
        keys = (self.numbers["t_center_ns"], self.codes["episode_id"], self.codes["host_id"])
        at = at[np.lexsort([key[at] for key in keys])]
        return ModelPredictions(
            model=experiment["model"],
            seed=int(experiment["seed"]),
            fold=experiment["fold"],
            windows=EvaluationWindows(
                **{name: self.texts[name][self.codes[name][at]] for name in _EPISODE_COLUMNS},
                t_center_ns=self.numbers["t_center_ns"][at].astype(np.int64),
                y_true=self.numbers["y_true"][at].astype(np.int64),
            ),
            output=ModelOutput(
                model=experiment["model"],
                seed=int(experiment["seed"]),
                probabilities=np.column_stack(
                    [self.numbers[name][at].astype(np.float64) for name in PROBABILITY_COLUMNS]
                ),
                y_pred=self.numbers["y_pred"][at].astype(np.int64),
            ),
        )


def _explain_rejection(predictions: ModelPredictions, fold: Fold | None) -> str | None:
    """Return why predictions cannot be scored, or None where they can.

    Args:
        predictions: Of one model, seed and fold.
        fold: The split that they should belong to; None skips that check.
    """
    p = predictions.output.probabilities
    if broken := int((~np.isfinite(p).all(axis=1)).sum()):
        return f"{broken} of {len(p)} windows have probabilities that are not finite; train it again"
    labels = np.column_stack([predictions.windows.y_true, predictions.output.y_pred])
    if strange := int(((labels < 0) | (labels >= len(PHASES))).any(axis=1).sum()):
        return f"{strange} of {len(p)} windows have a truth or a decision that is not a phase; train it again"
    if twice := int(_mark_duplicates(predictions.windows).sum()):
        return f"{twice} of {len(p)} windows occur more than once; train it again"
    if fold is None or fold.leaky:
        return None
    tested, predicted = set(fold.ids(SplitPart.TEST)), set(predictions.windows.episode_id)
    if foreign := predicted - tested:
        return (
            f"episode {min(foreign)} is not in this fold's test set: {PREDICTIONS_FILE} is of another split; "
            "train again"
        )
    if missing := tested - predicted:
        return f"{len(missing)} of {len(tested)} test episodes have no prediction; train again"
    return None


def _mark_duplicates(windows: EvaluationWindows) -> NDArray[np.bool_]:
    """Mark the windows equal to their predecessor, ``(n - 1,)``; windows in the order (host, episode, time)."""
    same: NDArray[np.bool_] = np.diff(windows.t_center_ns) == 0
    for ids in (windows.episode_id, windows.host_id):
        same = same & (ids[1:] == ids[:-1]).astype(np.bool_)
    return same
