"""The table `predictions_v1.parquet`: each experiment's predictions of windows outside its training set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch import atomic
from phasewatch.artifacts import check_columns, open_run_parquet
from phasewatch.dataset import EpisodeWindows
from phasewatch.models.smoothing import SMOOTHING_NONE
from phasewatch.parquet import convert_parquet_errors
from phasewatch.training.experiment import Experiment
from phasewatch.types import PHASES

__all__ = [
    "NO_FILTER",
    "PROBABILITY_COLUMNS",
    "WINDOW_TEXT_COLUMNS",
    "PartPredictions",
    "PredictionPart",
    "build_predictions_schema",
    "build_predictions_table",
    "read_predictions",
    "write_prediction_table",
]

NO_FILTER = SMOOTHING_NONE
PROBABILITY_COLUMNS = tuple(f"p_{phase}" for phase in PHASES)
WINDOW_TEXT_COLUMNS = (
    "threat",
    "model",
    "table",
    "filter",
    "part",
    "role",
    "agent",
    "episode_id",
    "session",
    "host_id",
    "profile",
    "sample_name",
    "sample_kind",
    "origin",
)
_TEXT_COLUMNS = ("recipe", "fold", *WINDOW_TEXT_COLUMNS)


class PredictionPart(StrEnum):
    """The values of the column `part`: windows every five seconds, or every second (``_1s``).

    `IDLE` holds the baseline episodes of the hosts that the fold holds out: clean machines that run no load.
    """

    VAL_B = "val_b"
    TEST = "test"
    SOAK = "soak"
    IDLE = "idle"
    VAL_B_LIVE = "val_b_1s"
    TEST_LIVE = "test_1s"
    SOAK_LIVE = "soak_1s"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartPredictions:
    """A model's predictions of the windows of one part.

    Attributes:
        part: The part.
        filter: Smoothing of the probabilities (`SMOOTHING_NONE`, `SMOOTHING_PHASE`, `SMOOTHING_SCHEDULE`).
        windows: The windows.
        p: ``(n, 5)`` float64 probabilities.
    """

    part: PredictionPart
    filter: str
    windows: EpisodeWindows
    p: NDArray[np.float64]


def build_predictions_schema() -> Any:
    """Return the pyarrow schema of the file."""
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


def build_predictions_table(experiment: Experiment, parts: Sequence[PartPredictions]) -> Any:
    """Build the pyarrow table of an experiment: parts in the given order, windows in their own."""
    import pyarrow as pa

    return pa.concat_tables([_build_part(experiment, part) for part in parts])


def write_prediction_table(path: Path, tables: Iterable[Any]) -> None:
    """Write pyarrow tables as row groups of one file; memory holds one table at a time."""
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
    """Read predictions as a pyarrow table.

    Raises:
        RunError: If the file is absent, unreadable or lacks a column.
    """
    with open_run_parquet(path, "train") as file:
        check_columns(path, file.schema_arrow.names, build_predictions_schema().names, "train")
        with convert_parquet_errors(path, hint="phasewatch train"):
            return file.read(columns=build_predictions_schema().names)


def _build_part(experiment: Experiment, predictions: PartPredictions) -> Any:
    import pyarrow as pa

    # Rounded before the argmax, so that the decision can be recomputed from the file.
    p = predictions.p.astype(np.float32)
    w = predictions.windows
    episode_index = pa.array(w.episode_index, pa.int32())

    def constant(value: str) -> Any:
        return pa.array([value], pa.string()).take(pa.array(np.zeros(len(w), np.int32)))

    def of_episode(values: list[str]) -> Any:
        return pa.array(values, pa.string()).take(episode_index)

    columns = {
        **{n: constant(v) for n, v in experiment.keys().items()},
        "filter": constant(predictions.filter),
        "seed": pa.array(np.full(len(w), experiment.seed, np.int64)),
        "part": constant(str(predictions.part)),
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
