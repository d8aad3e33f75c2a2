"""What a dashboard plays by itself: episodes one after the other, what the run's files say now, what all that costs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from phasewatch.artifacts import METRICS_FILE, file_sha256
from phasewatch.dataset.loader import N_CONTEXT_WINDOWS
from phasewatch.evaluation.evaluate import read_metrics
from phasewatch.events.from_metrics import build_metric_events, build_profile_event
from phasewatch.events.from_replay import (
    ReplayEpisode,
    ReplaySelection,
    add_alarm,
    find_model_folder,
    iter_replay_steps,
    list_episodes,
    read_alarm_rule,
    read_replay_episodes,
)
from phasewatch.events.perf import ProcessMeter
from phasewatch.events.publish import EventNumberer, send_on_schedule
from phasewatch.events.schema import EventData, EventEnvelope
from phasewatch.inference.model_selection import find_models
from phasewatch.inference.predictor import PhasePostprocessor as LiveJudge
from phasewatch.inference.predictor import PhasePredictor
from phasewatch.models.alarm import DECISION_DELAY_NS
from phasewatch.types import BIN_NS, STRIDE_BINS, WINDOW_BINS

MAX_PARALLEL_REPLAYS = 4  # machines replayed side by side
EPISODE_PAUSE_S = 2.0  # between two episodes of a lane
METRICS_INTERVAL_S = 20.0  # after which the run's files are looked at again
PERF_INTERVAL_S = 2.0
MAX_BINS_PER_EVENT = 120  # in one event
TELEMETRY_EVENTS_PER_S = 4.0  # of telemetry, whatever the speed

EventPublisher = Callable[[EventEnvelope], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """What is played.

    Attributes:
        episodes: Only these; empty plays all test episodes, one host beside the other.
        speed: Seconds of a recording in one of ours.
    """

    run: Path
    choice: ReplaySelection = field(default_factory=ReplaySelection)
    episodes: tuple[str, ...] = ()
    speed: float = 8.0


def compute_bins_per_event(speed: float) -> int:
    """Give how many bins go together, so that a page is not sent more than it can draw."""
    return min(MAX_BINS_PER_EVENT, max(1, round(2 * speed / TELEMETRY_EVENTS_PER_S)))


async def publish_replays(
    show: DemoConfig, recordings: Sequence[ReplayEpisode], publish: EventPublisher, meter: ProcessMeter
) -> None:
    """Play recordings over and over, up to four hosts side by side."""
    lanes: dict[str, list[ReplayEpisode]] = {}
    for recording in recordings:
        lanes.setdefault(recording.row.host_id, []).append(recording)
    numberer = EventNumberer("replay", show.run.name)

    async def hand_on(data: EventData) -> None:
        publish(numberer.wrap(data))

    async def lane(own: Sequence[ReplayEpisode]) -> None:
        for recording in cycle(own):
            steps = iter_replay_steps(
                recording, vm=recording.row.host_id, bins_per_event=compute_bins_per_event(show.speed)
            )
            await send_on_schedule(steps, hand_on, speed=show.speed, meter=meter)
            await asyncio.sleep(EPISODE_PAUSE_S)

    await asyncio.gather(*(lane(own) for own in list(lanes.values())[:MAX_PARALLEL_REPLAYS]))


def read_demo_episodes(show: DemoConfig) -> tuple[ReplayEpisode, ...]:
    """Read the episodes of a show; of each host those with most phases first, for there is most to see."""
    wanted = show.episodes or tuple(episode for _, episode in list_episodes(show.run, show.choice))
    found = []
    for recording in read_replay_episodes(show.run, wanted, show.choice):
        rule = read_alarm_rule(recording, show.run)
        found.append(recording if rule is None else add_alarm(recording, rule))
    return tuple(sorted(found, key=lambda r: (-len(set(r.predictions.y_true.tolist())), r.row.episode_id)))


def read_metric_events(run: Path) -> tuple[EventData, ...]:
    """Give what the run's scores say: leaderboard, confusion, profiles."""
    metrics = read_metrics(run)
    table = build_profile_event(metrics)
    return (*build_metric_events(metrics), *(() if table is None else (table,)))


async def publish_metrics(run: Path, publish: EventPublisher) -> None:
    """Send what the run's scores say now, again and again: a page that shows them knows that they still hold."""
    numberer = EventNumberer("facts", run.name)
    digest = ""
    said: tuple[EventData, ...] = ()
    while True:
        now = await asyncio.to_thread(file_sha256, run / METRICS_FILE)
        if now != digest:
            said, digest = await asyncio.to_thread(read_metric_events, run), now
        for data in said:
            publish(numberer.wrap(data))
        await asyncio.sleep(METRICS_INTERVAL_S)


async def publish_costs(
    show: DemoConfig,
    recordings: Sequence[ReplayEpisode],
    publish: EventPublisher,
    meter: ProcessMeter,
    *,
    scorer: PhasePredictor | None = None,
    backlog: Callable[[], int],
) -> None:
    """Judge one recording after the other as a watcher would, and say what this process costs meanwhile.

    Args:
        show: What is played, and how fast.
        recordings: What is judged.
        publish: Takes the events.
        meter: Of this process.
        scorer: The model; None takes each recording's own out of the run.
        backlog: Events that wait to be sent.
    """  # fmt: skip
    numberer = EventNumberer("perf", show.run.name)
    work = asyncio.create_task(_predict_in_loop(show, recordings, meter, scorer))
    try:
        while True:
            await asyncio.sleep(PERF_INTERVAL_S)
            if work.done():
                work.result()  # a model that cannot be loaded is said, and ends this producer alone
            publish(numberer.wrap(meter.read(backlog=backlog())))
    finally:
        work.cancel()


async def _predict_in_loop(
    show: DemoConfig, recordings: Sequence[ReplayEpisode], meter: ProcessMeter, scorer: PhasePredictor | None
) -> None:
    for recording in cycle(recordings):
        own = scorer if scorer is not None else await asyncio.to_thread(load_predictor, show.run, recording)
        await predict_on_schedule(recording, own, meter, speed=show.speed)


def load_predictor(run: Path, recording: ReplayEpisode) -> PhasePredictor:
    """Load the very model that judged a recording.

    Raises:
        RunError: If its checkpoint is absent.
        MismatchError: If it was made for other features, or looks at no telemetry.
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
    """Judge a recording's windows when they are due, and let the meter know how long after that each was decided."""
    judge, row, half_ns = LiveJudge(scorer), recording.row, WINDOW_BINS * BIN_NS // 2
    start_s = time.monotonic()
    for number, center_ns in enumerate(recording.predictions.t_center_ns.tolist()):
        first = (center_ns - half_ns - row.t0_ns) // BIN_NS
        due_s = start_s + (center_ns + DECISION_DELAY_NS - row.t0_ns) / 1e9 / speed
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        bins = recording.bins[max(0, first - N_CONTEXT_WINDOWS * STRIDE_BINS) : first + WINDOW_BINS]
        p, known = scorer.predict_windows(bins)[-1], scorer.compute_known_share(bins)[-1]
        judge.postprocess(number, center_ns - half_ns, p, known=float(known), flags=0)
        meter.add_window((time.monotonic() - due_s) * 1000)
        if tick is not None:
            await tick()
