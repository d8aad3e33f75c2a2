"""Bring your own: the examples as a user would write them, and what is said when something does not fit."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from tests.factories.synthetic_runs import World, write_run
from tests.models.test_models import examples
from tests.models.test_nets import motions

from phasewatch.dataset import write_splits
from phasewatch.errors import MismatchError, ModelError, UsageError
from phasewatch.models import registry
from phasewatch.models.adapters import CollectionAdapter, TableAdapter
from phasewatch.models.base import InputKind, LabelledExamples, ModelInputs
from phasewatch.training.experiment import Experiment
from phasewatch.training.train import train_experiments
from phasewatch.types import Phase

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def examples_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


class Nearest(CollectionAdapter):
    """Nearest mean course, in the form of an aeon classifier: fit, predict, classes_."""

    key = "nearest"

    def make(self, seed: int) -> object:
        class Classifier:
            def fit(self, x: np.ndarray, y: np.ndarray) -> None:
                assert x.ndim == 3
                assert np.isfinite(x).all()
                self.classes_ = np.unique(y)
                self.means = np.stack([x[y == c].mean(axis=0) for c in self.classes_])

            def predict(self, x: np.ndarray) -> np.ndarray:
                gaps = ((x[:, None] - self.means[None]) ** 2).sum(axis=(2, 3))
                return self.classes_[gaps.argmin(axis=1)]

        return Classifier()


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_fits_on_a_page(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= 30


def test_the_forest_is_trained_as_a_cell_and_scored_by_the_process_that_fitted_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", World(windows=8))
    write_splits(run, "held_out_host")
    cell = Experiment(recipe="held_out_host", fold="host-0", threat="realistic", model="forest:Forest")
    train_experiments(run, [cell], workers=1)
    table = pq.read_table(run / "predictions_v1.parquet")
    test = table.filter(pc.and_(pc.equal(table["part"], "test"), pc.equal(table["filter"], "none")))

    assert set(table["model"].to_pylist()) == {"forest:Forest"}
    assert (test["y_true"].to_numpy() == test["y_pred"].to_numpy()).mean() > 0.6
    assert train_experiments(run, [cell], workers=1).kept == (cell,)
    with pytest.raises(MismatchError, match="found model 'forest'"):
        registry.load(cell.folder(run))


def test_a_classifier_of_collections_learns_and_misses_no_row_for_a_missing_value() -> None:
    model = Nearest(seed=0).fit(motions(300, 0), motions(100, 1))
    test = motions(200, 2)
    p = model.predict_proba(test.inputs)

    assert model.kind is InputKind.TENSOR
    assert (model.predict(test.inputs) == test.y).mean() > 0.8
    assert np.isfinite(p).all()
    np.testing.assert_allclose(p.sum(axis=1), 1.0)


@pytest.mark.skipif(find_spec("aeon") is None, reason="aeon is in the bench environment")
def test_aeons_minirocket_learns() -> None:
    model = registry.create("rocket:Rocket").fit(motions(300, 0), motions(100, 1))
    test = motions(200, 2)

    assert (model.predict(test.inputs) == test.y).mean() > 0.8


def test_a_model_that_keeps_no_weights_says_so_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "find_plugin_models", lambda: {"nearest": registry.ModelEntry(
        key="nearest", where="x:Y", kind=InputKind.TENSOR, about="", persist="none")})  # fmt: skip
    Nearest(seed=0).fit(motions(60, 0), motions(60, 1)).save(tmp_path)

    with pytest.raises(MismatchError, match="nearest stores no weights"):
        registry.load(tmp_path)


def test_a_model_that_an_installed_package_brings_is_known_by_its_name(tmp_path: Path) -> None:
    info = tmp_path / "forests-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: forests\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[phasewatch.models]\nwoods = forest:Forest\n")
    sys.path.insert(0, str(tmp_path))
    try:
        row = registry.find_model("woods")
    finally:
        sys.path.remove(str(tmp_path))

    assert (row.kind, row.persist) == (InputKind.TABLE, "none")
    assert row.about.startswith("300 trees")


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("nowhere:Forest", "cannot be imported: No module named 'nowhere'; install its package, or put its folder on"),
        ("forest:Woods", "cannot be imported"),
        ("json:JSONDecoder", "is not a PhaseModel"),
    ],
)
def test_a_class_that_is_no_model_is_a_usage_error(where: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        registry.find_model(where)


def test_a_classifier_whose_probabilities_are_none_is_refused() -> None:
    class Broken(TableAdapter):
        key = "broken"

        def make(self, seed: int) -> object:
            class Classifier:
                classes_ = np.arange(5)

                def fit(self, x: np.ndarray, y: np.ndarray) -> None: ...

                def predict_proba(self, x: np.ndarray) -> np.ndarray:
                    return np.full((len(x), 5), np.nan)

            return Classifier()

    with pytest.raises(ModelError, match="model broken: the classifier returned probabilities below 0 or not finite"):
        Broken(seed=0).fit(examples("gbt"), examples("gbt", seed=1))


@pytest.mark.parametrize("names", [False, True], ids=["labels", "names of phases"])
@pytest.mark.parametrize("has_probabilities", [False, True])
def test_a_classifier_that_refuses_a_gap_in_its_labels_learns_where_train_lacks_a_phase(
    names: bool, has_probabilities: bool
) -> None:
    class Strict(TableAdapter):
        key = "strict"

        def make(self, seed: int) -> object:
            return _Strict(names=names, has_probabilities=has_probabilities)

    train = without_armed(200, 0)
    model = Strict(seed=0).fit(train, without_armed(100, 1))
    p = model.predict_proba(train.inputs)

    assert model.seen == (0, 2, 3, 4)
    assert (p.argmax(axis=1) == train.y).all()
    assert (p[:, 1] == 0).all()


def without_armed(n: int, seed: int) -> LabelledExamples:
    whole = examples("gbt", n, seed=seed)
    keep = whole.y != Phase.ARMED.code
    return LabelledExamples(inputs=ModelInputs(x=whole.inputs.x[keep], spec=whole.inputs.spec), y=whole.y[keep])


class _Strict:
    """As XGBClassifier: labels are 0 to k - 1 or it raises. Remembers its answers by row."""

    def __init__(self, *, names: bool, has_probabilities: bool) -> None:
        self.names, self.has_probabilities = names, has_probabilities

    def __getattribute__(self, name: str) -> object:
        if name == "predict_proba" and not object.__getattribute__(self, "has_probabilities"):
            raise AttributeError(name)
        return object.__getattribute__(self, name)

    def fit(self, x: np.ndarray, y: np.ndarray) -> None:
        found = np.unique(y)
        if found.tolist() != list(range(len(found))):
            raise ValueError(f"Expected: {list(range(len(found)))}, got {found.tolist()}")
        told = ("clean", "infecting", "active", "dormant")
        self.classes_ = np.array(told if self.names else found)
        self.known = {row.tobytes(): int(label) for row, label in zip(x, y, strict=True)}

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.classes_[[self.known.get(row.tobytes(), 0) for row in x]]

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        return np.eye(len(self.classes_))[[self.known.get(row.tobytes(), 0) for row in x]]


@pytest.mark.parametrize("classes", [["good", "bad"], [0.5, 1.5], [7, 8], [None, 1]], ids=str)
def test_classes_that_are_neither_labels_nor_phases_are_refused_in_words(classes: list[object]) -> None:
    class Odd(TableAdapter):
        key = "odd"

        def make(self, seed: int) -> object:
            class Classifier:
                classes_ = np.array(classes)

                def fit(self, x: np.ndarray, y: np.ndarray) -> None: ...

                def predict_proba(self, x: np.ndarray) -> np.ndarray:
                    return np.full((len(x), 2), 0.5)

            return Classifier()

    with pytest.raises(ModelError, match="model odd: its classes are"):
        Odd(seed=0).fit(without_armed(60, 0), without_armed(60, 1))


def test_multirocket_without_aeon_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aeon", None)

    with pytest.raises(UsageError, match=r"pip install 'phasewatch\[rocket\]'"):
        registry.create("multirocket").fit(examples("cnn"), examples("cnn", 80, seed=1))
