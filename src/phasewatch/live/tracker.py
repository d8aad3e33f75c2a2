"""Ticks to decisions: bins, windows, probabilities, phase filter, alarm. No clock, no file, no socket: all handed in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import CHANNELS
from phasewatch.grid.stream import Bin, Row, StreamGrid
from phasewatch.live.scorer import Scorer
from phasewatch.models.alarm import AlarmState, heat_of
from phasewatch.vocab import BIN_NS, PHASES, STALE_NS, STRIDE_BINS, WINDOW_BINS, Phase, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is said of one window.

    Attributes:
        number: Of the window, 0 first; since the grid was begun.
        t_start_ns, t_end_ns: The window.
        p: ``(5,)`` calibrated probabilities.
        belief: ``(5,)`` after the phase filter; the same as `p` where there is none.
        phase: The likeliest by `belief`.
        known: Share of the model's channels × bins that were known.
        flags: Of the window: 1 clock step, 2 late ticks.
        alarm: Whether the alarm rings after this window; None where no rule was trained.
        raised: Whether it began with this window.
        since_ns: End of the window at which it began, while it rings.
    """

    number: int
    t_start_ns: int
    t_end_ns: int
    p: tuple[float, ...]
    belief: tuple[float, ...]
    phase: Phase
    known: float
    flags: int
    alarm: bool | None
    raised: bool
    since_ns: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One closed bin, and the decision if a window ended with it.

    Attributes:
        bin_flags: Of the bin.
        began: Whether the grid was begun anew with it.
    """

    bin: Bin
    bin_flags: int
    decision: Decision | None
    began: bool


class Judge:
    """Filter and alarm over the windows of one VM, in the order of time."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._belief: NDArray[np.float64] | None = None
        self._alarm = AlarmState()
        self._since_ns: int | None = None
        self._last_ns = 0

    def decide(self, number: int, start_ns: int, p: NDArray[np.float64], *, known: float, flags: int) -> Decision:
        """Take in what the model says of the next window."""
        stride_ns, end_ns = STRIDE_BINS * BIN_NS, start_ns + WINDOW_BINS * BIN_NS
        belief = p
        if self._scorer.filter is not None:
            strides = max(1, round((end_ns - self._last_ns) / stride_ns)) if self._belief is not None else 1
            belief = self._belief = self._scorer.filter.step(self._belief, p, strides=strides)
        self._last_ns = end_ns
        rings: bool | None = None
        if self._scorer.alarm is not None:
            self._alarm = self._alarm.step(self._scorer.alarm, float(heat_of(belief)))
            rings = self._alarm.rings
            self._since_ns = end_ns if self._alarm.began else self._since_ns if rings else None
        return Decision(
            number=number, t_start_ns=start_ns, t_end_ns=end_ns, p=tuple(p.tolist()), belief=tuple(belief.tolist()),
            phase=PHASES[int(belief.argmax())], known=known, flags=flags, alarm=rings, raised=self._alarm.began,
            since_ns=self._since_ns,
        )  # fmt: skip


class Tracker:
    """Follows one VM.

    `add` takes readings as they come, `advance` closes what is due. The grid begins at the first proc reading, rounded
    up to a whole half second. When the wall clock steps by more than 2.5 s, or the machine slept, bins can no longer
    be laid on one grid: it is begun anew, and the filter goes on from its belief.

    Args:
        scorer: The model; None only makes bins.
    """

    def __init__(self, scorer: Scorer | None) -> None:
        self._scorer = scorer
        self._judge = Judge(scorer) if scorer is not None else None
        self._early: list[tuple[Source, Row]] = []
        self._bins = np.empty((0, len(CHANNELS)), np.float32)
        self._kept = scorer.bins_needed if scorer is not None else WINDOW_BINS
        self._offset_ns: int | None = None
        self._late_before = 0
        self._began = False
        self.grid: StreamGrid | None = None
        self.restarts = 0

    @property
    def late(self) -> int:
        """Readings that came after their bin was closed, since the beginning."""
        return self._late_before + (self.grid.late if self.grid is not None else 0)

    @property
    def next_close_ns(self) -> int | None:
        """Wall time at which `advance` has something to do again; None before the first proc reading."""
        return self.grid.next_close_ns if self.grid is not None else None

    def add(self, source: Source, row: Row) -> None:
        """Take one reading."""
        if self.grid is None:
            self._early.append((source, row))
            if source is Source.PROC:
                self._begin(-(-int(row[0] or 0) // BIN_NS) * BIN_NS)
            return
        self.grid.add(source, row)

    def begin_at(self, t0_ns: int) -> None:
        """Lay the grid on a given beginning, as a recording's first label does."""
        self._begin(t0_ns)

    def advance(self, wall_ns: int, mono_ns: int) -> list[Step]:
        """Close every bin that is due by the clock, and judge every window that ends with one."""
        offset_ns = wall_ns - mono_ns
        if self._offset_ns is not None and abs(offset_ns - self._offset_ns) > STALE_NS:
            self._start_over()
        # A slow drift is followed; only a jump from one wake-up to the next is a step.
        self._offset_ns = offset_ns
        if self.grid is None:
            return []
        return [self._step(bin_) for bin_ in self.grid.close_until(wall_ns)]

    def _whole(self) -> NDArray[np.float32]:
        """Give the kept bins from the start of a window on, so that the newest window ends with the newest bin."""
        return self._bins[(len(self._bins) - WINDOW_BINS) % STRIDE_BINS :]

    def _begin(self, t0_ns: int) -> None:
        self.grid = StreamGrid(t0_ns)
        self._bins = self._bins[:0]
        for source, row in self._early:
            self.grid.add(source, row)
        self._early.clear()
        self._began = True

    def _start_over(self) -> None:
        self._late_before = self.late
        self.restarts += self.grid is not None
        self.grid = None
        self._early.clear()

    def _step(self, bin_: Bin) -> Step:
        grid = self.grid
        if grid is None:
            raise RuntimeError("a bin was closed by no grid")
        self._bins = np.concatenate([self._bins, bin_.values[None]])[-self._kept :]
        decision = None
        first = bin_.number - (WINDOW_BINS - 1)
        flags = grid.flags_of(first, WINDOW_BINS)
        if self._scorer is not None and self._judge is not None and first >= 0 and first % STRIDE_BINS == 0:
            known = float(self._scorer.known(self._bins[-WINDOW_BINS:])[0])
            if known > 0.0:  # of a window of which nothing is known nothing is said
                decision = self._judge.decide(
                    first // STRIDE_BINS, bin_.end_ns - WINDOW_BINS * BIN_NS,
                    self._scorer.probabilities(self._whole())[-1], known=known, flags=flags,
                )  # fmt: skip
        began, self._began = self._began, False
        return Step(bin=bin_, bin_flags=grid.flags_of(bin_.number, 1), decision=decision, began=began)
