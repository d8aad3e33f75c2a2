"""Measure cost and macro-F1 of other classifiers on the same windows, folds and channel set."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from timing import Part, Row

from phasewatch.dataset import load, read_folds
from phasewatch.evaluation import bootstrap
from phasewatch.metrics import N_CLASSES, STATES, confusion_counts, macro_f1, merge_into_three_states
from phasewatch.models.base import LabelledExamples
from phasewatch.models.probabilities import compute_class_weights

N_RESAMPLES = 2_000


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
    decided: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    truths: list[np.ndarray] = []
    hosts: list[str] = []
    sessions: list[str] = []
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for fold in chosen:
        for kind in ("table", "tensor"):
            sets = load(run, "held_out_host", fold, "realistic", kind=kind)
            windows = sets.test.windows
            off = windows.mark_episodes(lambda e: not e.agent)
            if kind == "table":  # the tensors are of the same windows, in the same order
                episodes = [windows.episodes[i] for i in windows.episode_index[off]]
                truths.append(sets.test.y[off])
                hosts += [e.host_id for e in episodes]
                sessions += [e.session for e in episodes]
            for name, (wanted, work, _) in ways.items():
                if wanted == kind:
                    start = time.process_time()
                    predicted = work(sets)
                    taken[name].append(time.process_time() - start)
                    decided[name].append(predicted[off])
    truth = np.concatenate(truths)
    gaps = compute_gaps(
        truth, {name: np.concatenate(parts) for name, parts in decided.items()}, hosts, sessions, base="phasewatch gbt"
    )
    rows = tuple(
        Row(
            what=name,
            min_s=min(taken[name]),
            median_s=float(np.median(taken[name])),
            repeats=len(chosen),
            per="fold, fit and predict",
            is_ours=name.startswith("phasewatch"),
            score=float(macro_f1(confusion_counts(truth, np.concatenate(decided[name])))),
            note="; ".join(filter(None, (ways[name][2], gaps.get(name)))),
        )
        for name in ways
    )
    about = (
        f"Held-out host, {len(chosen)} folds, channel set realistic, raw input, seed 0, no calibration and no "
        f"smoothing; macro-F1 of {len(truth):,} pooled test windows without an agent. A gap is to `gbt`, paired over "
        "the same sessions, with its 95 % interval. The minimum time of aeon excludes its compiler, which makes the "
        "first fit slower."
    )
    return Part(title="Models", about=about, rows=rows)


def compute_gaps(
    truth: np.ndarray, decided: Mapping[str, np.ndarray], hosts: Sequence[str], sessions: Sequence[str], *, base: str
) -> dict[str, str]:
    """Compute each model's gap in macro-F1 to one of them, with a bootstrap over sessions within hosts.

    Args:
        truth: ``(n,)`` phase codes.
        decided: Model → ``(n,)`` phase codes.
        hosts: ``(n,)`` host of each window.
        sessions: ``(n,)`` session of each window.
        base: The model that the others are compared with.

    Returns:
        Model → the gaps in five phases and three states, as text.
    """
    clusters = bootstrap.build_clusters(hosts, sessions)
    weights = bootstrap.draw_weights(clusters, truth, classes=range(N_CLASSES), resamples=N_RESAMPLES, seed=0)
    if weights is None:
        return {}

    def score(codes: np.ndarray) -> list[np.ndarray]:
        counts = bootstrap.count_confusions(clusters, truth, codes)
        whole = counts.sum(axis=0)[None]
        drawn = np.concatenate([whole, bootstrap.resample(weights, counts)]).reshape(-1, N_CLASSES, N_CLASSES)
        return [macro_f1(drawn, range(N_CLASSES)), macro_f1(merge_into_three_states(drawn), range(len(STATES)))]

    scores = {name: score(codes) for name, codes in decided.items()}
    texts = {}
    for name in scores.keys() - {base}:
        parts = []
        for own, other in zip(scores[name], scores[base], strict=True):
            low, high = bootstrap.compute_interval((own - other)[1:])
            parts.append(f"{own[0] - other[0]:+.3f} [{low:+.3f}, {high:+.3f}]")
        texts[name] = f"gap {parts[0]}, 3 states {parts[1]}"
    return texts
