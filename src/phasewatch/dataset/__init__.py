"""A run's feature table, splits and identities come in; sets of windows with X, y, groups and names go out."""

from phasewatch.dataset.run import file_sha256, read_schema
from phasewatch.dataset.sets import Sets, Windows, WindowSet
from phasewatch.dataset.splits import (
    SplitIndex,
    read_built,
    read_episodes,
    read_fold,
    read_folds,
    read_split_index,
    write_all_splits,
    write_splits,
)
from phasewatch.dataset.windows import load, read_windows

__all__ = [
    "Sets",
    "SplitIndex",
    "WindowSet",
    "Windows",
    "file_sha256",
    "load",
    "read_built",
    "read_episodes",
    "read_fold",
    "read_folds",
    "read_schema",
    "read_split_index",
    "read_windows",
    "write_all_splits",
    "write_splits",
]
