"""The files of a run: their names and paths, the readers that several packages share, and their digests.

Every path is relative to the run's folder. No other module spells the name of a file of a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from phasewatch import parquet
from phasewatch.channels import has_extended_channels
from phasewatch.errors import RunError
from phasewatch.identity import find_contested_ids
from phasewatch.profiles import IDLE_SAMPLES
from phasewatch.types import (
    BENIGN_PROFILE,
    CHANNELS_FILE,
    PHASES,
    BundleStatus,
    EpisodeOrigin,
    EpisodeRole,
    SampleKind,
)

__all__ = [
    "ACCOUNTING_FILE",
    "AUDIT_FILE",
    "BINS_DIR",
    "BINS_FILE",
    "BINS_INDEX_FILE",
    "BINS_INDEX_PATH",
    "BINS_PATH",
    "BINS_PATHS",
    "CHANNELS_FILE",
    "EPISODE_FEATURES_FILE",
    "EXPERIMENT_FILE",
    "EXPERIMENT_PREDICTIONS_FILE",
    "FEATURES_FILE",
    "FEATURE_FILES",
    "FEATURE_SCHEMA_FILE",
    "HEADLINE_FILE",
    "LEVELS_FILE",
    "LEVELS_PATH",
    "METRICS_FILE",
    "MODELS_DIR",
    "PREDICTIONS_FILE",
    "REPORT_FILE",
    "RUN_FILES",
    "RUN_LOG_FILE",
    "SPLITS_DIR",
    "SPLIT_INDEX_FILE",
    "VALIDATION_FILE",
    "FeatureSchema",
    "RunEpisode",
    "SchemaDigests",
    "build_split_path",
    "check_columns",
    "file_sha256",
    "list_split_names",
    "list_split_paths",
    "open_run_parquet",
    "read_columns",
    "read_duplicate_id_episodes",
    "read_run_episodes",
    "read_schema",
]

RUN_LOG_FILE = "run.json"  # configuration, versions and stages of `phasewatch run`; the only file that holds times
ACCOUNTING_FILE = "ledger.json"
AUDIT_FILE = "audit_v1.json"

SPLIT_INDEX_FILE = "splits_v1.json"
PREDICTIONS_FILE = "predictions_v1.parquet"
METRICS_FILE = "metrics_v3.json"
OLD_METRICS_FILES = ("metrics_v2.json", "metrics_v1.json")  # their names mean other things; not read any more
HEADLINE_FILE = "headline.json"
REPORT_FILE = "report.html"

BINS_DIR = "grids"
BINS_FILE, LEVELS_FILE, BINS_INDEX_FILE = "grids.npy", "levels.npy", "index.parquet"  # in BINS_DIR
BINS_PATH, LEVELS_PATH, BINS_INDEX_PATH = (f"{BINS_DIR}/{name}" for name in (BINS_FILE, LEVELS_FILE, BINS_INDEX_FILE))
BINS_PATHS = (BINS_PATH, LEVELS_PATH, BINS_INDEX_PATH)

FEATURES_FILE = "features_window_v2.parquet"
EPISODE_FEATURES_FILE = "features_episode_v1.parquet"
FEATURE_SCHEMA_FILE = "feature_schema_v2.json"
FEATURE_FILES = (FEATURES_FILE, EPISODE_FEATURES_FILE, FEATURE_SCHEMA_FILE)
VALIDATION_FILE = "validation_v1.parquet"
SPLITS_DIR = "splits"

MODELS_DIR = "models"
EXPERIMENT_FILE = "cell.json"  # in an experiment's folder below MODELS_DIR
EXPERIMENT_PREDICTIONS_FILE = "predictions.parquet"  # beside it

# A folder that holds one of them is a run.
RUN_FILES = (
    RUN_LOG_FILE,
    VALIDATION_FILE,
    ACCOUNTING_FILE,
    FEATURES_FILE,
    FEATURE_SCHEMA_FILE,
    SPLIT_INDEX_FILE,
    PREDICTIONS_FILE,
    METRICS_FILE,
    AUDIT_FILE,
)

_VERDICT_COLUMNS = (
    "episode_id",
    "host_id",
    "profile",
    "sample_name",
    "sample_kind",
    "origin",
    "role",
    "status",
    "session",
    "plan_seed",
    "agent",
    "proc_sketch",
    "started_wall_ns",
    "duration_s",
)
# Absent from older indexes.
_NEIGHBOURS_COLUMN, _BACKGROUND_COLUMN = "neighbours", "background"


class SchemaDigests(msgspec.Struct, frozen=True, kw_only=True):
    """The two digests of the features of some channels."""

    schema_hash: str
    behaviour_fingerprint: str


class FeatureSchema(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `feature_schema_v2.json` that readers use.

    Attributes:
        schema_hash, behaviour_fingerprint: Digests of all columns.
        base: Digests of the columns of base channels; None in a file from before the extended channels.
    """

    phases: tuple[str, ...]
    feature_names: tuple[str, ...]
    schema_hash: str
    behaviour_fingerprint: str
    base: SchemaDigests | None = None

    def find_digests(self, channels: Iterable[str]) -> SchemaDigests:
        """Return the digests that the columns of some channels have in this run."""
        if self.base is not None and not has_extended_channels(channels):
            return self.base
        return SchemaDigests(schema_hash=self.schema_hash, behaviour_fingerprint=self.behaviour_fingerprint)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEpisode:
    """The metadata of one episode of the feature table.

    Attributes:
        session: The recording session; the episode's own id if it ran alone.
        agent: Whether the agent in the guest reported.
        proc_sketch: Sketch of the /proc readings for the near-duplicate search (`validate.verdict.proc_sketch`).
        started_wall_ns: Start of the recording, Unix nanoseconds.
        duration_s: Labelled time.
        neighbours: Ids of the episodes that were recorded at the same time on the same host.
        background: Benign load that ran beside a malicious profile; empty without one, None if it is unknown.
    """

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
    background: str | None = None

    @property
    def has_load(self) -> bool | None:
        """Whether a benign load ran in the episode; None if it is unknown."""
        if self.profile == BENIGN_PROFILE:
            return self.sample_name not in IDLE_SAMPLES
        return None if self.background is None else bool(self.background)

    @property
    def is_idle_clean(self) -> bool:
        """Whether the VM was clean and ran no load in the whole episode."""
        return self.profile == BENIGN_PROFILE and self.sample_name in IDLE_SAMPLES


def read_run_episodes(run: Path, *, only: Iterable[str]) -> tuple[RunEpisode, ...]:
    """Return the metadata of some usable episodes, sorted by host and episode.

    If several hosts claim an id, the row of its owner is returned (`identity.find_contested_ids`).

    Args:
        run: The run's folder.
        only: Ids of the episodes.

    Raises:
        RunError: If an episode has no usable row, or more than one.
    """
    wanted = set(only)
    path = run / VALIDATION_FILE
    episodes: dict[str, RunEpisode] = {}
    rows = _read_usable_rows(path)
    contested = find_contested_ids((row["host_id"], row["episode_id"]) for row in rows)
    for row in rows:
        if row["episode_id"] not in wanted or (row["host_id"], row["episode_id"]) in contested:
            continue
        if row["episode_id"] in episodes:
            raise RunError(f"{path}: episode {row['episode_id']} is usable twice; ids must be unique in a store")
        episodes[row["episode_id"]] = _parse_run_episode(row, path)
    if missing := wanted - set(episodes):
        raise RunError(
            f"{path}: episode {min(missing)} has windows in {FEATURES_FILE} but is not usable here; "
            "the two files are of different sweeps; run `phasewatch features` again"
        )
    return tuple(sorted(episodes.values(), key=lambda e: (e.host_id, e.episode_id)))


def read_duplicate_id_episodes(run: Path) -> tuple[RunEpisode, ...]:
    """Return the usable episodes that the run leaves out because another host claims their id.

    Raises:
        RunError: If the index of verdicts cannot be read.
    """
    path = run / VALIDATION_FILE
    rows = _read_usable_rows(path)
    contested = find_contested_ids((row["host_id"], row["episode_id"]) for row in rows)
    episodes = [_parse_run_episode(row, path) for row in rows if (row["host_id"], row["episode_id"]) in contested]
    return tuple(sorted(episodes, key=lambda e: (e.host_id, e.episode_id)))


def _read_usable_rows(path: Path) -> list[dict[str, Any]]:
    with open_run_parquet(path, "validate") as file:
        names = file.schema_arrow.names
        check_columns(path, names, _VERDICT_COLUMNS, "validate")
        optional = [name for name in (_NEIGHBOURS_COLUMN, _BACKGROUND_COLUMN) if name in names]
        rows = file.read(columns=[*_VERDICT_COLUMNS, *optional]).to_pylist()
    return [row for row in rows if row["status"] in (BundleStatus.ACCEPTED, BundleStatus.DEGRADED)]


def read_schema(run: Path) -> FeatureSchema:
    """Read the feature schema of a run.

    Raises:
        RunError: If the file is absent, malformed, or made for other phases.
    """
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


def build_split_path(run: Path, recipe: str, fold: str) -> Path:
    """Return the path of a fold's file."""
    return run / SPLITS_DIR / f"{recipe}-{fold}.json"


def list_split_paths(run: Path, recipe: str | None = None) -> list[Path]:
    """Return the fold files of a run, or of one of its recipes, sorted by name."""
    return sorted((run / SPLITS_DIR).glob("*.json" if recipe is None else f"{recipe}-*.json"))


def list_split_names(run: Path) -> tuple[str, ...]:
    """Return the fold files of a run relative to its folder, sorted."""
    return tuple(f"{SPLITS_DIR}/{path.name}" for path in list_split_paths(run))


def file_sha256(path: Path) -> str:
    """Return the SHA-256 digest of a file in hex.

    Raises:
        RunError: If the file is absent.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as exc:
        raise RunError(f"{path}: absent; run the stage that writes it first") from exc


def open_run_parquet(path: Path, command: str) -> Any:
    """Open a Parquet file of the run.

    Args:
        path: The file.
        command: The command that writes it, such as ``validate``, for messages.

    Returns:
        A `pyarrow.parquet.ParquetFile`.

    Raises:
        RunError: If it cannot be read; see `parquet.open_parquet`.
    """
    return parquet.open_parquet(path, hint=f"phasewatch {command}")


def read_columns(path: Path, columns: Sequence[str], command: str) -> Any:
    """Read some columns of a Parquet file of the run into a `pyarrow.Table`; see `open_run_parquet`.

    Raises:
        RunError: If the file cannot be read or lacks a column.
    """
    with open_run_parquet(path, command) as file:
        check_columns(path, file.schema_arrow.names, columns, command)
        with parquet.convert_parquet_errors(path, hint=f"phasewatch {command}"):
            return file.read(columns=list(columns))


def check_columns(path: Path, names: Sequence[str], required: Sequence[str], command: str) -> None:
    """Raise if a table lacks a required column.

    Raises:
        RunError: If it does; the message names the first missing column and the command that writes the file.
    """
    if missing := sorted(set(required) - set(names)):
        raise RunError(
            f"{path}: lacks column {missing[0]} ({len(missing)} missing); make it again with `phasewatch {command}`"
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
            background=row.get(_BACKGROUND_COLUMN),
        )
    raise RunError(
        f"{path}: the row of episode {row['episode_id']} has an invalid value; run `phasewatch validate` again"
    )
