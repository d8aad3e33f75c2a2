"""Measure how polars, DuckDB and pandas read a run's feature table; all must read the same values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from timing import Part, in_turns, rows_of

TABLE = "features_window_v2.parquet"
COLUMNS = ("proc.vcpu_run.mean", "netflow.out_bytes.p95")


def measure(run: Path, *, repeats: int = 5) -> Part:
    """Measure reading two columns and the host of every window."""
    import duckdb
    import pandas as pd
    import polars as pl
    import pyarrow.parquet as pq

    path = str(run / TABLE)
    truth = {c: pq.read_table(path, columns=[c]).column(c).to_numpy() for c in COLUMNS}
    quoted = ", ".join(f'"{c}"' for c in COLUMNS)
    works = {
        "pyarrow": lambda: pq.read_table(path).select(COLUMNS),
        "polars": lambda: pl.read_parquet(path).select(COLUMNS),
        "pandas": lambda: pd.read_parquet(path)[list(COLUMNS)],
        "DuckDB": lambda: duckdb.sql(f"SELECT {quoted} FROM (SELECT * FROM '{path}')").fetchnumpy(),
    }
    found = {"polars": works["polars"](), "pandas": works["pandas"](), "DuckDB": works["DuckDB"]()}
    for name, table in found.items():
        for column in COLUMNS:
            values = np.asarray(np.ma.filled(table[column], np.nan), np.float32)
            if not np.array_equal(values, truth[column], equal_nan=True):
                raise SystemExit(f"{name}: other values of {column}")
    times = in_turns(works, repeats=repeats)
    rows = rows_of(times, repeats=repeats, per="read of two columns")
    about = (
        f"`{TABLE}` of the run, {len(truth[COLUMNS[0]]):,} windows; values equal to the bit, NaN included. DuckDB "
        "reads only the requested columns."
    )
    return Part(title="Interchange", about=about, rows=rows)
