"""Turn the readings of one VM into bins, windows, phases and alarms (pure)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from phasewatch.binning.stream import ClosedBin, ReadingRow, StreamBinner
from phasewatch.channels import CHANNELS
from phasewatch.inference.predictor import PhaseDecision, PhasePostprocessor, PhasePredictor
from phasewatch.types import BIN_NS, LIVE_STRIDE_BINS, STALE_NS, WINDOW_BINS, SourceKind

__all__ = ["TrackerStep", "VmTracker"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerStep:
    """One closed bin, with the decision if a window ended with it.

    Attributes:
        bin: The bin.
        bin_flags: Flags of the bin.
        decision: The window's decision; None if no window ended, or nothing of it is known.
        began: Whether a new sequence of bins began with it.
    """

    bin: ClosedBin
    bin_flags: int
    decision: PhaseDecision | None
    began: bool


class VmTracker:
    """Follows one VM.

    `add` accepts readings as they arrive, `advance` closes the bins that are due. The first bin begins at the first
    proc reading, rounded up to a whole half second. When the wall clock steps by more than 2.5 s, or the host slept,
    a new sequence of bins begins; the phase filter and the alarms keep their state.

    Args:
        predictor: The model; None only makes bins.
        stride_bins: Bins from one window's start to the next; the first window is decided when it is full.

    Attributes:
        binner: The present sequence of bins; None before the first proc reading.
        restarts: How often a new sequence began because of the clock.
    """

    def __init__(self, predictor: PhasePredictor | None, *, stride_bins: int = LIVE_STRIDE_BINS) -> None:
        self._predictor, self._stride_bins = predictor, stride_bins
        self._postprocessor = PhasePostprocessor(predictor, stride_bins=stride_bins) if predictor is not None else None
        self._early: list[tuple[SourceKind, ReadingRow]] = []
        self._bins = np.empty((0, len(CHANNELS)), np.float32)
        self._n_kept = predictor.bins_needed if predictor is not None else WINDOW_BINS
        self._offset_ns: int | None = None
        self._late_before = 0
        self._began = False
        self.binner: StreamBinner | None = None
        self.restarts = 0

    @property
    def late(self) -> int:
        """Number of readings so far that arrived after their bin was closed."""
        return self._late_before + (self.binner.n_late if self.binner is not None else 0)

    @property
    def next_close_ns(self) -> int | None:
        """Wall time (ns) at which the next bin is due; None before the first proc reading."""
        return self.binner.next_close_ns if self.binner is not None else None

    def add(self, source: SourceKind, row: ReadingRow) -> None:
        """Add one reading."""
        if self.binner is None:
            self._early.append((source, row))
            if source is SourceKind.PROC:
                self._begin_bins(-(-int(row[0] or 0) // BIN_NS) * BIN_NS)
            return
        self.binner.add(source, row)

    def begin_at(self, t0_ns: int) -> None:
        """Begin the first bin at a given wall time (ns), as a recording's first label does."""
        self._begin_bins(t0_ns)

    def advance(self, wall_ns: int, mono_ns: int) -> list[TrackerStep]:
        """Close every bin that is due, and decide on every window that ends with one."""
        offset_ns = wall_ns - mono_ns
        if self._offset_ns is not None and abs(offset_ns - self._offset_ns) > STALE_NS:
            self._restart_bins()
        # A slow drift is followed; only a jump between two calls is a step.
        self._offset_ns = offset_ns
        if self.binner is None:
            return []
        return [self._build_step(bin_) for bin_ in self.binner.close_until(wall_ns)]

    def _begin_bins(self, t0_ns: int) -> None:
        self.binner = StreamBinner(t0_ns)
        self._bins = self._bins[:0]
        for source, row in self._early:
            self.binner.add(source, row)
        self._early.clear()
        self._began = True

    def _restart_bins(self) -> None:
        self._late_before = self.late
        self.restarts += self.binner is not None
        self.binner = None
        self._early.clear()

    def _build_step(self, bin_: ClosedBin) -> TrackerStep:
        binner = self.binner
        if binner is None:
            raise RuntimeError("a bin was closed while no sequence of bins exists")
        self._bins = np.concatenate([self._bins, bin_.values[None]])[-self._n_kept :]
        decision = None
        first = bin_.number - (WINDOW_BINS - 1)
        flags = binner.combine_flags(first, WINDOW_BINS)
        is_due = first >= 0 and first % self._stride_bins == 0
        if self._predictor is not None and self._postprocessor is not None and is_due:
            known = float(self._predictor.compute_known_share(self._bins[-WINDOW_BINS:])[0])
            if known > 0.0:  # a window without any known reading gets no decision
                decision = self._postprocessor.postprocess(
                    first // self._stride_bins,
                    bin_.end_ns - WINDOW_BINS * BIN_NS,
                    self._predictor.predict_newest(self._bins),
                    known=known,
                    flags=flags,
                )
        began, self._began = self._began, False
        return TrackerStep(bin=bin_, bin_flags=binner.combine_flags(bin_.number, 1), decision=decision, began=began)
