"""What an operator would have lived through: alarms raised and standing, onset and delay, false alarms and damage, all thresholds at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phasewatch.vocab import BIN_NS, PHASES, STRIDE_BINS, Phase

HITS, OF_WINDOWS = 2, 3  # raised when so many of the last windows reach the threshold; over when none of them does
CALM_NS = 60 * 10**9  # an alarm is false if nothing malicious ran for this long before it
DECIDED_AFTER_NS = 6 * 10**9  # from a window's middle to its decision: half a window, and 1 s for late ticks
EXPOSURE_S = BIN_NS * STRIDE_BINS / 1e9  # of one decision time
LOUD = (Phase.INFECTING, Phase.ACTIVE)
CALM = (Phase.CLEAN, Phase.ARMED)
THRESHOLDS = np.append(np.round(np.arange(0.01, 1.0, 0.01), 2), np.inf)  # the last one never raises

Spans = Sequence[tuple[Phase, int, int]]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Watched:
    """Episodes side by side, as one model saw them; ``E`` episodes of at most ``W`` windows.

    Attributes:
        score: ``(E, W)`` p(infecting) + p(active), −inf after an episode's last window.
        decided_ns: ``(E, W)`` decision times on the wall clock.
        calm: ``(E, W)`` whether an alarm raised then would be false.
        onset_ns: ``(E,)`` start of the first infecting, else of the first active; −1 where neither is.
    """

    score: NDArray[np.float64]
    decided_ns: NDArray[np.int64]
    calm: Bools
    onset_ns: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.onset_ns)

    @property
    def exposure_s(self) -> NDArray[np.float64]:
        """``(E,)`` seconds in which a false alarm could have been raised."""
        seconds: NDArray[np.float64] = self.calm.sum(axis=1) * EXPOSURE_S
        return seconds


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What became of each episode at each threshold, ``(T, E)``.

    Attributes:
        false_alarms: Alarms raised in calm.
        delay_s: From onset to the first decision time at which an alarm stands; inf where none does or there is no onset.
    """

    false_alarms: NDArray[np.int64]
    delay_s: NDArray[np.float64]


def onset_of(spans: Spans) -> int | None:
    """Give when it began: the first infecting, else the first active; None where nothing ran."""
    for phase in LOUD:
        for found, start, _ in spans:
            if found is phase:
                return start
    return None


def is_calm(spans: Spans, at_ns: NDArray[np.int64]) -> Bools:
    """Say at which times the truth had been clean or armed for the whole `CALM_NS` before.

    What was before the first label was as the first label says: a machine that starts dormant was infected unseen.
    """
    calm = np.full(len(at_ns), bool(spans))
    for i, (phase, start, end) in enumerate(spans):
        if phase not in CALM:
            since = np.iinfo(np.int64).min if i == 0 else start
            calm &= (at_ns < since) | (at_ns - CALM_NS >= end)
    return calm


def watch(episodes: Sequence[tuple[Spans, NDArray[np.int64], NDArray[np.floating]]]) -> Watched:
    """Set episodes side by side.

    Args:
        episodes: For each its label spans, ``(w,)`` window centres in order, and ``(w, 5)`` probabilities.
    """
    width = max((len(t) for _, t, _ in episodes), default=1)
    score = np.full((len(episodes), width), -np.inf)
    decided = np.zeros((len(episodes), width), np.int64)
    calm = np.zeros((len(episodes), width), np.bool_)
    onset = np.full(len(episodes), -1, np.int64)
    loud = [PHASES.index(phase) for phase in LOUD]
    for i, (spans, t_center_ns, p) in enumerate(episodes):
        n = len(t_center_ns)
        score[i, :n] = np.asarray(p, np.float64)[:, loud].sum(axis=1)
        decided[i, :n] = t_center_ns + DECIDED_AFTER_NS
        calm[i, :n] = is_calm(spans, decided[i, :n])
        began = onset_of(spans)
        onset[i] = -1 if began is None else began
    return Watched(score=score, decided_ns=decided, calm=calm, onset_ns=onset)


def standing(score: NDArray[np.float64], thresholds: NDArray[np.float64]) -> Bools:
    """Say when an alarm stands, ``(T, E, W)``: raised by 2 of the last 3 windows, over after 3 below in a row."""
    above = score[None, :, :] >= thresholds[:, None, None]
    stands = np.zeros(above.shape, np.bool_)
    before = np.zeros(above.shape[:2], np.bool_)
    for w in range(score.shape[1]):
        recent = above[:, :, max(0, w - OF_WINDOWS + 1) : w + 1].sum(axis=2)
        before = np.where(before, recent > 0, recent >= HITS)
        stands[:, :, w] = before
    stands &= np.isfinite(score)[None]
    return stands


def outcome(watched: Watched, thresholds: NDArray[np.float64]) -> Outcome:
    """Count false alarms and measure delays at each threshold."""
    stands = standing(watched.score, thresholds)
    earlier = np.zeros_like(stands)
    earlier[:, :, 1:] = stands[:, :, :-1]
    false_alarms = (stands & ~earlier & watched.calm[None]).sum(axis=2)
    counts = stands & ((watched.onset_ns >= 0)[:, None] & (watched.decided_ns >= watched.onset_ns[:, None]))[None]
    first = counts.argmax(axis=2)
    at_ns = watched.decided_ns[np.arange(len(watched))[None, :], first] if watched.decided_ns.size else first
    delay_s = np.where(counts.any(axis=2), (at_ns - watched.onset_ns[None]) / 1e9, np.inf)
    return Outcome(false_alarms=false_alarms, delay_s=delay_s)


def meeting(watched: Watched, thresholds: NDArray[np.float64], per_hour: float) -> int:
    """Give the place of the lowest threshold from which on upwards the budget of false alarms an hour is met.

    From which on upwards: a threshold so low that one alarm stands for ever raises few, and must not be chosen for it.
    """
    hours = float(watched.exposure_s.sum()) / 3600
    raised = outcome(watched, thresholds).false_alarms.sum(axis=1)
    over = np.flatnonzero(raised > per_hour * hours)
    return int(over[-1]) + 1 if len(over) else 0


def amount(rates: NDArray[np.floating], t0_ns: int, begin_ns: int, end_ns: int) -> NDArray[np.float64]:
    """Sum rates over the whole bins between two times, ``(n_bins, c)`` → ``(c,)``; a bin of which nothing is known adds nothing."""
    first = max(0, -(-(begin_ns - t0_ns) // BIN_NS))
    last = max(first, (end_ns - t0_ns) // BIN_NS)
    total: NDArray[np.float64] = np.nansum(np.asarray(rates[first:last], np.float64), axis=0) * (BIN_NS / 1e9)
    return total
