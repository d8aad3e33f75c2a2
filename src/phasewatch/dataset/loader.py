"""Windows of a run under a threat model's mask, cut into what models learn from: X, y, groups, names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.artifacts import (
    BINS_DIR,
    FEATURES_FILE,
    FeatureSchema,
    RunEpisode,
    check_columns,
    open_run_parquet,
    read_columns,
    read_run_episodes,
    read_schema,
)
from phasewatch.binning.storage import open_bins
from phasewatch.channels import CHANNELS, LEVEL_CHANNELS, build_channel_mask
from phasewatch.dataset.sets import EpisodeWindows, FoldData, WindowSet
from phasewatch.dataset.split_files import compute_sample_group, read_fold
from phasewatch.dataset.tensors import compute_level_means, cut_tensor
from phasewatch.errors import RunError, UsageError
from phasewatch.features.normalise import (
    ChannelScaling,
    HostBaseline,
    build_scaling,
    compute_scale_floors,
    measure_baseline,
)
from phasewatch.models.base import InputKind, InputSpec, InputVariant, ModelInputs
from phasewatch.splits import Fold, SplitPart, assign_random_windows, find_recipe
from phasewatch.types import BIN_NS, STRIDE_BINS, ChannelTrust, EpisodeRole

N_CONTEXT_WINDOWS = 2  # windows before a window's own
FLAG_NO_BASELINE = 8  # of a window: a channel has values, and its host's clean day did not show it
_STRIDE_NS = BIN_NS * STRIDE_BINS


def build_context_names(names: Sequence[str]) -> tuple[str, ...]:
    """Name the columns of a window and of its past: ``proc.cpu_user.mean``, ``proc.cpu_user.mean@-1`` …"""
    return (*names, *(f"{name}@-{back}" for back in range(1, N_CONTEXT_WINDOWS + 1) for name in names))


def add_context(windows: EpisodeWindows, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Put the stats of the windows before beside each window's own, ``(n, f)`` → ``(n, f (1 + BACK))``.

    Where there is none the earliest known one stands in again, so that its absence tells nothing.
    """
    before = np.arange(len(windows))
    follows = np.zeros(len(windows), np.bool_)
    follows[1:] = (windows.episode_index[1:] == windows.episode_index[:-1]) & (
        np.diff(windows.t_center_ns) == _STRIDE_NS
    )
    before[follows] -= 1
    at, parts = np.arange(len(windows)), [x]
    for _ in range(N_CONTEXT_WINDOWS):
        at = before[at]
        parts.append(x[at])
    return np.concatenate(parts, axis=1)


def check_host_channels(names: Sequence[str], threat: str) -> None:
    """Refuse a mask with channels that the guest reports: a clean day cannot be believed of them.

    Raises:
        UsageError: If it has one.
    """
    guests = {c.full_name for c in CHANNELS if c.trust is ChannelTrust.GUEST}
    if told := [n for n in names if n in guests or n.rpartition(".")[0] in guests]:
        raise UsageError(
            f"table commissioned: threat model {threat!r} has {told[0]}, which the guest reports; "
            "take one of host channels only, such as realistic"
        )


def apply_baseline(run: Path, sets: FoldData) -> FoldData:
    """Give the sets with every channel measured from its host's clean day.

    The floors come from train's bins, the days from the hosts' episodes of role `commission`, tested hosts included:
    that is what a defender has on the day a VM is known clean.
    """
    spec = sets.train.inputs.spec
    channels = _list_channels(spec.names, spec.kind)
    floors = compute_scale_floors(
        sets.train.x if spec.kind is InputKind.TENSOR else cut_tensor(run, sets.train.windows, channels)
    )
    days = read_baselines(run, channels)
    floored = replace(spec, table=InputVariant.COMMISSIONED, floors=tuple(zip(channels, floors.tolist(), strict=True)))

    def view(part: WindowSet) -> WindowSet:
        x, flags = part.x.copy(), part.windows.flags.copy()
        hosts = np.array([e.host_id for e in part.windows.episodes], dtype=object)[part.windows.episode_index]
        for host in sorted(set(hosts.tolist())):
            mine = np.flatnonzero(hosts == host)
            to = build_scaling(days.get(host), floors)
            flags[mine] |= np.where(_find_unmeasured(x[mine], to), FLAG_NO_BASELINE, 0).astype(np.uint8)
            x[mine] = to.scale_bins(x[mine]) if spec.kind is InputKind.TENSOR else to.scale_stats(x[mine])
        return WindowSet(windows=replace(part.windows, flags=flags), inputs=ModelInputs(x=x, spec=floored))

    return replace(
        sets, train=view(sets.train), val_a=view(sets.val_a), val_b=view(sets.val_b), test=view(sets.test),
        soak=view(sets.soak),
    )  # fmt: skip


def _list_channels(names: Sequence[str], kind: InputKind) -> tuple[str, ...]:
    """Give the channels of a raw input's columns, in their order."""
    return tuple(names) if kind is InputKind.TENSOR else tuple(dict.fromkeys(n.rpartition(".")[0] for n in names))


def read_baselines(run: Path, channels: Sequence[str]) -> dict[str, HostBaseline]:
    """Measure each host's clean day from the bins of its commissioning episodes, of those that the feature table has."""
    used = set(read_columns(run / FEATURES_FILE, ("episode_id",), "features")["episode_id"].unique().to_pylist())
    grids = open_bins(run / BINS_DIR)
    chosen = [[c.full_name for c in CHANNELS].index(name) for name in channels]
    bins: dict[str, list[NDArray[np.float32]]] = {}
    for row in grids.rows:
        if row.role is EpisodeRole.COMMISSION and row.episode_id in used:
            bins.setdefault(row.host_id, []).append(
                np.asarray(grids.bins[row.offset : row.offset + row.n_bins])[:, chosen]
            )
    return {host: measure_baseline(host, channels, np.concatenate(parts)) for host, parts in sorted(bins.items())}


def _find_unmeasured(x: NDArray[np.float32], to: ChannelScaling) -> NDArray[np.bool_]:
    if not to.is_missing.any():
        return np.zeros(len(x), np.bool_)
    known = np.isfinite(x).reshape(len(x), len(to.is_missing), -1).any(axis=2)
    return np.asarray((known & to.is_missing).any(axis=1), np.bool_)


ELAPSED_COLUMN, HOST_COLUMN = "t_center_s", "host_id"
_WINDOW_COLUMNS = ("t_center_s", "t_center_ns", "phase", "purity", "flags")


def load(
    run: Path, recipe: str, fold: str, threat: str = "realistic", kind: str = "table", table: str = "raw"
) -> FoldData:
    """Read the sets of one fold under a threat model's mask.

    Args:
        run: The run's folder, with features and splits.
        recipe: A name of `split.RECIPES`.
        fold: One of its folds; for `held_out_host` a host.
        threat: A name that `channels.mask_of` knows.
        kind: ``table`` (the five stats of each channel) or ``tensor`` (channels by time, from the grids); for baselines
            ``elapsed`` (seconds since the first label, alone), ``levels`` (cumulative totals) or ``host`` (which one).
        table: ``raw``, ``context`` (the stats of the two windows before beside its own) or ``apply_baseline`` (channels
            measured from their host's clean day).

    Raises:
        RunError: If a file of the run is absent, broken or edited.
        UsageError: If the recipe, threat model, kind or table is not known, or the kind has no such table.
    """
    if kind not in {str(k) for k in InputKind}:
        raise UsageError(f"no input kind {kind!r}; it is one of {', '.join(InputKind)}")
    if table not in {str(t) for t in InputVariant}:
        raise UsageError(f"no table {table!r}; it is one of {', '.join(InputVariant)}")
    cut = read_fold(run, recipe, fold)
    everything = read_windows(run, threat, InputKind(kind), only=set(cut.episodes), table=InputVariant(table))
    lab = everything.windows.mark_episodes(lambda e: e.role is EpisodeRole.LAB)

    dealt = _assign_random_windows(cut, everything.windows)

    def part(p: SplitPart) -> WindowSet:
        wanted = set(cut.ids(p))
        mine = everything.windows.mark_episodes(lambda e: e.episode_id in wanted) if dealt is None else dealt == p
        return everything.take(lab & mine)

    soak = everything.take(everything.windows.mark_episodes(lambda e: e.role is EpisodeRole.SOAK))
    test = part(SplitPart.TEST)
    sets = FoldData(
        fold=cut,
        train=part(SplitPart.TRAIN),
        val_a=part(SplitPart.VAL_A),
        val_b=part(SplitPart.VAL_B),
        test=test,
        soak=soak,
        calibration_soak=find_calibration_soak(recipe, test.windows, soak.windows),
    )
    return apply_baseline(run, sets) if table == InputVariant.COMMISSIONED else sets


def find_calibration_soak(recipe: str, test: EpisodeWindows, soak: EpisodeWindows) -> NDArray[np.bool_]:
    """Mark the windows of soak episodes that share nothing with the test set of what the recipe holds out."""
    keys: dict[str, Callable[[RunEpisode], str]] = {
        "host": lambda e: e.host_id,
        "sample group": lambda e: str(compute_sample_group(e.profile, e.sample_name)),
    }
    held = [(key, {key(e) for e in test.episodes}) for what in find_recipe(recipe).held_out if (key := keys.get(what))]
    return soak.mark_episodes(lambda e: not any(key(e) in of for key, of in held))


def _assign_random_windows(fold: Fold, windows: EpisodeWindows) -> NDArray[np.object_] | None:
    """Give each window's set where windows are dealt, not episodes."""
    if fold.deal is None:
        return None
    ids = (windows.episodes[i].episode_id for i in windows.episode_index)
    return np.array(assign_random_windows(fold.deal, zip(ids, windows.t_center_ns.tolist(), strict=True)), dtype=object)


def build_input_spec(
    schema: FeatureSchema, threat: str, kind: InputKind, table: InputVariant = InputVariant.RAW
) -> InputSpec:
    """Say which columns a threat model has, before anything is measured from a clean day.

    Raises:
        UsageError: If the threat model is not known, or has no column in this table.
    """
    chosen = {c.full_name for c, on in zip(CHANNELS, build_channel_mask(threat), strict=True) if on}
    names = tuple(n for n in schema.feature_names if n.rpartition(".")[0] in chosen)
    if not names:
        raise UsageError(f"threat model {threat!r} has no channel in this feature table")
    if table is not InputVariant.RAW and kind not in (InputKind.TABLE, InputKind.TENSOR):
        raise UsageError(f"input kind {kind} has no table {table}")
    if kind is InputKind.ELAPSED:
        names = (ELAPSED_COLUMN,)
    elif kind is InputKind.HOST:
        names = (HOST_COLUMN,)
    elif kind is InputKind.LEVELS:
        names = tuple(c.full_name for c in LEVEL_CHANNELS)
    elif kind is InputKind.TENSOR:
        names = tuple(c.full_name for c in CHANNELS if c.full_name in chosen)
    if table is InputVariant.COMMISSIONED:
        check_host_channels(names, threat)
    if table is InputVariant.CONTEXT:
        if kind is InputKind.TENSOR:
            raise UsageError("table context is of stats; a tensor model sees its window's own bins alone")
        names = build_context_names(names)
    return InputSpec(
        kind=kind,
        names=names,
        mask=threat,
        schema_hash=schema.schema_hash,
        behaviour_fingerprint=schema.behaviour_fingerprint,
        table=InputVariant.RAW if table is InputVariant.COMMISSIONED else table,
    )


def read_windows(
    run: Path,
    threat: str,
    kind: InputKind,
    *,
    only: Iterable[str] | None = None,
    table: InputVariant = InputVariant.RAW,
) -> WindowSet:
    """Read windows of known phase under a mask.

    Args:
        run: The run's folder.
        threat: A name that `channels.mask_of` knows.
        kind: What is read of each window.
        only: Episodes of role `lab` to read; None reads all. Soak episodes are always read, commissioning never.
        table: Of `context` each window's past is read too; what is commissioned is read raw.
    """
    spec = build_input_spec(read_schema(run), threat, kind, table)
    has_past = table is InputVariant.CONTEXT
    features = spec.names if kind is InputKind.TABLE else ()
    if has_past:
        features = tuple(name for name in features if "@" not in name)
    wanted = None if only is None else set(only)
    path = run / FEATURES_FILE
    blocks: list[_WindowBlock] = []
    with open_run_parquet(path, "features") as file:
        check_columns(path, file.schema_arrow.names, ("episode_id", "role", *_WINDOW_COLUMNS, *features), "features")
        for group in range(file.num_row_groups):
            if (block := _read_block(file, group, features, wanted, unknown=has_past)) is not None:
                blocks.append(block)
    if not blocks:
        raise RunError(f"{path}: no window of known phase for these episodes; is it of the same sweep as the splits?")
    windows, x = _join_blocks(run, blocks)
    if has_past:
        x = add_context(windows, x)
        known = windows.y >= 0
        windows, x = windows.take(known), x[known]
    elif kind is InputKind.TENSOR:
        x = cut_tensor(run, windows, spec.names)
    elif kind is InputKind.LEVELS:
        x = compute_level_means(run, windows)
    elif kind is InputKind.ELAPSED:
        x = windows.t_center_s[:, None].copy()
    elif kind is InputKind.HOST:
        numbers = np.array([_hash_host_id(e.host_id) for e in windows.episodes], np.float32)
        x = numbers[windows.episode_index][:, None]
    return WindowSet(windows=windows, inputs=ModelInputs(x=x, spec=spec))


def _hash_host_id(host_id: str) -> int:
    """Give a host's number: 24 bits of its hash, which float32 holds."""
    return int.from_bytes(hashlib.sha256(host_id.encode()).digest()[:3], "big")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _WindowBlock:
    """The windows that one row group gave."""

    episode_id: NDArray[Any]
    columns: Mapping[str, NDArray[Any]]
    x: NDArray[np.float32]


def _read_block(
    file: Any, group: int, features: Sequence[str], wanted: set[str] | None, *, unknown: bool
) -> _WindowBlock | None:
    head = file.read_row_group(group, columns=["episode_id", "role", *_WINDOW_COLUMNS])
    episode = np.asarray(head["episode_id"].to_pylist(), dtype=object)
    role = np.asarray(head["role"].to_pylist(), dtype=object)
    phase = head["phase"].to_numpy()
    keep = ((phase >= 0) | unknown) & (role != EpisodeRole.COMMISSION)
    if wanted is not None:
        keep &= np.fromiter(
            (r == EpisodeRole.SOAK or e in wanted for e, r in zip(episode, role, strict=True)), np.bool_, len(role)
        )
    if not keep.any():
        return None
    x = np.empty((int(keep.sum()), len(features)), np.float32)
    if features:
        body = file.read_row_group(group, columns=list(features))
        for i, name in enumerate(features):
            x[:, i] = body[name].to_numpy()[keep]
    return _WindowBlock(episode_id=episode[keep], columns={n: head[n].to_numpy()[keep] for n in _WINDOW_COLUMNS}, x=x)


def _join_blocks(run: Path, blocks: Sequence[_WindowBlock]) -> tuple[EpisodeWindows, NDArray[np.float32]]:
    ids = np.concatenate([b.episode_id for b in blocks])
    episodes = read_run_episodes(run, only=set(ids.tolist()))
    number = {e.episode_id: i for i, e in enumerate(episodes)}
    of = np.fromiter((number[i] for i in ids), np.int32, len(ids))
    column = {name: np.concatenate([b.columns[name] for b in blocks]) for name in _WINDOW_COLUMNS}
    order = np.lexsort((column["t_center_ns"], of))
    windows = EpisodeWindows(
        episodes=episodes,
        episode_index=of[order],
        t_center_ns=column["t_center_ns"][order].astype(np.int64),
        t_center_s=column["t_center_s"][order].astype(np.float32),
        purity=column["purity"][order].astype(np.float32),
        flags=column["flags"][order].astype(np.uint8),
        y=column["phase"][order].astype(np.int64),
    )
    return windows, np.concatenate([b.x for b in blocks])[order]
