"""Turn the readings of one VM into bins, windows, phases and alarms (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import Float32Array
from phasewatch.binning.stream import ClosedBin, ReadingRow, StreamBinner
from phasewatch.channels import CHANNELS
from phasewatch.inference.batch import BatchPredictor
from phasewatch.inference.predictor import AlarmMemory, PhaseDecision, PhasePostprocessor, PhasePredictor
from phasewatch.models.alarm import AlarmKind
from phasewatch.types import BIN_NS, LIVE_STRIDE_BINS, STALE_NS, WINDOW_BINS, SourceKind

__all__ = ["DueWindow", "TrackedBin", "TrackerStep", "VmTracker", "predict_due_windows"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class DueWindow:
    """A window that waits for its probabilities.

    Attributes:
        predictor: The model of its VM.
        bins: ``(n, 73)`` float32: the window's bins, after earlier ones if the model uses them.
        number: Number of the window, from 0.
        start_ns: Start of the window on the wall clock.
        known: Known share of the model's channels × bins.
        flags: Flags of the window.
    """

    predictor: PhasePredictor
    bins: Float32Array
    number: int
    start_ns: int
    known: float
    flags: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedBin:
    """One closed bin, before the decision on the window that ends with it.

    Attributes:
        bin, bin_flags, began: As in `TrackerStep`.
        window: The window; None if no window ended, or nothing of it is known.
    """

    bin: ClosedBin
    bin_flags: int
    began: bool
    window: DueWindow | None


def predict_due_windows(windows: Sequence[DueWindow]) -> list[NDArray[np.float64] | Exception]:
    """Predict the probabilities of windows of any number of VMs.

    Returns:
        For each window ``(5,)`` float64 in the order of PHASES, or the error of its model, which concerns its VM alone.
    """
    predicted: list[NDArray[np.float64] | Exception] = [np.empty(0)] * len(windows)
    groups: dict[int, list[int]] = {}
    for at, window in enumerate(windows):
        groups.setdefault(id(window.predictor), []).append(at)
    for members in groups.values():
        rows: Iterable[NDArray[np.float64] | Exception]
        try:
            rows = BatchPredictor(windows[members[0]].predictor).predict_newest([windows[at].bins for at in members])
        except Exception:  # one window may have failed them all
            rows = [_try_predict(windows[at]) for at in members]
        for at, row in zip(members, rows, strict=True):
            predicted[at] = row
    return predicted


def _try_predict(window: DueWindow) -> NDArray[np.float64] | Exception:
    try:
        return window.predictor.predict_newest(window.bins)
    except Exception as exc:  # whatever a model raises, the other VMs get their decisions
        return exc


class VmTracker:
    """Follows one VM.

    `add` accepts readings as they arrive, `advance` closes the bins that are due and decides on their windows. A watch
    of many VMs calls `close_bins` of each, predicts all windows together, and passes the results to `decide`.

    The first bin begins at the first proc reading, rounded up to a whole half second. When the wall clock steps by more
    than 2.5 s, or the host slept, a new sequence of bins begins; the phase filter and the alarms keep their state.

    Args:
        predictor: The model; None only makes bins.
        stride_bins: Bins from one window's start to the next; the first window is decided when it is full.
        grid_bins: The first bin begins at a multiple of this many bins of wall time, so that the windows of several
            VMs end at the same instants.

    Attributes:
        binner: The present sequence of bins; None before the first proc reading.
        restarts: How often a new sequence began because of the clock.
    """

    def __init__(
        self, predictor: PhasePredictor | None, *, stride_bins: int = LIVE_STRIDE_BINS, grid_bins: int = 1
    ) -> None:
        self._predictor, self._stride_bins = predictor, stride_bins
        self._grid_ns = grid_bins * BIN_NS
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

    @property
    def alarms(self) -> dict[AlarmKind, AlarmMemory]:
        """The alarms and what their rules remember; empty without a model."""
        return self._postprocessor.alarms if self._postprocessor is not None else {}

    def restore_alarms(self, memory: Mapping[AlarmKind, AlarmMemory]) -> None:
        """Continue alarms of an earlier watch of the same VM."""
        if self._postprocessor is not None:
            self._postprocessor.restore_alarms(memory)

    def add(self, source: SourceKind, row: ReadingRow) -> None:
        """Add one reading."""
        if self.binner is None:
            self._early.append((source, row))
            if source is SourceKind.PROC:
                self._begin_bins(-(-int(row[0] or 0) // self._grid_ns) * self._grid_ns)
            return
        self.binner.add(source, row)

    def begin_at(self, t0_ns: int) -> None:
        """Begin the first bin at a given wall time (ns), as a recording's first label does."""
        self._begin_bins(t0_ns)

    def advance(self, wall_ns: int, mono_ns: int) -> list[TrackerStep]:
        """Close every bin that is due, and decide on every window that ends with one."""
        closed = self.close_bins(wall_ns, mono_ns)
        return self.decide(closed, predict_due_windows([each.window for each in closed if each.window is not None]))

    def close_bins(self, wall_ns: int, mono_ns: int) -> list[TrackedBin]:
        """Close every bin that is due, without deciding."""
        offset_ns = wall_ns - mono_ns
        if self._offset_ns is not None and abs(offset_ns - self._offset_ns) > STALE_NS:
            self._restart_bins()
        # A slow drift is followed; only a jump between two calls is a step.
        self._offset_ns = offset_ns
        if self.binner is None:
            return []
        return [self._track_bin(bin_) for bin_ in self.binner.close_until(wall_ns)]

    def decide(
        self, closed: Sequence[TrackedBin], predicted: Sequence[NDArray[np.float64] | Exception]
    ) -> list[TrackerStep]:
        """Return the steps of closed bins.

        Args:
            closed: From `close_bins`, in order.
            predicted: One entry for each window among them, from `predict_due_windows`.

        Raises:
            Exception: The error of the model, if it failed.
        """
        left, steps = iter(predicted), []
        for each in closed:
            p = next(left) if each.window is not None else None
            if isinstance(p, Exception):
                raise p
            decision = None
            if p is not None and each.window is not None and self._postprocessor is not None:
                window = each.window
                decision = self._postprocessor.postprocess(
                    window.number, window.start_ns, p, known=window.known, flags=window.flags
                )
            steps.append(TrackerStep(bin=each.bin, bin_flags=each.bin_flags, decision=decision, began=each.began))
        return steps

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

    def _track_bin(self, bin_: ClosedBin) -> TrackedBin:
        binner = self.binner
        if binner is None:
            raise RuntimeError("a bin was closed while no sequence of bins exists")
        self._bins = np.concatenate([self._bins, bin_.values[None]])[-self._n_kept :]
        window = None
        first = bin_.number - (WINDOW_BINS - 1)
        if self._predictor is not None and first >= 0 and first % self._stride_bins == 0:
            known = self._predictor.compute_newest_known_share(self._bins)
            if known > 0.0:  # a window without any known reading gets no decision
                window = DueWindow(
                    predictor=self._predictor,
                    bins=self._bins,
                    number=first // self._stride_bins,
                    start_ns=bin_.end_ns - WINDOW_BINS * BIN_NS,
                    known=known,
                    flags=binner.combine_flags(first, WINDOW_BINS),
                )
        began, self._began = self._began, False
        return TrackedBin(bin=bin_, bin_flags=binner.combine_flags(bin_.number, 1), began=began, window=window)
