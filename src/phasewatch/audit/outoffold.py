"""Answers out of fold: shallow trees that saw nothing of what they are asked about, and how good their answers are (pure)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from phasewatch.measures import confusion_counts, macro_f1
from phasewatch.vocab import WINDOW_BINS

Floats = NDArray[np.float32]

FOLDS = 5
MOST_LEFT_OUT = 30  # of so few episodes each is left out by itself: how they fall into five folds moves a figure by 0.1

_ROUNDS = 40
_TREES = {"tree_method": "hist", "max_depth": 3, "max_bin": 32, "eta": 0.2, "seed": 0, "nthread": 1, "verbosity": 0}


def deal(groups: NDArray[np.str_], k: int) -> NDArray[np.int64]:
    """Deal groups over k folds by size: each goes, in order of falling size and name, where least is."""
    names, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    held, place = np.zeros(k, np.int64), np.zeros(len(names), np.int64)
    for group in np.lexsort((names, -sizes)):
        place[group] = int(np.argmin(held))
        held[place[group]] += sizes[group]
    return place[codes]


def splits(
    groups: NDArray[np.str_], rows: NDArray[np.bool_], k: int = FOLDS
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Give (train, test) masks over all rows, fold by fold; groups stay together, and only `rows` are in either."""
    fold = np.full(len(groups), -1)
    fold[rows] = deal(groups[rows], k)
    for number in range(k):
        yield rows & (fold != number), fold == number


def classify(
    x: Floats, y: NDArray[np.int64], groups: NDArray[np.str_], rows: NDArray[np.bool_]
) -> NDArray[np.int64] | None:
    """Answer every row by trees that saw none of its session; None where there are too few sessions."""
    import xgboost as xgb

    if len(np.unique(groups[rows])) < FOLDS or len(np.unique(y[rows])) < 2:
        return None
    k = int(y[rows].max()) + 1
    said = np.full(len(y), -1)
    for train, test in splits(groups, rows):
        count = np.bincount(y[train], minlength=k)
        weight = np.divide(1.0, count, out=np.zeros(k), where=count > 0) * len(y[train]) / max(1, (count > 0).sum())
        data = xgb.QuantileDMatrix(x[train], label=y[train], weight=weight[y[train]], max_bin=32, nthread=1)
        booster = xgb.train(
            {**_TREES, "objective": "multi:softprob", "num_class": k}, data, num_boost_round=_ROUNDS, verbose_eval=False
        )
        said[test] = np.asarray(booster.inplace_predict(x[test], missing=np.nan)).reshape(-1, k).argmax(axis=1)
    return said


def regress(x: Floats, t: NDArray[np.float64], episode: NDArray[np.int64]) -> NDArray[np.float64]:
    """Predict a number for every row by trees that saw none of its episode."""
    import xgboost as xgb

    said = np.zeros(len(t))
    k = min(MOST_LEFT_OUT, len(np.unique(episode)))
    for train, test in splits(episode.astype(str), np.ones(len(t), np.bool_), k):
        if train.any() and test.any():
            data = xgb.QuantileDMatrix(x[train], label=t[train], max_bin=32, nthread=1)
            booster = xgb.train({**_TREES, "objective": "reg:squarederror"}, data, num_boost_round=_ROUNDS)
            said[test] = booster.inplace_predict(x[test], missing=np.nan)
    return said


def scores(truth: NDArray[np.int64], said: NDArray[np.int64]) -> tuple[float, float]:
    """Give macro-F1, and what guesses drawn with the classes' shares would have."""
    confusion = confusion_counts(truth, said)
    share = confusion.sum(axis=1) / max(1, len(truth))
    classes = tuple(int(i) for i in np.flatnonzero(share))
    # A guess drawn by share has precision and recall equal to the share.
    return float(macro_f1(confusion, classes)), float(np.mean(share[list(classes)]))


def spearman(x: NDArray[np.floating], t: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correlate ranks column by column, over the finite rows; 0 where a column does not move (Spearman 1904)."""
    from scipy.stats import rankdata

    found = np.zeros(x.shape[1])
    for i in range(x.shape[1]):
        known = np.isfinite(x[:, i])
        if known.sum() >= WINDOW_BINS // 2 and np.ptp(x[known, i]) > 0:
            a, b = rankdata(x[known, i]), rankdata(t[known])
            found[i] = np.corrcoef(a, b)[0, 1] if np.ptp(b) > 0 else 0.0
    return found
