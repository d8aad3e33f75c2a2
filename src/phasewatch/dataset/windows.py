"""Windows of a run under a threat model's mask, cut into what models learn from: X, y, groups, names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import CHANNELS, LEVELS, mask_of
from phasewatch.dataset.run import (
    FEATURES,
    FeatureSchema,
    RunEpisode,
    need_columns,
    open_parquet,
    read_schema,
    read_verdicts,
)
from phasewatch.dataset.sets import Sets, Windows, WindowSet
from phasewatch.dataset.splits import group_of, read_fold
from phasewatch.dataset.tensors import cut_levels, cut_tensor
from phasewatch.dataset.views import commissioned, need_host_channels, past_names, with_past
from phasewatch.errors import RunError, UsageError
from phasewatch.models.base import InputKind, Inputs, InputSpec, Table
from phasewatch.split import Fold, Part, deal_windows, recipe_of
from phasewatch.vocab import Role

ELAPSED, HOST = "t_center_s", "host_id"
_WINDOW = ("t_center_s", "t_center_ns", "phase", "purity", "flags")


def load(run: Path, recipe: str, fold: str, threat: str = "realistic", kind: str = "table", table: str = "raw") -> Sets:
    """Read the sets of one fold under a threat model's mask.

    Args:
        run: The run's folder, with features and splits.
        recipe: A name of `split.RECIPES`.
        fold: One of its folds; for `held_out_host` a host.
        threat: A name that `channels.mask_of` knows.
        kind: ``table`` (the five stats of each channel) or ``tensor`` (channels by time, from the grids); for baselines
            ``elapsed`` (seconds since the first label, alone), ``levels`` (cumulative totals) or ``host`` (which one).
        table: ``raw``, ``context`` (the stats of the two windows before beside its own) or ``commissioned`` (channels
            measured from their host's clean day).

    Raises:
        RunError: If a file of the run is absent, broken or edited.
        UsageError: If the recipe, threat model, kind or table is not known, or the kind has no such table.
    """
    if kind not in {str(k) for k in InputKind}:
        raise UsageError(f"no input kind {kind!r}; it is one of {', '.join(InputKind)}")
    if table not in {str(t) for t in Table}:
        raise UsageError(f"no table {table!r}; it is one of {', '.join(Table)}")
    cut = read_fold(run, recipe, fold)
    everything = read_windows(run, threat, InputKind(kind), only=set(cut.episodes), table=Table(table))
    lab = everything.windows.where(lambda e: e.role is Role.LAB)

    dealt = _dealt(cut, everything.windows)

    def part(p: Part) -> WindowSet:
        wanted = set(cut.ids(p))
        mine = everything.windows.where(lambda e: e.episode_id in wanted) if dealt is None else dealt == p
        return everything.take(lab & mine)

    soak = everything.take(everything.windows.where(lambda e: e.role is Role.SOAK))
    test = part(Part.TEST)
    sets = Sets(
        fold=cut,
        train=part(Part.TRAIN),
        val_a=part(Part.VAL_A),
        val_b=part(Part.VAL_B),
        test=test,
        soak=soak,
        spared_soak=spared_soak(recipe, test.windows, soak.windows),
    )
    return commissioned(run, sets) if table == Table.COMMISSIONED else sets


def spared_soak(recipe: str, test: Windows, soak: Windows) -> NDArray[np.bool_]:
    """Mark the windows of soak episodes that share nothing with the test set of what the recipe holds out."""
    keys: dict[str, Callable[[RunEpisode], str]] = {
        "host": lambda e: e.host_id,
        "sample group": lambda e: str(group_of(e.profile, e.sample_name)),
    }
    held = [(key, {key(e) for e in test.episodes}) for what in recipe_of(recipe).apart if (key := keys.get(what))]
    return soak.where(lambda e: not any(key(e) in of for key, of in held))


def _dealt(fold: Fold, windows: Windows) -> NDArray[np.object_] | None:
    """Give each window's set where windows are dealt, not episodes."""
    if fold.deal is None:
        return None
    ids = (windows.episodes[i].episode_id for i in windows.of)
    return np.array(deal_windows(fold.deal, zip(ids, windows.t_center_ns.tolist(), strict=True)), dtype=object)


def spec_of(schema: FeatureSchema, threat: str, kind: InputKind, table: Table = Table.RAW) -> InputSpec:
    """Say which columns a threat model has, before anything is measured from a clean day.

    Raises:
        UsageError: If the threat model is not known, or has no column in this table.
    """
    chosen = {c.full_name for c, on in zip(CHANNELS, mask_of(threat), strict=True) if on}
    names = tuple(n for n in schema.feature_names if n.rpartition(".")[0] in chosen)
    if not names:
        raise UsageError(f"threat model {threat!r} has no channel in this feature table")
    if table is not Table.RAW and kind not in (InputKind.TABLE, InputKind.TENSOR):
        raise UsageError(f"input kind {kind} has no table {table}")
    if kind is InputKind.ELAPSED:
        names = (ELAPSED,)
    elif kind is InputKind.HOST:
        names = (HOST,)
    elif kind is InputKind.LEVELS:
        names = tuple(c.full_name for c in LEVELS)
    elif kind is InputKind.TENSOR:
        names = tuple(c.full_name for c in CHANNELS if c.full_name in chosen)
    if table is Table.COMMISSIONED:
        need_host_channels(names, threat)
    if table is Table.CONTEXT:
        if kind is InputKind.TENSOR:
            raise UsageError("table context is of stats; a tensor model sees its window's own bins alone")
        names = past_names(names)
    return InputSpec(
        kind=kind,
        names=names,
        mask=threat,
        schema_hash=schema.schema_hash,
        behaviour_fingerprint=schema.behaviour_fingerprint,
        table=Table.RAW if table is Table.COMMISSIONED else table,
    )


def read_windows(
    run: Path, threat: str, kind: InputKind, *, only: Iterable[str] | None = None, table: Table = Table.RAW
) -> WindowSet:
    """Read windows of known phase under a mask.

    Args:
        run: The run's folder.
        threat: A name that `channels.mask_of` knows.
        kind: What is read of each window.
        only: Episodes of role `lab` to read; None reads all. Soak episodes are always read, commissioning never.
        table: Of `context` each window's past is read too; what is commissioned is read raw.
    """
    spec = spec_of(read_schema(run), threat, kind, table)
    has_past = table is Table.CONTEXT
    features = spec.names if kind is InputKind.TABLE else ()
    if has_past:
        features = tuple(name for name in features if "@" not in name)
    wanted = None if only is None else set(only)
    path = run / FEATURES
    blocks: list[_Block] = []
    with open_parquet(path, "features") as file:
        need_columns(path, file.schema_arrow.names, ("episode_id", "role", *_WINDOW, *features), "features")
        for group in range(file.num_row_groups):
            if (block := _read_block(file, group, features, wanted, unknown=has_past)) is not None:
                blocks.append(block)
    if not blocks:
        raise RunError(f"{path}: no window of known phase for these episodes; is it of the same sweep as the splits?")
    windows, x = _assemble(run, blocks)
    if has_past:
        x = with_past(windows, x)
        known = windows.y >= 0
        windows, x = windows.take(known), x[known]
    elif kind is InputKind.TENSOR:
        x = cut_tensor(run, windows, spec.names)
    elif kind is InputKind.LEVELS:
        x = cut_levels(run, windows)
    elif kind is InputKind.ELAPSED:
        x = windows.t_center_s[:, None].copy()
    elif kind is InputKind.HOST:
        numbers = np.array([host_number(e.host_id) for e in windows.episodes], np.float32)
        x = numbers[windows.of][:, None]
    return WindowSet(windows=windows, inputs=Inputs(x=x, spec=spec))


def host_number(host_id: str) -> int:
    """Give a host's number: 24 bits of its hash, which float32 holds."""
    return int.from_bytes(hashlib.sha256(host_id.encode()).digest()[:3], "big")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Block:
    """The windows that one row group gave."""

    episode_id: NDArray[Any]
    columns: Mapping[str, NDArray[Any]]
    x: NDArray[np.float32]


def _read_block(
    file: Any, group: int, features: Sequence[str], wanted: set[str] | None, *, unknown: bool
) -> _Block | None:
    head = file.read_row_group(group, columns=["episode_id", "role", *_WINDOW])
    episode = np.asarray(head["episode_id"].to_pylist(), dtype=object)
    role = np.asarray(head["role"].to_pylist(), dtype=object)
    phase = head["phase"].to_numpy()
    keep = ((phase >= 0) | unknown) & (role != Role.COMMISSION)
    if wanted is not None:
        keep &= np.fromiter(
            (r == Role.SOAK or e in wanted for e, r in zip(episode, role, strict=True)), np.bool_, len(role)
        )
    if not keep.any():
        return None
    x = np.empty((int(keep.sum()), len(features)), np.float32)
    if features:
        body = file.read_row_group(group, columns=list(features))
        for i, name in enumerate(features):
            x[:, i] = body[name].to_numpy()[keep]
    return _Block(episode_id=episode[keep], columns={n: head[n].to_numpy()[keep] for n in _WINDOW}, x=x)


def _assemble(run: Path, blocks: Sequence[_Block]) -> tuple[Windows, NDArray[np.float32]]:
    ids = np.concatenate([b.episode_id for b in blocks])
    episodes = read_verdicts(run, only=set(ids.tolist()))
    number = {e.episode_id: i for i, e in enumerate(episodes)}
    of = np.fromiter((number[i] for i in ids), np.int32, len(ids))
    column = {name: np.concatenate([b.columns[name] for b in blocks]) for name in _WINDOW}
    order = np.lexsort((column["t_center_ns"], of))
    windows = Windows(
        episodes=episodes,
        of=of[order],
        t_center_ns=column["t_center_ns"][order].astype(np.int64),
        t_center_s=column["t_center_s"][order].astype(np.float32),
        purity=column["purity"][order].astype(np.float32),
        flags=column["flags"][order].astype(np.uint8),
        y=column["phase"][order].astype(np.int64),
    )
    return windows, np.concatenate([b.x for b in blocks])[order]
