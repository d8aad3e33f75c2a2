"""A model or a run of a stranger: digests are right, for whoever makes a file makes them; nothing else need be."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load as load_arrays
from tests.models.test_models import examples, fitted
from tests.trust import fuzz_models as fuzz

from phasewatch.errors import RunError, UsageError
from phasewatch.models import registry
from phasewatch.models.adapters import AdapterConfig
from phasewatch.models.base import FloatArray, LabelledExamples, PhaseModel
from phasewatch.models.checkpoint import CHECKPOINT_FILE, WEIGHTS_FILE, pack_weights
from phasewatch.parquet import open_parquet

RULE = {"kind": "infection", "stride_s": 1, "theta": 0.5, "k": 3, "n": 4}

FEATURES = 6
SMALL_TREES = {"rounds": 3, "leaves": 6}


@cache
def weights() -> bytes:
    """A file of trees as training writes it."""
    model = registry.create("gbt", settings=SMALL_TREES)
    return model.fit(examples("gbt"), examples("gbt", 80, seed=1))._files()[WEIGHTS_FILE]


def restore(data: bytes) -> PhaseModel:
    model = registry.create("gbt", settings=SMALL_TREES)
    model.spec, model.seen = examples("gbt", 1).inputs.spec, (0, 1, 2, 3, 4)
    model._restore({WEIGHTS_FILE: data})
    return model


def set_item(name: str, at: tuple[int, ...], value: float) -> Callable[[dict[str, NDArray[Any]]], None]:
    def change(arrays: dict[str, NDArray[Any]]) -> None:
        arrays[name][at] = value

    return change


EVIL_TREES: dict[str, Callable[[dict[str, NDArray[Any]]], None]] = {
    "a child beyond its tree": set_item("left", (0, 0), 10**6),
    "a leaf beyond its tree": set_item("left", (0, 0), -(10**6)),
    "the smallest number as a child": set_item("left", (0, 0), -(2**31)),
    "a child that is its parent": set_item("left", (0, 0), 0),
    "a child before its parent": set_item("right", (0, 1), 0),
    "a node that two reach": lambda arrays: arrays["left"].__setitem__((0, 0), arrays["right"][0, 0]),
    "a column that is not there": set_item("feature", (0, 0), FEATURES),
    "a negative column": set_item("feature", (0, 0), -1),
    "a direction that is none": set_item("nan_left", (0, 0), 2),
    "a threshold that is no number": set_item("threshold", (0, 0), float("nan")),
    "a leaf without end": set_item("leaf", (0, 0), float("inf")),
    "a tree of no leaf": set_item("size", (0,), 0),
    "a tree of too many leaves": set_item("size", (0,), 100),
    "a tree of fewer leaves than are reached": set_item("size", (0,), 2),
    "an array that is cut": lambda arrays: arrays.update(feature=arrays["feature"][:-1]),
    "an array of another type": lambda arrays: arrays.update(left=arrays["left"].astype(np.float64)),
    "an array too few": lambda arrays: arrays.pop("size") is None,  # type: ignore[dict-item]
}


@pytest.mark.parametrize("change", EVIL_TREES.values(), ids=EVIL_TREES)
def test_trees_that_lead_astray_are_refused(change: Callable[[dict[str, NDArray[Any]]], None]) -> None:
    arrays = {name: value.copy() for name, value in load_arrays(weights()).items()}
    change(arrays)

    with pytest.raises(RunError, match=r"^checkpoint of gbt: "):
        restore(pack_weights(arrays))


def test_damaged_trees_are_refused_or_answer_with_probabilities() -> None:
    rng = random.Random(0)
    inputs = examples("gbt", 5).inputs
    for _ in range(150):
        data, _how = fuzz.damaged(WEIGHTS_FILE, weights(), rng)
        try:
            model = restore(data)
        except RunError:
            continue
        assert np.isfinite(model.predict_proba(inputs)).all()


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        *(("mlp", {"width": value}) for value in (30_000, -1, 0, True, 1.5, "64", None, 2**70)),
        ("cnn", {"width": 18}),
        ("transformer", {"width": 2}),
        ("mlp", {"dropout": 1.5}),
        ("mlp", {"depth": 3}),
        ("gbt", {"rounds": 10**9}),
        ("gbt", {"leaves": 1}),
        ("gbt", {"learning_rate": -1.0}),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_made_of_them(
    key: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        registry.create(key, settings=settings)

    checkpoint_of("majority").copy_to(tmp_path)
    header = json.loads((tmp_path / CHECKPOINT_FILE).read_text())
    header.update(model=key, config=settings, input_kind=str(registry.find_model(key).kind))
    (tmp_path / CHECKPOINT_FILE).write_bytes(fuzz.sealed(header))
    with pytest.raises(RunError):
        registry.load(tmp_path)


def test_weights_of_another_width_than_the_settings_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    checkpoint_of("mlp").copy_to(tmp_path)
    header = json.loads((tmp_path / CHECKPOINT_FILE).read_text())
    header["config"]["width"] = 1024
    (tmp_path / CHECKPOINT_FILE).write_bytes(fuzz.sealed(header))

    with pytest.raises(RunError, match=r"net\.layers.* expected F32 of shape"):
        registry.load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1e-300},
        {"temperature": 1e300},
        {"seed": -1},
        {"seed": 2**64},
        {"columns": []},
        {"columns": ["a", "a"]},
        {"columns": [str(i) for i in range(5000)]},
        {"floors": {"a": 1e308}},
        {"seen": []},
        {"history": {"a": "b"}},
        {"files": {}},
        {"files": {f"f{i}": {"bytes": 0, "sha256": ""} for i in range(20)}},
        {"files": {"model.json": {"bytes": 2**40, "sha256": ""}}},
        {"filter": {"transitions": [[0.2] * 5] * 5, "prior": [1e-320] * 5, "kappa": 1.0}},
        {"filter": {"transitions": [[1.0, 0, 0, 0, 0]] * 5, "prior": [0.2] * 5, "kappa": 1.0}},
        {"alarms": [{**RULE, "theta": -1.0}]},
        {"alarms": [{**RULE, "k": 10**9, "n": 10**9}]},
        {"alarms": [{**RULE, "stride_s": 0}]},
        {"alarms": [{**RULE, "kind": "theft"}]},
        {"alarms": [RULE, RULE]},
        {"alarms": {"none": RULE}},
    ],
)
def test_a_header_whose_values_cannot_be_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    checkpoint_of("majority").copy_to(tmp_path)
    header = json.loads((tmp_path / CHECKPOINT_FILE).read_text())
    header.update(changes)
    (tmp_path / CHECKPOINT_FILE).write_bytes(fuzz.sealed(header))

    with pytest.raises(RunError):
        registry.load(tmp_path)


def test_a_header_that_is_nested_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT_FILE).write_text('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}")

    with pytest.raises(RunError):
        registry.load(tmp_path)


@pytest.mark.parametrize("name", [CHECKPOINT_FILE, "model.json"])
def test_a_pipe_in_a_files_place_is_refused_and_not_waited_for(name: str, tmp_path: Path) -> None:
    checkpoint_of("majority").copy_to(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)

    with pytest.raises(RunError, match="not a regular file"):
        registry.load(tmp_path)


class Kept:
    """The files of a checkpoint, in memory."""

    def __init__(self, folder: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}

    def copy_to(self, folder: Path) -> None:
        for name, data in self.files.items():
            (folder / name).write_bytes(data)


@cache
def checkpoint_of(key: str) -> Kept:
    import tempfile

    with tempfile.TemporaryDirectory() as room:
        fitted(key).save(Path(room) / key)
        return Kept(Path(room) / key)


class Fixed(PhaseModel):
    """Answers what it was told to."""

    key = "fixed"
    Config = AdapterConfig
    answer: Any = None

    def _fit(self, train: LabelledExamples, val: LabelledExamples) -> None:
        self.answer = np.full((len(val), 5), 0.2)

    def _predict_proba(self, x: NDArray[np.float32]) -> FloatArray:
        return self.answer  # type: ignore[no-any-return]

    def _files(self) -> Mapping[str, bytes]:
        return {}

    def _restore(self, files: Mapping[str, bytes]) -> None: ...


ROW = [0.2, 0.2, 0.2, 0.2, 0.2]


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param([[0.2] * 4] * 3, id="four phases"),
        pytest.param([ROW] * 2, id="a window too few"),
        pytest.param(ROW, id="one row for all"),
        pytest.param([ROW, [float("nan")] * 5, ROW], id="not a number"),
        pytest.param([ROW, ROW, [float("inf"), 0, 0, 0, 0]], id="without end"),
        pytest.param([ROW, ROW, [-0.1, 1.1, 0, 0, 0]], id="negative"),
        pytest.param([["a"] * 5] * 3, id="texts"),
        pytest.param(None, id="nothing"),
        pytest.param([ROW, [0, 0, 0, 0, 1.0], ROW], id="all on a phase never seen"),
        pytest.param([ROW, [0.0] * 5, ROW], id="zeros"),
        pytest.param([ROW, [1e308] * 5, ROW], id="sums without end"),
    ],
)
def test_answers_that_are_no_probabilities_are_refused_with_the_models_name(answer: object) -> None:
    train, val = examples("gbt", 60, classes=3), examples("gbt", 3, classes=3)
    model = Fixed().fit(train, val)
    assert model.predict_proba(val.inputs).shape == (3, 5)
    model.answer = answer

    with pytest.raises(RunError, match="model fixed"):
        model.predict_proba(val.inputs)


def test_a_table_that_says_it_holds_more_rows_than_it_can_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    rows = 30_000_000
    with pq.ParquetWriter(path, pa.schema([("a", pa.bool_())]), compression="zstd") as writer:
        batch = pa.table({"a": pa.array(np.zeros(3_000_000, np.bool_))})
        for _ in range(rows // 3_000_000):
            writer.write_table(batch, row_group_size=3_000_000)

    with pytest.raises(RunError, match="claims to hold"):
        open_parquet(path, hint="phasewatch features")


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + b"\xff" * 40 + b"PAR1", b"x" * 100])
def test_a_table_that_is_none_is_refused_in_words(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(data)

    with pytest.raises(RunError, match="parquet"):
        open_parquet(tmp_path / "x.parquet", hint="phasewatch features")


def make_models(folder: Path) -> None:
    """Write checkpoints of every model and edge bundles of the six that are exported, over real columns."""
    from unittest.mock import patch

    from tests.models import test_models

    from phasewatch.channels import BASE_CHANNELS, CHANNELS, build_channel_mask
    from phasewatch.features.fingerprint import behaviour_fingerprint
    from phasewatch.features.schema import feature_names, list_channel_columns, schema_hash
    from phasewatch.inference.edge_bundle import (
        EDGE_CARD_FILE,
        EDGE_FORMAT,
        EDGE_SCHEMA_FILE,
        EdgeHeader,
        EdgeModel,
        TrainingOrigin,
        pack_edge_bundle,
    )
    from phasewatch.inference.onnx_export import to_onnx
    from phasewatch.models.base import InputKind, InputSpec
    from phasewatch.types import PHASES

    names = [c.full_name for c, on in zip(CHANNELS, build_channel_mask("proc"), strict=True) if on]
    plain = test_models.spec

    def spec(key: str) -> InputSpec:
        kind = registry.find_model(key).kind
        columns: tuple[str, ...] = tuple(names)
        if kind is InputKind.TABLE:
            columns = list_channel_columns(feature_names(), names)
        elif kind in (InputKind.ELAPSED, InputKind.HOST, InputKind.LOAD):
            columns = plain(key).names
        return InputSpec(
            kind=kind,
            names=columns,
            mask="proc",
            schema_hash=schema_hash(BASE_CHANNELS),
            behaviour_fingerprint=behaviour_fingerprint(BASE_CHANNELS),
        )

    with patch.object(test_models, "spec", spec):
        for row in registry.BUILTIN_MODELS:
            model = fitted(row.key)
            model.save(folder / row.key)
            if row.key not in ("gbt", "mlp", "cnn", "gru", "lstm", "transformer"):
                continue
            header = EdgeHeader(
                format=EDGE_FORMAT,
                recipe="deploy",
                fold="all",
                schema_hash=schema_hash(BASE_CHANNELS),
                behaviour_fingerprint=behaviour_fingerprint(BASE_CHANNELS),
                classes=tuple(map(str, PHASES)),
                trained=TrainingOrigin(),
                models=(
                    EdgeModel(
                        member="proc.onnx",
                        model=row.key,
                        threat="proc",
                        table="raw",
                        seed=0,
                        input_kind=str(row.kind),
                        columns=spec(row.key).names,
                        rules={},
                    ),
                ),
                versions={},
                members={},
            )
            members = {"proc.onnx": to_onnx(model), EDGE_SCHEMA_FILE: b"{}", EDGE_CARD_FILE: b""}
            (folder / f"{row.key}.zip").write_bytes(pack_edge_bundle(header, members))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_no_damaged_model_kills_hangs_or_fills_the_process(
    seed: int, tmp_path: Path, soak_row: Callable[..., None]
) -> None:
    make_models(tmp_path)
    script = Path(fuzz.__file__)
    count = 1_000

    done = subprocess.run(
        [sys.executable, str(script), str(seed), str(count), str(tmp_path)], capture_output=True, text=True, check=True
    )

    ends = json.loads(done.stdout)
    soak_row("Models of strangers", seed=seed, models=count, **{"other ends": 0, **ends})
    assert set(ends) <= {"refused", "answered"}, done.stderr
