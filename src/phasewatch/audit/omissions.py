"""Checks of what a run leaves out, and of what it holds twice: folds, windows and bundles."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phasewatch.audit.checks import (
    AuditCheck,
    AuditSubject,
    CheckOutcome,
    build_check,
    build_untested_check,
    collect_refusals,
)
from phasewatch.dataset import read_windows
from phasewatch.dataset.split_files import read_all_folds
from phasewatch.evaluation.metric_table import HeadlineKey
from phasewatch.models.base import InputKind
from phasewatch.splits import Fold, SplitPart, find_recipe
from phasewatch.splits.fold import TRAINING_PARTS
from phasewatch.training.grids import find_widest_fold

__all__ = ["check_answered", "check_store_remainder", "check_twins", "compute_twin_share", "find_unanswered_folds"]

_ANSWERED_CHECK = "answered-folds"
_ANSWERED_PROMISE = "Every fold that was cut is predicted: no host or sample that went badly is left out."
_TWINS_CHECK = "feature-twins"
_MAX_TWIN_SHARE = 0.005
_TWINS_PROMISE = (
    f"At most {_MAX_TWIN_SHARE:.1%} of a fold's test windows have the same features, bit for bit, as a window that was "
    "learnt from."
)
_STORE_CHECK = "whole-store"
_STORE_PROMISE = "The run uses every bundle of its store."
_MAX_NAMED = 5
_CHANNEL_SET = "realistic"


def check_answered(run: Path, answered: Mapping[AuditSubject, Set[str]], key: HeadlineKey) -> AuditCheck:
    """Check that no fold of a recipe is without predictions.

    Args:
        run: The run.
        answered: Model, by recipe, channel set and input → its folds with test predictions.
        key: The headline, whose model must have predicted every fold of each recipe that it was trained on.
    """
    faults: list[str] = []
    looked: list[str] = []
    with collect_refusals(faults):
        folds: dict[str, list[Fold]] = {}
        for fold in read_all_folds(run):
            folds.setdefault(fold.recipe, []).append(fold)
        for recipe in sorted({subject.recipe for subject in answered} & folds.keys()):
            if not find_recipe(recipe).tests:
                continue
            everyone = set().union(*(found for subject, found in answered.items() if subject.recipe == recipe))
            faults += find_unanswered_folds(folds[recipe], everyone, "any model")
            home = AuditSubject(recipe=recipe, channel_set=key.channel_set, model=key.model, input=key.input)
            if home in answered:
                faults += find_unanswered_folds(folds[recipe], answered[home], key.model)
            looked.append(f"{len(folds[recipe])} folds of {recipe}")
    if not looked and not faults:
        return build_untested_check(_ANSWERED_CHECK, _ANSWERED_PROMISE, "the run has no predictions of a test set")
    return build_check(_ANSWERED_CHECK, _ANSWERED_PROMISE, faults, looked_at=", ".join(looked))


def find_unanswered_folds(folds: Sequence[Fold], answered: Set[str], who: str) -> list[str]:
    """Return the faults of folds without predictions.

    A grid may train a model on one fold alone, that with the most test profiles; then none is missing.

    Args:
        folds: All folds of one recipe.
        answered: The names of those with predictions.
        who: Whose predictions they are, for the message.
    """
    recipe = folds[0].recipe
    if answered == {fold.fold for fold in find_widest_fold({recipe: folds})}:
        return []
    missing = sorted({fold.fold for fold in folds} - answered)
    return [f"{recipe}-{name} was cut and has no predictions of {who}" for name in missing]


def check_twins(run: Path) -> AuditCheck:
    """Check how many test windows of each fold equal a window that was learnt from, bit for bit."""
    faults: list[str] = []
    n_folds, highest = 0, 0.0
    with collect_refusals(faults):
        windows = read_windows(run, _CHANNEL_SET, InputKind.TABLE)
        digests = _digest_rows(windows.x)
        ids = np.array([e.episode_id for e in windows.windows.episodes], dtype=object)[windows.windows.episode_index]
        for fold in read_all_folds(run):
            row = find_recipe(fold.recipe)
            if not row.tests or row.leaky or fold.deal is not None:
                continue
            tested = _mark(ids, fold.ids(SplitPart.TEST))
            learnt = _mark(ids, [i for part in TRAINING_PARTS for i in fold.ids(part)])
            share = compute_twin_share(digests[tested], digests[learnt])
            n_folds, highest = n_folds + 1, max(highest, share)
            if share > _MAX_TWIN_SHARE:
                faults.append(f"{fold.recipe}-{fold.fold}: {share:.1%} of the test windows were learnt from")
    if not n_folds and not faults:
        return build_untested_check(_TWINS_CHECK, _TWINS_PROMISE, "the run has no split that holds something out")
    looked = f"{n_folds} folds, at most {highest:.2%} of the test windows of one"
    return build_check(_TWINS_CHECK, _TWINS_PROMISE, faults, looked_at=looked)


def _digest_rows(x: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Digest each row, ``(n, f)`` float32 → ``(n,)`` uint64; 0 for a row without a known value."""
    bits = np.ascontiguousarray(x + np.float32(0.0), "<f4")  # one zero, whatever its sign
    bits[np.isnan(bits)] = np.nan  # and one NaN
    digests = (int.from_bytes(hashlib.blake2b(row.data, digest_size=8).digest(), "little") for row in bits)
    found = np.fromiter(digests, np.uint64, len(bits))
    found[np.isnan(x).all(axis=1)] = 0
    return found


def compute_twin_share(tested: NDArray[np.uint64], learnt: NDArray[np.uint64]) -> float:
    """Compute the share of ``(n,)`` digests of test windows that are among ``(m,)`` learnt ones; 0 marks no window."""
    known = tested[tested != 0]
    return float(np.isin(known, learnt).mean()) if len(known) else 0.0


def _mark(ids: NDArray[np.object_], wanted: Sequence[str]) -> NDArray[np.bool_]:
    chosen = set(wanted)
    return np.fromiter((i in chosen for i in ids), np.bool_, len(ids))


def check_store_remainder(left_out: Sequence[str] | None, *, limit: int = 0) -> AuditCheck:
    """Name the bundles of the store that the run does not list.

    They may have come later, so they break no promise; but they leave it untested.

    Args:
        left_out: Their paths in the store; None without the store.
        limit: Size of the sample that the run was asked to take; 0 for all bundles.
    """
    if left_out is None:
        return build_untested_check(_STORE_CHECK, _STORE_PROMISE, "the run's store is not there")
    if not left_out:
        return AuditCheck(
            name=_STORE_CHECK, promise=_STORE_PROMISE, fate=CheckOutcome.KEPT, words="no bundle is left out"
        )
    names = sorted(left_out)
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    sample = f", of which the run took a sample of {limit}" if limit else ""
    words = f"{len(names)} bundles of the store are not in this run{sample}: {', '.join(names[:_MAX_NAMED])}{more}"
    return build_untested_check(_STORE_CHECK, _STORE_PROMISE, words)
