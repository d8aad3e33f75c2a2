"""Compute the input of a model from bins: the same code for live windows, recordings and training."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import Float32Array
from phasewatch.channels import CHANNEL_NAMES
from phasewatch.features.normalise import ChannelScaling
from phasewatch.features.schema import feature_names
from phasewatch.features.stats import window_stats
from phasewatch.features.windows import build_window_view
from phasewatch.models.base import InputKind, InputSpec, InputVariant
from phasewatch.types import STRIDE_BINS

__all__ = ["compute_inputs"]


def compute_inputs(
    bins: Float32Array, spec: InputSpec, *, stride_bins: int = STRIDE_BINS, scaling: ChannelScaling | None = None
) -> NDArray[np.float32]:
    """Compute a model's input of every window in an episode's bins.

    Args:
        bins: ``(n, 46)`` float32 bins of all channels; NaN where unknown.
        spec: The input.
        stride_bins: Bins from one window's start to the next.
        scaling: Scaling by the host's baseline, for `InputVariant.COMMISSIONED`.

    Returns:
        ``(w, f)`` or ``(w, c, 20)`` float32, contiguous.
    """
    if spec.kind is InputKind.TABLE:
        names = feature_names()
        own = np.array([names.index(name) for name in spec.names if "@" not in name], np.intp)
        stats = window_stats(bins, stride_bins)
        x = stats.reshape(len(stats), len(names))[:, own]
        if scaling is not None:
            x = scaling.scale_stats(x)
        if spec.table is InputVariant.CONTEXT:
            at, step = np.arange(len(x)), STRIDE_BINS // stride_bins
            x = np.concatenate([x[np.where(at >= back, at - back, at % step)] for back in (0, step, 2 * step)], axis=1)
    else:
        chosen = np.array([CHANNEL_NAMES.index(name) for name in spec.names], np.intp)
        x = build_window_view(bins, stride_bins)[:, :, chosen].transpose(0, 2, 1)
        if scaling is not None:
            x = scaling.scale_bins(x)
    return np.ascontiguousarray(x)
