"""`phasewatch.load` gives what scikit-learn and aeon take: X, y, groups, names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.impute import SimpleImputer
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.tree import DecisionTreeClassifier
from tests.factories.synthetic_runs import World, write_run

import phasewatch
from phasewatch.dataset import write_splits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_run(tmp_path_factory.mktemp("api") / "run", World(windows=8))
    write_splits(made, "held_out_host")
    return made


def test_load_returns_a_table_for_scikit_learn(run: Path) -> None:
    train = phasewatch.load(run, "held_out_host", "host-0", "realistic", kind="table").train

    model = make_pipeline(SimpleImputer(keep_empty_features=True), DecisionTreeClassifier(random_state=0))
    scores = cross_val_score(model, train.X, train.y, groups=train.groups, cv=GroupKFold(2))

    assert train.X.shape == (len(train.y), len(train.names)) == (len(train.groups), 35 * 5 + 83)
    assert train.names[0] == "proc.cpu_user.mean"
    assert scores.mean() > 0.5


def test_load_returns_a_tensor_with_channels_before_time(run: Path) -> None:
    sets = phasewatch.load(run, "held_out_host", "host-0", "oracle", kind="tensor")

    assert sets.train.X.shape == (len(sets.train.y), 46, 20)
    assert sets.train.X.dtype == np.float32
    assert sets.train.X.flags.c_contiguous
    assert sets.train.names[0] == "proc.cpu_user"


def test_an_unknown_attribute_is_an_error() -> None:
    with pytest.raises(AttributeError, match="no 'lood'"):
        _ = phasewatch.lood  # type: ignore[attr-defined]
