"""Compute the input of a model from the bins of one VM, in the same way for training, recordings and live VMs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from phasewatch.arrays import Float32Array
from phasewatch.channels import CHANNEL_NAMES
from phasewatch.errors import MismatchError, UsageError
from phasewatch.features.context import CONTEXT_FEATURES, context_features, list_context_columns
from phasewatch.features.derived import DERIVED_FEATURES, derive_history
from phasewatch.features.normalise import ChannelScaling
from phasewatch.features.schema import list_channel_columns, list_column_channels
from phasewatch.features.stats import STATS, window_stats
from phasewatch.features.windows import n_windows
from phasewatch.models.base import InputKind, InputSpec, InputVariant
from phasewatch.types import STRIDE_BINS, WINDOW_BINS

__all__ = ["compute_inputs", "compute_newest_inputs", "list_input_channels", "list_table_columns"]


def list_table_columns(columns: Sequence[str], channels: Sequence[str], table: InputVariant) -> tuple[str, ...]:
    """Return the columns of a table input.

    Args:
        columns: Columns of the feature table.
        channels: Full names of the channels in the channel set.
        table: ``raw`` has the columns of the feature table whose channels are all in the set; ``context`` those and
            the context columns; ``commissioned`` the statistics alone, because a ratio has no host's baseline.
    """
    own = list_channel_columns(columns, channels)
    if table is InputVariant.COMMISSIONED:
        return tuple(name for name in own if name not in _DERIVED_PLACES)
    return (*own, *list_context_columns(channels)) if table is InputVariant.CONTEXT else own


def list_input_channels(kind: InputKind, names: Sequence[str]) -> tuple[str, ...]:
    """Return the channels that the columns of a table or tensor input need, in the order of CHANNELS.

    Names that are no column are ignored; `predictor.check_columns` refuses them.
    """
    used = set(names) if kind is InputKind.TENSOR else {c for name in names for c in list_column_channels(name)}
    return tuple(name for name in CHANNEL_NAMES if name in used)


def compute_inputs(
    bins: Float32Array,
    spec: InputSpec,
    *,
    stride_bins: int = STRIDE_BINS,
    scaling: ChannelScaling | None = None,
    newest_only: bool = False,
) -> Float32Array:
    """Compute the input of a model for every window of an episode.

    Args:
        bins: ``(n, 73)`` float32 bins of all channels from the episode's first bin on; NaN where unknown. For the
            newest window alone its last ``spec.n_bins`` bins are enough.
        spec: A table or tensor input; its columns choose what is computed.
        stride_bins: Bins from one window's start to the next. A window has the same bits at every stride.
        scaling: The baseline of the host, for values relative to it.
        newest_only: Whether only the window that ends with the last bin is computed.

    Returns:
        ``(w, f)`` float32 of a table, ``(w, c, spec.n_bins)`` float32 of a tensor. Where a tensor needs more history
        than the episode has, its earliest bin is repeated.

    Raises:
        UsageError: If the input is neither table nor tensor.
        MismatchError: If a column is unknown.
    """
    if newest_only:
        bins = bins[-spec.n_bins :]
    if spec.kind is InputKind.TENSOR:
        x = _cut_tensor(bins, spec, stride_bins, newest_only=newest_only)
        return x if scaling is None else scaling.scale_bins(x)
    if spec.kind is not InputKind.TABLE:
        raise UsageError(f"input kind {spec.kind} is not computed from bins; only table and tensor are")
    plan = _plan_columns(spec.names)
    own = bins[-WINDOW_BINS:] if newest_only else bins
    stats = window_stats(own[:, plan.channels], stride_bins)
    parts = [stats.reshape(len(stats), len(plan.channels) * len(STATS))[:, plan.stats]]
    if len(plan.derived):
        parts.append(derive_history([own], WINDOW_BINS, stride_bins)[:, plan.derived])
    if len(plan.context):
        parts.append(context_features(bins, stride_bins, newest_only=newest_only)[:, plan.context])
    x = np.ascontiguousarray(np.concatenate(parts, axis=1)[:, plan.order])
    return x if scaling is None else scaling.scale_stats(x)


def compute_newest_inputs(
    histories: Sequence[Float32Array], spec: InputSpec, *, scaling: ChannelScaling | None = None
) -> Float32Array:
    """Compute the input of a model for the newest window of each of several VMs.

    Args:
        histories: Bins of each VM, ``(n, 73)`` float32 with at least a window; as `compute_inputs` with `newest_only`.
        spec: A table or tensor input.
        scaling: The baseline of the hosts, for values relative to it.

    Returns:
        The rows that `compute_inputs` with `newest_only` gives for each history, one after the other.
    """
    if len(histories) < 2 or spec.kind is not InputKind.TABLE:
        rows = [compute_inputs(bins, spec, scaling=scaling, newest_only=True) for bins in histories]
        return np.concatenate(rows) if rows else np.empty((0, *spec.shape), np.float32)
    plan = _plan_columns(spec.names)
    windows = [bins[-WINDOW_BINS:] for bins in histories]
    # At a stride of half a window, every second window of the bins of all VMs is the window of one VM.
    stats = window_stats(np.concatenate([window[:, plan.channels] for window in windows]))[::2]
    parts = [stats.reshape(len(stats), len(plan.channels) * len(STATS))[:, plan.stats]]
    if len(plan.derived):
        parts.append(derive_history(windows, WINDOW_BINS)[:, plan.derived])
    if len(plan.context):
        context = [context_features(bins[-spec.n_bins :], newest_only=True) for bins in histories]
        parts.append(np.concatenate(context)[:, plan.context])
    x = np.ascontiguousarray(np.concatenate(parts, axis=1)[:, plan.order])
    return x if scaling is None else scaling.scale_stats(x)


def _cut_tensor(bins: Float32Array, spec: InputSpec, stride_bins: int, *, newest_only: bool) -> Float32Array:
    chosen = [CHANNEL_NAMES.index(name) for name in spec.names if name in CHANNEL_NAMES]
    if len(chosen) != len(spec.names):
        raise MismatchError(f"input: a channel is unknown; the {len(spec.names)} channels are of another version")
    if len(bins) < WINDOW_BINS:
        return np.empty((0, len(chosen), spec.n_bins), np.float32)
    history = bins[:, chosen]
    missing = spec.n_bins - (len(bins) if newest_only else WINDOW_BINS)
    history = np.concatenate([np.repeat(history[:1], max(missing, 0), axis=0), history])
    if newest_only:
        return np.ascontiguousarray(history[None].transpose(0, 2, 1))
    windows = sliding_window_view(history, spec.n_bins, axis=0)[::stride_bins]  # (w, c, t)
    return np.ascontiguousarray(windows[: n_windows(len(bins), stride_bins)])


@dataclass(frozen=True, slots=True, eq=False)
class _ColumnPlan:
    """Where the columns of a table come from: places in the statistics, derived and context columns, and their order.

    Attributes:
        channels: Indices in CHANNELS of the channels whose statistics are needed.
        stats: Places in the five statistics of these channels.
        derived, context: Places in `DERIVED_FEATURES` and `CONTEXT_FEATURES`.
        order: Place of each column in these three, one after the other.
    """

    channels: NDArray[np.intp]
    stats: NDArray[np.intp]
    derived: NDArray[np.intp]
    context: NDArray[np.intp]
    order: NDArray[np.intp]


_STAT_PLACES = {f"{name}.{stat}": (i, j) for i, name in enumerate(CHANNEL_NAMES) for j, stat in enumerate(STATS)}
_DERIVED_PLACES = {feature.name: i for i, feature in enumerate(DERIVED_FEATURES)}
_CONTEXT_PLACES = {feature.name: i for i, feature in enumerate(CONTEXT_FEATURES)}


@lru_cache(maxsize=32)
def _plan_columns(names: tuple[str, ...]) -> _ColumnPlan:
    stats: list[tuple[int, tuple[int, int]]] = []
    derived: list[tuple[int, int]] = []
    context: list[tuple[int, int]] = []
    for at, name in enumerate(names):
        if name in _STAT_PLACES:
            stats.append((at, _STAT_PLACES[name]))
        elif name in _DERIVED_PLACES:
            derived.append((at, _DERIVED_PLACES[name]))
        elif name in _CONTEXT_PLACES:
            context.append((at, _CONTEXT_PLACES[name]))
        else:
            raise MismatchError(f"input: no column {name[:60]!r}; the model was trained by another version")
    order = [at for at, _ in stats] + [at for at, _ in derived] + [at for at, _ in context]
    channels = sorted({channel for _, (channel, _) in stats})
    return _ColumnPlan(
        channels=np.array(channels, np.intp),
        stats=np.array([channels.index(c) * len(STATS) + s for _, (c, s) in stats], np.intp),
        derived=np.array([place for _, place in derived], np.intp),
        context=np.array([place for _, place in context], np.intp),
        order=np.argsort(np.array(order, np.intp), kind="stable"),
    )
