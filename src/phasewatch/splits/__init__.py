"""Episodes of a run come in; folds that say who is learnt from and who is tested, with their proof, go out."""

from phasewatch.splits.aside import SetAsideCode, SetAsideEpisode
from phasewatch.splits.build import (
    RecipeSplit,
    SplitInput,
    assign_random_windows,
    build_folds,
    build_split,
    prepare_split,
)
from phasewatch.splits.fold import (
    Fold,
    FoldCoverage,
    RandomWindowSplit,
    SplitEpisode,
    SplitPart,
    parse_fold,
    render_fold,
)
from phasewatch.splits.near import NearDuplicates, find_near_duplicates
from phasewatch.splits.recipes import SPLIT_RECIPES, Recipe, find_recipe

__all__ = [
    "SPLIT_RECIPES",
    "Fold",
    "FoldCoverage",
    "NearDuplicates",
    "RandomWindowSplit",
    "Recipe",
    "RecipeSplit",
    "SetAsideCode",
    "SetAsideEpisode",
    "SplitEpisode",
    "SplitInput",
    "SplitPart",
    "assign_random_windows",
    "build_folds",
    "build_split",
    "find_near_duplicates",
    "find_recipe",
    "parse_fold",
    "prepare_split",
    "render_fold",
]
