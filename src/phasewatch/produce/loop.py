"""What a dashboard plays by itself: episodes one after the other, what the run's files say now, what all that costs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from phasewatch.dataset.run import file_sha256
from phasewatch.dataset.views import BACK
from phasewatch.evaluate.rows import METRICS
from phasewatch.evaluate.score import read_metrics
from phasewatch.live.envelope import Event
from phasewatch.live.events import Data
from phasewatch.live.models import find_models
from phasewatch.live.scorer import Scorer
from phasewatch.live.tracker import Judge as LiveJudge
from phasewatch.models.alarm import DECISION_NS
from phasewatch.produce.metrics import build_metrics
from phasewatch.produce.perf import Meter
from phasewatch.produce.profiles import build_profiles
from phasewatch.produce.replay import (
    Choice,
    Recording,
    cell_of,
    list_episodes,
    play,
    read_recordings,
    read_rule,
    with_alarm,
)
from phasewatch.produce.send import Numberer, keep_time
from phasewatch.vocab import BIN_NS, STRIDE_BINS, WINDOW_BINS

LANES = 4  # machines replayed side by side
REST_S = 2.0  # between two episodes of a lane
AGAIN_S = 20.0  # after which the run's files are looked at again
PERF_S = 2.0
MOST_BINS = 120  # in one event
SENDS_PER_S = 4.0  # of telemetry, whatever the speed

Publish = Callable[[Event], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Show:
    """What is played.

    Attributes:
        episodes: Only these; empty plays all test episodes, one host beside the other.
        speed: Seconds of a recording in one of ours.
    """

    run: Path
    choice: Choice = field(default_factory=Choice)
    episodes: tuple[str, ...] = ()
    speed: float = 8.0


def bins_per_event(speed: float) -> int:
    """Give how many bins go together, so that a page is not sent more than it can draw."""
    return min(MOST_BINS, max(1, round(2 * speed / SENDS_PER_S)))


async def replays(show: Show, recordings: Sequence[Recording], publish: Publish, meter: Meter) -> None:
    """Play recordings over and over, up to four hosts side by side."""
    lanes: dict[str, list[Recording]] = {}
    for recording in recordings:
        lanes.setdefault(recording.row.host_id, []).append(recording)
    numberer = Numberer("replay", show.run.name)

    async def hand_on(data: Data) -> None:
        publish(numberer.envelop(data))

    async def lane(own: Sequence[Recording]) -> None:
        for recording in cycle(own):
            steps = play(recording, vm=recording.row.host_id, bins_per_event=bins_per_event(show.speed))
            await keep_time(steps, hand_on, speed=show.speed, meter=meter)
            await asyncio.sleep(REST_S)

    await asyncio.gather(*(lane(own) for own in list(lanes.values())[:LANES]))


def read_show(show: Show) -> tuple[Recording, ...]:
    """Read the episodes of a show; of each host those with most phases first, for there is most to see."""
    wanted = show.episodes or tuple(episode for _, episode in list_episodes(show.run, show.choice))
    found = []
    for recording in read_recordings(show.run, wanted, show.choice):
        rule = read_rule(recording, show.run)
        found.append(recording if rule is None else with_alarm(recording, rule))
    return tuple(sorted(found, key=lambda r: (-len(set(r.judged.y_true.tolist())), r.row.episode_id)))


def read_facts(run: Path) -> tuple[Data, ...]:
    """Give what the run's scores say: leaderboard, confusion, profiles."""
    metrics = read_metrics(run)
    table = build_profiles(metrics)
    return (*build_metrics(metrics), *(() if table is None else (table,)))


async def facts(run: Path, publish: Publish) -> None:
    """Send what the run's scores say now, again and again: a page that shows them knows that they still hold."""
    numberer = Numberer("facts", run.name)
    digest = ""
    said: tuple[Data, ...] = ()
    while True:
        now = await asyncio.to_thread(file_sha256, run / METRICS)
        if now != digest:
            said, digest = await asyncio.to_thread(read_facts, run), now
        for data in said:
            publish(numberer.envelop(data))
        await asyncio.sleep(AGAIN_S)


async def costs(
    show: Show,
    recordings: Sequence[Recording],
    publish: Publish,
    meter: Meter,
    *,
    scorer: Scorer | None = None,
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
    numberer = Numberer("perf", show.run.name)
    work = asyncio.create_task(_work(show, recordings, meter, scorer))
    try:
        while True:
            await asyncio.sleep(PERF_S)
            if work.done():
                work.result()  # a model that cannot be loaded is said, and ends this producer alone
            publish(numberer.envelop(meter.read(backlog=backlog())))
    finally:
        work.cancel()


async def _work(show: Show, recordings: Sequence[Recording], meter: Meter, scorer: Scorer | None) -> None:
    for recording in cycle(recordings):
        own = scorer if scorer is not None else await asyncio.to_thread(load_scorer, show.run, recording)
        await judge_in_time(recording, own, meter, speed=show.speed)


def load_scorer(run: Path, recording: Recording) -> Scorer:
    """Load the very model that judged a recording.

    Raises:
        RunError: If its checkpoint is absent.
        MismatchError: If it was made for other features, or looks at no telemetry.
    """
    return find_models(cell_of(recording, run))[0].scorer()


async def judge_in_time(
    recording: Recording,
    scorer: Scorer,
    meter: Meter,
    *,
    speed: float,
    tick: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Judge a recording's windows when they are due, and let the meter know how long after that each was decided."""
    judge, row, half_ns = LiveJudge(scorer), recording.row, WINDOW_BINS * BIN_NS // 2
    start_s = time.monotonic()
    for number, center_ns in enumerate(recording.judged.t_center_ns.tolist()):
        first = (center_ns - half_ns - row.t0_ns) // BIN_NS
        due_s = start_s + (center_ns + DECISION_NS - row.t0_ns) / 1e9 / speed
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        bins = recording.bins[max(0, first - BACK * STRIDE_BINS) : first + WINDOW_BINS]
        p, known = scorer.probabilities(bins)[-1], scorer.known(bins)[-1]
        judge.decide(number, center_ns - half_ns, p, known=float(known), flags=0)
        meter.window((time.monotonic() - due_s) * 1000)
        if tick is not None:
            await tick()
