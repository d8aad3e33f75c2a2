"""`predictions_v1.parquet`: what each cell said of each window that it did not learn from, merged in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch import atomic
from phasewatch.artifacts import check_columns, open_run_parquet
from phasewatch.dataset import WindowSet
from phasewatch.models.smoothing import SMOOTHING_NONE
from phasewatch.parquet import convert_parquet_errors
from phasewatch.training.experiment import Experiment
from phasewatch.types import PHASES

NO_FILTER = SMOOTHING_NONE
PROBABILITY_COLUMNS = tuple(f"p_{phase}" for phase in PHASES)
_TEXT_COLUMNS = (
    "recipe", "fold", "threat", "model", "table", "filter", "part", "role", "agent", "episode_id", "session", "host_id",
    "profile", "sample_name", "sample_kind", "origin",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartPredictions:
    """What a model, filtered or not, says of a part's windows: ``(n, 5)`` probabilities."""

    part: str
    filter: str
    data: WindowSet
    p: NDArray[np.float64]


def build_predictions_schema() -> Any:
    """Give the columns and their types, in the file's order."""
    import pyarrow as pa

    text, keys = pa.string(), dict.fromkeys(_TEXT_COLUMNS, pa.string())
    return pa.schema(
        [(name, text) for name in ("recipe", "fold", "threat", "model", "table", "filter")]
        + [("seed", pa.int64())]
        + [(name, keys[name]) for name in _TEXT_COLUMNS[6:]]
        + [("t_center_ns", pa.int64()), ("purity", pa.float32()), ("flags", pa.uint8())]
        + [("y_true", pa.int8()), ("y_pred", pa.int8())]
        + [(name, pa.float32()) for name in PROBABILITY_COLUMNS]
    )


def build_predictions_table(cell: Experiment, said: Sequence[PartPredictions]) -> Any:
    """Make a cell's rows: parts in the order given, windows in theirs."""
    import pyarrow as pa

    return pa.concat_tables([_build_part(cell, one) for one in said])


def write_prediction_table(path: Path, tables: Iterable[Any]) -> None:
    """Write tables one after the other, a row group each, so that memory holds one at a time."""
    import pyarrow.parquet as pq

    with atomic.open_atomic(path) as file:
        with pq.ParquetWriter(
            file,
            build_predictions_schema(),
            compression="zstd",
            compression_level=1,
            use_dictionary=list(_TEXT_COLUMNS),
        ) as out:
            for table in tables:
                out.write_table(table, row_group_size=max(1, table.num_rows))


def read_predictions(path: Path) -> Any:
    """Read predictions.

    Raises:
        RunError: If the file is absent or lacks a column.
    """
    with open_run_parquet(path, "train") as file:
        check_columns(path, file.schema_arrow.names, build_predictions_schema().names, "train")
        with convert_parquet_errors(path, hint="phasewatch train"):
            return file.read(columns=build_predictions_schema().names)


def _build_part(cell: Experiment, said: PartPredictions) -> Any:
    import pyarrow as pa

    # Rounded first, decided then: who re-derives the decision from the file gets the same one.
    p = said.p.astype(np.float32)
    w = said.data.windows
    of = pa.array(w.episode_index, pa.int32())

    def constant(value: str) -> Any:
        return pa.array([value], pa.string()).take(pa.array(np.zeros(len(w), np.int32)))

    def of_episode(values: list[str]) -> Any:
        return pa.array(values, pa.string()).take(of)

    columns = {
        **{n: constant(v) for n, v in cell.keys().items()},
        "filter": constant(said.filter),
        "seed": pa.array(np.full(len(w), cell.seed, np.int64)),
        "part": constant(said.part),
        "role": of_episode([str(e.role) for e in w.episodes]),
        "agent": of_episode(["on" if e.agent else "off" for e in w.episodes]),
        "episode_id": of_episode([e.episode_id for e in w.episodes]),
        "session": of_episode([e.session for e in w.episodes]),
        "host_id": of_episode([e.host_id for e in w.episodes]),
        "profile": of_episode([e.profile for e in w.episodes]),
        "sample_name": of_episode([e.sample_name for e in w.episodes]),
        "sample_kind": of_episode([str(e.sample_kind) for e in w.episodes]),
        "origin": of_episode([str(e.origin) for e in w.episodes]),
        "t_center_ns": pa.array(w.t_center_ns),
        "purity": pa.array(w.purity),
        "flags": pa.array(w.flags),
        "y_true": pa.array(w.y.astype(np.int8)),
        "y_pred": pa.array(p.argmax(axis=1).astype(np.int8)),
        **{column: pa.array(np.ascontiguousarray(p[:, i])) for i, column in enumerate(PROBABILITY_COLUMNS)},
    }
    return pa.table({n: columns[n] for n in build_predictions_schema().names}, schema=build_predictions_schema())
