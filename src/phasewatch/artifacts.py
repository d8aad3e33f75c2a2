"""What stands in a run: the feature schema, who its episodes are, the digests of its files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from phasewatch import parquet
from phasewatch.errors import RunError
from phasewatch.identity import find_contested_ids
from phasewatch.types import PHASES, BundleStatus, EpisodeOrigin, EpisodeRole, SampleKind

ACCOUNTING_FILE = "ledger.json"
SPLIT_INDEX_FILE = "splits_v1.json"
PREDICTIONS_FILE = "predictions_v1.parquet"
METRICS_FILE = "metrics_v1.json"
REPORT_FILE = "report.html"
BINS_INDEX_PATH = "grids/index.parquet"
BINS_PATHS = ("grids/grids.npy", "grids/levels.npy", BINS_INDEX_PATH)

FEATURES_FILE = "features_window_v1.parquet"
FEATURE_SCHEMA_FILE = "feature_schema_v1.json"
FEATURE_FILES = (FEATURES_FILE, "features_episode_v1.parquet", FEATURE_SCHEMA_FILE)
VALIDATION_FILE = "validation_v1.parquet"
SPLITS_DIR = "splits"
RUN_FILES = (
    "run.json",
    VALIDATION_FILE,
    ACCOUNTING_FILE,
    FEATURES_FILE,
    FEATURE_SCHEMA_FILE,
    SPLIT_INDEX_FILE,
    PREDICTIONS_FILE,
    METRICS_FILE,
    "audit_v1.json",
)  # a folder with one of these is a run
_VERDICT_COLUMNS = (
    "episode_id", "host_id", "profile", "sample_name", "sample_kind", "origin", "role", "status", "session", "plan_seed",
    "agent", "proc_sketch", "started_wall_ns", "duration_s",
)  # fmt: skip
_NEIGHBOURS_COLUMN = "neighbours"  # an index of 0.2 and before has none


class FeatureSchema(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of `feature_schema_v1.json`."""

    phases: tuple[str, ...]
    feature_names: tuple[str, ...]
    schema_hash: str
    behaviour_fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEpisode:
    """Who an episode of the feature table is. `session` is its own id where it ran alone."""

    episode_id: str
    host_id: str
    profile: str
    sample_name: str
    sample_kind: SampleKind
    origin: EpisodeOrigin
    role: EpisodeRole
    session: str
    agent: bool
    plan_seed: int
    proc_sketch: tuple[int, ...]
    started_wall_ns: int
    duration_s: float
    neighbours: tuple[str, ...] = ()


def read_run_episodes(run: Path, *, only: Iterable[str]) -> tuple[RunEpisode, ...]:
    """Return the named episodes as the validator saw them, in the order (host, episode).

    Of an id that several hosts hold, the row of the host that keeps it (`identity.find_taken_ids`).

    Raises:
        RunError: If one has no usable row, or two.
    """
    wanted = set(only)
    path = run / VALIDATION_FILE
    found: dict[str, RunEpisode] = {}
    rows = _read_usable_rows(path)
    taken = find_contested_ids((row["host_id"], row["episode_id"]) for row in rows)
    for row in rows:
        if row["episode_id"] not in wanted or (row["host_id"], row["episode_id"]) in taken:
            continue
        if row["episode_id"] in found:
            raise RunError(f"{path}: episode {row['episode_id']} is usable twice; ids must be unique in a store")
        found[row["episode_id"]] = _parse_run_episode(row, path)
    if missing := wanted - set(found):
        raise RunError(
            f"{path}: episode {min(missing)} has windows in {FEATURES_FILE} but is not accepted or degraded here; "
            "the two are of different sweeps, run `phasewatch features` again"
        )
    return tuple(sorted(found.values(), key=lambda e: (e.host_id, e.episode_id)))


def read_duplicate_id_episodes(run: Path) -> tuple[RunEpisode, ...]:
    """Return the usable episodes that no file of the run may name, because another host holds an episode of their id."""
    path = run / VALIDATION_FILE
    rows = _read_usable_rows(path)
    taken = find_contested_ids((row["host_id"], row["episode_id"]) for row in rows)
    found = [_parse_run_episode(row, path) for row in rows if (row["host_id"], row["episode_id"]) in taken]
    return tuple(sorted(found, key=lambda e: (e.host_id, e.episode_id)))


def _read_usable_rows(path: Path) -> list[dict[str, Any]]:
    with open_run_parquet(path, "validate") as file:
        there = file.schema_arrow.names
        check_columns(path, there, _VERDICT_COLUMNS, "validate")
        rows = file.read(
            columns=[*_VERDICT_COLUMNS, *([_NEIGHBOURS_COLUMN] if _NEIGHBOURS_COLUMN in there else [])]
        ).to_pylist()
    return [row for row in rows if row["status"] in (BundleStatus.ACCEPTED, BundleStatus.DEGRADED)]


def read_schema(run: Path) -> FeatureSchema:
    """Read what the columns of the feature table are."""
    path = run / FEATURE_SCHEMA_FILE
    try:
        schema = msgspec.json.decode(path.read_bytes(), type=FeatureSchema)
    except FileNotFoundError as exc:
        raise RunError(f"{path}: absent; make it with `phasewatch features {run}`") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RunError(f"{path}: not a feature schema: {exc}; make it again with `phasewatch features {run}`") from exc
    if schema.phases[: len(PHASES)] != tuple(map(str, PHASES)):
        raise RunError(f"{path}: found phases {', '.join(schema.phases)}, expected {', '.join(PHASES)}")
    return schema


def file_sha256(path: Path) -> str:
    """Digest of a file's bytes.

    Raises:
        RunError: If it is absent.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as exc:
        raise RunError(f"{path}: absent; the stage that makes it has not run") from exc


def open_run_parquet(path: Path, command: str) -> Any:
    """Open a parquet file of the run; `command` is what makes it."""
    return parquet.open_parquet(path, hint=f"phasewatch {command}")


def read_columns(path: Path, columns: Sequence[str], command: str) -> Any:
    """Read some columns of a parquet file of the run."""
    with open_run_parquet(path, command) as file:
        check_columns(path, file.schema_arrow.names, columns, command)
        with parquet.convert_parquet_errors(path, hint=f"phasewatch {command}"):
            return file.read(columns=list(columns))


def check_columns(path: Path, there: Sequence[str], wanted: Sequence[str], command: str) -> None:
    """Refuse a table that lacks a column."""
    if lacking := sorted(set(wanted) - set(there)):
        raise RunError(
            f"{path}: lacks column {lacking[0]} (of {len(lacking)}); make it again with `phasewatch {command}`"
        )


def _parse_run_episode(row: Mapping[str, Any], path: Path) -> RunEpisode:
    with suppress(ValueError, TypeError):
        return RunEpisode(
            episode_id=row["episode_id"],
            host_id=row["host_id"],
            profile=row["profile"],
            sample_name=row["sample_name"],
            sample_kind=SampleKind(row["sample_kind"]),
            origin=EpisodeOrigin(row["origin"]),
            role=EpisodeRole(row["role"]),
            session=row["session"] or row["episode_id"],
            agent=row["agent"] in (True, "on"),
            plan_seed=int(row["plan_seed"]),
            proc_sketch=tuple(row["proc_sketch"] or ()),
            started_wall_ns=int(row["started_wall_ns"]),
            duration_s=float(row["duration_s"]),
            neighbours=tuple(row.get(_NEIGHBOURS_COLUMN) or ()),
        )
    raise RunError(
        f"{path}: the row of episode {row['episode_id']} has a value that cannot be; run `phasewatch validate` again"
    )
