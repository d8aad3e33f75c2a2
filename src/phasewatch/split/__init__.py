"""Episodes of a run come in; folds that say who is learnt from and who is tested, with their proof, go out."""

from phasewatch.split.build import build_folds, near_duplicates
from phasewatch.split.deal import deal_windows
from phasewatch.split.fold import Coverage, Deal, Fold, Part, SplitEpisode, parse_fold, render_fold
from phasewatch.split.recipes import RECIPES, Recipe, recipe_of

__all__ = [
    "RECIPES",
    "Coverage",
    "Deal",
    "Fold",
    "Part",
    "Recipe",
    "SplitEpisode",
    "build_folds",
    "deal_windows",
    "near_duplicates",
    "parse_fold",
    "recipe_of",
    "render_fold",
]
