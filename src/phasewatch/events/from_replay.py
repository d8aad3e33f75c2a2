"""An episode of a run as the events that a watcher would have sent: its bins, and what a model said of its windows.

The probabilities are those of the fold that never saw the episode, read from the run; nothing is predicted anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.artifacts import PREDICTIONS_FILE, check_columns, open_run_parquet
from phasewatch.binning.storage import BinIndexRow, build_index_row, index_rows_by_id, open_bins
from phasewatch.channels import CHANNELS
from phasewatch.errors import RunError
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE
from phasewatch.events.schema import EventData, PhaseEvent, TelemetryEvent
from phasewatch.features.windows import build_label_spans, label_windows
from phasewatch.inference.predictor import PhaseDecision, PhasePredictor
from phasewatch.models.alarm import DECISION_DELAY_NS, THETA_NEVER, AlarmRule, apply_alarm_rule, compute_activity_score
from phasewatch.models.checkpoint import CHECKPOINT_FILE, read_header
from phasewatch.models.smoothing import SMOOTHING_NONE, SMOOTHING_PHASE
from phasewatch.parquet import convert_parquet_errors
from phasewatch.training.experiment import Experiment
from phasewatch.training.predictions import PROBABILITY_COLUMNS
from phasewatch.types import BIN_NS, PHASES, WINDOW_BINS, Phase
from phasewatch.validate.verdict import BundleCheck

_SELECTION_COLUMNS = ("recipe", "threat", "model", "table", "filter")
_PREDICTION_COLUMNS = (
    *_SELECTION_COLUMNS,
    "fold",
    "seed",
    "part",
    "episode_id",
    "host_id",
    "t_center_ns",
    "y_true",
    "y_pred",
    *PROBABILITY_COLUMNS,
)
_SIGNIFICANT_DIGITS = 5  # of a value on its way to a picture


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySelection:
    """Whose predictions are replayed; the lowest seed, and the phase filter where the run has it."""

    recipe: str = DEFAULT_HEADLINE.recipe
    threat: str = DEFAULT_HEADLINE.channel_set
    model: str = DEFAULT_HEADLINE.model
    table: str = DEFAULT_HEADLINE.input


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplayPredictions:
    """What a model said of the ``w`` windows of one episode, in time's order.

    Attributes:
        t_center_ns: ``(w,)`` int64.
        p: ``(w, 5)`` float64 in the order of PHASES.
        y_pred, y_true: ``(w,)`` int64, −1 = unknown.
        alarm: ``(w,)`` whether it rings; None where no threshold was trained.
        caveat: What a reader must know of all of it.
    """

    selection: ReplaySelection
    fold: str
    seed: int
    filter: str
    t_center_ns: NDArray[np.int64]
    p: NDArray[np.float64]
    y_pred: NDArray[np.int64]
    y_true: NDArray[np.int64]
    alarm: NDArray[np.bool_] | None = None
    threshold: float | None = None
    caveat: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplayEpisode:
    """One episode, ready to be played: ``(n, 46)`` bins in the order of CHANNELS, and what was said of them."""

    row: BinIndexRow
    bins: NDArray[np.float32]
    predictions: ReplayPredictions


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayStep:
    """Something to send, `at_s` after the episode's first label."""

    at_s: float
    data: EventData

    @property
    def is_window(self) -> bool:
        """Whether it is a judgement, not telemetry."""
        return isinstance(self.data, PhaseEvent)


def list_episodes(run: Path, choice: ReplaySelection = ReplaySelection()) -> tuple[tuple[str, str], ...]:
    """Give the (host, episode) that the run has test predictions of, in order.

    Raises:
        RunError: If there are none, or the run has no predictions.
    """
    table = _read_prediction_table(run, choice)
    found = sorted(set(zip(table.column("host_id").to_pylist(), table.column("episode_id").to_pylist(), strict=True)))
    return tuple(found)


def read_replay_episodes(
    run: Path, episodes: Sequence[str], choice: ReplaySelection = ReplaySelection()
) -> tuple[ReplayEpisode, ...]:
    """Read some episodes of a run, in the order asked for.

    Raises:
        RunError: If the run lacks one of them (names those it has), its grids or its predictions.
    """
    table = _read_prediction_table(run, choice)
    grids = open_bins(run / "grids")
    rows = index_rows_by_id(grids)
    ids = np.asarray(table.column("episode_id").to_pylist())
    found = []
    for episode in episodes:
        own = np.flatnonzero(ids == episode)
        if not len(own) or episode not in rows:
            some = ", ".join(sorted(set(ids.tolist()))[:3])
            raise RunError(
                f"{run}: no test predictions of episode {episode} by {_render_selection(choice)}; there are {some} …"
            )
        row = rows[episode]
        found.append(
            ReplayEpisode(
                row=row, bins=grids.episode_bins(row), predictions=_build_predictions(table.take(own), choice)
            )
        )
    return tuple(found)


def find_model_folder(recording: ReplayEpisode, run: Path) -> Path:
    """Give the folder of the very model that judged a recording."""
    said = recording.predictions
    cell = Experiment(
        recipe=said.selection.recipe, fold=said.fold, threat=said.selection.threat, model=said.selection.model,
        table=said.selection.table, seed=said.seed,
    )  # fmt: skip
    return cell.folder(run)


def read_alarm_rule(recording: ReplayEpisode, run: Path) -> AlarmRule | None:
    """Read the alarm's rule as it was fixed when the recording's model was trained; None where none was, or is kept.

    Raises:
        RunError, MismatchError: If the checkpoint is there and cannot be used.
    """
    folder = find_model_folder(recording, run)
    if not (folder / CHECKPOINT_FILE).is_file():
        return None
    return read_header(folder).alarm.get(recording.predictions.filter)


def add_alarm(recording: ReplayEpisode, rule: AlarmRule) -> ReplayEpisode:
    """Add when the alarm rings."""
    said = recording.predictions
    rings = apply_alarm_rule(rule, compute_activity_score(said.p), np.zeros(len(said.p), np.int64))
    return replace(recording, predictions=replace(said, alarm=rings, threshold=rule.theta))


def iter_replay_steps(recording: ReplayEpisode, *, vm: str, bins_per_event: int = 1) -> Iterator[ReplayStep]:
    """Give an episode's events in the order in which a watcher would have sent them.

    Args:
        recording: The episode.
        vm: The key under which it is shown.
        bins_per_event: Bins that go together.
    """
    steps = [*_iter_telemetry_steps(recording, vm, bins_per_event), *_iter_phase_steps(recording, vm)]
    # A bin is out before the window that it closes is judged.
    yield from sorted(steps, key=lambda step: (step.at_s, step.is_window))


def _iter_telemetry_steps(recording: ReplayEpisode, vm: str, bins_per_event: int) -> Iterator[ReplayStep]:
    row, names = recording.row, tuple(c.full_name for c in CHANNELS)
    flags = row.bin_flags
    masked = tuple(names[i] for i in np.flatnonzero(~np.isfinite(recording.bins).any(axis=0)))
    for start in range(0, row.n_bins, bins_per_event):
        stop = min(start + bins_per_event, row.n_bins)
        yield ReplayStep(
            at_s=stop * BIN_NS / 1e9,
            data=TelemetryEvent(
                vm=vm, host=row.host_id, origin=str(row.origin), t0_ns=row.t0_ns + start * BIN_NS, bin_s=BIN_NS / 1e9,
                channels=names, values=tuple(_round_values(line) for line in recording.bins[start:stop]),
                flags=tuple(int(f) for f in flags[start:stop]), masked=masked,
            ),
        )  # fmt: skip


def _iter_phase_steps(recording: ReplayEpisode, vm: str) -> Iterator[ReplayStep]:
    row, said = recording.row, recording.predictions
    half_ns = WINDOW_BINS * BIN_NS // 2
    since: int | None = None
    for i, center in enumerate(said.t_center_ns.tolist()):
        end_ns = center + half_ns
        stands = None if said.alarm is None else bool(said.alarm[i])
        since = (since or end_ns) if stands else None
        yield ReplayStep(
            at_s=(center + DECISION_DELAY_NS - row.t0_ns) / 1e9,
            data=PhaseEvent(
                vm=vm, host=row.host_id, t_start_ns=center - half_ns, t_end_ns=end_ns, p=_round_probabilities(said.p[i]),
                decision=str(PHASES[said.y_pred[i]]),
                truth=str(PHASES[said.y_true[i]]) if said.y_true[i] >= 0 else str(Phase.UNKNOWN),
                alarm=stands, alarm_since_ns=since, threshold=said.threshold, model=said.selection.model,
                threat=said.selection.threat, table=said.selection.table, filter=said.filter, caveat=_render_caveat(said),
            ),
        )  # fmt: skip


def _render_caveat(said: ReplayPredictions) -> str | None:
    words = [said.caveat] if said.caveat else []
    if said.threshold is not None and said.threshold >= THETA_NEVER:
        words.append("no threshold met the budget of false alarms: this alarm never rings")
    return "; ".join(words) or None


def _round_values(line: NDArray[np.float32]) -> tuple[float | None, ...]:
    """Five digits are finer than any picture, and the page stays quick."""
    return tuple(float(f"{v:.{_SIGNIFICANT_DIGITS}g}") if math.isfinite(v) else None for v in line.tolist())


def _round_probabilities(p: NDArray[np.float64]) -> tuple[float, float, float, float, float]:
    a, b, c, d, e = (min(1.0, max(0.0, round(v, _SIGNIFICANT_DIGITS))) for v in p.tolist())
    return a, b, c, d, e


def _build_predictions(table: Any, choice: ReplaySelection) -> ReplayPredictions:
    order = np.argsort(table.column("t_center_ns").to_numpy(), kind="stable")
    table = table.take(order)

    def numbers(name: str) -> NDArray[np.int64]:
        return np.asarray(table.column(name).to_numpy(), np.int64)

    return ReplayPredictions(
        selection=choice,
        fold=table.column("fold")[0].as_py(),
        seed=table.column("seed")[0].as_py(),
        filter=table.column("filter")[0].as_py(),
        t_center_ns=numbers("t_center_ns"),
        p=np.stack([np.asarray(table.column(name).to_numpy(), np.float64) for name in PROBABILITY_COLUMNS], axis=1),
        y_pred=numbers("y_pred"),
        y_true=numbers("y_true"),
    )


def _read_prediction_table(run: Path, choice: ReplaySelection) -> Any:
    """Read the test rows of a choice: the lowest seed, the phase filter where there is one."""
    import pyarrow.parquet as pq

    path = run / PREDICTIONS_FILE
    with open_run_parquet(path, "train") as file:
        check_columns(path, file.schema_arrow.names, _PREDICTION_COLUMNS, "train")
    wanted = [(key, "==", getattr(choice, key)) for key in _SELECTION_COLUMNS[:4]]
    with convert_parquet_errors(path, hint="phasewatch train"):
        table = pq.read_table(path, columns=list(_PREDICTION_COLUMNS), filters=[*wanted, ("part", "==", "test")])
    filters, seeds = np.asarray(table.column("filter").to_pylist()), table.column("seed").to_numpy()
    if not len(seeds):
        raise RunError(
            f"{path}: no test predictions by {_render_selection(choice)}; choose another --model, --channels or --recipe"
        )
    kind = SMOOTHING_PHASE if SMOOTHING_PHASE in filters else SMOOTHING_NONE
    keep = filters == kind
    return table.take(np.flatnonzero(keep & (seeds == seeds[keep].min())))


def _render_selection(choice: ReplaySelection) -> str:
    return f"{choice.model} ({choice.recipe}, {choice.threat}, {choice.table})"


def build_replay_episode(
    found: BundleCheck, scorer: PhasePredictor, said: Sequence[PhaseDecision], *, caveat: str | None = None
) -> ReplayEpisode:
    """Put a usable bundle, its labels and what was decided of its windows together.

    Args:
        found: The bundle.
        scorer: Whose decisions they are.
        said: In time's order.
        caveat: What a reader must know, such as that the model learnt from this very bundle.

    Raises:
        RunError: If the bundle is not usable, or nothing was said of it.
    """
    if found.episode is None or found.binned is None or not said:
        raise RunError(f"{found.verdict.path}: nothing to replay: {found.verdict.detail or 'shorter than a window'}")
    starts = np.array([d.t_start_ns for d in said], np.int64)
    p = np.array([d.belief for d in said], np.float64)
    judged = ReplayPredictions(
        selection=ReplaySelection(
            recipe="deploy", threat=scorer.threat, model=scorer.model, table=str(scorer.spec.table)
        ),
        fold="all",
        seed=scorer.seed,
        filter=SMOOTHING_PHASE if scorer.filter is not None else SMOOTHING_NONE,
        t_center_ns=starts + WINDOW_BINS * BIN_NS // 2,
        p=p,
        y_pred=p.argmax(axis=1),
        y_true=label_windows(build_label_spans(found.episode.marks), starts).phase.astype(np.int64),
        alarm=None if scorer.alarm is None else np.array([bool(d.alarm) for d in said], np.bool_),
        threshold=None if scorer.alarm is None else scorer.alarm.theta,
        caveat=caveat,
    )
    return ReplayEpisode(row=build_index_row(found.episode, found.binned), bins=found.binned.bins, predictions=judged)
