"""What `phasewatch export` takes out of a run, and what it never does to it."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.factories.synthetic_runs import World, edit_features, write_run
from tests.factories.trained_runs import FOLD, RECIPE

from phasewatch.artifacts import VALIDATION_FILE
from phasewatch.dataset import load, write_splits
from phasewatch.errors import RunError, UsageError
from phasewatch.inference.edge_bundle import read_edge_bundle
from phasewatch.inference.export import ExportRequest, export_run, read_training_origin
from phasewatch.inference.onnx_export import MAX_PARITY_ERROR, run_onnx
from phasewatch.models import registry
from phasewatch.models.checkpoint import read_header
from phasewatch.pipeline.stages import RunSettings, build_experiments
from phasewatch.training.experiment import Experiment
from phasewatch.training.train import train_experiments

CELL = ExportRequest(recipe=RECIPE, fold=FOLD)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_edge_bundle_holds_every_mask_but_the_oracles_largest_first(run: Path, tmp_path: Path) -> None:
    done = export_run(run, tmp_path / "x.zip", CELL, quote=lambda threat: f"0.99 for {threat}")

    with zipfile.ZipFile(done.path) as archive:
        header = json.loads(archive.read("edge.json"))
        card = archive.read("card.md").decode()
        assert archive.namelist() == [
            "edge.json", "card.md", "feature_schema_v2.json", "portable.onnx", "realistic.onnx",
        ]  # fmt: skip
    assert [m["threat"] for m in header["models"]] == ["realistic", "portable"]
    assert header["trained"] == json.loads(json.dumps(_fields(read_training_origin(run, RECIPE, FOLD))))
    assert header["trained"]["accels"] == ["tcg"]
    assert "0.99 for portable" in card
    assert done.parity <= MAX_PARITY_ERROR
    assert done.windows > 0


def _fields(record: object) -> dict[str, object]:
    return {name: getattr(record, name) for name in record.__struct_fields__}  # type: ignore[attr-defined]


def test_the_held_out_host_is_not_among_those_that_it_learnt_from(run: Path) -> None:
    assert FOLD not in read_training_origin(run, RECIPE, FOLD).hosts


def test_an_embargoed_episode_is_not_among_those_that_it_learnt_from(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", World(windows=8, hosts=3, sessions=6, soaks=0))
    table = pq.read_table(run / VALIDATION_FILE)
    hosts, sketches = table["host_id"].to_pylist(), table["proc_sketch"].to_pylist()
    twins = [i for i, host in enumerate(hosts) if host == "host-2"]
    tested = [i for i, host in enumerate(hosts) if host == FOLD]
    for i, j in zip(twins, tested, strict=True):  # copies of each other: nobody can say which host was first
        sketches[i] = sketches[j] = [1000 + 2 * i, 1001 + 2 * i]
    at = table.schema.get_field_index("proc_sketch")
    pq.write_table(
        table.set_column(at, "proc_sketch", pa.array(sketches, pa.list_(pa.uint64()))), run / VALIDATION_FILE
    )
    fold = next(fold for fold in write_splits(run, RECIPE) if fold.fold == FOLD)

    learnt = read_training_origin(run, RECIPE, FOLD)

    assert len(fold.embargoed) == len(twins)
    assert learnt.hosts == ("host-1",)
    assert learnt.episodes == sum(host == "host-1" for host in hosts)


def test_model_trained_on_other_windows_is_not_exported(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    edit_features(tmp_path / "run", lambda table: table.slice(0, len(table) - 1))
    write_splits(tmp_path / "run", RECIPE)

    with pytest.raises(RunError, match=r"raw-s0: was trained on other windows than the run has now; train it again"):
        export_run(tmp_path / "run", tmp_path / "x.zip", CELL)


def test_bundle_of_a_model_of_baseline_values_has_its_scales(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    cell = Experiment(recipe=RECIPE, fold=FOLD, threat="portable", model="gbt", table="commissioned")
    train_experiments(tmp_path / "run", [cell], workers=1)

    export_run(tmp_path / "run", tmp_path / "x.zip", ExportRequest(recipe=RECIPE, fold=FOLD, table="commissioned"))

    (model,) = read_edge_bundle(tmp_path / "x.zip").header.models
    assert model.floors == dict(read_header(cell.folder(tmp_path / "run")).floors)
    assert len(model.floors) == len(model.columns) / 5


def test_the_same_run_is_the_same_bundle_and_stays_as_it_was(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    one, two = (export_run(run, tmp_path / name, CELL).path.read_bytes() for name in ("one.zip", "two.zip"))

    assert one == two
    assert contents(run) == before


def test_an_onnx_file_is_one_model_alone_and_the_oracles_may_leave_so(run: Path, tmp_path: Path) -> None:
    done = export_run(run, tmp_path / "x.onnx", ExportRequest(recipe=RECIPE, fold=FOLD, threats=("oracle",)))
    sets = load(run, RECIPE, FOLD, "oracle")
    model = registry.load(run / "models" / RECIPE / FOLD / "oracle" / "gbt" / "raw-s0")

    said = run_onnx(done.path.read_bytes(), sets.test.inputs.x)

    assert np.abs(said - model.predict_proba(sets.test.inputs)).max() <= MAX_PARITY_ERROR


@pytest.mark.parametrize(
    ("name", "wanted", "error", "words"),
    [
        pytest.param("x.tar", CELL, UsageError, "an edge bundle X.zip, or one model X.onnx", id="another suffix"),
        pytest.param("x.onnx", CELL, UsageError, "choose one channel set", id="three channel sets for one file"),
        pytest.param("x.zip", ExportRequest(recipe=RECIPE), UsageError, "choose one with --fold", id="no fold named"),
        pytest.param(
            "x.zip",
            ExportRequest(recipe=RECIPE, fold=FOLD, threats=("oracle",)),
            UsageError,
            "cannot use the guest's channels",
            id="oracle in an edge bundle",
        ),
        pytest.param(
            "x.zip",
            ExportRequest(recipe=RECIPE, fold=FOLD, threats=("proc",)),
            RunError,
            "was not trained with proc",
            id="channel set never trained",
        ),
        pytest.param(
            "x.zip",
            ExportRequest(recipe=RECIPE, fold=FOLD, model="cnn"),
            RunError,
            "cnn was not trained with any channel set",
            id="model never trained",
        ),
        pytest.param(
            "x.zip",
            ExportRequest(recipe=RECIPE, fold=FOLD, model="cnnn"),
            UsageError,
            "did you mean cnn",
            id="no model",
        ),
        pytest.param("x.zip", ExportRequest(recipe="deploi", fold=FOLD), UsageError, "deploi", id="no such recipe"),
    ],
)
def test_export_that_is_refused_names_the_reason_and_writes_nothing(
    run: Path, tmp_path: Path, name: str, wanted: ExportRequest, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        export_run(run, tmp_path / name, wanted)

    assert list(tmp_path.iterdir()) == []


def test_suggested_command_trains_the_missing_model(run: Path, tmp_path: Path) -> None:
    wanted = ExportRequest(recipe=RECIPE, fold=FOLD, model="cnn", threats=("proc+tap",))
    with pytest.raises(RunError, match="train it with") as told:
        export_run(run, tmp_path / "x.zip", wanted)
    words = shlex.split(str(told.value).split("`")[1])
    asked = {option: value.split(",") for option, value in zip(words[3::2], words[4::2], strict=True)}

    cells = build_experiments(
        RunSettings(
            store=run, run=Path(words[2]), models=tuple(asked["--models"]), recipes=tuple(asked["--recipes"]),
            channel_sets=tuple(asked["--channels"]),
        )
    )  # fmt: skip

    assert {(cell.model, cell.recipe, cell.threat) for cell in cells} == {("cnn", RECIPE, "proc+tap")}
    assert FOLD in {cell.fold for cell in cells}


def test_nothing_is_ever_written_into_a_run(run: Path) -> None:
    with pytest.raises(UsageError, match="is in the run"):
        export_run(run, run / "exports" / "x.zip", CELL)


def test_a_bundle_is_read_where_it_stands_in_any_zip_reader(run: Path, tmp_path: Path) -> None:
    data = export_run(run, tmp_path / "x.zip", CELL).path.read_bytes()
    infos = zipfile.ZipFile(io.BytesIO(data)).infolist()

    assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}
    assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)}
