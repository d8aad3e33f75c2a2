"""Windows of a run under a threat model's mask, cut into what models learn from: X, y, groups, names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import CHANNELS, mask_of
from phasewatch.dataset.run import (
    FEATURES,
    FeatureSchema,
    RunEpisode,
    need_columns,
    open_parquet,
    read_schema,
    read_verdicts,
)
from phasewatch.dataset.splits import group_of, read_fold
from phasewatch.dataset.tensors import cut_tensor
from phasewatch.errors import RunError, UsageError
from phasewatch.models.base import Examples, InputKind, Inputs, InputSpec
from phasewatch.models.filter import Track
from phasewatch.split import Fold, Part, deal_windows, recipe_of
from phasewatch.vocab import Role

ELAPSED = "t_center_s"
_WINDOW = ("t_center_s", "t_center_ns", "phase", "purity", "flags")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Windows:
    """Windows of known phase in the order (host, episode, time), whatever order the file has.

    Attributes:
        episodes: Whose windows they are, in that order.
        of: ``(n,)`` index into `episodes`.
        y: ``(n,)`` phase codes.
    """

    episodes: tuple[RunEpisode, ...]
    of: NDArray[np.int32]
    t_center_ns: NDArray[np.int64]
    t_center_s: NDArray[np.float32]
    purity: NDArray[np.float32]
    flags: NDArray[np.uint8]
    y: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)

    def where(self, keep: Callable[[RunEpisode], bool]) -> NDArray[np.bool_]:
        """Mark the windows of the episodes that a rule keeps, ``(n,)``."""
        kept = np.fromiter((keep(e) for e in self.episodes), dtype=np.bool_, count=len(self.episodes))
        marked: NDArray[np.bool_] = kept[self.of]
        return marked

    def take(self, rows: NDArray[np.bool_]) -> Windows:
        """Give the marked windows, and of the episodes those that are left."""
        present, of = np.unique(self.of[rows], return_inverse=True)
        return Windows(
            episodes=tuple(self.episodes[i] for i in present),
            of=of.astype(np.int32),
            t_center_ns=self.t_center_ns[rows],
            t_center_s=self.t_center_s[rows],
            purity=self.purity[rows],
            flags=self.flags[rows],
            y=self.y[rows],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowSet:
    """Windows, and what a model sees of them."""

    windows: Windows
    inputs: Inputs

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def x(self) -> NDArray[np.float32]:
        """``(n, f)``, NaN where nothing was known."""
        return self.inputs.x

    @property
    def y(self) -> NDArray[np.int64]:
        """``(n,)`` phase codes."""
        return self.windows.y

    @property
    def names(self) -> tuple[str, ...]:
        """What the columns of `x` are."""
        return self.inputs.spec.names

    @property
    def groups(self) -> NDArray[np.str_]:
        """``(n,)`` host and session of each window: what may not be torn apart."""
        labels = np.array([f"{e.host_id}/{e.session}" for e in self.windows.episodes], dtype=np.str_)
        return labels[self.windows.of]

    @property
    def track(self) -> Track:
        """Truth, episode and time of each window, as filter and alarm take them."""
        return Track(y=self.y, of=self.windows.of, t_center_ns=self.windows.t_center_ns)

    @property
    def examples(self) -> Examples:
        """Inputs with labels, as `PhaseModel.fit` takes them."""
        return Examples(inputs=self.inputs, y=self.y)

    def take(self, rows: NDArray[np.bool_]) -> WindowSet:
        """Give the marked windows."""
        return WindowSet(windows=self.windows.take(rows), inputs=Inputs(x=self.inputs.x[rows], spec=self.inputs.spec))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sets:
    """A fold's five sets of windows; `soak` is every soak episode of the run, for false alarms only.

    Attributes:
        spared_soak: ``(n,)`` marks the soak windows of no host (or sample group) that the recipe holds out in this
            fold: thresholds may be set by them.
    """

    fold: Fold
    train: WindowSet
    val_a: WindowSet
    val_b: WindowSet
    test: WindowSet
    soak: WindowSet
    spared_soak: NDArray[np.bool_]


def load(run: Path, recipe: str, fold: str, threat: str = "realistic", kind: str = "table") -> Sets:
    """Read the sets of one fold under a threat model's mask.

    Args:
        run: The run's folder, with features and splits.
        recipe: A name of `split.RECIPES`.
        fold: One of its folds; for `held_out_host` a host.
        threat: A name that `channels.mask_of` knows.
        kind: ``table`` (the five stats of each channel), ``tensor`` (channels by time, from the grids) or ``elapsed``
            (seconds since the first label, alone).

    Raises:
        RunError: If a file of the run is absent, broken or edited.
        UsageError: If the recipe, threat model or kind is not known.
    """
    if kind not in {str(k) for k in InputKind}:
        raise UsageError(f"no input kind {kind!r}; it is one of {', '.join(InputKind)}")
    cut = read_fold(run, recipe, fold)
    everything = read_windows(run, threat, InputKind(kind), only=set(cut.episodes))
    lab = everything.windows.where(lambda e: e.role is Role.LAB)

    dealt = _dealt(cut, everything.windows)

    def part(p: Part) -> WindowSet:
        wanted = set(cut.ids(p))
        mine = everything.windows.where(lambda e: e.episode_id in wanted) if dealt is None else dealt == p
        return everything.take(lab & mine)

    soak = everything.take(everything.windows.where(lambda e: e.role is Role.SOAK))
    test = part(Part.TEST)
    return Sets(
        fold=cut,
        train=part(Part.TRAIN),
        val_a=part(Part.VAL_A),
        val_b=part(Part.VAL_B),
        test=test,
        soak=soak,
        spared_soak=_spared(recipe, test.windows, soak.windows),
    )


def _spared(recipe: str, test: Windows, soak: Windows) -> NDArray[np.bool_]:
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


def spec_of(schema: FeatureSchema, threat: str, kind: InputKind) -> InputSpec:
    """Say which columns a threat model has.

    Raises:
        UsageError: If the threat model is not known, or has no column in this table.
    """
    chosen = {c.full_name for c, on in zip(CHANNELS, mask_of(threat), strict=True) if on}
    names = tuple(n for n in schema.feature_names if n.rpartition(".")[0] in chosen)
    if not names:
        raise UsageError(f"threat model {threat!r} has no channel in this feature table")
    if kind is InputKind.ELAPSED:
        names = (ELAPSED,)
    elif kind is InputKind.TENSOR:
        names = tuple(c.full_name for c in CHANNELS if c.full_name in chosen)
    return InputSpec(
        kind=kind,
        names=names,
        mask=threat,
        schema_hash=schema.schema_hash,
        behaviour_fingerprint=schema.behaviour_fingerprint,
    )


def read_windows(run: Path, threat: str, kind: InputKind, *, only: Iterable[str] | None = None) -> WindowSet:
    """Read windows of known phase under a mask.

    Args:
        run: The run's folder.
        threat: A name that `channels.mask_of` knows.
        kind: Features, or elapsed time alone.
        only: Episodes of role `lab` to read; None reads all. Soak episodes are always read, commissioning never.
    """
    spec = spec_of(read_schema(run), threat, kind)
    features = spec.names if kind is InputKind.TABLE else ()
    wanted = None if only is None else set(only)
    path = run / FEATURES
    blocks: list[_Block] = []
    with open_parquet(path, "features") as file:
        need_columns(path, file.schema_arrow.names, ("episode_id", "role", *_WINDOW, *features), "features")
        for group in range(file.num_row_groups):
            if (block := _read_block(file, group, features, wanted)) is not None:
                blocks.append(block)
    if not blocks:
        raise RunError(f"{path}: no window of known phase for these episodes; is it of the same sweep as the splits?")
    windows, x = _assemble(run, blocks)
    if kind is InputKind.ELAPSED:
        x = windows.t_center_s[:, None].copy()
    elif kind is InputKind.TENSOR:
        x = cut_tensor(run, windows, spec.names)
    return WindowSet(windows=windows, inputs=Inputs(x=x, spec=spec))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Block:
    """The windows that one row group gave."""

    episode_id: NDArray[Any]
    columns: Mapping[str, NDArray[Any]]
    x: NDArray[np.float32]


def _read_block(file: Any, group: int, features: Sequence[str], wanted: set[str] | None) -> _Block | None:
    head = file.read_row_group(group, columns=["episode_id", "role", *_WINDOW])
    episode = np.asarray(head["episode_id"].to_pylist(), dtype=object)
    role = np.asarray(head["role"].to_pylist(), dtype=object)
    phase = head["phase"].to_numpy()
    keep = (phase >= 0) & (role != Role.COMMISSION)
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
