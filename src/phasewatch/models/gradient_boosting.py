"""Gradient-boosted trees (LightGBM) over a table of features, and two baselines that use them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from phasewatch.arrays import FloatArray
from phasewatch.errors import RunError
from phasewatch.metrics import N_CLASSES, confusion_counts, macro_f1
from phasewatch.models import checkpoint
from phasewatch.models.base import InputKind, LabelledExamples, ModelInputs, PhaseModel
from phasewatch.models.checkpoint import WEIGHTS_FILE
from phasewatch.models.probabilities import mask_unseen_phases, softmax
from phasewatch.models.trees import (
    MAX_LEAVES,
    MAX_ROUNDS,
    TreeArrays,
    TreeEvaluator,
    list_expected_arrays,
    load_lightgbm,
    parse_lightgbm_text,
)
from phasewatch.types import SourceKind

__all__ = ["CHANNEL_FILE", "BestChannel", "GbtConfig", "GradientBoosting", "LevelsBaseline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GbtConfig:
    """Settings of the trees (ADR 74).

    Attributes:
        rounds: Boosting rounds, one tree for each phase; none is cut by a validation set.
        leaves: Largest number of leaves of a tree; trees grow leaf by leaf.
        columns: Share of the columns that each tree may use.
        rows: Share of the windows that each round draws.
        min_leaf_windows: Smallest number of windows in a leaf.
        l2: Penalty on the squared leaf scores.
        bins: Largest number of distinct thresholds of a column.
    """

    rounds: Annotated[int, Meta(ge=1, le=MAX_ROUNDS)] = 200
    leaves: Annotated[int, Meta(ge=2, le=MAX_LEAVES)] = 15
    learning_rate: Annotated[float, Meta(gt=0.0, le=10.0)] = 0.08
    columns: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.2
    rows: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.8
    min_leaf_windows: Annotated[int, Meta(ge=1, le=1_000_000)] = 20
    l2: Annotated[float, Meta(ge=0.0, le=1e9)] = 5.0
    bins: Annotated[int, Meta(ge=2, le=4096)] = 63


class GradientBoosting(PhaseModel):
    """LightGBM with balanced classes and a fixed number of rounds; each tree sees few columns; NaN is a value.

    Training does not read validation A: stopping early on the windows of one host costs more than it saves (ADR 74).
    """

    key = "gbt"
    Config = GbtConfig

    @property
    def trees(self) -> TreeArrays:
        """The fitted trees; `phasewatch export` converts them."""
        return self._evaluator.trees

    def _fit(self, train: LabelledExamples, val: LabelledExamples) -> None:
        lgb = load_lightgbm()
        c: GbtConfig = self.config
        params = {
            "objective": "multiclass",
            "num_class": N_CLASSES,
            "num_leaves": c.leaves,
            "learning_rate": c.learning_rate,
            "feature_fraction": c.columns,
            "bagging_fraction": c.rows,
            "bagging_freq": 1 if c.rows < 1.0 else 0,
            "min_data_in_leaf": c.min_leaf_windows,
            "lambda_l2": c.l2,
            "max_bin": c.bins,
            "seed": self.seed % 2**31,
            # One thread, one algorithm: the order of the sums, and so every bit, is the same in each run.
            "num_threads": 1,
            "deterministic": True,
            "force_col_wise": True,
            "feature_pre_filter": False,
            "verbose": -1,
        }
        data = lgb.Dataset(train.inputs.x, train.y, weight=train.compute_weights(), params=params)
        booster = lgb.train(params, data, c.rounds)
        text = booster.model_to_string(num_iteration=-1)
        self._evaluator = TreeEvaluator(parse_lightgbm_text(text, rounds=c.rounds, leaves=c.leaves))

    def _predict_proba(self, x: NDArray[np.float32]) -> FloatArray:
        return softmax(mask_unseen_phases(self._evaluator.compute_scores(x), self.seen))

    def _files(self) -> Mapping[str, bytes]:
        return {WEIGHTS_FILE: checkpoint.pack_weights(self.trees.to_mapping())}

    def _restore(self, files: Mapping[str, bytes]) -> None:
        expected = list_expected_arrays(self.config.rounds, self.config.leaves)
        trees = TreeArrays(**checkpoint.unpack_weights(files, WEIGHTS_FILE, expected, model=self.key))
        try:
            trees.check(len(self.spec.names) if self.spec else 0)
        except ValueError as exc:
            raise RunError(
                f"checkpoint of {self.key}: {WEIGHTS_FILE}: {exc}; it was not written by phasewatch, "
                "train the model again"
            ) from exc
        self._evaluator = TreeEvaluator(trees)

    def _libraries(self) -> tuple[str, ...]:
        return ("numpy", "lightgbm", "safetensors")


class LevelsBaseline(GradientBoosting):
    """The same trees over the cumulative levels alone, which reveal the elapsed time."""

    key = "levels_only"
    kind = InputKind.LEVELS


CHANNEL_FILE = "channel.json"
_SOURCES = frozenset(SourceKind)
_TRIAL_SETTINGS: Mapping[str, float] = {"rounds": 15, "columns": 1.0}  # enough to rank channels, at little cost


class BestChannel(PhaseModel):
    """Gradient-boosted trees over the stats of one channel, selected by macro-F1 on validation A."""

    key = "best_channel"
    Config = GbtConfig

    def _fit(self, train: LabelledExamples, val: LabelledExamples) -> None:
        names = train.inputs.spec.names
        channels = tuple(dict.fromkeys(filter(None, map(_find_stat_channel, names))))
        scores = []
        for channel in channels:
            own, other = (_select_columns(part, _find_channel_columns(names, channel)) for part in (train, val))
            trial = GradientBoosting(seed=self.seed, settings=_TRIAL_SETTINGS)
            scores.append(_compute_val_macro_f1(trial.fit(own, other), other))
        self._channel = channels[int(np.argmax(scores))]
        own, other = (_select_columns(part, _find_channel_columns(names, self._channel)) for part in (train, val))
        settings = msgspec.to_builtins(self.config)
        self._model = GradientBoosting(seed=self.seed, settings=settings).fit(own, other)
        self.history = {"trial_val_a_macro_f1": tuple(round(s, 6) for s in scores)}

    def _predict_proba(self, x: NDArray[np.float32]) -> FloatArray:
        names = self.spec.names if self.spec else ()
        return self._model._predict_proba(np.ascontiguousarray(x[:, _find_channel_columns(names, self._channel)]))

    def _files(self) -> Mapping[str, bytes]:
        return {CHANNEL_FILE: msgspec.json.encode(self._channel), **self._model._files()}

    def _restore(self, files: Mapping[str, bytes]) -> None:
        names = self.spec.names if self.spec else ()
        try:
            channel = msgspec.json.decode(files.get(CHANNEL_FILE, b""), type=str)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise RunError(f"checkpoint of {self.key}: {CHANNEL_FILE} is absent or not a name: {exc}") from exc
        if not _find_channel_columns(names, channel):
            raise RunError(
                f"checkpoint of {self.key}: {CHANNEL_FILE} names {channel!r}, which is not one of its channels"
            )
        self._channel = channel
        self._model = GradientBoosting(seed=self.seed, settings=msgspec.to_builtins(self.config))
        self._model.spec = (
            replace(self.spec, names=tuple(names[i] for i in _find_channel_columns(names, channel)))
            if self.spec
            else None
        )
        self._model.seen = self.seen
        self._model._restore(files)

    def _libraries(self) -> tuple[str, ...]:
        return ("numpy", "lightgbm", "safetensors")


def _find_channel_columns(names: tuple[str, ...], channel: str) -> list[int]:
    return [i for i, name in enumerate(names) if channel and _find_stat_channel(name) == channel]


def _find_stat_channel(column: str) -> str:
    """Return the channel of one of its own five statistics; empty for a derived or context column."""
    source, _, rest = column.partition(".")
    return column.rpartition(".")[0] if source in _SOURCES and "." in rest and "@" not in rest else ""


def _select_columns(part: LabelledExamples, columns: list[int]) -> LabelledExamples:
    spec = part.inputs.spec
    names = tuple(spec.names[i] for i in columns)
    x = np.ascontiguousarray(part.inputs.x[:, columns])
    return LabelledExamples(
        inputs=ModelInputs(x=x, spec=replace(spec, names=names)), y=part.y, is_baseline=part.is_baseline
    )


def _compute_val_macro_f1(model: PhaseModel, val: LabelledExamples) -> float:
    return float(macro_f1(confusion_counts(val.y, model.predict(val.inputs))))
