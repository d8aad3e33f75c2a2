"""The metric table of a run, `metrics_v3.json`: one flat row per number, note codes, and the headline's key."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import msgspec

from phasewatch.artifacts import METRICS_FILE, OLD_METRICS_FILES
from phasewatch.errors import RunError
from phasewatch.splits import SINGLE_HOST_RECIPE
from phasewatch.types import EpisodeOrigin

__all__ = [
    "DEFAULT_HEADLINE",
    "HEADLINE_RECIPES",
    "SELECTION_METRIC",
    "ConfusionMatrix",
    "HeadlineKey",
    "MetricNote",
    "MetricRow",
    "MetricTable",
    "NoteCode",
    "has_metrics",
    "parse_metrics",
    "read_metrics",
    "render_metrics",
    "select_headline",
    "select_rows",
]

SELECTION_METRIC = "val_b_macro_f1"  # chooses the headline's model before any test prediction is read
_OVERALL: dict[str, object] = {"phase": None, "profile": None, "host_id": None, "sample_name": None}


class NoteCode(StrEnum):
    """The reason that a row's note explains; code branches on this and never on the note's words."""

    # Why a number has no interval.
    TOO_FEW_SESSIONS = "too_few_sessions"
    ONE_SESSION_PER_HOST = "one_session_per_host"
    TOO_FEW_SESSIONS_PER_HOST = "too_few_sessions_per_host"
    TOO_FEW_HOSTS = "too_few_hosts"
    RESAMPLES_LOSE_CLASSES = "resamples_lose_classes"
    RESAMPLES_LOSE_EPISODES = "resamples_lose_episodes"
    RESAMPLES_LOSE_WINDOWS = "resamples_lose_windows"
    UNBOUNDED_INTERVAL = "unbounded_interval"
    NO_SPREAD = "no_spread"
    BIASED_ESTIMATE = "biased_estimate"
    COUNT = "count"
    MEAN_OVER_FOLDS = "mean_over_folds"
    # Why there is no number.
    NO_TEST_WINDOWS = "no_test_windows"
    NO_CONSECUTIVE_WINDOWS = "no_consecutive_windows"
    NO_DECIDED_WINDOWS = "no_decided_windows"
    NO_ONSET = "no_onset"
    NO_QUIET_TIME = "no_quiet_time"
    MOST_EPISODES_MISSED = "most_episodes_missed"
    BUDGET_NOT_MET = "budget_not_met"
    NO_IDLE_WINDOWS = "no_idle_windows"
    UNKNOWN_LOAD = "unknown_load"
    TOO_FEW_WINDOWS = "too_few_windows"
    # Details of a number.
    HOST_NAME = "host_name"
    HOST_RANGE = "host_range"
    QUIET_TIME = "quiet_time"
    FALSE_ALARM_COUNT = "false_alarm_count"
    BASE_RATE = "base_rate"
    CURVE_POINT = "curve_point"
    OTHER_STRIDE = "other_stride"
    OTHER_RECIPE = "other_recipe"
    RECORDED = "recorded"
    SIMULATED = "simulated"
    # Remarks, in rows of the metric `note`.
    FEW_SESSIONS = "few_sessions"
    RESAMPLES_REDRAWN = "resamples_redrawn"
    NOT_ABOVE_ELAPSED_TIME = "not_above_elapsed_time"
    NOT_SCORED = "not_scored"
    LEFT_OUT = "left_out"
    NO_IMPORTANCE = "no_importance"
    NO_ALARM_METRICS = "no_alarm_metrics"
    NO_LIVE_PREDICTIONS = "no_live_predictions"
    ONE_HOST = "one_host"

    @classmethod
    def from_origin(cls, origin: str) -> NoteCode:
        """Return the code of an episode origin, for rows of the metric `origin`."""
        return cls.SIMULATED if origin == EpisodeOrigin.SIMULATED else cls.RECORDED


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricNote:
    """A note on a row: its code for programs and its text for people."""

    code: NoteCode
    text: str


class MetricRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One number of a run; a null part (phase, profile, host, sample, agent) means "over all".

    Attributes:
        fold: A fold's name, or ``pooled``.
        seed: A model's seed, or ``mean`` over seeds.
        agent: Guest agent state of the episodes, ``on`` or ``off``.
        compared_to: The other side of a paired gap; the value is this row's side minus the other's.
        bin: Abscissa of a curve; for `confusion` the code of the decided phase.
        note: Why there is no number or no interval, or the remark of a row whose metric is `note`; for people.
        code: The note's code; null only where `note` is null.
        n_profiles_tested: Malicious profiles with a window under this number; null for metrics without coverage.
        n_profiles: Registered malicious profiles; null where `n_profiles_tested` is.
    """

    metric: str
    recipe: str
    fold: str
    channel_set: str
    model: str | None
    input: str
    smoothing: str
    seed: int | str | None = None
    agent: str | None = None
    phase: str | None = msgspec.field(default=None, name="class")
    profile: str | None = None
    host_id: str | None = None
    sample_name: str | None = None
    compared_to: str | None = None
    p: float | None = None
    p_holm: float | None = None
    bin: float | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    note: str | None = None
    code: NoteCode | None = None
    unit: str = "1"
    n_windows: int = 0
    n_episodes: int = 0
    n_sessions: int = 0
    n_hosts: int = 0
    n_profiles_tested: int | None = None
    n_profiles: int | None = None


def select_rows(
    rows: Iterable[MetricRow], metric: str | None = None, *, overall: bool = False, **columns: object
) -> tuple[MetricRow, ...]:
    """Return the rows that have the given metric and column values, in their order.

    Args:
        rows: Any rows.
        metric: Name of the metric; None selects every metric.
        overall: Select only rows over all phases, profiles, hosts and samples.
        columns: Column name → value. A set means "one of these"; columns that are not named may have any value.

    Raises:
        AttributeError: If a column does not exist.
    """
    wanted = {**(_OVERALL if overall else {}), **columns}
    if metric is not None:
        wanted["metric"] = metric
    return tuple(row for row in rows if all(_matches(getattr(row, k), v) for k, v in wanted.items()))


def _matches(value: object, wanted: object) -> bool:
    return value in wanted if isinstance(wanted, (set, frozenset)) else value == wanted


class MetricTable(msgspec.Struct, frozen=True, kw_only=True):
    """`metrics_v3.json`: the digests of the files it was computed from, and its rows."""

    inputs: dict[str, str]
    metrics: tuple[MetricRow, ...]

    def select(self, metric: str | None = None, *, overall: bool = False, **columns: object) -> tuple[MetricRow, ...]:
        """Return the rows that have the given metric and column values; see `select_rows`."""
        return select_rows(self.metrics, metric, overall=overall, **columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadlineKey:
    """The recipe, channel set, model, input and agent state of the headline."""

    recipe: str = "held_out_host"
    channel_set: str = "realistic"
    model: str = "gbt"
    input: str = "raw"
    agent: str = "off"


DEFAULT_HEADLINE = HeadlineKey()  # what the report and the dashboard are about
HEADLINE_RECIPES = ("held_out_both", "held_out_host")  # the headline quotes the first that was tested
_CHOICE_RECIPES = (*HEADLINE_RECIPES, SINGLE_HOST_RECIPE)  # a store of one host can hold out no host


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfusionMatrix:
    """Windows by truth (rows) and decision (columns) over the union of labels; means over seeds, so maybe fractions."""

    labels: tuple[str, ...]
    counts: tuple[tuple[float, ...], ...]


def render_metrics(metrics: MetricTable) -> bytes:
    """Render the file's bytes, one row per line."""
    inputs = msgspec.json.encode(metrics.inputs, order="sorted")
    rows = b",\n".join(msgspec.json.encode(row) for row in metrics.metrics)
    return b'{"inputs":' + inputs + b',\n"metrics":[\n' + rows + b"\n]}\n"


def parse_metrics(data: bytes, *, file: str) -> MetricTable:
    """Parse the file's bytes.

    Raises:
        RunError: If they are not a metric table of this version.
    """
    try:
        return msgspec.json.decode(data, type=MetricTable)
    except msgspec.DecodeError as exc:
        raise RunError(f"{file}: not a metrics file: {exc}; make it again with `phasewatch evaluate`") from exc


def has_metrics(run: Path) -> bool:
    """Return whether a run has been scored, by this version or by one whose file `read_metrics` refuses."""
    return any((run / name).is_file() for name in (METRICS_FILE, *OLD_METRICS_FILES))


def read_metrics(run: Path) -> MetricTable:
    """Read a run's `metrics_v3.json`.

    Raises:
        RunError: If it is absent, broken, or the run has only the file of an older version.
    """
    path = run / METRICS_FILE
    if path.is_file():
        return parse_metrics(path.read_bytes(), file=str(path))
    if old := next((run / name for name in OLD_METRICS_FILES if (run / name).is_file()), None):
        raise RunError(
            f"{old}: written by an older version, expected {METRICS_FILE}; make it with `phasewatch evaluate {run}`"
        )
    raise RunError(f"{path}: absent; make it with `phasewatch evaluate {run}`")


def select_headline(metrics: Sequence[MetricRow]) -> HeadlineKey:
    """Return the headline's key: its model scores best on validation B of the hardest recipe that was trained.

    `gbt` wins a tie, and is chosen without a choice. The key's recipe is that of the leaderboard.
    """
    home = DEFAULT_HEADLINE
    for recipe in _CHOICE_RECIPES:
        rows = select_rows(metrics, SELECTION_METRIC, recipe=recipe, channel_set=home.channel_set, input=home.input)
        if rows := tuple(r for r in rows if r.model):
            best = max(rows, key=lambda r: (r.value or 0.0, r.model == home.model))
            return replace(home, model=str(best.model))
    return home
