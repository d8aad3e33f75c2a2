"""Producers for the dashboard of a run: replay test episodes in a loop, publish scores and process metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from phasewatch.artifacts import METRICS_FILE, file_sha256
from phasewatch.evaluation.evaluate import read_metrics
from phasewatch.evaluation.headline import read_verdict
from phasewatch.events.from_metrics import build_metric_events, build_profile_event
from phasewatch.events.from_replay import (
    ReplayEpisode,
    ReplaySelection,
    add_alarms,
    find_model_folder,
    iter_replay_steps,
    list_episodes,
    read_alarm_rules,
    read_replay_episodes,
)
from phasewatch.events.perf import ProcessMeter
from phasewatch.events.publish import EventNumberer, send_on_schedule
from phasewatch.events.schema import EventData, EventEnvelope
from phasewatch.inference.model_selection import find_models
from phasewatch.inference.predictor import PhasePostprocessor, PhasePredictor
from phasewatch.models.alarm import DECISION_DELAY_NS
from phasewatch.types import BIN_NS, WINDOW_BINS

__all__ = [
    "DemoConfig",
    "EventPublisher",
    "compute_bins_per_event",
    "load_predictor",
    "predict_on_schedule",
    "publish_costs",
    "publish_metrics",
    "publish_replays",
    "read_demo_episodes",
    "read_metric_events",
]

_MAX_PARALLEL_REPLAYS = 4  # hosts replayed at the same time
_EPISODE_PAUSE_S = 2.0  # between two episodes of one host
_METRICS_INTERVAL_S = 20.0  # between two checks of the metrics file
_PERF_INTERVAL_S = 2.0
_MAX_BINS_PER_EVENT = 120
_TELEMETRY_EVENTS_PER_S = 4.0  # per host, at any playback speed

EventPublisher = Callable[[EventEnvelope], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Configuration of a replay.

    Attributes:
        run: Folder of the run.
        choice: Predictions to replay.
        episodes: IDs of the episodes to replay; empty for all test episodes.
        speed: Playback speed (1 = real time).
    """

    run: Path
    choice: ReplaySelection = field(default_factory=ReplaySelection)
    episodes: tuple[str, ...] = ()
    speed: float = 8.0


def compute_bins_per_event(speed: float) -> int:
    """Return the number of bins per telemetry event, which limits the rate of events at high playback speed."""
    return min(_MAX_BINS_PER_EVENT, max(1, round(2 * speed / _TELEMETRY_EVENTS_PER_S)))


async def publish_replays(
    config: DemoConfig, recordings: Sequence[ReplayEpisode], publish: EventPublisher, meter: ProcessMeter
) -> None:
    """Replay recordings in a loop, up to four hosts in parallel."""
    by_host: dict[str, list[ReplayEpisode]] = {}
    for recording in recordings:
        by_host.setdefault(recording.row.host_id, []).append(recording)
    numberer = EventNumberer("replay", config.run.name)

    async def send(data: EventData) -> None:
        publish(numberer.wrap(data))

    async def replay_host(episodes: Sequence[ReplayEpisode]) -> None:
        for recording in cycle(episodes):
            steps = iter_replay_steps(
                recording, vm=recording.row.host_id, bins_per_event=compute_bins_per_event(config.speed)
            )
            await send_on_schedule(steps, send, speed=config.speed, meter=meter)
            await asyncio.sleep(_EPISODE_PAUSE_S)

    await asyncio.gather(*(replay_host(episodes) for episodes in list(by_host.values())[:_MAX_PARALLEL_REPLAYS]))


def read_demo_episodes(config: DemoConfig) -> tuple[ReplayEpisode, ...]:
    """Read the episodes to replay with their alarms, those with the most phases first."""
    wanted = config.episodes or tuple(episode for _, episode in list_episodes(config.run, config.choice))
    episodes = []
    for recording in read_replay_episodes(config.run, wanted, config.choice):
        episodes.append(add_alarms(recording, read_alarm_rules(recording, config.run)))
    return tuple(sorted(episodes, key=lambda r: (-len(set(r.predictions.y_true.tolist())), r.row.episode_id)))


def read_metric_events(run: Path) -> tuple[EventData, ...]:
    """Read the metrics of a run as events: leaderboard, confusion matrix, and scores by profile and host.

    The headline in them obeys the audit's verdict.
    """
    metrics = read_metrics(run)
    table = build_profile_event(metrics)
    return (*build_metric_events(metrics, read_verdict(run)), *(() if table is None else (table,)))


async def publish_metrics(run: Path, publish: EventPublisher) -> None:
    """Publish the scores of a run repeatedly, so that pages know that they are current; reread a changed file."""
    numberer = EventNumberer("facts", run.name)
    digest = ""
    events: tuple[EventData, ...] = ()
    while True:
        newest = await asyncio.to_thread(file_sha256, run / METRICS_FILE)
        if newest != digest:
            events, digest = await asyncio.to_thread(read_metric_events, run), newest
        for data in events:
            publish(numberer.wrap(data))
        await asyncio.sleep(_METRICS_INTERVAL_S)


async def publish_costs(
    config: DemoConfig,
    recordings: Sequence[ReplayEpisode],
    publish: EventPublisher,
    meter: ProcessMeter,
    *,
    scorer: PhasePredictor | None = None,
    backlog: Callable[[], int],
) -> None:
    """Predict the windows of the recordings as a watcher would, and publish latency, CPU and memory of this process.

    Args:
        config: Configuration of the replay.
        recordings: Episodes to predict, in a loop.
        publish: Receives the events.
        meter: Meter of this process.
        scorer: The model; None loads the model of each recording from the run.
        backlog: Returns the number of events that wait to be sent.
    """
    numberer = EventNumberer("perf", config.run.name)
    work = asyncio.create_task(_predict_in_loop(config, recordings, meter, scorer))
    try:
        while True:
            await asyncio.sleep(_PERF_INTERVAL_S)
            if work.done():
                work.result()  # raises if the model cannot be loaded, which ends only this producer
            publish(numberer.wrap(meter.read(backlog=backlog())))
    finally:
        work.cancel()


async def _predict_in_loop(
    config: DemoConfig, recordings: Sequence[ReplayEpisode], meter: ProcessMeter, scorer: PhasePredictor | None
) -> None:
    for recording in cycle(recordings):
        predictor = scorer if scorer is not None else await asyncio.to_thread(load_predictor, config.run, recording)
        await predict_on_schedule(recording, predictor, meter, speed=config.speed)


def load_predictor(run: Path, recording: ReplayEpisode) -> PhasePredictor:
    """Load the model that predicted a recording.

    Raises:
        RunError: If its checkpoint is missing.
        MismatchError: If the model needs other features, or uses no telemetry.
    """
    return find_models(find_model_folder(recording, run))[0].load_predictor()


async def predict_on_schedule(
    recording: ReplayEpisode,
    scorer: PhasePredictor,
    meter: ProcessMeter,
    *,
    speed: float,
    tick: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Predict the windows of a recording when they are due, and record the latency of each.

    Args:
        recording: The episode.
        scorer: The model.
        meter: Records the latencies.
        speed: Playback speed (1 = real time).
        tick: Called after each window.
    """
    postprocessor, row, half_ns = PhasePostprocessor(scorer), recording.row, WINDOW_BINS * BIN_NS // 2
    start_s = time.monotonic()
    for number, center_ns in enumerate(recording.predictions.t_center_ns.tolist()):
        first = (center_ns - half_ns - row.t0_ns) // BIN_NS
        due_s = start_s + (center_ns + DECISION_DELAY_NS - row.t0_ns) / 1e9 / speed
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        end = first + WINDOW_BINS
        p = scorer.predict_newest(recording.bins[max(0, end - scorer.bins_needed) : end])
        known = scorer.compute_known_share(recording.bins[first:end])[0]
        postprocessor.postprocess(number, center_ns - half_ns, p, known=float(known), flags=0)
        meter.add_window((time.monotonic() - due_s) * 1000)
        if tick is not None:
            await tick()
