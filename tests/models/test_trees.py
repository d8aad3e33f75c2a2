"""Trees as arrays: they give what LightGBM gives, bit for bit, in any batch, and after a checkpoint."""

from __future__ import annotations

import lightgbm as lgb
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from phasewatch.errors import MissingToolError
from phasewatch.models import trees
from phasewatch.models.trees import TreeArrays, TreeEvaluator, parse_lightgbm_text

FEATURES = 12


def make_windows(n: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Windows with columns that are sometimes, always and never missing, and some that take few values."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, FEATURES)).astype(np.float32)
    y = rng.integers(0, 5, n)
    x[:, 0] += y
    x[:, 1] = np.round(x[:, 1])
    x[:, 2] = 0.0
    x[rng.random(x.shape) < 0.1] = np.nan
    x[:, 3] = np.nan
    x[:, 4] = np.nan_to_num(x[:, 4])
    return x, y


def train(rounds: int, leaves: int) -> tuple[lgb.Booster, TreeArrays]:
    x, y = make_windows(600, 0)
    params = {"objective": "multiclass", "num_class": 5, "num_leaves": leaves, "verbose": -1, "num_threads": 1}
    booster = lgb.train(params, lgb.Dataset(x, y, params=params), rounds)
    return booster, parse_lightgbm_text(booster.model_to_string(), rounds=rounds, leaves=leaves)


def walk(trees: TreeArrays, row: NDArray[np.float32]) -> list[float]:
    """Follow each tree from its root, as a reader of the format's description would."""
    scores = [0.0] * 5
    for tree, size in enumerate(trees.size):
        node = 0 if size > 1 else -1
        while node >= 0:
            value = row[trees.feature[tree, node]]
            goes_left = trees.nan_left[tree, node] if np.isnan(value) else value <= trees.threshold[tree, node]
            node = int((trees.left if goes_left else trees.right)[tree, node])
        scores[tree % 5] += trees.leaf[tree, -1 - node]
    return scores


@pytest.mark.parametrize(("rounds", "leaves"), [(30, 15), (6, 20), (4, 40), (3, 64), (5, 2)])
def test_arrays_give_the_sums_of_lightgbm_and_of_a_plain_walk(rounds: int, leaves: int) -> None:
    booster, trees = train(rounds, leaves)
    trees.check(FEATURES)
    x, _ = make_windows(300, 1)
    x[:, 3] = 1.0  # known here, never in train
    x[:, 4] = np.nan  # known in train, never here

    scores = TreeEvaluator(trees).compute_scores(x)

    assert_array_equal(scores, booster.predict(x, raw_score=True))
    assert_array_equal(scores[:20], [walk(trees, row) for row in x[:20]])


def test_a_window_has_the_same_bits_alone_and_in_a_batch() -> None:
    evaluator = TreeEvaluator(train(30, 15)[1])
    x, _ = make_windows(200, 1)

    assert_array_equal(
        np.concatenate([evaluator.compute_scores(x[i : i + 1]) for i in range(200)]), evaluator.compute_scores(x)
    )


def test_a_threshold_between_two_float32_numbers_is_rounded_down() -> None:
    low = np.float32(0.1)
    between = float(low) + 1e-10
    text = f"tree\nTree=0\nnum_leaves=2\nsplit_feature=0\nthreshold={between!r}\ndecision_type=2\nleft_child=-1\n"
    text += "right_child=-2\nleaf_value=1 2\n\nend of trees\n"

    trees = parse_lightgbm_text(text, rounds=1, leaves=2)

    assert trees.threshold[0, 0] == low
    x = np.array([[low], [np.nextafter(low, np.float32(1))]], np.float32)
    assert_array_equal(TreeEvaluator(trees).compute_scores(x)[:, 0], [1.0, 2.0])


def test_rounds_that_training_did_not_need_add_nothing() -> None:
    _, trees = train(30, 15)
    x, _ = make_windows(80, 1)
    longer = TreeArrays.create_empty(40, 15)
    for name, array in longer.to_mapping().items():
        array[: len(trees.size)] = getattr(trees, name)

    assert_array_equal(TreeEvaluator(longer).compute_scores(x), TreeEvaluator(trees).compute_scores(x))


def test_lightgbm_finds_torchs_openmp_library_where_the_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str) -> object:
        if not loaded:
            raise OSError("libgomp.so.1: cannot open shared object file")
        return name

    monkeypatch.setattr(trees, "import_module", load)
    monkeypatch.setattr(trees.ctypes, "CDLL", loaded.append)

    assert trees.load_lightgbm() == "lightgbm"
    assert loaded[0].endswith("torch/lib/libgomp.so.1")


def test_lightgbm_without_any_openmp_library_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> object:
        raise OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(trees, "import_module", fail)
    monkeypatch.setattr(trees.ctypes, "CDLL", fail)

    with pytest.raises(MissingToolError, match="libgomp1"):
        trees.load_lightgbm()
