"""Event producers of the dashboard: recorded episodes that it plays back, and running VMs that it watches."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from phasewatch.bundle.archive import unpack_manifest
from phasewatch.dashboard.intake import EventIntake, EventProducer
from phasewatch.dashboard.server import relay_watcher
from phasewatch.errors import PhasewatchError, StoreError
from phasewatch.events import demo
from phasewatch.events.from_replay import ReplayEpisode, build_replay_episode
from phasewatch.events.perf import ProcessMeter
from phasewatch.inference.model_selection import find_models
from phasewatch.inference.offline import choose_offline_model, predict_episode
from phasewatch.inference.predictor import PhasePredictor
from phasewatch.store.local import DiskStore
from phasewatch.types import EpisodeRole, SampleKind
from phasewatch.validate.verdict import BundleCheck, BundleLocation, validate_bundle

__all__ = [
    "MAX_DEMO_HOSTS",
    "build_bundle_players",
    "build_run_players",
    "build_watch_producers",
    "select_demo_episodes",
]

MAX_DEMO_HOSTS = 3
_TRAINED_ON_CAVEAT = "the bundled model was trained on this episode: this shows the dashboard, not the accuracy"


def build_run_players(run: Path, episodes: Sequence[str], speed: float) -> tuple[EventProducer, ...]:
    """Return what plays the test episodes of a run, its metrics and the cost of predicting.

    Args:
        run: A run with predictions and metrics.
        episodes: Episodes to play; empty plays all test episodes.
        speed: Playback speed; 1 is real time.

    Raises:
        RunError: If the run has no test predictions, or none of these episodes.
    """
    config = demo.DemoConfig(run=run, episodes=tuple(episodes), speed=speed)
    recordings = demo.read_demo_episodes(config)
    with suppress(PhasewatchError):  # its producer reports it; loading the library later would stop the page for a time
        demo.load_predictor(run, recordings[0])

    async def publish_metrics(intake: EventIntake) -> None:
        await demo.publish_metrics(run, intake.publish)

    return (*_build_players(config, recordings), publish_metrics)


def build_bundle_players(store: Path, model: Path) -> tuple[EventProducer, ...]:
    """Return what plays a few episodes of a store, with predictions of an edge bundle.

    Args:
        store: A store with malicious lab episodes.
        model: An edge bundle.

    Raises:
        StoreError: If the store has no malicious lab episode.
    """
    predictor = choose_offline_model(find_models(model))
    recordings = [
        build_replay_episode(check, predictor, predict_episode(check, predictor)[0], caveat=_TRAINED_ON_CAVEAT)
        for check in select_demo_episodes(store)
    ]
    return _build_players(demo.DemoConfig(run=store), recordings, predictor)


def select_demo_episodes(store: Path) -> list[BundleCheck]:
    """Return the first malicious lab episode without a guest agent of each of at most `MAX_DEMO_HOSTS` hosts.

    Raises:
        StoreError: If there is none.
    """
    disk = DiskStore(store)
    chosen: dict[str, BundleCheck] = {}
    for item in disk.walk():
        if item.host_id is None or item.host_id in chosen or len(chosen) == MAX_DEMO_HOSTS:
            continue
        data = disk.read(item)
        manifest = unpack_manifest(data, file=item.path)
        if manifest.role is EpisodeRole.LAB and manifest.sample_kind is not SampleKind.BENIGN and not manifest.agent:
            place = BundleLocation(
                path=item.path, host_id=item.host_id, episode_id=item.episode_id, receipt=item.receipt
            )
            chosen[item.host_id] = validate_bundle(data, place)
    if not chosen:
        raise StoreError(f"{store}: has no malicious lab episode to play")
    return list(chosen.values())


def build_watch_producers(
    machines: Sequence[str], run: Path | None, *, is_all: bool = False, state: Path | None = None
) -> tuple[EventProducer, ...]:
    """Return what watches running VMs in one process, which cleans up even if this one is killed.

    Args:
        machines: Names, patterns of names, or a process id.
        run: A run; its deploy model is used if it has one, else the bundled model.
        is_all: Whether all VMs of this host are watched.
        state: State folder of the watch, which keeps its alarms; None keeps none.
    """
    names = [] if is_all else [machine for machine in machines if not machine.isdigit()]
    choices: list[tuple[list[str], list[str]]] = [(["--pid", m], []) for m in machines if m.isdigit() and not is_all]
    if is_all:
        choices.append((["--all"], []))
    elif names:
        choices.append(([], ["--", *names]))
    model = ["--model", str(run)] if run is not None and (run / "models" / "deploy").is_dir() else []
    kept = ["--state", str(state)] if state is not None else []
    return tuple(_build_watch_producer([*first, *model, *kept, "--json", *last]) for first, last in choices)


def _build_watch_producer(arguments: Sequence[str]) -> EventProducer:
    command = [sys.executable, "-m", "phasewatch", "watch", *arguments]
    return lambda intake: relay_watcher(command, intake, "watch")


def _build_players(
    config: demo.DemoConfig, recordings: Sequence[ReplayEpisode], predictor: PhasePredictor | None = None
) -> tuple[EventProducer, ...]:
    meter = ProcessMeter(
        "dashboard", about="Prediction during playback; memory and CPU are of the whole dashboard process."
    )

    async def play(intake: EventIntake) -> None:
        await demo.publish_replays(config, recordings, intake.publish, meter)

    async def measure(intake: EventIntake) -> None:
        await demo.publish_costs(
            config, recordings, intake.publish, meter, scorer=predictor, backlog=lambda: intake.backlog
        )

    return play, measure
