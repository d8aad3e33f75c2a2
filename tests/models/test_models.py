"""What every registered model keeps to, and what each of the present ones is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from phasewatch.errors import MismatchError, RunError, UsageError
from phasewatch.metrics import log_loss
from phasewatch.models import registry
from phasewatch.models.base import InputKind, InputSpec, InputVariant, LabelledExamples, ModelInputs
from phasewatch.models.checkpoint import CHECKPOINT_FILE, read_header
from phasewatch.models.probabilities import compute_class_weights, fit_temperature

KEYS = [row.key for row in registry.BUILTIN_MODELS if row.persist == "exact"]
NETS = ("mlp", "cnn", "gru", "lstm", "transformer", "tcn")
SETTINGS: dict[str, dict[str, int]] = {
    **{key: {"rounds": 15} for key in ("gbt", "levels_only", "best_channel")},
    **{key: {"epochs": 4, "width": 16} for key in NETS},
}


def spec(key: str, f: int = 6) -> InputSpec:
    kind = registry.find_model(key).kind
    ending = ".mean" if kind is InputKind.TABLE else ""
    alone = {InputKind.ELAPSED: ("t_center_s",), InputKind.HOST: ("host_id",), InputKind.LOAD: ("has_load",)}
    names = alone.get(kind) or tuple(f"proc.channel_{i}{ending}" for i in range(f))
    return InputSpec(
        kind=kind,
        names=names,
        mask="realistic",
        schema_hash="5" * 64,
        behaviour_fingerprint="b" * 64,
        table=registry.find_model(key).variant,
    )


def examples(key: str, n: int = 200, *, classes: int = 5, seed: int = 0) -> LabelledExamples:
    """Windows whose phase a column (or the time) nearly tells, with a few NaN."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    s = spec(key)
    if s.kind is InputKind.HOST:
        x = (100 + y + 5 * rng.integers(0, 2, n))[:, None].astype(np.float32)
    elif s.kind is InputKind.LOAD:
        x = rng.integers(0, 3, n)[:, None].astype(np.float32)
    elif s.kind is InputKind.ELAPSED:
        x = (5.0 * (4 * y + rng.integers(1, 5, n)))[:, None].astype(np.float32)
    else:
        x = rng.normal(size=(n, *s.shape)).astype(np.float32)
        x[:, 0] += (2 * y).reshape(-1, *([1] * (x.ndim - 2)))
        x[rng.random(x.shape) < 0.05] = np.nan
    return LabelledExamples(inputs=ModelInputs(x=x, spec=s), y=y)


def fitted(key: str, *, classes: int = 5, seed: int = 0):  # type: ignore[no-untyped-def]
    model = registry.create(key, seed=seed, settings=SETTINGS.get(key))
    model.fit(examples(key, classes=classes), examples(key, 80, classes=classes, seed=1))
    return model.calibrate(examples(key, 80, seed=2))


each_model = pytest.mark.parametrize("key", KEYS)


@each_model
def test_rows_are_five_probabilities_that_sum_to_one(key: str) -> None:
    p = fitted(key).predict_proba(examples(key, seed=3).inputs)

    assert p.shape == (200, 5)
    assert (p >= 0).all()
    assert_allclose(p.sum(axis=1), 1.0)


@each_model
def test_a_phase_never_seen_in_train_has_probability_zero(key: str) -> None:
    model = fitted(key, classes=3)
    p = model.predict_proba(examples(key, seed=3).inputs)

    assert (p[:, 3:] == 0).all()
    assert np.isfinite(log_loss(p, examples(key, seed=3).y))


@each_model
def test_model_can_be_fitted_to_one_phase(key: str) -> None:
    assert (fitted(key, classes=1).predict(examples(key, seed=3).inputs) == 0).all()


@each_model
def test_input_is_not_changed(key: str) -> None:
    data = examples(key, seed=3)
    before = data.inputs.x.tobytes()

    fitted(key).predict_proba(data.inputs)

    assert data.inputs.x.tobytes() == before


@each_model
def test_single_window_has_the_probabilities_that_it_has_in_a_batch(key: str) -> None:
    model, data = fitted(key), examples(key, seed=3)
    one = ModelInputs(x=data.inputs.x[7:8], spec=data.inputs.spec)

    assert_allclose(model.predict_proba(one), model.predict_proba(data.inputs)[7:8], atol=1e-5)
    assert model.predict_proba(ModelInputs(x=data.inputs.x[:0], spec=data.inputs.spec)).shape == (0, 5)


@pytest.mark.parametrize(
    "key", [key for key in KEYS if registry.find_model(key).kind not in (InputKind.ELAPSED, InputKind.HOST)]
)
def test_window_without_known_values_has_probabilities(key: str) -> None:
    nothing = ModelInputs(x=np.full_like(examples(key, 1).inputs.x, np.nan), spec=spec(key))

    assert np.isfinite(fitted(key).predict_proba(nothing)).all()


@each_model
def test_same_seed_gives_the_same_checkpoint_bytes(key: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        fitted(key).save(tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "one").iterdir())

    assert CHECKPOINT_FILE in files
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in files)


@each_model
def test_restored_model_predicts_the_same_bits(key: str, tmp_path: Path) -> None:
    model, data = fitted(key), examples(key, seed=3)
    model.save(tmp_path / "m")

    loaded = registry.load(tmp_path / "m")

    assert loaded.predict_proba(data.inputs).tobytes() == model.predict_proba(data.inputs).tobytes()
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / CHECKPOINT_FILE).read_bytes() == (tmp_path / "m" / CHECKPOINT_FILE).read_bytes()


@each_model
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        pytest.param({"schema_hash": "6" * 64}, "feature schema 6666666666666666, the model needs 5555", id="schema"),
        pytest.param({"behaviour_fingerprint": "c" * 64}, "behaviour fingerprint cccc", id="fingerprint"),
        pytest.param({"mask": "oracle"}, "channel set oracle, the model needs realistic", id="mask"),
    ],
)
def test_input_of_another_schema_is_refused_with_the_difference(key: str, changed: dict[str, str], words: str) -> None:
    data = examples(key).inputs

    with pytest.raises(MismatchError, match=words):
        fitted(key).predict_proba(ModelInputs(x=data.x, spec=replace(data.spec, **changed)))


def test_columns_in_another_order_are_refused() -> None:
    data = examples("gbt").inputs
    turned = replace(data.spec, names=(data.spec.names[1], data.spec.names[0], *data.spec.names[2:]))

    with pytest.raises(MismatchError, match=r"another order, from column 0 on \(proc\.channel_1\.mean\)"):
        fitted("gbt").predict_proba(ModelInputs(x=data.x, spec=turned))


def test_a_missing_column_is_named() -> None:
    data = examples("gbt").inputs
    fewer = replace(data.spec, names=data.spec.names[:-1])

    with pytest.raises(MismatchError, match=r"proc\.channel_5\.mean\) missing"):
        fitted("gbt").predict_proba(ModelInputs(x=data.x[:, :-1], spec=fewer))


@each_model
def test_model_that_is_not_fitted_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="not fitted"):
        registry.create(key).predict_proba(examples(key).inputs)
    with pytest.raises(MismatchError, match="not fitted"):
        registry.create(key).save(tmp_path)


@each_model
def test_changed_bytes_are_refused_before_a_parser_sees_them(key: str, tmp_path: Path) -> None:
    fitted(key).save(tmp_path)
    name = next(iter(read_header(tmp_path).files))
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)

    with pytest.raises(MismatchError, match=f"{name}: found sha256 .* expected"):
        registry.load(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "error", "words"),
    [
        pytest.param(
            '"phasewatch-checkpoint/2"', '"phasewatch-checkpoint/1"', MismatchError, "found format", id="format"
        ),
        pytest.param(
            '"gbt"', '"os.system"', MismatchError, "found model 'os.system'", id="a model that is not registered"
        ),
        pytest.param(
            '"weights.safetensors"', '"../weights.safetensors"', RunError, "invalid file name", id="a file elsewhere"
        ),
        pytest.param('"armed"', '"harmed"', MismatchError, "found classes", id="classes"),
        pytest.param('"temperature": 1', '"temperature": -1', RunError, "invalid value: temperature", id="temperature"),
        pytest.param('"seen"', '"scene"', RunError, "not a checkpoint", id="field"),
        pytest.param(
            '"input_kind": "table"', '"input_kind": "chair"', RunError, r"input_kind", id="an input that is none"
        ),
        pytest.param('"table": "raw"', '"table": "cooked"', RunError, r"\.table", id="a table that is none"),
    ],
)
def test_header_with_an_invalid_value_is_refused(
    tmp_path: Path, old: str, new: str, error: type[Exception], words: str
) -> None:
    model = registry.create("gbt", settings={"rounds": 2})
    model.fit(examples("gbt"), examples("gbt", seed=1)).save(tmp_path)
    path = tmp_path / CHECKPOINT_FILE
    text = path.read_text()
    assert old in text
    path.write_text(resealed(text.replace(old, new, 1)))

    with pytest.raises(error, match=words):
        registry.load(tmp_path)


def resealed(text: str) -> str:
    """Build an edited header's own digest fit again, as somebody who hides it would."""
    fields = json.loads(text)
    fields["sha256"] = ""
    fields["sha256"] = sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps(fields)


def test_an_edited_header_is_refused(tmp_path: Path) -> None:
    fitted("gbt").save(tmp_path)
    path = tmp_path / CHECKPOINT_FILE
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))

    with pytest.raises(MismatchError, match="the digest does not match"):
        registry.load(tmp_path)


def test_header_that_is_not_text_is_refused(tmp_path: Path) -> None:
    fitted("majority").save(tmp_path)
    (tmp_path / CHECKPOINT_FILE).write_bytes(b'{"format": "\xff"}')

    with pytest.raises(RunError, match="not a checkpoint"):
        registry.load(tmp_path)


def test_expected_input_is_checked_when_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    fitted("gbt").save(tmp_path)

    assert registry.load(tmp_path, expected=spec("gbt")).key == "gbt"
    with pytest.raises(MismatchError, match=r"behaviour fingerprint cccc.*train it again"):
        registry.load(tmp_path, expected=replace(spec("gbt"), behaviour_fingerprint="c" * 64))


def test_model_of_baseline_values_accepts_its_own_windows_after_loading(tmp_path: Path) -> None:
    data = examples("gbt")
    floors = tuple((name, 0.5) for name in ("proc.cpu_user", "netflow.dns_queries"))  # the file sorts them
    own = replace(data.inputs, spec=replace(data.inputs.spec, table=InputVariant.COMMISSIONED, floors=floors))
    model = registry.create("gbt", seed=0, settings=SETTINGS["gbt"])
    model.fit(replace(data, inputs=own), replace(data, inputs=own))
    model.save(tmp_path / "m")

    loaded = registry.load(tmp_path / "m", expected=own.spec)

    assert_array_equal(loaded.predict_proba(own), model.predict_proba(own))
    other = replace(own.spec, floors=(("proc.cpu_user", 0.25), floors[1]))
    with pytest.raises(MismatchError, match="baseline scales"):
        registry.load(tmp_path / "m", expected=other)


def mutants_of_a_checkpoint(folder: Path, count: int) -> dict[str, int]:
    """Damage a checkpoint in many ways; each is refused in words, or still says exactly what it said.

    Gives how many of each model were refused.
    """
    rng = np.random.default_rng(0)
    many: Counter[str] = Counter()
    for key in ("gbt", "mlp", "cnn", "elapsed_time", "minirocket"):
        whole = folder / key
        model, data = fitted(key), examples(key, 20, seed=3)
        model.save(whole)
        said = model.predict_proba(data.inputs)
        names = sorted(path.name for path in whole.iterdir())
        for _ in range(count):
            name = str(rng.choice(names))
            before = (whole / name).read_bytes()
            (whole / name).write_bytes(damaged(before, rng))
            refused = ""
            try:
                assert_array_equal(registry.load(whole).predict_proba(data.inputs), said)
            except (MismatchError, RunError) as error:
                refused = str(error)
            assert not refused or name in refused
            many[key] += bool(refused)
            (whole / name).write_bytes(before)
    return dict(many)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip, cut, double, zero or replace something."""
    at = int(rng.integers(len(data)))
    end = min(len(data), at + int(rng.integers(1, 40)))
    return (
        data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :],
        data[:at], data[:end] + data[at:], data[:at] + bytes(end - at) + data[end:], data[:at] + data[end:],
        data[:at] + rng.bytes(end - at) + data[end:], b"", data + b" ",
    )[int(rng.integers(8))]  # fmt: skip


def test_damaged_checkpoint_is_refused_or_predicts_the_same(tmp_path: Path) -> None:
    mutants_of_a_checkpoint(tmp_path, 20)


@pytest.mark.soak
def test_thousands_of_damaged_checkpoints_are_refused_or_predict_the_same(
    tmp_path: Path, soak_row: Callable[..., None]
) -> None:
    for key, refused in mutants_of_a_checkpoint(tmp_path, 1000).items():
        same = {"loaded and said the same": 1000 - refused, "loaded and said something else": 0}
        soak_row("Damaged checkpoints", model=key, mutants=1000, refused=refused, **same)


def test_an_absent_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"checkpoint.json: not found"):
        registry.load(tmp_path)


def test_unknown_model_or_setting_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="did you mean gbt"):
        registry.create("gtb")
    with pytest.raises(UsageError, match=r"no setting 'trees'; it can set rounds"):
        registry.create("gbt", settings={"trees": 3})
    with pytest.raises(UsageError, match="model gbt"):
        registry.create("gbt", settings={"rounds": "many"})


def test_labels_outside_the_five_phases_are_refused() -> None:
    data = examples("gbt", 3)

    with pytest.raises(MismatchError, match=r"labels -1\.\."):
        LabelledExamples(inputs=data.inputs, y=np.array([-1, 0, 1]))


def test_gbt_learns_without_reading_validation() -> None:
    train, val, test = (examples("gbt", 400, seed=s) for s in range(3))
    shuffled = LabelledExamples(inputs=val.inputs, y=val.y[::-1].copy())

    one, other = (registry.create("gbt").fit(train, v).predict_proba(test.inputs) for v in (val, shuffled))

    assert (one.argmax(axis=1) == test.y).mean() > 0.5
    assert_array_equal(one, other)


def test_seeds_of_gbt_are_different_models() -> None:
    p = [fitted("gbt", seed=seed).predict_proba(examples("gbt", seed=3).inputs) for seed in (0, 1)]

    assert np.abs(p[0] - p[1]).max() > 0.01


def test_best_channel_sees_the_statistics_of_one_channel_and_no_derived_column() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 200)
    names = ("proc.a.mean", "proc.a.std", "ratio.x", "proc.b.mean", "burst.y", "proc.a.mean@60s")
    s = replace(spec("best_channel"), names=names)
    x = rng.normal(size=(200, 6)).astype(np.float32)
    x[:, [2, 4, 5]] = y[:, None]  # columns that tell the phase and are not of one channel's own window
    x[:, 0] += 2 * y
    data = LabelledExamples(inputs=ModelInputs(x=x, spec=s), y=y)
    model = registry.create("best_channel").fit(data, data)
    before = model.predict_proba(data.inputs)

    x = x.copy()
    x[:, 2:] = np.nan

    assert np.array_equal(model.predict_proba(ModelInputs(x=x, spec=s)), before)


def test_majority_predicts_the_most_frequent_phase_of_train() -> None:
    y = np.array([3] * 120 + [0] * 80)
    data = LabelledExamples(inputs=examples("majority").inputs, y=y)
    model = registry.create("majority").fit(data, data)

    assert (model.predict(data.inputs) == 3).all()
    assert_allclose(model.predict_proba(data.inputs)[0], [0.4, 0, 0, 0.6, 0])


def test_elapsed_time_learns_a_schedule_and_extends_its_last_row() -> None:
    model, data = fitted("elapsed_time"), examples("elapsed_time", seed=3)
    late = ModelInputs(x=np.array([[5000.0]], np.float32), spec=data.inputs.spec)

    assert (model.predict(data.inputs) == data.y).mean() > 0.8
    assert model.predict(late).tolist() == [4]


def test_class_weights_balance_the_classes() -> None:
    weights = compute_class_weights(np.array([0, 0, 0, 1]))

    assert weights.tolist() == [4 / 6, 2.0, 0, 0, 0]


def test_temperature_softens_overconfidence_and_leaves_empty_validation_alone() -> None:
    p = np.array([[0.9, 0.1, 0, 0, 0]] * 10)
    y = np.array([0] * 7 + [1] * 3)

    assert fit_temperature(p, y) == pytest.approx(np.log(9) / np.log(7 / 3), rel=1e-5)  # 0.9 becomes 0.7
    assert fit_temperature(p[:0], y[:0]) == 1.0


def test_temperature_that_lowers_no_loss_stays_one() -> None:
    p = np.full((4, 5), 0.2)

    assert fit_temperature(p, np.array([0, 1, 2, 3])) == 1.0


@pytest.mark.parametrize("key", ["gbt", "mlp", "tcn", "minirocket"])
def test_final_model_is_trained_on_all_parts_and_keeps_what_the_selection_model_set(key: str, tmp_path: Path) -> None:
    parts = [examples(key, 120, classes=4), examples(key, 60, seed=1), examples(key, 60, seed=2)]
    model = registry.create(key, settings=SETTINGS.get(key)).fit(*parts[:2]).calibrate(parts[2])
    kept = model.temperature, model.history, model.val_a_macro_f1
    selected = model.predict_proba(parts[2].inputs)

    model.refit(parts)

    assert (model.temperature, model.history, model.val_a_macro_f1) == kept
    assert model.seen == (0, 1, 2, 3, 4)  # train has no windows of the last phase, the validation sets have
    assert (model.predict_proba(parts[2].inputs)[:, 4] > selected[:, 4]).all()
    assert model.trained_on["refit"] == LabelledExamples.concatenate(parts).sha256()
    model.save(tmp_path)
    assert_array_equal(registry.load(tmp_path).predict_proba(parts[2].inputs), model.predict_proba(parts[2].inputs))


def test_net_is_refitted_for_the_number_of_epochs_that_was_best_on_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    from phasewatch.models import neural

    epochs = []
    fit_net = neural.fit_net

    def spy(*args, **kwargs):  # type: ignore[no-untyped-def]
        epochs.append(kwargs["config"].epochs)
        return fit_net(*args, **kwargs)

    monkeypatch.setattr(neural, "fit_net", spy)
    model = registry.create("mlp", settings={"epochs": 6, "width": 8})
    model.fit(examples("mlp"), examples("mlp", seed=1)).refit([examples("mlp"), examples("mlp", seed=1)])

    assert epochs == [6, 1 + int(np.argmax(model.history["val_a_macro_f1"]))]


def test_further_train_windows_join_the_training_set_under_their_own_digest() -> None:
    train, val, extra = (examples("majority", 100, classes=c, seed=c) for c in (2, 2, 5))

    model = registry.create("majority").fit(train, val, extra=extra)

    assert model.seen == (0, 1, 2, 3, 4)
    assert model.trained_on == {"train": train.sha256(), "extra": extra.sha256(), "val_a": val.sha256()}
