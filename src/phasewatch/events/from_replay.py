"""Convert a recorded episode to the events that a watcher would have sent: telemetry bins and predicted phases.

The predictions of a run's episode come from the fold that did not train on it. They are read, not computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from phasewatch.artifacts import BINS_DIR, PREDICTIONS_FILE, check_columns, open_run_parquet
from phasewatch.binning.storage import BinIndexRow, build_index_row, index_rows_by_id, open_bins
from phasewatch.channels import CHANNELS, build_channel_mask
from phasewatch.errors import RunError, UsageError
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE
from phasewatch.events.evidence import QuietReference
from phasewatch.events.schema import EventData, PhaseEvent, TelemetryEvent
from phasewatch.features.windows import build_label_spans, label_windows
from phasewatch.inference.predictor import PhaseDecision, PhasePredictor
from phasewatch.models.alarm import (
    DECISION_DELAY_NS,
    RULE_STRIDE_S,
    THETA_NEVER,
    AlarmKind,
    AlarmRule,
    apply_alarm_rule,
    compute_alarm_score,
    find_alarm_rule,
)
from phasewatch.models.checkpoint import CHECKPOINT_FILE, read_header
from phasewatch.models.smoothing import SMOOTHING_NONE, SMOOTHING_PHASE
from phasewatch.parquet import convert_parquet_errors
from phasewatch.training.experiment import Experiment
from phasewatch.training.predictions import PROBABILITY_COLUMNS, PredictionPart
from phasewatch.types import BIN_NS, LIVE_STRIDE_BINS, PHASES, WINDOW_BINS
from phasewatch.validate.verdict import BundleCheck

__all__ = [
    "ReplayAlarm",
    "ReplayEpisode",
    "ReplayPredictions",
    "ReplaySelection",
    "ReplayStep",
    "add_alarms",
    "build_replay_episode",
    "find_model_folder",
    "iter_replay_steps",
    "list_episodes",
    "read_alarm_rules",
    "read_replay_episodes",
]

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
_SIGNIFICANT_DIGITS = 5  # of the values in events


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySelection:
    """Predictions to replay: those with the lowest seed, every five seconds, without the phase filter."""

    recipe: str = DEFAULT_HEADLINE.recipe
    threat: str = DEFAULT_HEADLINE.channel_set
    model: str = DEFAULT_HEADLINE.model
    table: str = DEFAULT_HEADLINE.input


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplayAlarm:
    """One alarm over the ``n`` windows of one episode.

    Attributes:
        is_active: ``(n,)`` bool whether it is raised after each window.
        threshold: Threshold of its score.
    """

    is_active: NDArray[np.bool_]
    threshold: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplayPredictions:
    """Predictions of the ``n`` windows of one episode, in order of time.

    Attributes:
        selection: Split, channel set, model and input of the predictions.
        fold, seed, filter: Fold and seed of the model, and the filter of the probabilities.
        t_center_ns: ``(n,)`` int64 centre of the window, nanoseconds since the epoch.
        p: ``(n, 5)`` float64 probabilities in the order of PHASES.
        y_pred, y_true: ``(n,)`` int64 codes of the predicted and of the true phase; −1 = unknown.
        alarms: The alarms by kind; one without a rule is absent.
        caveat: Warning that applies to all predictions.
    """

    selection: ReplaySelection
    fold: str
    seed: int
    filter: str
    t_center_ns: NDArray[np.int64]
    p: NDArray[np.float64]
    y_pred: NDArray[np.int64]
    y_true: NDArray[np.int64]
    alarms: Mapping[AlarmKind, ReplayAlarm] = field(default_factory=dict)
    caveat: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplayEpisode:
    """One episode with its predictions.

    Attributes:
        row: Index row of the episode.
        bins: ``(b, 73)`` float32 values of the bins in the order of CHANNELS; NaN = unknown.
        predictions: Predictions of its windows.
    """

    row: BinIndexRow
    bins: NDArray[np.float32]
    predictions: ReplayPredictions


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayStep:
    """An event and its time in seconds since the start of the episode's first bin."""

    at_s: float
    data: EventData

    @property
    def is_window(self) -> bool:
        """Whether the event is a prediction, not telemetry."""
        return isinstance(self.data, PhaseEvent)


def list_episodes(run: Path, choice: ReplaySelection = ReplaySelection()) -> tuple[tuple[str, str], ...]:
    """Return the (host, episode) pairs with test predictions, sorted.

    Raises:
        RunError: If there are none, or the run has no predictions.
    """
    table = _read_prediction_table(run, choice)
    pairs = zip(table.column("host_id").to_pylist(), table.column("episode_id").to_pylist(), strict=True)
    return tuple(sorted(set(pairs)))


def read_replay_episodes(
    run: Path, episodes: Sequence[str], choice: ReplaySelection = ReplaySelection()
) -> tuple[ReplayEpisode, ...]:
    """Read episodes of a run with their predictions, in the given order.

    Raises:
        RunError: If the run lacks an episode (the message lists some that it has), its bins or its predictions.
    """
    table = _read_prediction_table(run, choice)
    bins = open_bins(run / BINS_DIR)
    rows = index_rows_by_id(bins)
    ids = np.asarray(table.column("episode_id").to_pylist())
    recordings = []
    for episode in episodes:
        indices = np.flatnonzero(ids == episode)
        if not len(indices) or episode not in rows:
            some = ", ".join(sorted(set(ids.tolist()))[:3])
            raise RunError(
                f"{run}: no test predictions of episode {episode} by {_render_selection(choice)}; available: {some} …"
            )
        row = rows[episode]
        recordings.append(
            ReplayEpisode(
                row=row, bins=bins.episode_bins(row), predictions=_build_predictions(table.take(indices), choice)
            )
        )
    return tuple(recordings)


def find_model_folder(recording: ReplayEpisode, run: Path) -> Path:
    """Return the folder of the model that predicted a recording."""
    predictions = recording.predictions
    selection = predictions.selection
    experiment = Experiment(
        recipe=selection.recipe,
        fold=predictions.fold,
        threat=selection.threat,
        model=selection.model,
        table=selection.table,
        seed=predictions.seed,
    )
    return experiment.folder(run)


def read_alarm_rules(recording: ReplayEpisode, run: Path) -> tuple[AlarmRule, ...]:
    """Read the alarm rules of the model that predicted a recording; return none if it has no rule or no checkpoint.

    Raises:
        RunError, MismatchError: If the checkpoint exists but cannot be used.
    """
    folder = find_model_folder(recording, run)
    if not (folder / CHECKPOINT_FILE).is_file():
        return ()
    return read_header(folder).alarms


def add_alarms(recording: ReplayEpisode, rules: Sequence[AlarmRule]) -> ReplayEpisode:
    """Return the recording, with windows every five seconds, with the alarms that the rules for them raise."""
    predictions = recording.predictions
    alarms = {}
    for kind in AlarmKind:
        if (rule := find_alarm_rule(rules, kind, RULE_STRIDE_S)) is not None:
            score = compute_alarm_score(predictions.p, kind)
            is_active = apply_alarm_rule(rule, score, np.zeros(len(score), np.int64))
            alarms[kind] = ReplayAlarm(is_active=is_active, threshold=rule.theta)
    return replace(recording, predictions=replace(predictions, alarms=alarms))


def iter_replay_steps(recording: ReplayEpisode, *, vm: str, bins_per_event: int = 1) -> Iterator[ReplayStep]:
    """Yield the events of an episode in the order in which a watcher would have sent them.

    Args:
        recording: The episode.
        vm: Name of the machine in the events.
        bins_per_event: Number of bins per telemetry event.
    """
    steps = [*_iter_telemetry_steps(recording, vm, bins_per_event), *_iter_phase_steps(recording, vm)]
    # Telemetry comes before the prediction of the window that it completes.
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
                vm=vm,
                host=row.host_id,
                origin=str(row.origin),
                t0_ns=row.t0_ns + start * BIN_NS,
                bin_s=BIN_NS / 1e9,
                channels=names,
                values=tuple(_round_values(line) for line in recording.bins[start:stop]),
                flags=tuple(int(f) for f in flags[start:stop]),
                masked=masked,
            ),
        )


def _iter_phase_steps(recording: ReplayEpisode, vm: str) -> Iterator[ReplayStep]:
    row, predictions = recording.row, recording.predictions
    selection = predictions.selection
    half_ns = WINDOW_BINS * BIN_NS // 2
    states = {kind: _AlarmSpan(predictions.alarms.get(kind)) for kind in AlarmKind}
    infection, activity = states[AlarmKind.INFECTION], states[AlarmKind.ACTIVITY]
    reference, n_added = QuietReference(_list_set_channels(selection.threat)), 0
    for i, center in enumerate(predictions.t_center_ns.tolist()):
        end_ns = center + half_ns
        end = min(row.n_bins, max(n_added, (end_ns - row.t0_ns) // BIN_NS))
        for values in recording.bins[n_added:end]:
            reference.add(values, is_quiet=not (infection.is_active or activity.is_active))
        n_added = end
        changes = [kind for kind, state in states.items() if state.step(i, end_ns)]
        is_raised = any(states[kind].is_active for kind in changes)
        yield ReplayStep(
            at_s=(center + DECISION_DELAY_NS - row.t0_ns) / 1e9,
            data=PhaseEvent(
                vm=vm,
                host=row.host_id,
                t_start_ns=center - half_ns,
                t_end_ns=end_ns,
                p=_round_probabilities(predictions.p[i]),
                decision=str(PHASES[predictions.y_pred[i]]),
                truth=str(PHASES[predictions.y_true[i]]) if predictions.y_true[i] >= 0 else None,
                alarm=infection.is_active,
                alarm_since_ns=infection.since_ns,
                threshold=infection.threshold,
                activity_alarm=activity.is_active,
                activity_alarm_since_ns=activity.since_ns,
                activity_threshold=activity.threshold,
                alarm_changes=tuple(str(kind) for kind in changes),
                model=selection.model,
                threat=selection.threat,
                table=selection.table,
                filter=predictions.filter,
                caveat=_render_caveat(predictions),
                evidence=(reference.explain() if is_raised else ()) or UNSET,
            ),
        )


def _list_set_channels(name: str) -> tuple[str, ...]:
    """Return the channels of a channel set; none if it is not one of phasewatch, so that all may be evidence."""
    try:
        mask = build_channel_mask(name)
    except UsageError:
        return ()
    return tuple(c.full_name for c, is_in in zip(CHANNELS, mask, strict=True) if is_in)


class _AlarmSpan:
    """The state of one alarm while its windows are replayed."""

    def __init__(self, alarm: ReplayAlarm | None) -> None:
        self._alarm = alarm
        self.is_active: bool | None = None
        self.since_ns: int | None = None

    @property
    def threshold(self) -> float | None:
        return None if self._alarm is None else self._alarm.threshold

    def step(self, i: int, end_ns: int) -> bool:
        """Update the state with window `i`, which ends at `end_ns`; return whether the alarm was raised or ended."""
        if self._alarm is None:
            return False
        was_active, self.is_active = bool(self.is_active), bool(self._alarm.is_active[i])
        self.since_ns = (self.since_ns or end_ns) if self.is_active else None
        return was_active != self.is_active


def _render_caveat(predictions: ReplayPredictions) -> str | None:
    caveats = [predictions.caveat] if predictions.caveat else []
    never = [str(kind) for kind, alarm in predictions.alarms.items() if alarm.threshold >= THETA_NEVER]
    if never:
        caveats.append(f"no threshold met the false-alarm budget: {' and '.join(never)} alarms are never raised")
    return "; ".join(caveats) or None


def _round_values(line: NDArray[np.float32]) -> tuple[float | None, ...]:
    """Round to five digits, which is finer than any figure shows and keeps events small."""
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
    """Read the test predictions of a selection: lowest seed, without the phase filter."""
    import pyarrow.parquet as pq

    path = run / PREDICTIONS_FILE
    with open_run_parquet(path, "train") as file:
        check_columns(path, file.schema_arrow.names, _PREDICTION_COLUMNS, "train")
    wanted = [(key, "==", getattr(choice, key)) for key in _SELECTION_COLUMNS[:4]]
    wanted += [("part", "==", str(PredictionPart.TEST)), ("filter", "==", SMOOTHING_NONE)]
    with convert_parquet_errors(path, hint="phasewatch train"):
        table = pq.read_table(path, columns=list(_PREDICTION_COLUMNS), filters=wanted)
    seeds = table.column("seed").to_numpy()
    if not len(seeds):
        raise RunError(
            f"{path}: no test predictions by {_render_selection(choice)}; "
            "choose another --model, --channels or --recipe"
        )
    return table.take(np.flatnonzero(seeds == seeds.min()))


def _render_selection(choice: ReplaySelection) -> str:
    return f"{choice.model} ({choice.recipe}, {choice.threat}, {choice.table})"


def build_replay_episode(
    bundle: BundleCheck, scorer: PhasePredictor, decisions: Sequence[PhaseDecision], *, caveat: str | None = None
) -> ReplayEpisode:
    """Combine a usable bundle with its labels and the predictions of a model.

    Args:
        bundle: The validated bundle.
        scorer: The model.
        decisions: Decisions of the model, one each second, in order of time.
        caveat: Warning for the viewer, such as that the model was trained on this bundle.

    Raises:
        RunError: If the bundle is not usable, or there is no decision.
    """
    if bundle.episode is None or bundle.binned is None or not decisions:
        raise RunError(f"{bundle.verdict.path}: nothing to replay: {bundle.verdict.detail or 'shorter than a window'}")
    starts = np.array([d.t_start_ns for d in decisions], np.int64)
    p = np.array([d.belief for d in decisions], np.float64)
    states = {
        AlarmKind.INFECTION: [d.alarm for d in decisions],
        AlarmKind.ACTIVITY: [d.activity_alarm for d in decisions],
    }
    rules = {kind: scorer.find_rule(kind, LIVE_STRIDE_BINS) for kind in AlarmKind}
    alarms = {
        kind: ReplayAlarm(is_active=np.array(states[kind], np.bool_), threshold=rule.theta)
        for kind, rule in rules.items()
        if rule is not None
    }
    predictions = ReplayPredictions(
        selection=ReplaySelection(
            recipe="deploy", threat=scorer.threat, model=scorer.model, table=str(scorer.spec.table)
        ),
        fold="all",
        seed=scorer.seed,
        filter=SMOOTHING_PHASE if scorer.filter is not None else SMOOTHING_NONE,
        t_center_ns=starts + WINDOW_BINS * BIN_NS // 2,
        p=p,
        y_pred=p.argmax(axis=1),
        y_true=label_windows(build_label_spans(bundle.episode.marks), starts).phase.astype(np.int64),
        alarms=alarms,
        caveat=caveat,
    )
    return ReplayEpisode(
        row=build_index_row(bundle.episode, bundle.binned), bins=bundle.binned.bins, predictions=predictions
    )
