"""What an operator would have lived through at some thresholds: onset and delay, false alarms in calm, damage done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phasewatch.models.alarm import DECISION_NS, LOOK_BACK_NS, AlarmRule, begins, heat_of, run_alarm
from phasewatch.vocab import BIN_NS, STRIDE_BINS, Phase

EXPOSURE_S = BIN_NS * STRIDE_BINS / 1e9  # of one decision time
LOUD = (Phase.INFECTING, Phase.ACTIVE)
CALM = (Phase.CLEAN, Phase.ARMED)

Spans = Sequence[tuple[Phase, int, int]]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Watched:
    """Episodes one after the other, as one model saw them: ``n`` windows of ``E`` episodes.

    Attributes:
        heat: ``(n,)`` p(infecting) + p(active).
        of: ``(n,)`` index of each window's episode, rising.
        decided_ns: ``(n,)`` decision times on the wall clock.
        calm: ``(n,)`` whether an alarm raised then would be false.
        onset_ns: ``(E,)`` start of the first infecting, else of the first active; −1 where neither is.
    """

    heat: NDArray[np.float64]
    of: NDArray[np.int64]
    decided_ns: NDArray[np.int64]
    calm: Bools
    onset_ns: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.onset_ns)

    @property
    def exposure_s(self) -> NDArray[np.float64]:
        """``(E,)`` seconds in which a false alarm could have been raised."""
        windows = np.bincount(self.of, self.calm, len(self))
        return np.asarray(windows * EXPOSURE_S, np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What became of each episode at each threshold, ``(T, E)``.

    Attributes:
        false_alarms: Alarms raised in calm.
        delay_s: From onset to the first decision time at which an alarm rings; inf where none does or there is no onset.
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
    """Say at which times the truth had been clean or armed for the whole minute before.

    What was before the first label was as the first label says: a machine that starts dormant was infected unseen.
    """
    calm = np.full(len(at_ns), bool(spans))
    for i, (phase, start, end) in enumerate(spans):
        if phase not in CALM:
            since = np.iinfo(np.int64).min if i == 0 else start
            calm &= (at_ns < since) | (at_ns - LOOK_BACK_NS >= end)
    return calm


def watch(episodes: Sequence[tuple[Spans, NDArray[np.int64], NDArray[np.floating]]]) -> Watched:
    """Set episodes one after the other.

    Args:
        episodes: For each its label spans, ``(w,)`` window centres in order, and ``(w, 5)`` probabilities.
    """
    decided = [t_center_ns + DECISION_NS for _, t_center_ns, _ in episodes]
    onsets = [onset_of(spans) for spans, _, _ in episodes]
    return Watched(
        heat=np.concatenate([np.zeros(0), *(heat_of(p) for _, _, p in episodes)]),
        of=np.repeat(np.arange(len(episodes)), [len(t) for t in decided]),
        decided_ns=np.concatenate([np.zeros(0, np.int64), *decided]),
        calm=np.concatenate([np.zeros(0, np.bool_), *(is_calm(e[0], t) for e, t in zip(episodes, decided, strict=True))]),
        onset_ns=np.array([-1 if onset is None else onset for onset in onsets], np.int64),
    )  # fmt: skip


def outcome(watched: Watched, thresholds: Sequence[float]) -> Outcome:
    """Count false alarms and measure delays at each threshold."""
    false_alarms = np.zeros((len(thresholds), len(watched)), np.int64)
    delay_s = np.full((len(thresholds), len(watched)), np.inf)
    began = watched.onset_ns[watched.of]
    for i, theta in enumerate(thresholds):
        rings = run_alarm(AlarmRule(theta=theta), watched.heat, watched.of)
        raised = begins(rings, watched.of)
        false_alarms[i] = np.bincount(watched.of, raised & watched.calm, len(watched))
        counts = rings & (began >= 0) & (watched.decided_ns >= began)
        np.minimum.at(delay_s[i], watched.of[counts], (watched.decided_ns - began)[counts] / 1e9)
    return Outcome(false_alarms=false_alarms, delay_s=delay_s)


def amount(rates: NDArray[np.floating], t0_ns: int, begin_ns: int, end_ns: int) -> NDArray[np.float64]:
    """Sum rates over the whole bins between two times, ``(n_bins, c)`` → ``(c,)``; a bin of which nothing is known adds nothing."""
    first = max(0, -(-(begin_ns - t0_ns) // BIN_NS))
    last = max(first, (end_ns - t0_ns) // BIN_NS)
    total: NDArray[np.float64] = np.nansum(np.asarray(rates[first:last], np.float64), axis=0) * (BIN_NS / 1e9)
    return total
