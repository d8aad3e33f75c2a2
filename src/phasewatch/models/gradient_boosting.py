"""Gradient-boosted trees (XGBoost) over a table of features, and two baselines that use them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from phasewatch.arrays import FloatArray
from phasewatch.errors import RunError
from phasewatch.metrics import N_CLASSES, confusion_counts, macro_f1
from phasewatch.models.base import InputKind, LabelledExamples, ModelInputs, PhaseModel, compute_class_weights
from phasewatch.models.foreign import foreign_errors
from phasewatch.models.treefile import MAX_TREES, check_xgboost_trees
from phasewatch.types import SourceKind

__all__ = ["CHANNEL_FILE", "TREES_FILE", "BestChannel", "GbtConfig", "GradientBoosting", "LevelsBaseline"]

TREES_FILE = "model.ubj"


@dataclass(frozen=True, slots=True, kw_only=True)
class GbtConfig:
    """Settings of the trees; depth and bins are fixed; rate, rounds and patience from ADR 12."""

    rounds: Annotated[int, Meta(ge=1, le=MAX_TREES // N_CLASSES)] = 150
    patience: Annotated[int, Meta(ge=1, le=10_000)] = 15
    depth: Annotated[int, Meta(ge=1, le=16)] = 4
    bins: Annotated[int, Meta(ge=2, le=4096)] = 64
    learning_rate: Annotated[float, Meta(gt=0.0, le=10.0)] = 0.15
    min_child_weight: Annotated[float, Meta(ge=0.0, le=1e9)] = 2.0
    l2: Annotated[float, Meta(ge=0.0, le=1e9)] = 1.0


class GradientBoosting(PhaseModel):
    """XGBoost with `multi:softprob`, histogram method and balanced classes; NaN is a value of its own.

    Training stops early by the log loss on validation A.
    """

    key = "gbt"
    Config = GbtConfig

    @property
    def booster(self) -> Any:
        """The fitted trees; `phasewatch export` converts them."""
        return self._booster

    def _fit(self, train: LabelledExamples, val: LabelledExamples) -> None:
        import xgboost as xgb

        c: GbtConfig = self.config
        weights = compute_class_weights(train.y)
        # One thread: the order of the sums, and so every bit, is the same on any machine.
        data = xgb.QuantileDMatrix(
            train.inputs.x, label=train.y, weight=weights[train.y], max_bin=c.bins, missing=np.nan, nthread=1
        )
        # Windows of a phase that train does not have get weight 0: no round could improve them.
        watched = xgb.QuantileDMatrix(
            val.inputs.x, label=val.y, weight=weights[val.y], max_bin=c.bins, missing=np.nan, nthread=1, ref=data
        )
        can_stop = bool(weights[val.y].any())
        log: dict[str, dict[str, list[float]]] = {}
        booster = xgb.train(
            {
                "objective": "multi:softprob",
                "num_class": N_CLASSES,
                "tree_method": "hist",
                "max_depth": c.depth,
                "max_bin": c.bins,
                "eta": c.learning_rate,
                "min_child_weight": c.min_child_weight,
                "lambda": c.l2,
                "base_score": 0.5,
                "eval_metric": "mlogloss",
                "seed": self.seed,
                "nthread": 1,
                "verbosity": 0,
            },
            data,
            num_boost_round=c.rounds,
            evals=[(watched, "val_a")] if can_stop else [],
            early_stopping_rounds=c.patience if can_stop else None,
            evals_result=log,
            verbose_eval=False,
        )
        if can_stop:
            self.history = {"val_a_mlogloss": tuple(round(v, 6) for v in log["val_a"]["mlogloss"])}
            booster = booster[: booster.best_iteration + 1]
        self._booster: Any = booster

    def _predict_proba(self, x: NDArray[np.float32]) -> FloatArray:
        return np.asarray(self._booster.inplace_predict(x, missing=np.nan), np.float64)

    def _files(self) -> Mapping[str, bytes]:
        return {TREES_FILE: bytes(self._booster.save_raw("ubj"))}

    def _restore(self, files: Mapping[str, bytes]) -> None:
        if TREES_FILE not in files:
            raise RunError(f"checkpoint of gbt: {TREES_FILE} is not among its files ({', '.join(files) or 'none'})")
        features = len(self.spec.names) if self.spec else 0
        self._booster = self._load(files[TREES_FILE], features)

    def _load(self, data: bytes, features: int) -> Any:
        """Load the trees of a file; XGBoost parses the output of `check_xgboost_trees`, never the file's own bytes."""
        import xgboost as xgb

        place = f"checkpoint of {self.key}: {TREES_FILE}"
        checked = check_xgboost_trees(data, place=place, features=features)
        with foreign_errors(place, "XGBoost refuses it"):
            return xgb.Booster({"nthread": 1}, model_file=bytearray(checked))

    def _libraries(self) -> tuple[str, ...]:
        return ("numpy", "xgboost", "xgboost-cpu")


class LevelsBaseline(GradientBoosting):
    """The same trees over the cumulative levels alone, which reveal the elapsed time."""

    key = "levels_only"
    kind = InputKind.LEVELS


CHANNEL_FILE = "channel.json"
_SOURCES = frozenset(SourceKind)
_TRIAL_ROUNDS = 15  # enough to rank channels, a tenth of the cost


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
            trial = GradientBoosting(seed=self.seed, settings={"rounds": _TRIAL_ROUNDS, "patience": _TRIAL_ROUNDS})
            scores.append(_compute_val_macro_f1(trial.fit(own, other), other))
        self._channel = channels[int(np.argmax(scores))]
        own, other = (_select_columns(part, _find_channel_columns(names, self._channel)) for part in (train, val))
        settings = msgspec.to_builtins(self.config)
        self._model = GradientBoosting(seed=self.seed, settings=settings).fit(own, other)
        self.history = {**self._model.history, "trial_val_a_macro_f1": tuple(round(s, 6) for s in scores)}

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
        self._model._restore(files)

    def _libraries(self) -> tuple[str, ...]:
        return ("numpy", "xgboost", "xgboost-cpu")


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
    return LabelledExamples(inputs=ModelInputs(x=x, spec=replace(spec, names=names)), y=part.y)


def _compute_val_macro_f1(model: PhaseModel, val: LabelledExamples) -> float:
    return float(macro_f1(confusion_counts(val.y, model.predict(val.inputs))))
