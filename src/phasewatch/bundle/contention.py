"""How much CPU time other work took from a VM that has a CPU quota.

Without a quota, the time that the vCPUs waited for a core is that measure. Under a quota it is not: the kernel counts
the time that the quota stops a thread as waiting, and a VM that shares a core with others gets its quota in small
pieces, waiting in between, without losing any of it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["compute_quota_contention"]


def compute_quota_contention(
    t_ns: NDArray[np.float64],
    wait_ns: NDArray[np.float64],
    used_ns: NDArray[np.float64],
    *,
    quota_cores: float,
    throttled_s: float,
) -> float:
    """Compute the largest CPU time that a VM under a quota can have lost to other work, in cores.

    It is the smaller of two bounds. Over the whole time: the waiting of the vCPUs less the time that the quota stopped
    the VM. Between two readings: that waiting, but not more than the part of the quota that was not used; what a VM
    used of its quota it did not lose.

    Args:
        t_ns: ``(n,)`` float64, ascending time of the readings.
        wait_ns: ``(n,)`` float64, time that the vCPU threads waited so far.
        used_ns: ``(n,)`` float64, CPU time of all threads so far.
        quota_cores: The quota.
        throttled_s: Time between the first and the last reading that the quota stopped the VM.

    Returns:
        The mean over the time; NaN with fewer than two readings.
    """
    steps_ns = np.diff(t_ns)
    length_ns = float(steps_ns.sum())
    if not length_ns > 0:
        return float("nan")
    waited_ns = np.diff(wait_ns)
    unused_ns = quota_cores * steps_ns - np.diff(used_ns)
    lost_ns = float(np.minimum(waited_ns, unused_ns).clip(0.0).sum())
    return min(max(0.0, float(waited_ns.sum()) - throttled_s * 1e9), lost_ns) / length_ns
