"""Labels permuted over the training windows: a model that then scores above chance sees the truth by another road."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phasewatch import measures
from phasewatch.audit.checks import Check, collecting, judge, untested
from phasewatch.dataset import load, read_folds
from phasewatch.evaluate import bootstrap
from phasewatch.models import registry
from phasewatch.models.base import Examples

SHUFFLED = "shuffled-labels"
PROMISE = "Trained on labels permuted over the training windows, gbt scores no more than chance."
MODEL, RECIPE, THREAT = "gbt", "held_out_host", "realistic"
MARGIN = 0.05  # above stratified random, for the upper end of the interval (DESIGN section 9)
GUESSES = 200  # stratified random answers, averaged
RESAMPLES = 2_000
TURNS = 2  # one permutation is lucky in one clean run of fifty (measured); a leak is there in every one

Answers = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], list[str], list[str]]


def check_shuffled(
    run: Path, *, seed: int = 0, answers: Callable[[Path, np.random.Generator], Answers] | None = None
) -> Check:
    """Train on permuted labels over all folds of the headline's recipe, and score what they say of the test sets.

    A run is accused only where every one of TURNS permutations scores above chance; the second is made if need be.

    Args:
        run: The run.
        seed: Of the permutations.
        answers: Gives truth, decision and train's class shares of every test window, its host and session; trains, if
            left out.
    """
    ask = answers or _answers
    faults: list[str] = []
    if not list((run / "splits").glob(f"{RECIPE}-*.json")):
        return untested(SHUFFLED, PROMISE, f"the run has no fold of {RECIPE}")
    looked = ""
    with collecting(faults):
        rng = np.random.default_rng([seed, int.from_bytes(b"shuffled", "big")])
        for _ in range(TURNS):
            truth, said, chance, hosts, sessions = ask(run, rng)
            high, guess = _upper(truth, said, hosts, sessions), _guess(truth, chance, rng)
            looked += f"{', then ' if looked else ''}macro-F1 up to {high:.2f}, stratified random {guess:.2f}"
            if high <= guess + MARGIN:
                break
        else:
            faults.append(f"{looked}: something other than the labels tells the phase")
    return judge(SHUFFLED, PROMISE, faults, looked_at=looked)


def _answers(run: Path, rng: np.random.Generator) -> Answers:
    """Give truth, decision and train's class shares of every test window, with its host and session."""
    truths, decisions, shares = [], [], []
    hosts: list[str] = []
    sessions: list[str] = []
    for fold in read_folds(run, RECIPE):
        sets = load(run, RECIPE, fold.fold, THREAT, registry.row_of(MODEL).kind)

        def permuted(examples: Examples) -> Examples:
            return Examples(inputs=examples.inputs, y=rng.permutation(examples.y))

        model = registry.create(MODEL).fit(permuted(sets.train.examples), permuted(sets.val_a.examples))
        truths.append(sets.test.y)
        decisions.append(model.predict(sets.test.inputs))
        prior = np.bincount(sets.train.y, minlength=measures.N_CLASSES) / max(len(sets.train), 1)
        shares.append(np.tile(prior, (len(sets.test), 1)))
        of = [sets.test.windows.episodes[i] for i in sets.test.windows.of]
        hosts += [e.host_id for e in of]
        sessions += [e.session for e in of]
    return np.concatenate(truths), np.concatenate(decisions), np.concatenate(shares), hosts, sessions


def _upper(truth: NDArray[np.int64], said: NDArray[np.int64], hosts: list[str], sessions: list[str]) -> float:
    """Give the upper end of the interval; the point where there are too few sessions for one."""
    clusters = bootstrap.number_clusters(hosts, sessions)
    classes = tuple(int(c) for c in np.unique(truth))
    counts = bootstrap.confusions(clusters, truth, said)
    k = measures.N_CLASSES
    weights = bootstrap.draw_weights(clusters, truth, classes=classes, resamples=RESAMPLES, seed=0)
    if weights is None:
        return float(measures.macro_f1(counts.sum(axis=0).reshape(k, k), classes))
    draws = measures.macro_f1(bootstrap.resample(weights, counts).reshape(-1, k, k), classes)
    return bootstrap.interval(draws)[1]


def _guess(truth: NDArray[np.int64], shares: NDArray[np.float64], rng: np.random.Generator) -> float:
    """Give the mean macro-F1 of guesses drawn with train's class shares."""
    classes = tuple(int(c) for c in np.unique(truth))
    cumulative = shares.cumsum(axis=1)
    scores = []
    for _ in range(GUESSES):
        drawn = (rng.random(len(truth))[:, None] > cumulative).sum(axis=1).clip(0, measures.N_CLASSES - 1)
        scores.append(float(measures.macro_f1(measures.confusion_counts(truth, drawn), classes)))
    return float(np.mean(scores))
