"""The nets: their scaler sees train alone, their trainer keeps the best epoch, and all of them learn."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from phasewatch.errors import RunError
from phasewatch.models import checkpoint, registry
from phasewatch.models.base import InputKind, InputSpec, LabelledExamples, ModelInputs
from phasewatch.models.minirocket import _fit_ridge
from phasewatch.models.neural import SCALER_LIMIT, AsinhScaler
from phasewatch.models.probabilities import compute_class_weights
from phasewatch.types import WINDOW_BINS

NETS = ("cnn", "gru", "lstm", "transformer")


def motions(n: int, seed: int, *, shift: float = 0.0) -> LabelledExamples:
    """Five shapes over time that only their course tells apart: level, rise, fall, burst, swing."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, WINDOW_BINS)
    courses = np.stack([np.full_like(t, 0.5), t, 1 - t, (np.abs(t - 0.5) < 0.1) * 2.0, np.sin(12 * t)])
    y = rng.integers(0, 5, n)
    x = courses[y][:, None, :] + shift + 0.25 * rng.normal(size=(n, 3, WINDOW_BINS))
    x[rng.random(x.shape) < 0.03] = np.nan
    spec = InputSpec(
        kind=InputKind.TENSOR,
        names=("a", "b", "c"),
        mask="realistic",
        schema_hash="5" * 64,
        behaviour_fingerprint="b" * 64,
    )
    return LabelledExamples(inputs=ModelInputs(x=x.astype(np.float32), spec=spec), y=y)


@pytest.mark.parametrize("key", [*NETS, "minirocket"])
def test_network_learns_a_difference_in_the_order_of_bins(key: str) -> None:
    settings = {"epochs": 25, "width": 24} if key != "minirocket" else {}
    model = registry.create(key, settings=settings).fit(motions(500, 0), motions(150, 1))
    test = motions(300, 2)

    assert (model.predict(test.inputs) == test.y).mean() > 0.8


def digits() -> tuple[LabelledExamples, LabelledExamples, LabelledExamples]:
    """Written digits 0 to 4 (scikit-learn's bundled set, UCI): 8 channels, 8 steps stretched over a window's bins."""
    from sklearn.datasets import load_digits

    images, of = load_digits(n_class=5, return_X_y=True)
    steps = np.arange(WINDOW_BINS) * 8 // WINDOW_BINS
    x = images.reshape(-1, 8, 8)[:, :, steps].astype(np.float32)
    spec = InputSpec(
        kind=InputKind.TENSOR, names=tuple(f"row{i}" for i in range(8)), mask="realistic", schema_hash="5" * 64,
        behaviour_fingerprint="b" * 64,
    )  # fmt: skip
    parts = (slice(0, 300), slice(300, 450), slice(450, 700))
    train, val, test = (
        LabelledExamples(inputs=ModelInputs(x=x[p], spec=spec), y=of[p].astype(np.int64)) for p in parts
    )
    return train, val, test


@pytest.mark.parametrize("key", NETS)
def test_network_learns_a_public_data_set(key: str) -> None:
    train, val, test = digits()

    model = registry.create(key, settings={"epochs": 15, "width": 32, "batch": 32}).fit(train, val)

    assert (model.predict(test.inputs) == test.y).mean() > 0.6  # chance is 0.2


def test_weights_are_those_of_the_best_epoch_in_the_history() -> None:
    val = motions(150, 1)
    model = registry.create("cnn", settings={"epochs": 12, "width": 16}).fit(motions(300, 0), val)
    from sklearn.metrics import f1_score

    kept = f1_score(val.y, model.predict(val.inputs), average="macro")

    assert_allclose(kept, max(model.history["val_a_macro_f1"]), atol=1e-6)


def test_training_stops_when_validation_stops_improving() -> None:
    model = registry.create("gru", settings={"epochs": 60, "patience": 2, "width": 16})

    model.fit(motions(300, 0), motions(100, 1))

    assert len(model.history["train_loss"]) < 60


def test_mixed_precision_gives_nearly_the_same_probabilities() -> None:
    train, val, test = motions(300, 0), motions(100, 1), motions(200, 2)
    full, mixed = (
        registry.create("cnn", settings={"epochs": 15, "width": 16, "mixed": m}).fit(train, val).predict(test.inputs)
        for m in (False, True)
    )

    assert (full == mixed).mean() > 0.8


def test_training_restores_the_settings_of_torch() -> None:
    import torch

    before = (
        torch.get_num_threads(),
        torch.random.get_rng_state().clone(),
        torch.are_deterministic_algorithms_enabled(),
    )

    registry.create("cnn", settings={"epochs": 1, "width": 16}).fit(motions(60, 0), motions(60, 1))

    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert torch.are_deterministic_algorithms_enabled() == before[2]


def test_channel_that_train_always_had_may_be_missing_later() -> None:
    model = registry.create("cnn", settings={"epochs": 25, "width": 24}).fit(motions(500, 0), motions(150, 1))
    test = motions(300, 2)
    x = test.inputs.x.copy()
    x[:, 1] = np.nan

    assert (model.predict(ModelInputs(x=x, spec=test.inputs.spec)) == test.y).mean() > 0.7


def test_scaler_is_fitted_to_train_and_marks_missing_values() -> None:
    train = np.array([[100.0, 0.0, np.nan], [300.0, 0.0, np.nan], [200.0, 0.0, np.nan]], np.float32)
    scaler = AsinhScaler.fit(train)
    given = np.array([[200.0, -1.0, np.nan]], np.float32)

    out = scaler.apply(given)

    assert_allclose(scaler.size, [200.0, 1.0, 1.0])
    assert_allclose(out, [[np.arcsinh(1.0), np.arcsinh(-1.0), 0.0, 0.0, 0.0, 1.0]], rtol=1e-6)
    assert AsinhScaler.fit(train).apply(np.full((1, 3), 1e30, np.float32)).max() == SCALER_LIMIT


def test_scaler_of_a_tensor_has_one_size_for_each_channel() -> None:
    x = motions(20, 0).inputs.x
    flat = np.moveaxis(x, 1, 2).reshape(-1, 3)

    assert_allclose(AsinhScaler.fit(x).size, AsinhScaler.fit(flat).size)
    assert AsinhScaler.fit(x).apply(x).shape == (20, 6, WINDOW_BINS)


def test_weights_are_the_same_bytes_in_any_order_and_come_back() -> None:
    arrays = {"b": np.arange(3.0), "a": np.eye(2, dtype=np.float32)}
    packed = checkpoint.pack_weights(arrays)

    assert packed == checkpoint.pack_weights(dict(reversed(arrays.items())))
    found = checkpoint.unpack_weights({"w": packed}, "w", {"a": ("F32", (2, 2)), "b": ("F64", (3,))}, model="x")
    assert_array_equal(found["a"], arrays["a"])


@pytest.mark.parametrize(
    ("data", "shapes", "words"),
    [
        (b"", {"a": ("F64", (1,))}, "not a safetensors file"),
        (b"\xff" * 64, {"a": ("F64", (1,))}, "not a safetensors file"),
        (checkpoint.pack_weights({"a": np.zeros(2)}), {"a": ("F64", (3,))}, r"shape \(2,\), expected .*\(3,\)"),
        (checkpoint.pack_weights({"a": np.zeros(2)}), {"a": ("F32", (2,))}, "F64 .* expected F32"),
        (checkpoint.pack_weights({"a": np.zeros(2)}), {"a": ("F64", (2,)), "b": ("F64", (1,))}, r"b as nothing"),
        (checkpoint.pack_weights({"a": np.array([np.nan])}), {"a": ("F64", (1,))}, "not finite"),
    ],
    ids=["empty", "noise", "shape", "type", "absent", "nan"],
)
def test_weights_of_another_shape_or_type_are_refused(
    data: bytes, shapes: checkpoint.ExpectedArrays, words: str
) -> None:
    with pytest.raises(RunError, match=words):
        checkpoint.unpack_weights({"w": data}, "w", shapes, model="cnn")


def test_a_pickle_in_place_of_weights_is_not_run() -> None:
    class Boom:
        def __reduce__(self) -> tuple[object, ...]:
            return (json.loads, ("never",))

    import pickle

    with pytest.raises(RunError, match="not a safetensors file"):
        checkpoint.unpack_weights({"w": pickle.dumps(Boom())}, "w", {"a": ("F64", (1,))}, model="cnn")


def test_a_large_train_set_gets_fewer_epochs_not_more_time() -> None:
    model = registry.create("cnn", settings={"epochs": 20, "steps": 12, "batch": 50, "width": 8})

    model.fit(motions(200, 0), motions(60, 1))

    assert len(model.history["train_loss"]) == 3  # of four batches each


def test_ridge_of_minirocket_equals_scikit_learn() -> None:
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(120, 30)), rng.integers(0, 4, 120)
    weight = compute_class_weights(y)[y]
    spec = InputSpec(kind=InputKind.TABLE, names=("a",), mask="realistic", schema_hash="s", behaviour_fingerprint="b")
    examples = LabelledExamples(inputs=ModelInputs(x=np.zeros((120, 1), np.float32), spec=spec), y=y)
    for penalty, (coef, intercept) in zip((1.0, 100.0), _fit_ridge(x, examples, (1.0, 100.0)), strict=True):
        theirs = Ridge(alpha=penalty).fit(x, np.where(np.eye(5)[y] > 0, 1.0, -1.0), sample_weight=weight)

        assert_allclose(coef, theirs.coef_, atol=1e-9)
        assert_allclose(intercept, theirs.intercept_, atol=1e-9)
