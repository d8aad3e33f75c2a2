"""Splits: assign the episodes of a run to train, validation and test sets, and check each fold against leakage."""

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
    TRAINING_PARTS,
    Fold,
    FoldCoverage,
    RandomWindowSplit,
    SplitEpisode,
    SplitEpisodes,
    SplitPart,
    has_single_host,
    parse_fold,
    render_fold,
)
from phasewatch.splits.near import NearDuplicates, find_near_duplicates
from phasewatch.splits.recipes import ALARM_RECIPES, SINGLE_HOST_RECIPE, SPLIT_RECIPES, Recipe, find_recipe

__all__ = [
    "ALARM_RECIPES",
    "SINGLE_HOST_RECIPE",
    "SPLIT_RECIPES",
    "TRAINING_PARTS",
    "Fold",
    "FoldCoverage",
    "NearDuplicates",
    "RandomWindowSplit",
    "Recipe",
    "RecipeSplit",
    "SetAsideCode",
    "SetAsideEpisode",
    "SplitEpisode",
    "SplitEpisodes",
    "SplitInput",
    "SplitPart",
    "assign_random_windows",
    "build_folds",
    "build_split",
    "find_near_duplicates",
    "find_recipe",
    "has_single_host",
    "parse_fold",
    "prepare_split",
    "render_fold",
]
