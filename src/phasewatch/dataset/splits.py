"""The split files of a run: made from its features and verdicts, read back with their hashes checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from phasewatch import atomic, profiles
from phasewatch.dataset.run import FEATURES, SPLITS, read_table, read_verdicts
from phasewatch.errors import RunError, SplitError, UsageError
from phasewatch.split import RECIPES, Fold, SplitEpisode, build_folds, parse_fold, recipe_of, render_fold
from phasewatch.vocab import PHASES

INDEX = "splits_v1.json"


class Built(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What became of one recipe: its folds, or why it cannot be built."""

    recipe: str
    folds: tuple[str, ...] = ()
    why: str = ""


def write_all_splits(run: Path, recipes: Iterable[str]) -> tuple[Built, ...]:
    """Cut the run's episodes by each of the recipes; one that cannot be built costs no other.

    Recipes that the run has already are cut again with them, so that all that is there was made from these episodes.
    What was built, and why something was not, stands in `splits_v1.json`.
    """
    asked = {recipe_of(name).name for name in recipes}
    names = [row.name for row in RECIPES if row.name in asked or any((run / SPLITS).glob(f"{row.name}-*.json"))]
    episodes = read_episodes(run)
    built: list[Built] = []
    for name in names:
        try:
            folds = _write(run, name, episodes)
        except SplitError as error:
            _remove(run, name, keep=set())
            built.append(Built(recipe=name, why=str(error)))
        else:
            built.append(Built(recipe=name, folds=tuple(fold.fold for fold in folds)))
    data = msgspec.json.format(msgspec.json.encode({"recipes": built}, order="sorted"), indent=1)
    atomic.write_whole(run / INDEX, data + b"\n")
    return tuple(built)


def read_built(run: Path) -> tuple[Built, ...]:
    """Read `splits_v1.json`; nothing where there is none (splits written one recipe at a time).

    Raises:
        RunError: If it is not one.
    """
    path = run / INDEX
    if not path.is_file():
        return ()
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Index).recipes
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RunError(f"{path}: not an index of splits: {exc}; make it again with `phasewatch split {run}`") from exc


class _Index(msgspec.Struct, frozen=True):
    recipes: tuple[Built, ...]


def write_splits(run: Path, recipe: str) -> tuple[Fold, ...]:
    """Cut the run's episodes by a recipe and write `splits/<recipe>-<fold>.json`; folds of an earlier cut go.

    Raises:
        SplitError: If the recipe cannot be built from these episodes.
    """
    return _write(run, recipe, read_episodes(run))


def _write(run: Path, recipe: str, episodes: Sequence[SplitEpisode]) -> tuple[Fold, ...]:
    folds = build_folds(recipe, episodes, profiles=tuple(p.name for p in profiles.PROFILES))
    atomic.make_folder(run / SPLITS)
    for fold in folds:
        atomic.write_whole(fold_path(run, fold.recipe, fold.fold), render_fold(fold))
    _remove(run, recipe, keep={fold_path(run, fold.recipe, fold.fold) for fold in folds})
    return folds


def _remove(run: Path, recipe: str, *, keep: set[Path]) -> None:
    for path in sorted((run / SPLITS).glob(f"{recipe}-*.json")):
        if path not in keep:
            atomic.remove(path)


def read_fold(run: Path, recipe: str, fold: str) -> Fold:
    """Read one fold of a recipe."""
    recipe_of(recipe)
    path = fold_path(run, recipe, fold)
    if path.parent != run / SPLITS or not path.is_file():
        there = ", ".join(sorted(p.stem for p in (run / SPLITS).glob("*.json"))) or "none"
        raise RunError(f"{path}: absent; the run has {there}; make it with `phasewatch split {run}`")
    return parse_fold(path.read_bytes(), file=str(path))


def read_folds(run: Path, recipe: str) -> tuple[Fold, ...]:
    """Read all folds of a recipe, in order of their names."""
    recipe_of(recipe)
    paths = sorted((run / SPLITS).glob(f"{recipe}-*.json"))
    if not paths:
        raise RunError(f"{run / SPLITS}: no fold of {recipe}; make them with `phasewatch split {run}`")
    return tuple(parse_fold(path.read_bytes(), file=str(path)) for path in paths)


def read_episodes(run: Path) -> tuple[SplitEpisode, ...]:
    """Give what a split needs of each episode that has windows in the feature table."""
    import pyarrow.compute as pc

    table = read_table(run / FEATURES, ("episode_id", "phase"), "features")
    phases: dict[str, set[int]] = {}
    # Distinct pairs first: millions of windows are a few thousand of them.
    for row in table.group_by(["episode_id", "phase"]).aggregate([]).to_pylist():
        phases.setdefault(row["episode_id"], set()).add(int(row["phase"]))
    known = read_verdicts(run, only=set(pc.unique(table["episode_id"]).to_pylist()))
    return tuple(
        SplitEpisode(
            episode_id=e.episode_id,
            host_id=e.host_id,
            profile=e.profile,
            sample_name=e.sample_name,
            sample_group=group_of(e.profile, e.sample_name),
            session=e.session,
            role=e.role,
            agent=e.agent,
            plan_seed=e.plan_seed,
            proc_sketch=e.proc_sketch,
            started_wall_ns=e.started_wall_ns,
            phases=tuple(p for p in PHASES if p.code in phases[e.episode_id]),
            duration_s=e.duration_s,
        )
        for e in known
    )


def group_of(profile: str, sample_name: str) -> int:
    """Give a sample's group; one that is not registered (a real one that a user recorded) gets its by hash of its name."""
    try:
        return profiles.sample_group(profile, sample_name)
    except UsageError:
        digest = hashlib.sha256(f"{profile}|{sample_name}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % profiles.SAMPLE_GROUPS


def fold_path(run: Path, recipe: str, fold: str) -> Path:
    """Where a fold's file stands."""
    return run / SPLITS / f"{recipe}-{fold}.json"
