"""Datasets: load the feature table of a run as train, validation and test sets with X, y, groups and names."""

from phasewatch.artifacts import file_sha256, read_schema
from phasewatch.dataset.loader import load, read_windows
from phasewatch.dataset.sets import EpisodeWindows, FoldData, WindowSet
from phasewatch.dataset.splices import SplicedEpisode, SpliceKind, build_spliced_examples, build_splices
from phasewatch.dataset.split_files import (
    SplitIndex,
    read_fold,
    read_folds,
    read_recipe_results,
    read_split_episodes,
    read_split_index,
    write_all_splits,
    write_splits,
)

__all__ = [
    "EpisodeWindows",
    "FoldData",
    "SpliceKind",
    "SplicedEpisode",
    "SplitIndex",
    "WindowSet",
    "build_spliced_examples",
    "build_splices",
    "file_sha256",
    "load",
    "read_fold",
    "read_folds",
    "read_recipe_results",
    "read_schema",
    "read_split_episodes",
    "read_split_index",
    "read_windows",
    "write_all_splits",
    "write_splits",
]
