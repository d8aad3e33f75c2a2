"""Load the windows of a run for one channel set and one fold."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.artifacts import (
    BINS_DIR,
    BINS_PATH,
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
from phasewatch.channels import CHANNELS, LEVEL_CHANNELS, build_channel_mask, has_extended_channels
from phasewatch.dataset.sets import EpisodeWindows, FoldData, WindowSet
from phasewatch.dataset.splices import build_spliced_examples, build_splices
from phasewatch.dataset.split_files import compute_sample_group, read_fold
from phasewatch.dataset.tensors import (
    LOAD_HISTORY_WINDOWS,
    compute_bin_inputs,
    compute_level_means,
    compute_load_history,
    cut_tensor,
)
from phasewatch.errors import RunError, UsageError
from phasewatch.features.inputs import list_input_channels, list_table_columns
from phasewatch.features.normalise import (
    ChannelScaling,
    HostBaseline,
    build_scaling,
    compute_scale_floors,
    measure_baseline,
)
from phasewatch.features.schema import list_column_channels
from phasewatch.models.base import InputKind, InputSpec, InputVariant, ModelInputs
from phasewatch.models.baselines import LOAD_UNKNOWN
from phasewatch.splits import Fold, SplitPart, assign_random_windows, find_recipe
from phasewatch.types import ChannelTrust, EpisodeRole

__all__ = [
    "ELAPSED_COLUMN",
    "FLAG_NO_BASELINE",
    "HOST_COLUMN",
    "LOAD_COLUMN",
    "apply_baseline",
    "build_input_spec",
    "check_host_channels",
    "find_calibration_soak",
    "load",
    "read_baselines",
    "read_windows",
]

FLAG_NO_BASELINE = 8  # of a window: a channel has values, but its host's baseline has none


def check_host_channels(names: Sequence[str], threat: str) -> None:
    """Check that no channel is reported by the guest, because its baseline could not be trusted.

    Args:
        names: Columns or channels of the channel set.
        threat: Name of the channel set, for the message.

    Raises:
        UsageError: If the guest reports a channel.
    """
    guests = {c.full_name for c in CHANNELS if c.trust is ChannelTrust.GUEST}
    if reported := [n for n in names if n in guests or guests & set(list_column_channels(n))]:
        raise UsageError(
            f"table commissioned: channel set {threat!r} has {reported[0]}, which the guest reports; "
            "use a channel set of host channels only, such as realistic"
        )


def apply_baseline(run: Path, sets: FoldData) -> FoldData:
    """Return the sets with every channel relative to its host's baseline.

    The scale floors come from the bins of train. The baselines come from the hosts' episodes of role `commission`,
    those of test hosts included, because a defender can record one while a VM is known clean.
    """
    spec = sets.train.inputs.spec
    channels = list_input_channels(spec.kind, spec.names)
    floors = compute_scale_floors(
        sets.train.x if spec.kind is InputKind.TENSOR else cut_tensor(run, sets.train.windows, channels)
    )
    baselines = read_baselines(run, channels)
    scaled_spec = replace(
        spec, table=InputVariant.COMMISSIONED, floors=tuple(zip(channels, floors.tolist(), strict=True))
    )

    def scale(part: WindowSet) -> WindowSet:
        x, flags = part.x.copy(), part.windows.flags.copy()
        hosts = np.array([e.host_id for e in part.windows.episodes], dtype=object)[part.windows.episode_index]
        for host in sorted(set(hosts.tolist())):
            rows = np.flatnonzero(hosts == host)
            scaling = build_scaling(baselines.get(host), floors)
            flags[rows] |= np.where(_find_unmeasured(x[rows], scaling), FLAG_NO_BASELINE, 0).astype(np.uint8)
            x[rows] = scaling.scale_bins(x[rows]) if spec.kind is InputKind.TENSOR else scaling.scale_stats(x[rows])
        return WindowSet(windows=replace(part.windows, flags=flags), inputs=ModelInputs(x=x, spec=scaled_spec))

    return replace(
        sets,
        train=scale(sets.train),
        val_a=scale(sets.val_a),
        val_b=scale(sets.val_b),
        test=scale(sets.test),
        soak=scale(sets.soak),
    )


def read_baselines(run: Path, channels: Sequence[str]) -> dict[str, HostBaseline]:
    """Measure the baseline of each host on the bins of its episodes of role `commission` in the feature table.

    Args:
        run: Folder of the run.
        channels: Full names of the channels.

    Returns:
        Host → its baseline; a host without such an episode is absent.
    """
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


def _find_unmeasured(x: NDArray[np.float32], scaling: ChannelScaling) -> NDArray[np.bool_]:
    """Mark the windows with values of a channel that the baseline lacks, ``(n,)`` bool."""
    if not scaling.is_missing.any():
        return np.zeros(len(x), np.bool_)
    known = np.isfinite(x).reshape(len(x), len(scaling.is_missing), -1).any(axis=2)
    return np.asarray((known & scaling.is_missing).any(axis=1), np.bool_)


ELAPSED_COLUMN, HOST_COLUMN, LOAD_COLUMN = "t_center_s", "host_id", "has_load"
_DURATION_COLUMNS = tuple(f"cpu@-{back}" for back in range(LOAD_HISTORY_WINDOWS))
_WINDOW_COLUMNS = ("t_center_s", "t_center_ns", "phase", "purity", "flags")


def load(
    run: Path, recipe: str, fold: str, threat: str = "realistic", kind: str = "table", table: str = "raw"
) -> FoldData:
    """Load the train, validation, test and soak windows of one fold.

    Args:
        run: Folder of a run with features and splits.
        recipe: Name of a split recipe (`splits.SPLIT_RECIPES`).
        fold: Name of one of its folds; for `held_out_host` a host.
        threat: Name of a channel set (`channels.build_channel_mask`).
        kind: ``table`` (statistics and derived columns) or ``tensor`` (channels by time, from the bins); for baselines
            ``elapsed`` (seconds since the first label), ``levels`` (cumulative totals), ``host`` (24 bits of the hash
            of the host id, as a number), ``load`` (whether a benign load runs in the episode: 0, 1, or 2 for unknown)
            or ``duration`` (CPU use of the window and of those before it).
        table: ``raw``, ``context`` (with up to two minutes before each window; train has `extra` examples made of
            spliced episodes) or ``commissioned`` (relative to the host's baseline).

    Raises:
        RunError: If a file of the run is absent, invalid or edited.
        UsageError: If the recipe, channel set, kind or table is unknown, or the kind has no such table.
    """
    if kind not in {str(k) for k in InputKind}:
        raise UsageError(f"no input kind {kind!r}; it is one of {', '.join(InputKind)}")
    if table not in {str(t) for t in InputVariant}:
        raise UsageError(f"no table {table!r}; it is one of {', '.join(InputVariant)}")
    assignment = read_fold(run, recipe, fold)
    windows = read_windows(run, threat, InputKind(kind), only=set(assignment.episodes), table=InputVariant(table))
    lab = windows.windows.mark_episodes(lambda e: e.role is EpisodeRole.LAB)

    window_parts = _assign_random_windows(assignment, windows.windows)

    def part(p: SplitPart) -> WindowSet:
        ids = set(assignment.ids(p))
        if window_parts is None:
            return windows.take(lab & windows.windows.mark_episodes(lambda e: e.episode_id in ids))
        return windows.take(lab & (window_parts == p))

    soak = windows.take(windows.windows.mark_episodes(lambda e: e.role is EpisodeRole.SOAK))
    test, train = part(SplitPart.TEST), part(SplitPart.TRAIN)
    val_a, val_b = part(SplitPart.VAL_A), part(SplitPart.VAL_B)
    known_hosts = {e.host_id for p in (train, val_a, val_b) for e in p.windows.episodes}
    new_hosts = {e.host_id for e in test.windows.episodes} - known_hosts
    variant = InputVariant(table)
    has_live = window_parts is None and kind in (InputKind.TABLE, InputKind.TENSOR) and (run / BINS_PATH).is_file()
    extra = None
    if table == InputVariant.CONTEXT and window_parts is None:  # windows dealt at random share their episodes
        extra = build_spliced_examples(build_splices(run, train.windows.episodes), train.inputs.spec)
    sets = FoldData(
        fold=assignment,
        train=train,
        val_a=val_a,
        val_b=val_b,
        test=test,
        soak=soak,
        calibration_soak=find_calibration_soak(recipe, test.windows, soak.windows),
        baseline=_read_idle_windows(run, threat, InputKind(kind), variant, known_hosts),
        idle=_read_idle_windows(run, threat, InputKind(kind), variant, new_hosts),
        run=run if has_live else None,
        extra=extra,
    )
    return apply_baseline(run, sets) if table == InputVariant.COMMISSIONED else sets


def _read_idle_windows(
    run: Path, threat: str, kind: InputKind, table: InputVariant, hosts: Set[str]
) -> WindowSet | None:
    """Read the windows of the baseline episodes of some hosts: clean machines that run no load; None without any.

    There are none for the variant ``commissioned``, which is scaled by the same episodes.
    """
    if kind not in (InputKind.TABLE, InputKind.TENSOR) or table is InputVariant.COMMISSIONED or not hosts:
        return None
    columns = read_columns(run / FEATURES_FILE, ("episode_id", "host_id", "role", "phase"), "features").to_pydict()
    ids = {
        episode_id
        for episode_id, host, role, phase in zip(*columns.values(), strict=True)
        if role == EpisodeRole.COMMISSION and host in hosts and phase >= 0
    }
    return read_windows(run, threat, kind, only=ids, table=table, is_baseline=True) if ids else None


def find_calibration_soak(recipe: str, test: EpisodeWindows, soak: EpisodeWindows) -> NDArray[np.bool_]:
    """Mark the soak windows that share no held-out host or sample group with the test set.

    Args:
        recipe: Name of the split recipe.
        test: Windows of the test set.
        soak: All soak windows.

    Returns:
        ``(n,)`` bool over the soak windows.
    """
    keys: dict[str, Callable[[RunEpisode], str]] = {
        "host": lambda e: e.host_id,
        "sample group": lambda e: str(compute_sample_group(e.profile, e.sample_name)),
    }
    held = [(key, {key(e) for e in test.episodes}) for what in find_recipe(recipe).held_out if (key := keys.get(what))]
    return soak.mark_episodes(lambda e: not any(key(e) in tested for key, tested in held))


def _assign_random_windows(fold: Fold, windows: EpisodeWindows) -> NDArray[np.object_] | None:
    """Return the `SplitPart` of each window of a random window split, ``(n,)`` object; None for other folds."""
    if fold.deal is None:
        return None
    ids = (windows.episodes[i].episode_id for i in windows.episode_index)
    return np.array(assign_random_windows(fold.deal, zip(ids, windows.t_center_ns.tolist(), strict=True)), dtype=object)


def build_input_spec(
    schema: FeatureSchema, threat: str, kind: InputKind, table: InputVariant = InputVariant.RAW
) -> InputSpec:
    """Return the columns of a channel set, before any scaling by a baseline.

    Raises:
        UsageError: If the channel set is unknown or has no column in this feature table, or the kind has no such table.
    """
    chosen = {c.full_name for c, on in zip(CHANNELS, build_channel_mask(threat), strict=True) if on}
    names = list_table_columns(schema.feature_names, tuple(chosen), table)
    if not names:
        raise UsageError(f"channel set {threat!r} has no channel in this feature table")
    if schema.base is None and has_extended_channels(chosen):
        raise UsageError(
            f"channel set {threat!r} has channels that this run lacks: an earlier version made it; make it again "
            "with `phasewatch validate STORE --out RUN --force` and `phasewatch features RUN`"
        )
    if table is not InputVariant.RAW and kind not in (InputKind.TABLE, InputKind.TENSOR):
        raise UsageError(f"input kind {kind} has no table {table}")
    if kind is InputKind.ELAPSED:
        names = (ELAPSED_COLUMN,)
    elif kind is InputKind.HOST:
        names = (HOST_COLUMN,)
    elif kind is InputKind.LOAD:
        names = (LOAD_COLUMN,)
    elif kind is InputKind.DURATION:
        names = _DURATION_COLUMNS
    elif kind is InputKind.LEVELS:
        names = tuple(c.full_name for c in LEVEL_CHANNELS)
    elif kind is InputKind.TENSOR:
        names = tuple(c.full_name for c in CHANNELS if c.full_name in chosen)
    if table is InputVariant.COMMISSIONED:
        check_host_channels(names, threat)
    digests = schema.find_digests(chosen)
    return InputSpec(
        kind=kind,
        names=names,
        mask=threat,
        schema_hash=digests.schema_hash,
        behaviour_fingerprint=digests.behaviour_fingerprint,
        table=InputVariant.RAW if table is InputVariant.COMMISSIONED else table,
    )


def read_windows(
    run: Path,
    threat: str,
    kind: InputKind,
    *,
    only: Iterable[str] | None = None,
    table: InputVariant = InputVariant.RAW,
    is_baseline: bool = False,
) -> WindowSet:
    """Read the windows of known phase for one channel set.

    Args:
        run: Folder of the run.
        threat: Name of a channel set (`channels.build_channel_mask`).
        kind: Input to read.
        only: Episodes of role `lab` to read; None reads all. Soak episodes are always read, baseline episodes never.
        is_baseline: Read the baseline episodes among `only`, and no others.
        table: ``context`` is computed from the bins. ``commissioned`` is read unscaled; call `apply_baseline`.

    Raises:
        RunError: If a file of the run is absent or invalid, or no window matches.
        UsageError: As `build_input_spec`.
    """
    spec = build_input_spec(read_schema(run), threat, kind, table)
    has_past = table is InputVariant.CONTEXT
    features = spec.names if kind is InputKind.TABLE and not has_past else ()
    wanted = None if only is None else set(only)
    path = run / FEATURES_FILE
    blocks: list[_WindowBlock] = []
    with open_run_parquet(path, "features") as file:
        check_columns(path, file.schema_arrow.names, ("episode_id", "role", *_WINDOW_COLUMNS, *features), "features")
        for group in range(file.num_row_groups):
            if (block := _read_block(file, group, features, wanted, is_baseline=is_baseline)) is not None:
                blocks.append(block)
    if not blocks:
        raise RunError(
            f"{path}: no window of known phase for these episodes; make the splits again with `phasewatch split {run}`"
        )
    windows, x = _join_blocks(run, blocks)
    if has_past:
        x = compute_bin_inputs(run, windows, spec)
    elif kind is InputKind.TENSOR:
        x = cut_tensor(run, windows, spec.names)
    elif kind is InputKind.LEVELS:
        x = compute_level_means(run, windows)
    elif kind is InputKind.ELAPSED:
        x = windows.t_center_s[:, None].copy()
    elif kind is InputKind.LOAD:
        codes = np.array([LOAD_UNKNOWN if e.has_load is None else e.has_load for e in windows.episodes], np.float32)
        x = codes[windows.episode_index][:, None]
    elif kind is InputKind.DURATION:
        x = compute_load_history(run, windows)
    elif kind is InputKind.HOST:
        numbers = np.array([_hash_host_id(e.host_id) for e in windows.episodes], np.float32)
        x = numbers[windows.episode_index][:, None]
    return WindowSet(windows=windows, inputs=ModelInputs(x=x, spec=spec))


def _hash_host_id(host_id: str) -> int:
    """Return 24 bits of the hash of a host id as a number, which float32 represents exactly."""
    return int.from_bytes(hashlib.sha256(host_id.encode()).digest()[:3], "big")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _WindowBlock:
    """The windows of one row group."""

    episode_id: NDArray[Any]
    columns: Mapping[str, NDArray[Any]]
    x: NDArray[np.float32]


def _read_block(
    file: Any, group: int, features: Sequence[str], wanted: set[str] | None, *, is_baseline: bool
) -> _WindowBlock | None:
    head = file.read_row_group(group, columns=["episode_id", "role", *_WINDOW_COLUMNS])
    episode = np.asarray(head["episode_id"].to_pylist(), dtype=object)
    role = np.asarray(head["role"].to_pylist(), dtype=object)
    phase = head["phase"].to_numpy()
    keep = (phase >= 0) & ((role == EpisodeRole.COMMISSION) == is_baseline)
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
