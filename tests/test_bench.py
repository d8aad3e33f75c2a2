"""docs/performance.md shows what was measured, and other people's tools read our tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.factories.synthetic_runs import World, write_run

ROOT = Path(__file__).parents[1]


def test_the_page_shows_the_numbers_that_are_kept() -> None:
    done = subprocess.run([sys.executable, "bench/run.py", "--check"], cwd=ROOT, capture_output=True, timeout=60)

    assert done.returncode == 0


def test_every_part_says_on_what_it_was_measured() -> None:
    kept = json.loads((ROOT / "docs" / "results" / "performance.json").read_bytes())["parts"]

    for part in kept.values():
        assert set(part["measured_on"]) == {"machine", "python", "versions", "load"}
        assert all(row["min_s"] > 0 for row in part["rows"])


def test_a_figure_says_whether_it_reaches_what_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from timing import Figure  # type: ignore[import-not-found]

    def fate(measured: float, must: str, aim: str) -> str:
        return str(Figure(what="", must=must, aim=aim, measured=measured).fate())

    assert fate(9.0, "≤9", "≤2.5") == "must"
    assert fate(9.1, "≤9", "≤2.5") == "**missed**"
    assert fate(2000, "≥1,000", "≥2000") == "aim"


@pytest.mark.soak
@pytest.mark.parametrize("tool", ["polars", "duckdb", "pandas"])
def test_the_feature_table_is_plain_parquet(tool: str, tmp_path: Path) -> None:
    module = pytest.importorskip(tool, reason=f"{tool} is in the bench's environment (bench/requirements.txt)")
    path = str(write_run(tmp_path / "run", World(hosts=2, sessions=2)) / "features_window_v1.parquet")
    name = "proc.vcpu_run.mean"
    expected = pq.read_table(path).column(name).to_numpy()

    if tool == "duckdb":
        found = module.sql(f"SELECT \"{name}\" FROM '{path}'").fetchnumpy()[name]
        found = np.ma.filled(found, np.nan)
    else:
        found = module.read_parquet(path)[name].to_numpy()

    assert np.array_equal(found, expected, equal_nan=True)


def test_what_load_gives_is_what_torch_and_aeon_take(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from phasewatch import load
    from phasewatch.dataset import write_splits

    run = write_run(tmp_path / "run")
    write_splits(run, "held_out_host")
    train = load(run, "held_out_host", "host-0", "realistic", kind="tensor").train
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.from_numpy(train.x), torch.from_numpy(train.y)), batch_size=32
    )
    x, y = next(iter(loader))

    # aeon: (cases, channels, timepoints) and one label a case.
    assert x.shape == (32, len(train.names), 20)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert train.x.shape[0] == train.y.shape[0] == len(train.groups)
