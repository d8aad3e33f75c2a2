"""Write and read the split files of a run; digests are checked on reading."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from phasewatch import atomic, profiles
from phasewatch.artifacts import (
    FEATURES_FILE,
    SPLIT_INDEX_FILE,
    SPLITS_DIR,
    build_split_path,
    list_split_paths,
    read_columns,
    read_duplicate_id_episodes,
    read_run_episodes,
)
from phasewatch.errors import RunError, SplitError, UsageError
from phasewatch.splits import (
    SPLIT_RECIPES,
    Fold,
    RecipeSplit,
    SetAsideCode,
    SetAsideEpisode,
    SplitEpisode,
    SplitInput,
    build_split,
    find_recipe,
    parse_fold,
    prepare_split,
    render_fold,
)
from phasewatch.types import PHASES

__all__ = [
    "RecipeResult",
    "SplitIndex",
    "compute_sample_group",
    "read_all_folds",
    "read_fold",
    "read_fold_file",
    "read_folds",
    "read_recipe_results",
    "read_split_episodes",
    "read_split_index",
    "write_all_splits",
    "write_splits",
]


class RecipeResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The folds of a recipe, or the reason why it could not be built (`why`, for people)."""

    recipe: str
    folds: tuple[str, ...] = ()
    why: str = ""


class SplitIndex(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `splits_v1.json`.

    Attributes:
        recipes: Result of each recipe.
        set_aside: Episodes in no fold of some or all recipes, in the order (host, episode); absent from the file if
            empty.
    """

    recipes: tuple[RecipeResult, ...] = ()
    set_aside: tuple[SetAsideEpisode, ...] = ()


def write_all_splits(run: Path, recipes: Iterable[str]) -> SplitIndex:
    """Build and write the folds of several recipes, and `splits_v1.json`; one that fails does not stop the others.

    Recipes that the run has already are built again, so that all folds are from the same episodes.

    Args:
        run: Folder of a run with features.
        recipes: Names of the recipes.

    Raises:
        UsageError: If a recipe is unknown.
    """
    asked = {find_recipe(name).name for name in recipes}
    names = [row.name for row in SPLIT_RECIPES if row.name in asked or list_split_paths(run, row.name)]
    given = prepare_split(read_split_episodes(run))
    built: list[RecipeResult] = []
    aside: list[SetAsideEpisode] = [*given.set_aside, *_read_set_aside_duplicates(run)]
    for name in names:
        try:
            made = _write_recipe(run, name, given)
        except SplitError as error:
            _remove_folds(run, name, keep=set())
            built.append(RecipeResult(recipe=name, why=str(error)))
        else:
            built.append(RecipeResult(recipe=name, folds=tuple(fold.fold for fold in made.folds)))
            aside += made.set_aside
    index = SplitIndex(recipes=tuple(built), set_aside=_merge_set_aside(aside))
    parts = {"recipes": index.recipes} | ({"set_aside": index.set_aside} if index.set_aside else {})
    atomic.write_atomic(
        run / SPLIT_INDEX_FILE, msgspec.json.format(msgspec.json.encode(parts, order="sorted"), indent=1) + b"\n"
    )
    return index


def _read_set_aside_duplicates(run: Path) -> list[SetAsideEpisode]:
    return [
        SetAsideEpisode(host_id=e.host_id, episode_id=e.episode_id, profile=e.profile, code=SetAsideCode.ID_TAKEN)
        for e in read_duplicate_id_episodes(run)
    ]


def _merge_set_aside(aside: Iterable[SetAsideEpisode]) -> tuple[SetAsideEpisode, ...]:
    """Return each episode and code once, with all of its recipes."""
    recipes: dict[tuple[str, str, str, SetAsideCode], list[str]] = {}
    for a in aside:
        recipes.setdefault((a.host_id, a.episode_id, a.profile, a.code), []).extend(a.recipes)
    return tuple(
        SetAsideEpisode(host_id=host, episode_id=episode, profile=profile, code=code, recipes=tuple(of))
        for (host, episode, profile, code), of in sorted(recipes.items())
    )


def read_recipe_results(run: Path) -> tuple[RecipeResult, ...]:
    """Read the result of each recipe; empty without an index (splits written one recipe at a time).

    Raises:
        RunError: If `splits_v1.json` is invalid.
    """
    return read_split_index(run).recipes


def read_split_index(run: Path) -> SplitIndex:
    """Read `splits_v1.json`; empty if it is absent.

    Raises:
        RunError: If it is invalid.
    """
    path = run / SPLIT_INDEX_FILE
    if not path.is_file():
        return SplitIndex()
    try:
        return msgspec.json.decode(path.read_bytes(), type=SplitIndex)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RunError(f"{path}: not an index of splits: {exc}; make it again with `phasewatch split {run}`") from exc


def write_splits(run: Path, recipe: str) -> tuple[Fold, ...]:
    """Build a recipe and write `splits/<recipe>-<fold>.json`; folds of an earlier build are removed.

    Raises:
        SplitError: If the recipe cannot be built from these episodes.
        UsageError: If the recipe is unknown.
    """
    return _write_recipe(run, recipe, prepare_split(read_split_episodes(run))).folds


def _write_recipe(run: Path, recipe: str, given: SplitInput) -> RecipeSplit:
    made = build_split(recipe, given, profiles=tuple(p.name for p in profiles.PROFILES))
    atomic.make_folder(run / SPLITS_DIR)
    for fold in made.folds:
        atomic.write_atomic(build_split_path(run, fold.recipe, fold.fold), render_fold(fold))
    _remove_folds(run, recipe, keep={build_split_path(run, fold.recipe, fold.fold) for fold in made.folds})
    return made


def _remove_folds(run: Path, recipe: str, *, keep: set[Path]) -> None:
    for path in list_split_paths(run, recipe):
        if path not in keep:
            atomic.remove(path)


def read_fold(run: Path, recipe: str, fold: str) -> Fold:
    """Read one fold of a recipe.

    Raises:
        RunError: If it is absent, invalid or edited.
        UsageError: If the recipe is unknown.
    """
    find_recipe(recipe)
    path = build_split_path(run, recipe, fold)
    if path.parent != run / SPLITS_DIR or not path.is_file():
        there = ", ".join(p.stem for p in list_split_paths(run)) or "none"
        raise RunError(f"{path}: absent; the run has {there}; make it with `phasewatch split {run}`")
    return read_fold_file(path)


def read_folds(run: Path, recipe: str) -> tuple[Fold, ...]:
    """Read all folds of a recipe, in order of their names.

    Raises:
        RunError: If there is none, or a file is not a fold.
        UsageError: If the recipe is unknown.
    """
    find_recipe(recipe)
    folds = read_all_folds(run, recipe)
    if not folds:
        raise RunError(f"{run / SPLITS_DIR}: no fold of {recipe}; make them with `phasewatch split {run}`")
    return folds


def read_all_folds(run: Path, recipe: str | None = None) -> tuple[Fold, ...]:
    """Read the folds of every recipe of a run, or of one; empty where there is none.

    Raises:
        RunError: If a file is not a fold.
    """
    return tuple(read_fold_file(path) for path in list_split_paths(run, recipe))


def read_fold_file(path: Path) -> Fold:
    """Read the file of one fold.

    Raises:
        RunError: If it is not a fold, or was edited.
    """
    return parse_fold(path.read_bytes(), file=str(path))


def read_split_episodes(run: Path) -> tuple[SplitEpisode, ...]:
    """Read the facts that a split needs of each episode with windows in the feature table."""
    import pyarrow.compute as pc

    table = read_columns(run / FEATURES_FILE, ("episode_id", "phase"), "features")
    phases: dict[str, set[int]] = {}
    # Distinct pairs first: millions of windows are a few thousand of them.
    for row in table.group_by(["episode_id", "phase"]).aggregate([]).to_pylist():
        phases.setdefault(row["episode_id"], set()).add(int(row["phase"]))
    known = read_run_episodes(run, only=set(pc.unique(table["episode_id"]).to_pylist()))
    return tuple(
        SplitEpisode(
            episode_id=e.episode_id,
            host_id=e.host_id,
            profile=e.profile,
            sample_name=e.sample_name,
            sample_group=compute_sample_group(e.profile, e.sample_name),
            session=e.session,
            role=e.role,
            agent=e.agent,
            plan_seed=e.plan_seed,
            proc_sketch=e.proc_sketch,
            started_wall_ns=e.started_wall_ns,
            phases=tuple(p for p in PHASES if p.code in phases[e.episode_id]),
            duration_s=e.duration_s,
            neighbours=e.neighbours,
        )
        for e in known
    )


def compute_sample_group(profile: str, sample_name: str) -> int:
    """Return the group of a sample; one that is not registered (recorded by a user) gets it by its name's hash."""
    try:
        return profiles.find_sample_group(profile, sample_name)
    except UsageError:
        digest = hashlib.sha256(f"{profile}|{sample_name}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % profiles.N_SAMPLE_GROUPS
