"""The command that serves the page, and the demonstration on it."""

from __future__ import annotations

import os
from contextlib import ExitStack, aclosing, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from phasewatch.cli import common

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phasewatch.dashboard.hub import EventHub
    from phasewatch.dashboard.server import EventProducer
    from phasewatch.events.demo import DemoConfig
    from phasewatch.events.from_replay import ReplayEpisode
    from phasewatch.events.publish import EventReceiver
    from phasewatch.events.schema import EventData
    from phasewatch.inference.predictor import PhasePredictor
    from phasewatch.validate.verdict import BundleCheck


DEFAULT_PORT = 8765
DEFAULT_SPEED = 8.0
MAX_DEMO_HOSTS = 3  # hosts of which an episode is replayed


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=common.EXIT_CODES_HELP)(dashboard)


def dashboard(
    run: Path = typer.Argument(
        None, help="A run with predictions and scores; without one only outside producers are shown."
    ),
    port: int = typer.Option(DEFAULT_PORT, min=0, max=65535, help="On 127.0.0.1; 0 takes a free one."),
    watch: list[str] = typer.Option(
        [],
        metavar="NAME|PID",
        help="Watch this running machine too, with the run's model or the bundled one; may be given again.",
    ),
    episode: list[str] = typer.Option([], help="Replay only this one; may be given again."),
    speed: float = typer.Option(DEFAULT_SPEED, min=0.1, max=1000, help="Seconds of a recording in one of ours."),
    no_produce: bool = typer.Option(False, "--no-produce", help="Send nothing; wait for outside producers."),
    no_auth: bool = typer.Option(
        False, "--no-auth", help="Let every program of this machine look; sending still needs the token."
    ),
    token_file: Path = typer.Option(None, help="Where the token lies; made on first start."),
    as_json: bool = typer.Option(False, "--json", help="The address as one JSON document, before serving."),
) -> None:
    """Serve a page that shows telemetry, phases, scores and costs as they come; plays the run's events itself.

    Example: phasewatch dashboard runs/mine --port 8765
    """  # fmt: skip
    from phasewatch.errors import UsageError

    if run is None and not no_produce and not watch:
        raise UsageError("a run to play, --watch NAME, or --no-produce to wait for outside producers")
    plays = run is not None and not no_produce
    common.check_option_pair("--episode", "a run that is played", alone=bool(episode) and not plays)
    common.check_option_pair("--speed", "a run that is played", alone=speed != DEFAULT_SPEED and not plays)
    if run is not None:
        common.check_run_folder(run)
    for machine in watch:
        _check_machine(machine)
    players = () if no_produce or run is None else _build_run_players(run, tuple(episode), speed)
    _serve_dashboard(
        run.name if run else "live", port=port, no_auth=no_auth, token_file=token_file, as_json=as_json,
        producers=(*players, *(_build_watch_producer(machine, run) for machine in watch)),
    )  # fmt: skip


def _check_machine(machine: str) -> None:
    """Raise if a machine does not run here, or cannot be watched with what is installed."""
    from phasewatch.live.discover import find_running_vm

    _check_modules("onnxruntime", "qemu.qmp")
    is_pid = machine.isdigit()
    find_running_vm(pid=int(machine) if is_pid else None, name=None if is_pid else machine, qmp=None)


def _check_modules(*names: str) -> None:
    """Raise ModuleNotFoundError for the first module that is not installed; nothing of it is loaded."""
    from importlib.util import find_spec

    for name in names:
        root = name.partition(".")[0]
        if find_spec(root) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _build_watch_producer(machine: str, run: Path | None) -> EventProducer:
    """Watch a machine in a process of its own: its guard cleans up whatever becomes of this one."""
    import sys

    from phasewatch.artifacts import MODELS_DIR
    from phasewatch.dashboard.server import relay_watcher

    which = ["--pid", machine] if machine.isdigit() else ["--name", machine]
    model = ["--model", str(run)] if run is not None and (run / MODELS_DIR / "deploy").is_dir() else []
    return lambda hub: relay_watcher(
        [sys.executable, "-m", "phasewatch", "watch", *which, *model, "--json"], hub, machine
    )


def show_demo(run: Path, *, port: int, as_json: bool) -> None:
    """Replay bundled episodes on a dashboard: out of the demo's run if it is there, else judged by the bundled model."""
    from phasewatch.artifacts import PREDICTIONS_FILE
    from phasewatch.errors import RunError
    from phasewatch.events.demo import DemoConfig
    from phasewatch.events.from_replay import build_replay_episode
    from phasewatch.inference.model_selection import find_models
    from phasewatch.inference.offline import choose_offline_model, predict_episode

    if (run / PREDICTIONS_FILE).is_file():
        _serve_dashboard(
            run.name,
            port=port,
            no_auth=False,
            token_file=None,
            as_json=as_json,
            producers=_build_run_players(run, (), DEFAULT_SPEED),
        )
        return
    corpus = common.find_bundled_corpus()
    edge = corpus.parent / common.BUNDLED_MODEL_FILE
    if not edge.is_file():
        raise RunError(
            f"{run}: no run is here, and {edge}, the bundled model, is absent; `phasewatch demo --out {run}` makes the run in a few minutes"
        )
    scorer = choose_offline_model(find_models(edge))
    caveat = "the bundled model learnt from this very episode: this shows the page, not how well phases are told"
    recordings = [
        build_replay_episode(found, scorer, predict_episode(found, scorer)[0], caveat=caveat)
        for found in _read_bundled_episodes(corpus)
    ]
    show = DemoConfig(run=corpus)
    _serve_dashboard(
        corpus.name,
        port=port,
        no_auth=False,
        token_file=None,
        as_json=as_json,
        producers=_build_players(show, recordings, scorer),
    )


def _read_bundled_episodes(corpus: Path) -> list[BundleCheck]:
    """Read one malicious lab episode of each of a few hosts."""
    from phasewatch.bundle.archive import unpack_manifest
    from phasewatch.errors import StoreError
    from phasewatch.store.local import DiskStore
    from phasewatch.types import EpisodeRole, SampleKind
    from phasewatch.validate.verdict import BundleLocation, validate_bundle

    store = DiskStore(corpus)
    found: dict[str, BundleCheck] = {}
    for item in store.walk():
        if item.host_id is None or item.host_id in found or len(found) == MAX_DEMO_HOSTS:
            continue
        data = store.read(item)
        manifest = unpack_manifest(data, file=item.path)
        if manifest.role is EpisodeRole.LAB and manifest.sample_kind is not SampleKind.BENIGN and not manifest.agent:
            place = BundleLocation(
                path=item.path, host_id=item.host_id, episode_id=item.episode_id, receipt=item.receipt
            )
            found[item.host_id] = validate_bundle(data, place)
    if not found:
        raise StoreError(f"{corpus}: holds no malicious lab episode to replay")
    return list(found.values())


def _build_run_players(run: Path, episodes: tuple[str, ...], speed: float) -> tuple[EventProducer, ...]:
    from phasewatch.errors import PhasewatchError
    from phasewatch.events import demo

    show = demo.DemoConfig(run=run, episodes=episodes, speed=speed)
    recordings = demo.read_demo_episodes(show)
    with suppress(PhasewatchError):  # said by its producer; loading a model's library later would hold the page up
        demo.load_predictor(run, recordings[0])

    async def facts(hub: EventHub) -> None:
        await demo.publish_metrics(run, hub.publish)

    return (*_build_players(show, recordings), facts)


def _build_players(
    show: DemoConfig, recordings: Sequence[ReplayEpisode], scorer: PhasePredictor | None = None
) -> tuple[EventProducer, ...]:
    """Give what plays recordings, and says what judging them costs this process."""
    from phasewatch.events import demo
    from phasewatch.events.perf import ProcessMeter

    meter = ProcessMeter(
        "dashboard", about="A replay judged as it comes; memory and CPU are of the whole process, page included."
    )

    async def replays(hub: EventHub) -> None:
        await demo.publish_replays(show, recordings, hub.publish, meter)

    async def costs(hub: EventHub) -> None:
        await demo.publish_costs(show, recordings, hub.publish, meter, scorer=scorer, backlog=lambda: hub.backlog)

    return replays, costs


def _serve_dashboard(
    title: str,
    *,
    port: int,
    no_auth: bool,
    token_file: Path | None,
    as_json: bool,
    producers: tuple[EventProducer, ...],
) -> None:
    """Bind the port, print the address, serve until told to stop.

    Raises:
        ModuleNotFoundError: If what serves is not installed.
        MachineError: If the port is taken, or the token can be kept nowhere.
    """
    from phasewatch.dashboard import server
    from phasewatch.dashboard.app import build_app
    from phasewatch.dashboard.auth import AccessControl, ensure_token, find_token_path

    _check_modules("uvicorn")
    token = ensure_token(token_file or find_token_path())
    hub, gate = server.make_hub(), AccessControl(token=token, is_open=no_auth)
    build_app(hub, gate, title=title)  # what keeps the page from being served is found before its address is printed
    sock = server.bind_socket(port)
    address = f"http://{server.DASHBOARD_ADDRESS}:{sock.getsockname()[1]}/"
    start = address if no_auth else f"{address}?token={token}"
    result = {"address": address, "start": start, "token_file": str(token_file or find_token_path())}
    common.print_result(result, as_json=as_json, lines=["Open this in a browser; Ctrl-C ends it.", start])
    server.serve_dashboard(
        sock, hub, gate, title=title,
        producers=producers, tell=lambda words: typer.echo(f"error: {common.escape_for_terminal(words)}", err=True),
    )  # fmt: skip


def register_publish(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=common.EXIT_CODES_HELP)(produce)


class ProducerKind(StrEnum):
    """A producer."""

    REPLAY = "replay"
    METRICS = "metrics"
    PERF = "perf"
    PROFILES = "profiles"


def produce(
    what: ProducerKind = typer.Argument(..., help="What to send."),
    run: Path = typer.Argument(..., help="A run with predictions and scores."),
    to: str = typer.Option("-", help="A dashboard's address, a file, or - for standard output."),
    episode: str = typer.Option("", help="Which one is replayed or judged; the richest one if left out."),
    speed: float = typer.Option(
        8.0, min=0.1, max=1000, help="Seconds of the recording in one of ours; a file is not waited for."
    ),
    model: str = typer.Option("gbt", help="Whose predictions are replayed."),
    threat: str = typer.Option("realistic", help="Under which threat model."),
    recipe: str = typer.Option("held_out_host", help="Of which recipe."),
    token_file: Path = typer.Option(None, help="Where the dashboard's token lies; PHASEWATCH_TOKEN comes first."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document; not with --to -."),
) -> None:
    """Send a run's events: an episode replayed, its scores, its profiles, or what judging it costs here and now.

    Example: phasewatch produce replay runs/mine --speed 8 --to http://127.0.0.1:8765
    """  # fmt: skip
    import asyncio

    from phasewatch.errors import UsageError
    from phasewatch.events.demo import DemoConfig
    from phasewatch.events.from_replay import ReplaySelection

    if as_json and to == "-":
        raise UsageError("--json with --to -: standard output holds either the events or the answer; name a file")
    choice = ReplaySelection(recipe=recipe, threat=threat, model=model)
    show = DemoConfig(
        run=common.check_run_folder(run), choice=choice, episodes=(episode,) if episode else (), speed=speed
    )
    with ExitStack() as stack:
        is_page = "://" in to
        receiver = _open_output(to, stack, token_file)
        sent = asyncio.run(_send_events(what, show, receiver, paced=is_page or what is ProducerKind.PERF))
    if to != "-":
        common.print_result({"events": sent, "to": to}, as_json=as_json, lines=[f"{sent:,} events", to])


def _open_output(to: str, stack: ExitStack, token_file: Path | None) -> EventReceiver:
    import sys

    from phasewatch import atomic
    from phasewatch.dashboard.auth import TOKEN_VARIABLE, find_token_path, read_token
    from phasewatch.events.publish import EventFileWriter, EventPoster

    if to == "-":
        return EventFileWriter(sys.stdout.buffer)
    if "://" not in to:
        return EventFileWriter(stack.enter_context(atomic.open_atomic(Path(to))))
    told = os.environ.get(TOKEN_VARIABLE) if token_file is None else None
    return EventPoster(to, told or read_token(token_file or find_token_path()))


async def _send_events(what: ProducerKind, show: DemoConfig, receiver: EventReceiver, *, paced: bool) -> int:
    async with aclosing(receiver):
        return await _produce_events(what, show, receiver, paced=paced)


async def _produce_events(what: ProducerKind, show: DemoConfig, receiver: EventReceiver, *, paced: bool) -> int:
    from phasewatch.events import demo
    from phasewatch.events.from_replay import iter_replay_steps
    from phasewatch.events.perf import ProcessMeter
    from phasewatch.events.publish import EventNumberer, send_on_schedule

    numberer = EventNumberer(str(what), show.run.name)
    sent = 0

    async def hand_on(data: EventData) -> None:
        nonlocal sent
        await receiver.send([numberer.wrap(data)])
        sent += 1

    if what is ProducerKind.REPLAY:
        recording = demo.read_demo_episodes(show)[0]
        speed = show.speed if paced else 0.0
        steps = iter_replay_steps(
            recording, vm=recording.row.host_id, bins_per_event=demo.compute_bins_per_event(show.speed)
        )
        await send_on_schedule(steps, hand_on, speed=speed)
    elif what is ProducerKind.PERF:
        meter = ProcessMeter(
            "perf", about=f"{show.choice.model} judging one recorded episode, {show.speed:g} times as fast as it was."
        )

        async def tick() -> None:
            await hand_on(meter.read())

        recording = demo.read_demo_episodes(show)[0]
        await demo.predict_on_schedule(
            recording, demo.load_predictor(show.run, recording), meter, speed=show.speed, tick=tick
        )
    else:
        kinds = ("score", "confusion") if what is ProducerKind.METRICS else ("profile",)
        for data in demo.read_metric_events(show.run):
            event = numberer.wrap(data)
            if event.type in kinds:
                await receiver.send([event])
                sent += 1
    return sent
