"""What models see beside the raw stats: windows with their past, and channels measured from a host's clean day."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import CHANNELS
from phasewatch.dataset.run import FEATURES, read_table
from phasewatch.dataset.sets import Sets, Windows, WindowSet
from phasewatch.dataset.tensors import GRIDS, cut_tensor
from phasewatch.errors import UsageError
from phasewatch.features.commission import Affine, Reference, affine_of, floors_of, measure
from phasewatch.grid.files import open_grids
from phasewatch.models.base import InputKind, Inputs, Table
from phasewatch.vocab import BIN_NS, STRIDE_BINS, Role, Trust

BACK = 2  # windows before a window's own
FLAG_LACKING = 8  # of a window: a channel has values, and its host's clean day did not show it
_STRIDE_NS = BIN_NS * STRIDE_BINS


def past_names(names: Sequence[str]) -> tuple[str, ...]:
    """Name the columns of a window and of its past: ``proc.cpu_user.mean``, ``proc.cpu_user.mean@-1`` …"""
    return (*names, *(f"{name}@-{back}" for back in range(1, BACK + 1) for name in names))


def with_past(windows: Windows, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Put the stats of the windows before beside each window's own, ``(n, f)`` → ``(n, f (1 + BACK))``.

    Where there is none the earliest known one stands in again, so that its absence tells nothing.
    """
    before = np.arange(len(windows))
    follows = np.zeros(len(windows), np.bool_)
    follows[1:] = (windows.of[1:] == windows.of[:-1]) & (np.diff(windows.t_center_ns) == _STRIDE_NS)
    before[follows] -= 1
    at, parts = np.arange(len(windows)), [x]
    for _ in range(BACK):
        at = before[at]
        parts.append(x[at])
    return np.concatenate(parts, axis=1)


def need_host_channels(names: Sequence[str], threat: str) -> None:
    """Refuse a mask with channels that the guest reports: a clean day cannot be believed of them.

    Raises:
        UsageError: If it has one.
    """
    guests = {c.full_name for c in CHANNELS if c.trust is Trust.GUEST}
    if told := [n for n in names if n in guests or n.rpartition(".")[0] in guests]:
        raise UsageError(
            f"table commissioned: threat model {threat!r} has {told[0]}, which the guest reports; "
            "take one of host channels only, such as realistic"
        )


def commissioned(run: Path, sets: Sets) -> Sets:
    """Give the sets with every channel measured from its host's clean day.

    The floors come from train's bins, the days from the hosts' episodes of role `commission`, tested hosts included:
    that is what a defender has on the day a VM is known clean.
    """
    spec = sets.train.inputs.spec
    channels = channels_of(spec.names, spec.kind)
    floors = floors_of(sets.train.x if spec.kind is InputKind.TENSOR else cut_tensor(run, sets.train.windows, channels))
    days = read_days(run, channels)
    floored = replace(spec, table=Table.COMMISSIONED, floors=tuple(zip(channels, floors.tolist(), strict=True)))

    def view(part: WindowSet) -> WindowSet:
        x, flags = part.x.copy(), part.windows.flags.copy()
        hosts = np.array([e.host_id for e in part.windows.episodes], dtype=object)[part.windows.of]
        for host in sorted(set(hosts.tolist())):
            mine = np.flatnonzero(hosts == host)
            to = affine_of(days.get(host), floors)
            flags[mine] |= np.where(_unmeasured(x[mine], to), FLAG_LACKING, 0).astype(np.uint8)
            x[mine] = to.bins(x[mine]) if spec.kind is InputKind.TENSOR else to.stats(x[mine])
        return WindowSet(windows=replace(part.windows, flags=flags), inputs=Inputs(x=x, spec=floored))

    return replace(
        sets, train=view(sets.train), val_a=view(sets.val_a), val_b=view(sets.val_b), test=view(sets.test),
        soak=view(sets.soak),
    )  # fmt: skip


def channels_of(names: Sequence[str], kind: InputKind) -> tuple[str, ...]:
    """Give the channels of a raw input's columns, in their order."""
    return tuple(names) if kind is InputKind.TENSOR else tuple(dict.fromkeys(n.rpartition(".")[0] for n in names))


def read_days(run: Path, channels: Sequence[str]) -> dict[str, Reference]:
    """Measure each host's clean day from the bins of its commissioning episodes, of those that the feature table has."""
    used = set(read_table(run / FEATURES, ("episode_id",), "features")["episode_id"].unique().to_pylist())
    grids = open_grids(run / GRIDS)
    chosen = [[c.full_name for c in CHANNELS].index(name) for name in channels]
    bins: dict[str, list[NDArray[np.float32]]] = {}
    for row in grids.rows:
        if row.role is Role.COMMISSION and row.episode_id in used:
            bins.setdefault(row.host_id, []).append(
                np.asarray(grids.bins[row.offset : row.offset + row.n_bins])[:, chosen]
            )
    return {host: measure(host, channels, np.concatenate(parts)) for host, parts in sorted(bins.items())}


def _unmeasured(x: NDArray[np.float32], to: Affine) -> NDArray[np.bool_]:
    if not to.lacking.any():
        return np.zeros(len(x), np.bool_)
    known = np.isfinite(x).reshape(len(x), len(to.lacking), -1).any(axis=2)
    return np.asarray((known & to.lacking).any(axis=1), np.bool_)
