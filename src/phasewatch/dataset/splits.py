"""The split files of a run: made from its features and verdicts, read back with their hashes checked."""

from __future__ import annotations

import hashlib
from pathlib import Path

from phasewatch import atomic, profiles
from phasewatch.dataset.run import FEATURES, SPLITS, read_table, read_verdicts
from phasewatch.errors import RunError, UsageError
from phasewatch.split import Fold, SplitEpisode, build_folds, parse_fold, recipe_of, render_fold
from phasewatch.vocab import PHASES


def write_splits(run: Path, recipe: str) -> tuple[Fold, ...]:
    """Cut the run's episodes by a recipe and write `splits/<recipe>-<fold>.json`; folds of an earlier cut go.

    Raises:
        SplitError: If the recipe cannot be built from these episodes.
    """
    folds = build_folds(recipe, read_episodes(run), profiles=tuple(p.name for p in profiles.PROFILES))
    folder = run / SPLITS
    atomic.make_folder(folder)
    for fold in folds:
        atomic.write_whole(fold_path(run, fold.recipe, fold.fold), render_fold(fold))
    current = {fold_path(run, fold.recipe, fold.fold) for fold in folds}
    for path in sorted(folder.glob(f"{recipe}-*.json")):
        if path not in current:
            atomic.remove(path)
    return folds


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
