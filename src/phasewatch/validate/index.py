"""The index of a store on disk: `validation_v1.parquet`, one row per thing that lies where a bundle should be."""

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
from phasewatch.parquet import find_footer_fault
from phasewatch.types import PHASES, BundleStatus, SourceKind
from phasewatch.validate.copies import EpisodeKey, PriorVerdict
from phasewatch.validate.verdict import USABLE_STATUSES, BundleVerdict

if TYPE_CHECKING:
    import pyarrow as pa


_TEXT_COLUMNS = ("profile", "sample_name", "sample_kind", "origin", "role", "session")


def write_index(path: Path, verdicts: Sequence[BundleVerdict]) -> None:
    """Write the verdicts in their order: same verdicts, same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pydict(_build_columns(verdicts), schema=_build_schema())
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", compression_level=1, row_group_size=10_000, write_statistics=False)
    write_atomic(path, sink.getvalue())


def read_index(path: Path) -> tuple[BundleVerdict, ...]:
    """Read the verdicts back.

    Raises:
        RunError: If the file is absent or not an index.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if words := find_footer_fault(file.metadata, path.stat().st_size):
                raise ValueError(words)
            if file.schema_arrow.names not in (
                _build_schema().names,
                _build_schema().names[:-1],
            ):  # an older one has no neighbours
                raise ValueError("its columns are not an index's")
            # A little at a time: as a dict of its own each, the rows of a large index would take more than the verdicts.
            batches = file.iter_batches(batch_size=1_000, use_threads=False)
            return tuple(_parse_row(row) for batch in batches for row in batch.to_pylist())
    except (OSError, ValueError, KeyError, TypeError, MemoryError, pa.ArrowException) as exc:
        raise _build_read_error(path, exc) from exc


def read_statuses(path: Path) -> dict[tuple[str, str], BundleStatus]:
    """Read (host_id, episode_id) → status of the usable bundles, and nothing else: a large index holds much.

    Raises:
        RunError: If the file is absent or not an index.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if words := find_footer_fault(file.metadata, path.stat().st_size):
                raise ValueError(words)
            table = file.read(columns=["host_id", "episode_id", "status"])
        columns = [table.column(name).to_pylist() for name in ("host_id", "episode_id", "status")]
        rows = [(host, episode, BundleStatus(status)) for host, episode, status in zip(*columns, strict=True)]
    except (OSError, ValueError, KeyError, pa.ArrowException) as exc:
        raise _build_read_error(path, exc) from exc
    return {(host, episode): status for host, episode, status in rows if status in USABLE_STATUSES}


def read_prior_verdicts(path: Path) -> dict[EpisodeKey, PriorVerdict]:
    """Read what an earlier sweep said of each bundle; nothing if there was none, or its index cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["host_id", "episode_id", "status", "sha256", "reasons"]
    try:
        with pq.ParquetFile(path) as file:
            if find_footer_fault(file.metadata, path.stat().st_size):
                return {}
            table = file.read(columns=names)
        columns = [table.column(name).to_pylist() for name in names]
        return {
            (host, episode): PriorVerdict(status=BundleStatus(status), sha256=digest, reasons=frozenset(reasons))
            for host, episode, status, digest, reasons in zip(*columns, strict=True)
        }
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return {}


def _build_read_error(path: Path, exc: Exception) -> RunError:
    found = f"no readable index ({exc})" if path.exists() else "absent"
    return RunError(f"{path}: {found}; make it with `phasewatch validate STORE --out RUN`")


def _build_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("path", pa.string()), ("episode_id", pa.string()), ("host_id", pa.string()),
            *((name, pa.string()) for name in _TEXT_COLUMNS),
            ("plan_seed", pa.int64()), ("agent", pa.bool_()), ("status", pa.string()), ("reasons", pa.list_(pa.string())),
            ("detail", pa.string()), ("sha256", pa.string()), ("telemetry_sha256", pa.string()),
            ("proc_sketch", pa.list_(pa.uint64())), ("bytes", pa.int64()), ("started_wall_ns", pa.int64()),
            ("duration_s", pa.float64()),
            *((f"rows_{source}", pa.int64()) for source in SourceKind), *((f"lost_{source}", pa.int64()) for source in SourceKind),
            *((f"s_{phase}", pa.float64()) for phase in PHASES),
            ("vcpu_wait", pa.float64()), ("duplicate_of", pa.string()), ("flags", pa.uint8()),
            ("neighbours", pa.list_(pa.string())),
        ]
    )  # fmt: skip


def _build_columns(verdicts: Sequence[BundleVerdict]) -> dict[str, list[Any]]:
    plain = ("path", "episode_id", "host_id", *_TEXT_COLUMNS, "plan_seed", "agent", "detail", "sha256", "telemetry_sha256",
             "bytes", "started_wall_ns", "duration_s", "duplicate_of", "flags")  # fmt: skip
    columns: dict[str, list[Any]] = {name: [getattr(v, name) for v in verdicts] for name in plain}
    columns["status"] = [str(v.status) for v in verdicts]
    columns["reasons"] = [list(v.reasons) for v in verdicts]
    columns["proc_sketch"] = [list(v.proc_sketch) for v in verdicts]
    columns["neighbours"] = [list(v.neighbours) for v in verdicts]
    columns["vcpu_wait"] = [None if math.isnan(v.vcpu_wait) else v.vcpu_wait for v in verdicts]
    for i, source in enumerate(SourceKind):
        columns[f"rows_{source}"] = [v.rows[i] for v in verdicts]
        columns[f"lost_{source}"] = [v.lost[i] for v in verdicts]
    for i, phase in enumerate(PHASES):
        columns[f"s_{phase}"] = [v.seconds[i] for v in verdicts]
    return columns


def _parse_row(row: dict[str, Any]) -> BundleVerdict:
    return BundleVerdict(
        **{name: row[name] for name in ("path", "episode_id", "host_id", *_TEXT_COLUMNS, "plan_seed", "agent", "detail", "sha256",
                                        "telemetry_sha256", "bytes", "started_wall_ns", "duration_s", "duplicate_of", "flags")},
        status=BundleStatus(row["status"]), reasons=tuple(row["reasons"]), proc_sketch=tuple(row["proc_sketch"]),
        neighbours=tuple(row.get("neighbours") or ()),
        vcpu_wait=math.nan if row["vcpu_wait"] is None else row["vcpu_wait"],
        rows=tuple(row[f"rows_{source}"] for source in SourceKind), lost=tuple(row[f"lost_{source}"] for source in SourceKind),
        seconds=tuple(row[f"s_{phase}"] for phase in PHASES),
    )  # fmt: skip


def build_accounting(verdicts: Sequence[BundleVerdict]) -> dict[str, Any]:
    """Give the ledger's entry of the validation stage.

    Rows in = rows emitted by the samplers, as far as a readable manifest tells; used = rows of usable bundles whose
    source was usable too; lost = by reason. ``rows_in = rows_used + sum(rows_lost)``.
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
    """Tell whether the entry adds up."""
    bundles = bool(stage["in"] == sum(stage[str(status)] for status in BundleStatus))
    return bundles and bool(stage["rows_in"] == stage["rows_used"] + sum(stage["rows_lost"].values()))


def render_accounting(stages: dict[str, dict[str, Any]]) -> bytes:
    """Spell `ledger.json`."""
    return (json.dumps({"stages": stages}, indent=1) + "\n").encode()
