"""Measure cost and macro-F1 of other classifiers on the same windows, folds and channel set."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from timing import Part, Row

from phasewatch.dataset import load, read_folds
from phasewatch.metrics import confusion_counts, macro_f1
from phasewatch.models.base import LabelledExamples
from phasewatch.models.probabilities import compute_class_weights


def measure(run: Path, *, folds: int = 0) -> Part:
    """Fit each model once per fold of held_out_host, and score the pooled test episodes without an agent."""
    from aeon.classification.convolution_based import MiniRocketClassifier
    from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier

    from phasewatch.models import registry

    def brought(make: Callable[[], Any], *, fill: bool, kind: str) -> Callable[[Any], np.ndarray]:
        def work(sets: Any) -> np.ndarray:
            x, z = sets.train.x.astype(np.float64), sets.test.x.astype(np.float64)
            if fill:
                axes = (0, 2) if kind == "tensor" else (0,)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a channel that no machine has
                    middle = np.nan_to_num(np.nanmedian(x, axis=axes, keepdims=True))
                x, z = np.where(np.isfinite(x), x, middle), np.where(np.isfinite(z), z, middle)
            return np.asarray(make().fit(x, sets.train.y).predict(z))

        return work

    def ours(key: str) -> Callable[[Any], np.ndarray]:
        def work(sets: Any) -> np.ndarray:
            parts = [sets.train.examples, sets.val_a.examples, sets.val_b.examples]
            model = registry.create(key, seed=0).fit(*parts[:2]).refit(parts)
            return model.predict(sets.test.inputs)

        return work

    def boost(sets: Any) -> np.ndarray:
        """XGBoost with the settings of `gbt`, as far as it has them, on the same windows."""
        import xgboost as xgb

        parts = LabelledExamples.concatenate([sets.train.examples, sets.val_a.examples, sets.val_b.examples])
        weight = compute_class_weights(parts.y)[parts.y]
        data = xgb.QuantileDMatrix(parts.inputs.x, label=parts.y, weight=weight, max_bin=64, nthread=1)
        settings = {
            "objective": "multi:softprob", "num_class": 5, "tree_method": "hist", "grow_policy": "lossguide",
            "max_depth": 0, "max_leaves": 15, "max_bin": 64, "eta": 0.13, "subsample": 0.8, "colsample_bytree": 0.2,
            "min_child_weight": 0.1, "lambda": 8.0, "base_score": 0.5, "seed": 0, "nthread": 1, "verbosity": 0,
        }  # fmt: skip
        booster = xgb.train(settings, data, 200)
        return np.asarray(booster.inplace_predict(sets.test.x)).argmax(axis=1)

    ways: dict[str, tuple[str, Callable[[Any], np.ndarray], str]] = {
        "phasewatch gbt": ("table", ours("gbt"), "LightGBM; two fits"),
        "XGBoost": ("table", boost, "200 rounds, the best of 15 settings; one fit"),
        "phasewatch minirocket": ("tensor", ours("minirocket"), ""),
        "scikit-learn HistGradientBoosting": (
            "table",
            brought(
                lambda: HistGradientBoostingClassifier(max_iter=200, class_weight="balanced", random_state=0),
                fill=False,
                kind="table",
            ),
            "200 rounds, native NaN",
        ),
        "scikit-learn RandomForest": (
            "table",
            brought(
                lambda: RandomForestClassifier(
                    300, min_samples_leaf=2, class_weight="balanced", random_state=0, n_jobs=1
                ),
                fill=True,
                kind="table",
            ),
            "300 trees, medians for missing values",
        ),
        "aeon MiniRocket + ridge": (
            "tensor",
            brought(lambda: MiniRocketClassifier(n_kernels=10_000, random_state=0, n_jobs=1), fill=True, kind="tensor"),
            "10,000 kernels, medians for missing values",
        ),
    }
    chosen = [fold.fold for fold in read_folds(run, "held_out_host")][: folds or None]
    counts = {name: np.zeros((5, 5), np.int64) for name in ways}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for fold in chosen:
        for kind in ("table", "tensor"):
            sets = load(run, "held_out_host", fold, "realistic", kind=kind)
            off = sets.test.windows.mark_episodes(lambda e: not e.agent)
            for name, (wanted, work, _) in ways.items():
                if wanted == kind:
                    start = time.process_time()
                    predicted = work(sets)
                    taken[name].append(time.process_time() - start)
                    counts[name] += confusion_counts(sets.test.y[off], predicted[off])
    rows = tuple(
        Row(
            what=name,
            min_s=min(taken[name]),
            median_s=float(np.median(taken[name])),
            repeats=len(chosen),
            per="fold, fit and predict",
            is_ours=name.startswith("phasewatch"),
            score=float(macro_f1(counts[name])),
            note=ways[name][2],
        )
        for name in ways
    )
    n = int(next(iter(counts.values())).sum())
    about = (
        f"Held-out host, {len(chosen)} folds, channel set realistic, raw input, seed 0, no calibration and no "
        f"smoothing; macro-F1 of {n:,} pooled test windows without an agent. Without intervals: differences of a "
        "few hundredths are noise, the report has the intervals. The minimum time of aeon excludes its compiler, "
        "which makes the first fit slower."
    )
    return Part(title="Models", about=about, rows=rows)
