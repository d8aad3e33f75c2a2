"""How far the readings of a window can be trusted: which sources are thin, and whether the vCPUs waited for a core (pure)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import CHANNELS
from phasewatch.validate.gates import MAX_WAIT_CORES
from phasewatch.vocab import WINDOW_BINS, Source

ENOUGH = 0.9  # share of a source's readings in a window
WINDOWS = 3  # in a row, until contention is said to have begun or ended
_NAMES = tuple(c.full_name for c in CHANNELS)
_WAIT = _NAMES.index("proc.vcpu_wait")


class WindowQuality:
    """Keeps the bins of one window.

    Args:
        channels: Full names of those that the model reads.
    """

    def __init__(self, channels: Sequence[str]) -> None:
        self._bins: deque[NDArray[np.float32]] = deque(maxlen=WINDOW_BINS)
        self._places = {
            source: [_NAMES.index(name) for name in channels if name.startswith(f"{source}.")] for source in Source
        }
        self._streak = 0
        self.is_contended = False

    def add(self, values: NDArray[np.float32], *, began: bool) -> None:
        """Add a bin, ``(46,)`` float32; `began` where bins begin anew."""
        if began:
            self._bins.clear()
        self._bins.append(values)

    def thin_sources(self) -> tuple[Source, ...]:
        """Return the sources of which the model misses more than a tenth of the window's readings."""
        bins = np.array(self._bins)
        return tuple(
            source for source, places in self._places.items()
            if places and len(bins) and np.isfinite(bins[:, places]).mean() < ENOUGH
        )  # fmt: skip

    @property
    def wait_cores(self) -> float:
        """Mean cores for which the vCPUs waited in the window; NaN where nobody knows."""
        wait = np.array([values[_WAIT] for values in self._bins])
        known = wait[np.isfinite(wait)]
        return float(known.mean()) if len(known) else float("nan")

    @property
    def is_crowded(self) -> bool:
        """Whether they waited for so long that `inspect` would call a recording of it degraded."""
        return self.wait_cores > MAX_WAIT_CORES

    def judge_contention(self) -> bool:
        """Update at the end of a window; return whether contention began or ended with it."""
        self._streak = self._streak + 1 if self.is_crowded != self.is_contended else 0
        if self._streak < WINDOWS:
            return False
        self.is_contended, self._streak = not self.is_contended, 0
        return True
