"""Compute the evidence of an alarm: the channels that moved most against the VM's own quiet time (pure)."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import FloatArray
from phasewatch.channels import CHANNELS
from phasewatch.events.schema import AlarmEvidence
from phasewatch.features.normalise import HostBaseline
from phasewatch.types import WINDOW_BINS

__all__ = ["MAX_EVIDENCE", "QuietReference"]

MAX_EVIDENCE = 5  # channels in the evidence of one alarm
_MAX_WINDOWS = 30  # quiet windows that are kept: five minutes
_MIN_WINDOWS = 2  # with the newest, which is left out: half a minute of quiet time
_MIN_ABS_Z = 3.0  # a channel that moved less is no evidence
_MAX_ABS_Z = 1000.0
_SIGMA_OF_MAD = 1.4826  # median absolute deviation to standard deviation, for a normal distribution
_SIGMA_OF_IQR = 1 / 1.349  # interquartile range to standard deviation, for a normal distribution
_MIN_SHARE_OF_MEDIAN = 0.1  # a channel's scale is at least this share of its median
# Smallest scale by unit. A channel that was constant has no spread, and its first blip must not outrank everything.
_MIN_SCALES = {"cores": 0.02, "1/s": 1.0, "B/s": 4096.0, "1": 0.05, "B": 64.0, "s": 0.001, "bit": 0.25}
_FLOORS: FloatArray = np.array([_MIN_SCALES[c.unit] for c in CHANNELS], np.float64)
_SIGNIFICANT_DIGITS = 4  # of the numbers in the event


class QuietReference:
    """Reference of one VM: its usual values in windows without an alarm, or its measured baseline.

    Add every bin. The reference is the median of the last quiet windows of ten seconds, which do not overlap. The
    newest quiet window is left out, because an infection begins before its alarm.

    Args:
        channels: Full names of the channels that may be evidence; empty allows all.
        baseline: The VM's baseline, which replaces the quiet windows; None if it has none.
    """

    def __init__(self, channels: Sequence[str] = (), baseline: HostBaseline | None = None) -> None:
        names = [c.full_name for c in CHANNELS]
        self._is_allowed = np.array([not channels or name in channels for name in names], np.bool_)
        self._baseline = baseline.select_channels(names) if baseline is not None else None
        self._bins: deque[NDArray[np.float32]] = deque(maxlen=WINDOW_BINS)
        self._windows: deque[NDArray[np.float32]] = deque(maxlen=_MAX_WINDOWS + 1)
        self._n_quiet = 0

    def add(self, values: NDArray[np.float32], *, is_quiet: bool) -> None:
        """Add one bin.

        Args:
            values: ``(73,)`` float32 in the order of CHANNELS; NaN where unknown.
            is_quiet: Whether no alarm was raised when the bin ended.
        """
        self._bins.append(values)
        self._n_quiet = self._n_quiet + 1 if is_quiet else 0
        if self._n_quiet >= WINDOW_BINS:
            self._windows.append(_compute_window_mean(self._bins).astype(np.float32))
            self._n_quiet = 0

    def explain(self) -> tuple[AlarmEvidence, ...]:
        """Return the channels of the newest window that deviate most from the reference, largest deviation first.

        The robust z is the deviation from the median, divided by the spread of the quiet windows (their median
        absolute deviation, scaled to a standard deviation) with a floor. Without a reference nothing is returned.
        """
        reference = self._compute_reference()
        if reference is None or not self._bins:
            return ()
        median, sigma = reference
        value = _compute_window_mean(self._bins)
        scale = np.maximum(np.maximum(sigma, _FLOORS), _MIN_SHARE_OF_MEDIAN * np.abs(median))
        z = np.clip((value - median) / scale, -_MAX_ABS_Z, _MAX_ABS_Z)
        is_evidence = self._is_allowed & (np.abs(np.nan_to_num(z)) >= _MIN_ABS_Z)
        order = np.argsort(-np.abs(np.nan_to_num(z)), kind="stable")
        return tuple(
            AlarmEvidence(
                channel=CHANNELS[i].full_name,
                value=_round(value[i]),
                usual=_round(median[i]),
                z=_round(z[i]),
            )
            for i in order.tolist()
            if is_evidence[i]
        )[:MAX_EVIDENCE]

    def _compute_reference(self) -> tuple[FloatArray, FloatArray] | None:
        """Return ``(73,)`` medians and standard deviations; None without a reference."""
        if self._baseline is not None:
            return self._baseline.median, self._baseline.spread * _SIGMA_OF_IQR
        windows = np.array(list(self._windows)[:-1], np.float64)
        if len(windows) < _MIN_WINDOWS:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a channel without any reading stays NaN
            median = np.nanmedian(windows, axis=0)
            return median, _SIGMA_OF_MAD * np.nanmedian(np.abs(windows - median), axis=0)


def _compute_window_mean(bins: Sequence[NDArray[np.float32]] | deque[NDArray[np.float32]]) -> FloatArray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmean(np.array(bins, np.float64), axis=0), np.float64)


def _round(value: float) -> float:
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}")
