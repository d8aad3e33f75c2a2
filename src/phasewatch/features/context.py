"""Context columns: statistics of the last 30, 60 and 120 seconds, and of the two windows before.

No column counts from the start of an episode, and none has a horizon that reveals the time: where less than a horizon
has passed, the statistics use what there is. The horizons end with the window, so that a window has the same bits at
every stride, live and offline.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from phasewatch.arrays import Float32Array, FloatArray
from phasewatch.binning.align import to_float32
from phasewatch.channels import CHANNEL_NAMES
from phasewatch.features.derived import DERIVED_FEATURES, RATIO_FEATURES, derive_history
from phasewatch.features.windows import n_windows
from phasewatch.types import BIN_NS, CONTEXT_BINS, MIN_FINITE_BINS, STRIDE_BINS, WINDOW_BINS

__all__ = ["CONTEXT_CHANNELS", "CONTEXT_FEATURES", "ContextFeature", "context_features", "list_context_columns"]

CONTEXT_CHANNELS = (
    "proc.vcpu_run",
    "proc.vcpu_vcs",
    "proc.io_wchar_net",
    "proc.io_write_bytes",
    "proc.rss_anon_delta",
    "qmp.blk_wr_bytes",
    "qmp.blk_rd_bytes",
    "qmp.blk_wr_ops",
    "qmp.blk_rd_ops",
    "qmp.blk_flush_ops",
    "qmp.vq_blk",
    "netflow.out_pkts",
    "netflow.out_bytes",
    "netflow.in_pkts",
    "netflow.in_bytes",
    "netflow.new_flows",
    "netflow.syn_out",
    "netflow.rst_in",
    "netflow.dst_ports",
    "netflow.dst_ips",
    "netflow.dns_queries",
    "proc.main_vcs",
    "qmp.jit_tb",
    "qmp.jit_tlb_partial",
    "proc.cpu_sys",
    "proc.aux_run",
)
_HORIZONS = (60, 120, CONTEXT_BINS)  # bins
_DERIVED_HORIZON = 120
_STATS = ("mean", "std", "max")
_EARLIER_STATS = ("mean", "max")
_N_EARLIER = 2  # windows that began 5 and 10 s before
# Activity that lasts through the whole history has one start and the length of the history, which would tell the time.
_DERIVED = tuple(i for i, f in enumerate(DERIVED_FEATURES) if not f.name.endswith(("_starts", "_length")))
_COLUMNS = np.array([CHANNEL_NAMES.index(name) for name in CONTEXT_CHANNELS], np.intp)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextFeature:
    """A column of the history of a window.

    Attributes:
        name: What is computed, ``@`` and the time: ``proc.vcpu_run.max@60s``, or ``@-1`` for the window before.
        channels: Full names of the channels that it needs.
    """

    name: str
    channels: tuple[str, ...]


def _in_seconds(bins: int) -> str:
    return f"{bins * BIN_NS // 1_000_000_000}s"


CONTEXT_FEATURES = (
    *(
        ContextFeature(name=f"{channel}.{stat}@{_in_seconds(horizon)}", channels=(channel,))
        for horizon in _HORIZONS
        for stat in _STATS
        for channel in CONTEXT_CHANNELS
    ),
    *(
        ContextFeature(name=f"{feature.name}@{_in_seconds(horizon)}", channels=feature.channels)
        for places, horizon in ((_DERIVED, _DERIVED_HORIZON), (range(len(RATIO_FEATURES)), CONTEXT_BINS))
        for feature in (DERIVED_FEATURES[i] for i in places)
    ),
    *(
        ContextFeature(name=f"{channel}.{stat}@-{back}", channels=(channel,))
        for back in range(1, _N_EARLIER + 1)
        for stat in _EARLIER_STATS
        for channel in CONTEXT_CHANNELS
    ),
)


def list_context_columns(channels: Collection[str]) -> tuple[str, ...]:
    """Return the context columns that a set of channels has: those whose channels are all in it."""
    return tuple(feature.name for feature in CONTEXT_FEATURES if set(feature.channels) <= set(channels))


def context_features(bins: Float32Array, stride_bins: int = STRIDE_BINS, *, newest_only: bool = False) -> Float32Array:
    """Compute the context columns of every window of an episode.

    Args:
        bins: ``(n, 73)`` float32 bins of all channels from the episode's first bin on; NaN where unknown. For the
            newest window alone its last `CONTEXT_BINS` bins are enough.
        stride_bins: Bins from one window's start to the next. A window has the same bits at every stride.
        newest_only: Whether only the window that ends with the last bin is computed.

    Returns:
        ``(w, m)`` float32 in the order of `CONTEXT_FEATURES`. A statistic of a channel with fewer than
        `MIN_FINITE_BINS` known bins in its horizon is NaN.
    """
    if len(bins) < WINDOW_BINS:
        return np.empty((0, len(CONTEXT_FEATURES)), np.float32)
    if newest_only:
        bins = bins[-CONTEXT_BINS:]
        begins = np.array([len(bins) - WINDOW_BINS])
    else:
        begins = stride_bins * np.arange(n_windows(len(bins), stride_bins))
    x = np.array(bins[:, _COLUMNS].T, np.float64, order="C")
    known = np.isfinite(x)
    x[~known] = 0.0
    parts = (
        to_float32(_compute_history(x, known, begins)),
        derive_history([bins], _DERIVED_HORIZON, stride_bins, newest_only=newest_only)[:, _DERIVED],
        derive_history([bins], CONTEXT_BINS, stride_bins, with_bursts=False, newest_only=newest_only),
        to_float32(_compute_earlier(x, known, begins)),
    )
    return np.concatenate(parts, axis=1)


def _compute_history(x: FloatArray, known: NDArray[np.bool_], begins: NDArray[np.int64]) -> FloatArray:
    """Compute mean, deviation and maximum over each horizon, from blocks of ten bins: ``(k, n)`` → ``(w, 9 k)``.

    Sums run over the bins of a block first to last, then over the blocks from the newest back.
    """
    k, size = len(x), STRIDE_BINS
    ahead = CONTEXT_BINS - WINDOW_BINS
    step = size if len(begins) == 1 else int(begins[1] - begins[0])  # blocks begin where some horizon has one
    first = int(begins[0]) % step
    padded, is_known = (np.concatenate([np.zeros((k, ahead), a.dtype), a], axis=1)[:, first:] for a in (x, known))
    blocks, here = (sliding_window_view(a, size, axis=1)[:, ::step] for a in (padded, is_known))
    count = np.count_nonzero(here, axis=-1)
    total = np.cumsum(blocks, axis=-1)[..., -1]
    mean = total / np.maximum(count, 1)
    deviation = np.where(here, blocks - mean[..., None], 0.0)
    deviation *= deviation
    squares = np.cumsum(deviation, axis=-1)[..., -1]
    highest = np.where(here, blocks, -np.inf).max(axis=-1)
    newest = (begins[:, None] + CONTEXT_BINS - size - size * np.arange(CONTEXT_BINS // size) - first) // step  # (w, 24)
    mean, squares = mean[:, newest], squares[:, newest]
    counts, totals = np.cumsum(count[:, newest], axis=-1), np.cumsum(total[:, newest], axis=-1)
    highest, weight = np.maximum.accumulate(highest[:, newest], axis=-1), count[:, newest]
    out = np.full((len(_HORIZONS), len(_STATS), k, len(begins)), np.nan)
    for i, horizon in enumerate(_HORIZONS):
        last = horizon // size - 1
        n = counts[..., last]
        middle = totals[..., last] / np.maximum(n, 1)
        apart = mean[..., : last + 1] - middle[..., None]
        spread = np.cumsum(squares[..., : last + 1] + weight[..., : last + 1] * (apart * apart), axis=-1)[..., -1]
        out[i] = np.where(
            n >= MIN_FINITE_BINS, (middle, np.sqrt(spread / np.maximum(n, 1)), highest[..., last]), np.nan
        )
    return out.reshape(-1, len(begins)).T


def _compute_earlier(x: FloatArray, known: NDArray[np.bool_], begins: NDArray[np.int64]) -> FloatArray:
    """Compute mean and maximum of the windows that began 5 and 10 s before: ``(k, n)`` → ``(w, 4 k)``.

    The first window of the episode stands in for those before it.
    """
    out = np.full((_N_EARLIER, len(_EARLIER_STATS), len(x), len(begins)), np.nan)
    for back in range(1, _N_EARLIER + 1):
        at = np.maximum(begins - back * STRIDE_BINS, 0)[:, None] + np.arange(WINDOW_BINS)
        values, here = x[:, at], known[:, at]
        n = np.count_nonzero(here, axis=-1)
        mean = np.cumsum(values, axis=-1)[..., -1] / np.maximum(n, 1)
        highest = np.where(here, values, -np.inf).max(axis=-1)
        out[back - 1] = np.where(n >= MIN_FINITE_BINS, (mean, highest), np.nan)
    return out.reshape(-1, len(begins)).T
