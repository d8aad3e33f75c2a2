"""The index of a store, `validation_v1.parquet` (one verdict per bundle), and the data accounting of the validation."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phasewatch.atomic import write_atomic
from phasewatch.errors import RunError
from phasewatch.parquet import check_footer
from phasewatch.types import PHASES, BundleStatus, SourceKind
from phasewatch.validate.copies import EpisodeKey, PriorVerdict
from phasewatch.validate.verdict import USABLE_STATUSES, BundleVerdict

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "build_accounting",
    "is_balanced",
    "read_index",
    "read_prior_verdicts",
    "read_statuses",
    "render_accounting",
    "write_index",
]

_TEXT_COLUMNS = ("profile", "sample_name", "sample_kind", "origin", "role", "session")
# Columns whose values are fields of a verdict as they are.
_PLAIN_COLUMNS = (
    "path",
    "episode_id",
    "host_id",
    *_TEXT_COLUMNS,
    "plan_seed",
    "agent",
    "detail",
    "sha256",
    "telemetry_sha256",
    "bytes",
    "started_wall_ns",
    "duration_s",
    "duplicate_of",
    "flags",
)


def write_index(path: Path, verdicts: Sequence[BundleVerdict]) -> None:
    """Write the verdicts in their order; equal verdicts give equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pydict(_build_columns(verdicts), schema=_build_schema())
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", compression_level=1, row_group_size=10_000, write_statistics=False)
    write_atomic(path, sink.getvalue())


def read_index(path: Path) -> tuple[BundleVerdict, ...]:
    """Read the verdicts of an index.

    Raises:
        RunError: If the file is absent or not an index.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            check_footer(file.metadata, path.stat().st_size)
            names = _build_schema().names
            if file.schema_arrow.names not in (names, names[:-1], names[:-2]):  # older: no background, no neighbours
                raise ValueError("its columns are not those of an index")
            # In batches, because the rows of a large index take more memory as dicts than as verdicts.
            batches = file.iter_batches(batch_size=1_000, use_threads=False)
            return tuple(_parse_row(row) for batch in batches for row in batch.to_pylist())
    except (OSError, ValueError, KeyError, TypeError, MemoryError, pa.ArrowException) as exc:
        raise _build_read_error(path, exc) from exc


def read_statuses(path: Path) -> dict[tuple[str, str], BundleStatus]:
    """Read the status of the usable bundles by (host_id, episode_id), without the other columns.

    Raises:
        RunError: If the file is absent or not an index.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            check_footer(file.metadata, path.stat().st_size)
            table = file.read(columns=["host_id", "episode_id", "status"])
        columns = [table.column(name).to_pylist() for name in ("host_id", "episode_id", "status")]
        rows = [(host, episode, BundleStatus(status)) for host, episode, status in zip(*columns, strict=True)]
    except (OSError, ValueError, KeyError, pa.ArrowException) as exc:
        raise _build_read_error(path, exc) from exc
    return {(host, episode): status for host, episode, status in rows if status in USABLE_STATUSES}


def read_prior_verdicts(path: Path) -> dict[EpisodeKey, PriorVerdict]:
    """Read the verdicts of an earlier validation; empty if there is no readable index."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["host_id", "episode_id", "status", "sha256", "reasons"]
    try:
        with pq.ParquetFile(path) as file:
            check_footer(file.metadata, path.stat().st_size)
            table = file.read(columns=names)
        columns = [table.column(name).to_pylist() for name in names]
        return {
            (host, episode): PriorVerdict(status=BundleStatus(status), sha256=digest, reasons=frozenset(reasons))
            for host, episode, status, digest, reasons in zip(*columns, strict=True)
        }
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return {}


def _build_read_error(path: Path, exc: Exception) -> RunError:
    problem = f"no readable index ({exc})" if path.exists() else "absent"
    return RunError(f"{path}: {problem}; make it with `phasewatch validate STORE --out RUN`")


def _build_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("path", pa.string()),
            ("episode_id", pa.string()),
            ("host_id", pa.string()),
            *((name, pa.string()) for name in _TEXT_COLUMNS),
            ("plan_seed", pa.int64()),
            ("agent", pa.bool_()),
            ("status", pa.string()),
            ("reasons", pa.list_(pa.string())),
            ("detail", pa.string()),
            ("sha256", pa.string()),
            ("telemetry_sha256", pa.string()),
            ("proc_sketch", pa.list_(pa.uint64())),
            ("bytes", pa.int64()),
            ("started_wall_ns", pa.int64()),
            ("duration_s", pa.float64()),
            *((f"rows_{source}", pa.int64()) for source in SourceKind),
            *((f"lost_{source}", pa.int64()) for source in SourceKind),
            *((f"s_{phase}", pa.float64()) for phase in PHASES),
            ("vcpu_wait", pa.float64()),
            ("duplicate_of", pa.string()),
            ("flags", pa.uint8()),
            ("neighbours", pa.list_(pa.string())),
            ("background", pa.string()),
        ]
    )


def _build_columns(verdicts: Sequence[BundleVerdict]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [getattr(v, name) for v in verdicts] for name in _PLAIN_COLUMNS}
    columns["status"] = [str(v.status) for v in verdicts]
    columns["reasons"] = [list(v.reasons) for v in verdicts]
    columns["proc_sketch"] = [list(v.proc_sketch) for v in verdicts]
    columns["neighbours"] = [list(v.neighbours) for v in verdicts]
    columns["background"] = [v.background for v in verdicts]
    columns["vcpu_wait"] = [None if math.isnan(v.vcpu_wait) else v.vcpu_wait for v in verdicts]
    for i, source in enumerate(SourceKind):
        columns[f"rows_{source}"] = [v.rows[i] for v in verdicts]
        columns[f"lost_{source}"] = [v.lost[i] for v in verdicts]
    for i, phase in enumerate(PHASES):
        columns[f"s_{phase}"] = [v.seconds[i] for v in verdicts]
    return columns


def _parse_row(row: dict[str, Any]) -> BundleVerdict:
    return BundleVerdict(
        **{name: row[name] for name in _PLAIN_COLUMNS},
        status=BundleStatus(row["status"]),
        reasons=tuple(row["reasons"]),
        proc_sketch=tuple(row["proc_sketch"]),
        neighbours=tuple(row.get("neighbours") or ()),
        background=row.get("background"),
        vcpu_wait=math.nan if row["vcpu_wait"] is None else row["vcpu_wait"],
        rows=tuple(row[f"rows_{source}"] for source in SourceKind),
        lost=tuple(row[f"lost_{source}"] for source in SourceKind),
        seconds=tuple(row[f"s_{phase}"] for phase in PHASES),
    )


def build_accounting(verdicts: Sequence[BundleVerdict]) -> dict[str, Any]:
    """Return the data accounting of the validation: what came in, what is used, and what was lost for which reason.

    ``rows_in`` counts the rows that the samplers emitted, as far as manifests are readable. ``rows_used`` counts those
    of usable sources of usable bundles. ``rows_lost`` counts the others by reason, so that
    ``rows_in = rows_used + sum(rows_lost)``.
    """
    statuses = Counter(v.status for v in verdicts)
    rows_in = rows_used = 0
    lost: Counter[str] = Counter()
    per_source: dict[str, dict[str, int]] = {str(s): {"in": 0, "used": 0, "lost": 0} for s in SourceKind}
    for v in verdicts:
        for source, rows, never in zip(SourceKind, v.rows, v.lost, strict=True):
            rows_in += rows + never
            lost[f"never arrived:{source}"] += never
            if v.status not in USABLE_STATUSES:
                lost[str(v.status)] += rows
                used = 0
            elif f"clock-base:{source}" in v.reasons:
                lost[f"clock-base:{source}"] += rows
                used = 0
            else:
                used = rows
            rows_used += used
            entry = per_source[str(source)]
            entry["in"], entry["used"] = entry["in"] + rows + never, entry["used"] + used
            entry["lost"] += rows + never - used
    reasons = Counter(code for v in verdicts for code in v.reasons)
    return {
        "in": len(verdicts),
        **{str(status): statuses.get(status, 0) for status in BundleStatus},
        "reasons": dict(sorted(reasons.items())),
        "rows_in": rows_in,
        "rows_used": rows_used,
        "rows_lost": {reason: n for reason, n in sorted(lost.items()) if n},
        "rows_by_source": per_source,
    }


def is_balanced(stage: dict[str, Any]) -> bool:
    """Whether the accounting of a stage adds up."""
    bundles = bool(stage["in"] == sum(stage[str(status)] for status in BundleStatus))
    return bundles and bool(stage["rows_in"] == stage["rows_used"] + sum(stage["rows_lost"].values()))


def render_accounting(stages: dict[str, dict[str, Any]]) -> bytes:
    """Render the content of `ledger.json`."""
    return (json.dumps({"stages": stages}, indent=1) + "\n").encode()
