"""Episodes of a run come in; folds that say who is learnt from and who is tested, with their proof, go out."""

from phasewatch.split.aside import AsideCode, SetAside
from phasewatch.split.build import RecipeSplit, SplitInput, build_folds, build_split, prepare
from phasewatch.split.deal import deal_windows
from phasewatch.split.fold import Coverage, Deal, Fold, Part, SplitEpisode, parse_fold, render_fold
from phasewatch.split.near import NearDuplicates, near_duplicates
from phasewatch.split.recipes import RECIPES, Recipe, recipe_of

__all__ = [
    "RECIPES",
    "AsideCode",
    "Coverage",
    "Deal",
    "Fold",
    "NearDuplicates",
    "Part",
    "Recipe",
    "RecipeSplit",
    "SetAside",
    "SplitEpisode",
    "SplitInput",
    "build_folds",
    "build_split",
    "deal_windows",
    "near_duplicates",
    "parse_fold",
    "prepare",
    "recipe_of",
    "render_fold",
]
