"""docs/performance.md shows the saved numbers, and other libraries read our tables and arrays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.factories.synthetic_runs import World, write_run

from phasewatch.artifacts import FEATURES_FILE

ROOT = Path(__file__).parents[1]


def test_page_shows_the_saved_numbers() -> None:
    done = subprocess.run([sys.executable, "bench/run.py", "--check"], cwd=ROOT, capture_output=True, timeout=60)

    assert done.returncode == 0


def test_every_part_records_its_machine_and_positive_times() -> None:
    parts = json.loads((ROOT / "docs" / "results" / "performance.json").read_bytes())["parts"]

    for part in parts.values():
        assert set(part["measured_on"]) == {"machine", "python", "versions", "load"}
        assert all(row["min_s"] > 0 for row in part["rows"])


@pytest.mark.parametrize(
    ("measured", "must", "aim", "reached"),
    [(9.0, "≤9", "≤2.5", "must"), (9.1, "≤9", "≤2.5", "**missed**"), (2000, "≥1,000", "≥2000", "aim")],
)
def test_figure_reports_the_best_target_that_it_reaches(
    measured: float, must: str, aim: str, reached: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from timing import Figure  # type: ignore[import-not-found]

    assert Figure(what="", must=must, aim=aim, measured=measured).target() == reached


@pytest.mark.soak
@pytest.mark.parametrize("tool", ["polars", "duckdb", "pandas"])
def test_feature_table_is_read_by(tool: str, tmp_path: Path) -> None:
    module = pytest.importorskip(tool, reason=f"{tool} is in the environment of the bench (bench/requirements.txt)")
    path = str(write_run(tmp_path / "run", World(hosts=2, sessions=2)) / FEATURES_FILE)
    name = "proc.vcpu_run.mean"
    expected = pq.read_table(path).column(name).to_numpy()

    if tool == "duckdb":
        column = module.sql(f"SELECT \"{name}\" FROM '{path}'").fetchnumpy()[name]
        column = np.ma.filled(column, np.nan)
    else:
        column = module.read_parquet(path)[name].to_numpy()

    assert np.array_equal(column, expected, equal_nan=True)


def test_loaded_tensors_fit_torch_and_aeon(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from phasewatch import load
    from phasewatch.dataset import write_splits

    run = write_run(tmp_path / "run")
    write_splits(run, "held_out_host")
    train = load(run, "held_out_host", "host-0", "realistic", kind="tensor").train
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(train.x), torch.from_numpy(train.y))
    x, y = next(iter(torch.utils.data.DataLoader(dataset, batch_size=32)))

    # aeon expects (cases, channels, timepoints) and one label per case.
    assert x.shape == (32, len(train.names), 20)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert train.x.shape[0] == train.y.shape[0] == len(train.groups)
