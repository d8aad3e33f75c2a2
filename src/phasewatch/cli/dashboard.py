"""Commands that show events: dashboard, publish."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, aclosing
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phasewatch.cli import common
from phasewatch.cli.folders import BUNDLED_MODEL_FILE, check_run_folder, find_bundled_corpus
from phasewatch.cli.options import Episodes, RunFolder, Speed, TokenFile
from phasewatch.errors import RunError, UsageError

if TYPE_CHECKING:
    from phasewatch.dashboard.intake import EventProducer
    from phasewatch.events.demo import DemoConfig
    from phasewatch.events.publish import EventReceiver
    from phasewatch.events.schema import EventData

    _SendEvent = Callable[[EventData], Awaitable[None]]

__all__ = ["DEFAULT_PORT", "EventKind", "dashboard", "publish", "show_demo"]

DEFAULT_PORT = 8765
_DEFAULT_SPEED = 8.0
_GLOB_CHARS = frozenset("*?[")

# `phasewatch.dashboard.server`, `app` and `players` are imported in functions: they need the extra `serve`.


def dashboard(
    run: Annotated[Path | None, typer.Argument(help="Run with predictions and metrics; default: no playback.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = DEFAULT_PORT,
    watch: Annotated[
        list[str],
        typer.Option(
            metavar="NAME|GLOB|PID",
            help="Also watch this VM, or those whose names match, with the run's or the bundled model; repeatable.",
        ),
    ] = [],  # noqa: B006  typer copies it
    watch_all: Annotated[
        bool, typer.Option("--watch-all", help="Also watch all VMs of this host, also those that start later.")
    ] = False,
    state: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="State folder of a watch: its alarm history is shown and changed."),
    ] = None,
    episode: Episodes = [],  # noqa: B006
    speed: Speed = _DEFAULT_SPEED,
    no_produce: Annotated[
        bool, typer.Option("--no-produce", help="Play and watch nothing; show what others publish.")
    ] = False,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let every local program read; publishing still needs the token.")
    ] = False,
    token_file: TokenFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the address as one JSON document.")] = False,
) -> None:
    """Serve the dashboard for a run or for running VMs.

    The page shows telemetry, phases, metrics and costs. A run's test episodes are played back. Ctrl-C ends it.

    Example: phasewatch dashboard runs/mine
    """
    if run is None and not no_produce and not watch and not watch_all:
        raise UsageError("name a run to play, --watch NAME, --watch-all, or --no-produce to show what others publish")
    if state is not None and not state.is_dir() and not (watch or watch_all):
        raise UsageError(f"{state}: no such folder; name the --state folder of a watch")
    played = None if no_produce else run
    common.check_option_pair("--episode", "a run that is played", is_partner_missing=bool(episode) and played is None)
    common.check_option_pair(
        "--speed", "a run that is played", is_partner_missing=speed != _DEFAULT_SPEED and played is None
    )
    if run is not None:
        check_run_folder(run)
    if watch or watch_all:
        _check_modules("onnxruntime")
    for machine in watch:
        if not _GLOB_CHARS & set(machine):
            _check_machine(machine)
    _check_modules("uvicorn")
    from phasewatch.dashboard.players import build_run_players, build_watch_producers

    players = build_run_players(played, episode, speed) if played is not None else ()
    _serve(
        run.name if run else "",  # what others publish may be a replay
        port=port,
        no_auth=no_auth,
        token_file=token_file,
        as_json=as_json,
        producers=(*players, *build_watch_producers(watch, run, is_all=watch_all, state=state)),
        state=state,
    )


def _check_machine(machine: str) -> None:
    """Raise if a VM does not run here."""
    from phasewatch.live.discover import find_running_vm

    is_pid = machine.isdigit()
    find_running_vm(pid=int(machine) if is_pid else None, name=None if is_pid else machine, qmp=None)


def _check_modules(*names: str) -> None:
    """Raise ModuleNotFoundError for the first module that is not installed; none is imported."""
    for name in names:
        if find_spec(name.partition(".")[0]) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def show_demo(run: Path, *, port: int, as_json: bool) -> None:
    """Serve the dashboard with the demo's run, or if there is none with bundled recordings and the bundled model.

    Raises:
        RunError: If there is neither a run nor a bundled model.
    """
    from phasewatch.artifacts import PREDICTIONS_FILE

    _check_modules("uvicorn")
    from phasewatch.dashboard.players import build_bundle_players, build_run_players

    if (run / PREDICTIONS_FILE).is_file():
        title, producers = run.name, build_run_players(run, (), _DEFAULT_SPEED)
    else:
        corpus = find_bundled_corpus()
        model = corpus.parent / BUNDLED_MODEL_FILE
        if not model.is_file():
            raise RunError(
                f"{run}: no run is here, and {model}, the bundled model, is absent; `phasewatch demo --out {run}` "
                "makes the run in a few minutes"
            )
        title, producers = corpus.name, build_bundle_players(corpus, model)
    _serve(title, port=port, no_auth=False, token_file=None, as_json=as_json, producers=producers)


def _serve(
    title: str,
    *,
    port: int,
    no_auth: bool,
    token_file: Path | None,
    as_json: bool,
    producers: tuple[EventProducer, ...],
    state: Path | None = None,
) -> None:
    """Bind the port, print the address and serve until a signal.

    Raises:
        ModuleNotFoundError: If the extra `serve` is not installed.
        MachineError: If the port is taken, or the token cannot be stored.
    """
    from phasewatch.dashboard import server
    from phasewatch.dashboard.alarm_keeper import StateFolderAlarms, follow_state_folder
    from phasewatch.dashboard.app import build_app
    from phasewatch.dashboard.auth import AccessControl, ensure_token, find_token_path

    token = ensure_token(token_file or find_token_path())
    keeper = None if state is None else StateFolderAlarms(state)
    producers = producers if keeper is None else (*producers, follow_state_folder)
    intake, access = server.make_intake(keeper), AccessControl(token=token, is_open=no_auth)
    build_app(intake, access, title=title)  # its errors are reported before the address is printed
    sock = server.bind_socket(port)
    address = f"http://{server.DASHBOARD_ADDRESS}:{sock.getsockname()[1]}/"
    start = address if no_auth else f"{address}?token={token}"
    result = {"address": address, "start": start, "token_file": str(token_file or find_token_path())}
    common.print_result(result, as_json=as_json, lines=["Open this address in a browser; Ctrl-C ends it.", start])
    server.serve_dashboard(
        sock,
        intake,
        access,
        title=title,
        producers=producers,
    )


class EventKind(StrEnum):
    """What `publish` sends."""

    REPLAY = "replay"
    METRICS = "metrics"
    PERF = "perf"
    PROFILES = "profiles"


def publish(
    what: Annotated[EventKind, typer.Argument(help="replay, metrics, perf (cost of predicting here) or profiles.")],
    run: RunFolder,
    to: Annotated[str, typer.Option(help="Dashboard address, file, or - for standard output.")] = "-",
    episode: Annotated[str, typer.Option(help="Episode to replay; default: the one with most phases.")] = "",
    speed: Speed = _DEFAULT_SPEED,
    model: Annotated[str, typer.Option(help="Model whose predictions are replayed.")] = "gbt",
    channels: Annotated[str, typer.Option("--channels", help="Channel set of that model.")] = "realistic",
    recipe: Annotated[str, typer.Option(help="Split recipe of that model.")] = "held_out_host",
    token_file: Annotated[
        Path | None, typer.Option(help="File with the dashboard's token; PHASEWATCH_TOKEN wins.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document; not with --to -.")] = False,
) -> None:
    """Send a run's events to a dashboard, a file or stdout.

    Events for a file are written at once; for a dashboard they follow the clock of the recording.

    Example: phasewatch publish replay runs/mine --to http://127.0.0.1:8765
    """
    import asyncio

    from phasewatch.events.demo import DemoConfig
    from phasewatch.events.from_replay import ReplaySelection

    if as_json and to == "-":
        raise UsageError("--json with --to -: standard output holds either the events or the result; name a file")
    config = DemoConfig(
        run=check_run_folder(run),
        choice=ReplaySelection(recipe=recipe, threat=channels, model=model),
        episodes=(episode,) if episode else (),
        speed=speed,
    )
    with ExitStack() as stack:
        receiver = _open_output(to, stack, token_file)
        is_paced = "://" in to or what is EventKind.PERF
        sent = asyncio.run(_send_events(what, config, receiver, is_paced=is_paced))
    if to != "-":
        common.print_result({"events": sent, "to": to}, as_json=as_json, lines=[f"{sent:,} events", to])


def _open_output(to: str, stack: ExitStack, token_file: Path | None) -> EventReceiver:
    from phasewatch import atomic
    from phasewatch.dashboard.auth import TOKEN_VARIABLE, find_token_path, read_token
    from phasewatch.events.publish import EventFileWriter, EventPoster

    if to == "-":
        return EventFileWriter(sys.stdout.buffer)
    if "://" not in to:
        return EventFileWriter(stack.enter_context(atomic.open_atomic(Path(to))))
    token = os.environ.get(TOKEN_VARIABLE) if token_file is None else None
    return EventPoster(to, token or read_token(token_file or find_token_path()))


async def _send_events(what: EventKind, config: DemoConfig, receiver: EventReceiver, *, is_paced: bool) -> int:
    """Send the events of one kind and return their number."""
    from phasewatch.events import demo
    from phasewatch.events.publish import EventNumberer

    numberer = EventNumberer(str(what), config.run.name)
    sent = 0

    async def send(data: EventData) -> None:
        nonlocal sent
        await receiver.send([numberer.wrap(data)])
        sent += 1

    async with aclosing(receiver):
        if what is EventKind.REPLAY:
            await _replay(config, send, is_paced=is_paced)
        elif what is EventKind.PERF:
            await _measure(config, send)
        else:
            kinds = ("score", "confusion") if what is EventKind.METRICS else ("profile",)
            for data in demo.read_metric_events(config.run):
                event = numberer.wrap(data)
                if event.type in kinds:
                    await receiver.send([event])
                    sent += 1
    return sent


async def _replay(config: DemoConfig, send: _SendEvent, *, is_paced: bool) -> None:
    from phasewatch.events import demo
    from phasewatch.events.from_replay import iter_replay_steps
    from phasewatch.events.publish import send_on_schedule

    recording = demo.read_demo_episodes(config)[0]
    steps = iter_replay_steps(
        recording, vm=recording.row.host_id, bins_per_event=demo.compute_bins_per_event(config.speed)
    )
    await send_on_schedule(steps, send, speed=config.speed if is_paced else 0.0)


async def _measure(config: DemoConfig, send: _SendEvent) -> None:
    from phasewatch.events import demo
    from phasewatch.events.perf import ProcessMeter

    meter = ProcessMeter(
        "perf", about=f"{config.choice.model} on one recorded episode at {config.speed:g} times real time."
    )

    async def tick() -> None:
        await send(meter.read())

    recording = demo.read_demo_episodes(config)[0]
    predictor = demo.load_predictor(config.run, recording)
    await demo.predict_on_schedule(recording, predictor, meter, speed=config.speed, tick=tick)
