"""A classifier of the user's own can be exported and watched, or the refusal says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from numpy.testing import assert_allclose
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, StandardScaler
from tests.factories.trained_runs import FOLD, RECIPE
from tests.models.test_models import examples

from phasewatch.errors import RunError, UsageError
from phasewatch.inference.export import ExportRequest, export_run
from phasewatch.inference.model_selection import find_models
from phasewatch.inference.onnx_check import check_onnx
from phasewatch.inference.onnx_export import MAX_PARITY_ERROR, check_parity, run_onnx, to_onnx
from phasewatch.models.adapters import AdapterConfig, CollectionAdapter, TableAdapter
from phasewatch.models.base import LabelledExamples, PhaseModel
from phasewatch.training.experiment import Experiment
from phasewatch.training.train import train_experiments

CLASSIFIERS: dict[str, Any] = {
    "logistic regression": lambda: LogisticRegression(max_iter=200),
    "logistic regression of scaled columns": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)),
    "logistic regression of columns in a range": lambda: make_pipeline(MinMaxScaler(), LogisticRegression()),
    "random forest": lambda: RandomForestClassifier(8, class_weight="balanced", random_state=0),
    "extra trees": lambda: ExtraTreesClassifier(8, random_state=0),
    "boosted trees": lambda: GradientBoostingClassifier(n_estimators=4, random_state=0),
    "boosted trees of histograms": lambda: HistGradientBoostingClassifier(max_iter=8, random_state=0),
    "neural network of scaled columns": lambda: make_pipeline(
        StandardScaler(), MLPClassifier((8,), max_iter=20, random_state=0)
    ),
}


def adapt(make: Any, *, imputes: bool = True, classes: int = 5) -> PhaseModel:
    kind = type("Own", (TableAdapter,), {"key": "own", "imputes": imputes, "make": lambda self, seed: make()})
    model: PhaseModel = kind()
    model.fit(examples("gbt", classes=classes), examples("gbt", 80, classes=classes, seed=1))
    return model.calibrate(examples("gbt", 80, seed=2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("classes", [5, 3, 2])
@pytest.mark.parametrize("make", CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_the_graph_of_a_scikit_learn_classifier_gives_its_probabilities(make: Any, classes: int) -> None:
    model = adapt(make, classes=classes)

    data = to_onnx(model)

    assert check_parity(model, data, examples("gbt", seed=3).inputs) <= MAX_PARITY_ERROR
    assert (run_onnx(data, examples("gbt", seed=3).inputs.x)[:, classes:] == 0).all()


def test_a_classifier_that_takes_missing_values_gets_them_in_the_graph_too() -> None:
    model = adapt(CLASSIFIERS["boosted trees of histograms"], imputes=False)

    assert check_parity(model, to_onnx(model), examples("gbt", seed=3).inputs) <= MAX_PARITY_ERROR


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(RidgeClassifier, "no predict_proba", id="without probabilities"),
        pytest.param(
            KNeighborsClassifier, "watcher would refuse it.*operator", id="with an operator that is not known"
        ),
        pytest.param(
            lambda: CalibratedClassifierCV(RidgeClassifier()),
            "cannot be exported",
            id="that skl2onnx converts otherwise",
        ),
    ],
)
def test_the_refusal_of_another_classifier_says_why(make: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        to_onnx(adapt(make))


def test_a_classifier_of_time_series_is_refused() -> None:
    class Series(CollectionAdapter):
        key = "series"

        def make(self, seed: int) -> Any:
            return make_pipeline(FunctionTransformer(lambda x: x.reshape(len(x), -1)), LogisticRegression(max_iter=500))

    model = Series().fit(examples("cnn"), examples("cnn", 80, seed=1))

    with pytest.raises(UsageError, match="series cannot be exported"):
        to_onnx(model)


class TorchModel(PhaseModel):
    """A user's torch module."""

    key = "torch_own"
    persist = "none"
    Config = AdapterConfig
    layers: ClassVar[Any] = lambda: torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))

    def _fit(self, train: LabelledExamples, val: LabelledExamples) -> None:
        torch.manual_seed(self.seed)

        class Whole(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = TorchModel.layers()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.softmax(self.layers(torch.where(torch.isnan(x), 0.0, x)), dim=1)

        self._module = Whole().eval()

    def _predict_proba(self, x: Any) -> Any:
        with torch.inference_mode():
            return self._module(torch.from_numpy(x.copy())).numpy()

    def torch_module(self) -> Any:
        return self._module

    def _files(self) -> dict[str, bytes]:
        return {}

    def _restore(self, files: Any) -> None: ...


def test_a_torch_module_is_exported_with_phases_and_temperature() -> None:
    model = (
        TorchModel().fit(examples("gbt", classes=3), examples("gbt", 80, seed=1)).calibrate(examples("gbt", 80, seed=2))
    )

    assert check_parity(model, to_onnx(model), examples("gbt", seed=3).inputs) <= MAX_PARITY_ERROR


def test_a_torch_module_with_an_unknown_operator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchModel, "layers", lambda: torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Softplus()))
    model = TorchModel().fit(examples("gbt"), examples("gbt", 80, seed=1))

    with pytest.raises(UsageError, match="a watcher would refuse it"):
        to_onnx(model)


def change(data: bytes, operator: str, name: str, value: Any) -> bytes:
    model = onnx.load_from_string(data)
    node = next(node for node in model.graph.node if node.op_type == operator)
    attribute = next(a for a in node.attribute if a.name == name)
    (attribute.ints or attribute.floats)[0] = value
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("key", "operator", "name", "value"),
    [
        ("random forest", "TreeEnsembleClassifier", "class_nodeids", 10**6),
        ("random forest", "TreeEnsembleClassifier", "class_nodeids", 0),
        ("random forest", "TreeEnsembleClassifier", "class_treeids", -1),
        ("random forest", "TreeEnsembleClassifier", "class_ids", 7),
        ("random forest", "TreeEnsembleClassifier", "nodes_featureids", 6),
        ("random forest", "TreeEnsembleClassifier", "nodes_truenodeids", 0),
        ("random forest", "TreeEnsembleClassifier", "nodes_values", float("nan")),
        ("logistic regression", "LinearClassifier", "coefficients", float("inf")),
        ("logistic regression", "LinearClassifier", "classlabels_ints", 3),
        ("logistic regression of scaled columns", "Scaler", "offset", float("nan")),
    ],
)
def test_a_changed_graph_of_a_user_is_refused(key: str, operator: str, name: str, value: Any) -> None:
    data = to_onnx(adapt(CLASSIFIERS[key]))

    with pytest.raises(RunError):
        check_onnx(change(data, operator, name, value), file="x", model="own", shape=(6,))


def test_coefficients_of_another_width_are_refused() -> None:
    model = onnx.load_from_string(to_onnx(adapt(CLASSIFIERS["logistic regression"])))
    node = next(node for node in model.graph.node if node.op_type == "LinearClassifier")
    del next(a for a in node.attribute if a.name == "coefficients").floats[-1]

    with pytest.raises(RunError, match="coefficients that do not fit"):
        check_onnx(model.SerializeToString(), file="x", model="own", shape=(6,))


class Forest(TableAdapter):
    """As in examples/forest.py."""

    key = "forest"

    def make(self, seed: int) -> Any:
        return RandomForestClassifier(20, class_weight="balanced", random_state=seed)


class Unsteady(TableAdapter):
    """Another forest at each fit."""

    key = "unsteady"

    def make(self, seed: int) -> Any:
        return RandomForestClassifier(3, random_state=np.random.default_rng().integers(10**6))


def test_a_users_model_is_exported_from_its_run_and_can_be_watched(run: Path, tmp_path: Path) -> None:
    name = f"{__name__}:Forest"
    cell = Experiment(recipe=RECIPE, fold=FOLD, threat="realistic", model=name)
    train_experiments(run, [cell], workers=1)

    done = export_run(run, tmp_path / "own.zip", ExportRequest(model=name, recipe=RECIPE, fold=FOLD))

    (candidate,) = find_models(tmp_path / "own.zip")
    predictor = candidate.load_predictor()
    assert done.parity <= MAX_PARITY_ERROR
    assert (predictor.model, bool(predictor.alarms)) == (name, True)
    p = predictor.predict_windows(np.ones((40, 46), np.float32))
    assert p.shape == (3, 5)
    assert_allclose(p.sum(axis=1), 1.0, atol=1e-5)


def test_a_model_that_is_another_at_each_fit_is_not_exported(run: Path, tmp_path: Path) -> None:
    name = f"{__name__}:Unsteady"
    train_experiments(run, [Experiment(recipe=RECIPE, fold=FOLD, threat="realistic", model=name)], workers=1)

    with pytest.raises(RunError, match="fitted again it predicts something else"):
        export_run(run, tmp_path / "own.zip", ExportRequest(model=name, recipe=RECIPE, fold=FOLD))
