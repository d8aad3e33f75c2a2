"""The index of a store on disk: `validation_v1.parquet`, one row per thing that lies where a bundle should be."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phasewatch.atomic import write_whole
from phasewatch.errors import RunError
from phasewatch.parquet import footer_offence
from phasewatch.validate.copies import Key, PriorVerdict
from phasewatch.validate.verdict import USABLE, Verdict
from phasewatch.vocab import PHASES, Source, Status

if TYPE_CHECKING:
    import pyarrow as pa

INDEX = "validation_v1.parquet"

_TEXT = ("profile", "sample_name", "sample_kind", "origin", "role", "session")


def write_index(path: Path, verdicts: Sequence[Verdict]) -> None:
    """Write the verdicts in their order: same verdicts, same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pydict(_columns(verdicts), schema=_schema())
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", compression_level=1, row_group_size=10_000, write_statistics=False)
    write_whole(path, sink.getvalue())


def read_index(path: Path) -> tuple[Verdict, ...]:
    """Read the verdicts back.

    Raises:
        RunError: If the file is absent or not an index.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if words := footer_offence(file.metadata, path.stat().st_size):
                raise ValueError(words)
            if file.schema_arrow.names not in (_schema().names, _schema().names[:-1]):  # an older one has no neighbours
                raise ValueError("its columns are not an index's")
            # A little at a time: as a dict of its own each, the rows of a large index would take more than the verdicts.
            batches = file.iter_batches(batch_size=1_000, use_threads=False)
            return tuple(_verdict(row) for batch in batches for row in batch.to_pylist())
    except (OSError, ValueError, KeyError, TypeError, MemoryError, pa.ArrowException) as exc:
        raise _unreadable(path, exc) from exc


def read_statuses(path: Path) -> dict[tuple[str, str], Status]:
    """Read (host_id, episode_id) → status of the usable bundles, and nothing else: a large index holds much.

    Raises:
        RunError: If the file is absent or not an index.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if words := footer_offence(file.metadata, path.stat().st_size):
                raise ValueError(words)
            table = file.read(columns=["host_id", "episode_id", "status"])
        columns = [table.column(name).to_pylist() for name in ("host_id", "episode_id", "status")]
        rows = [(host, episode, Status(status)) for host, episode, status in zip(*columns, strict=True)]
    except (OSError, ValueError, KeyError, pa.ArrowException) as exc:
        raise _unreadable(path, exc) from exc
    return {(host, episode): status for host, episode, status in rows if status in USABLE}


def read_prior(path: Path) -> dict[Key, PriorVerdict]:
    """Read what an earlier sweep said of each bundle; nothing if there was none, or its index cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["host_id", "episode_id", "status", "sha256", "reasons"]
    try:
        with pq.ParquetFile(path) as file:
            if footer_offence(file.metadata, path.stat().st_size):
                return {}
            table = file.read(columns=names)
        columns = [table.column(name).to_pylist() for name in names]
        return {
            (host, episode): PriorVerdict(status=Status(status), sha256=digest, reasons=frozenset(reasons))
            for host, episode, status, digest, reasons in zip(*columns, strict=True)
        }
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return {}


def _unreadable(path: Path, exc: Exception) -> RunError:
    found = f"no readable index ({exc})" if path.exists() else "absent"
    return RunError(f"{path}: {found}; make it with `phasewatch validate STORE --out RUN`")


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("path", pa.string()), ("episode_id", pa.string()), ("host_id", pa.string()),
            *((name, pa.string()) for name in _TEXT),
            ("plan_seed", pa.int64()), ("agent", pa.bool_()), ("status", pa.string()), ("reasons", pa.list_(pa.string())),
            ("detail", pa.string()), ("sha256", pa.string()), ("telemetry_sha256", pa.string()),
            ("proc_sketch", pa.list_(pa.uint64())), ("bytes", pa.int64()), ("started_wall_ns", pa.int64()),
            ("duration_s", pa.float64()),
            *((f"rows_{source}", pa.int64()) for source in Source), *((f"lost_{source}", pa.int64()) for source in Source),
            *((f"s_{phase}", pa.float64()) for phase in PHASES),
            ("vcpu_wait", pa.float64()), ("duplicate_of", pa.string()), ("flags", pa.uint8()),
            ("neighbours", pa.list_(pa.string())),
        ]
    )  # fmt: skip


def _columns(verdicts: Sequence[Verdict]) -> dict[str, list[Any]]:
    plain = ("path", "episode_id", "host_id", *_TEXT, "plan_seed", "agent", "detail", "sha256", "telemetry_sha256",
             "bytes", "started_wall_ns", "duration_s", "duplicate_of", "flags")  # fmt: skip
    columns: dict[str, list[Any]] = {name: [getattr(v, name) for v in verdicts] for name in plain}
    columns["status"] = [str(v.status) for v in verdicts]
    columns["reasons"] = [list(v.reasons) for v in verdicts]
    columns["proc_sketch"] = [list(v.proc_sketch) for v in verdicts]
    columns["neighbours"] = [list(v.neighbours) for v in verdicts]
    columns["vcpu_wait"] = [None if math.isnan(v.vcpu_wait) else v.vcpu_wait for v in verdicts]
    for i, source in enumerate(Source):
        columns[f"rows_{source}"] = [v.rows[i] for v in verdicts]
        columns[f"lost_{source}"] = [v.lost[i] for v in verdicts]
    for i, phase in enumerate(PHASES):
        columns[f"s_{phase}"] = [v.seconds[i] for v in verdicts]
    return columns


def _verdict(row: dict[str, Any]) -> Verdict:
    return Verdict(
        **{name: row[name] for name in ("path", "episode_id", "host_id", *_TEXT, "plan_seed", "agent", "detail", "sha256",
                                        "telemetry_sha256", "bytes", "started_wall_ns", "duration_s", "duplicate_of", "flags")},
        status=Status(row["status"]), reasons=tuple(row["reasons"]), proc_sketch=tuple(row["proc_sketch"]),
        neighbours=tuple(row.get("neighbours") or ()),
        vcpu_wait=math.nan if row["vcpu_wait"] is None else row["vcpu_wait"],
        rows=tuple(row[f"rows_{source}"] for source in Source), lost=tuple(row[f"lost_{source}"] for source in Source),
        seconds=tuple(row[f"s_{phase}"] for phase in PHASES),
    )  # fmt: skip
