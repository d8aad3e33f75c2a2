"""Gradient-boosted trees (XGBoost) over a table of features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from phasewatch.errors import RunError
from phasewatch.measures import N_CLASSES
from phasewatch.models.base import Examples, Floats, InputKind, PhaseModel, class_weights
from phasewatch.models.foreign import foreign_errors
from phasewatch.models.treefile import MAX_TREES, check_trees

FILE = "model.ubj"


@dataclass(frozen=True, slots=True, kw_only=True)
class GbtConfig:
    """Depth and bins are those that DESIGN section 16 measured; rate, rounds and patience those of ADR 12."""

    rounds: Annotated[int, Meta(ge=1, le=MAX_TREES // N_CLASSES)] = 150
    patience: Annotated[int, Meta(ge=1, le=10_000)] = 15
    depth: Annotated[int, Meta(ge=1, le=16)] = 4
    bins: Annotated[int, Meta(ge=2, le=4096)] = 64
    learning_rate: Annotated[float, Meta(gt=0.0, le=10.0)] = 0.15
    min_child_weight: Annotated[float, Meta(ge=0.0, le=1e9)] = 2.0
    l2: Annotated[float, Meta(ge=0.0, le=1e9)] = 1.0


class GradientBoosting(PhaseModel):
    """`multi:softprob`, histogram method, NaN as it comes, classes weighed alike, stopped by validation A's log loss."""

    key = "gbt"
    Config = GbtConfig

    @property
    def booster(self) -> Any:
        """The fitted trees; `phasewatch export` converts them."""
        return self._booster

    def _fit(self, train: Examples, val: Examples) -> None:
        import xgboost as xgb

        c: GbtConfig = self.config
        weights = class_weights(train.y)
        # One thread: the order of sums, and so every bit, is the same on any machine.
        data = xgb.QuantileDMatrix(
            train.inputs.x, label=train.y, weight=weights[train.y], max_bin=c.bins, missing=np.nan, nthread=1
        )
        # Windows of a phase that train never showed weigh nothing here: no round could make them better.
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

    def _predict_proba(self, x: NDArray[np.float32]) -> Floats:
        return np.asarray(self._booster.inplace_predict(x, missing=np.nan), np.float64)

    def _files(self) -> Mapping[str, bytes]:
        return {FILE: bytes(self._booster.save_raw("ubj"))}

    def _restore(self, files: Mapping[str, bytes]) -> None:
        if FILE not in files:
            raise RunError(f"checkpoint of gbt: {FILE} is not among its files ({', '.join(files) or 'none'})")
        features = len(self.spec.names) if self.spec else 0
        self._booster = self._load(files[FILE], features)

    def _load(self, data: bytes, features: int) -> Any:
        """Return the trees of a file; XGBoost's reader sees what `check_trees` wrote, never the file's own bytes."""
        import xgboost as xgb

        place = f"checkpoint of {self.key}: {FILE}"
        checked = check_trees(data, place=place, features=features)
        with foreign_errors(place, "XGBoost refuses it"):
            return xgb.Booster({"nthread": 1}, model_file=bytearray(checked))

    def _libraries(self) -> tuple[str, ...]:
        return ("numpy", "xgboost", "xgboost-cpu")


class LevelsOnly(GradientBoosting):
    """The same trees over the cumulative levels alone: how much "how late is it" would have told."""

    key = "levels_only"
    kind = InputKind.LEVELS
