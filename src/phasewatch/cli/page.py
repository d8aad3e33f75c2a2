"""The command that serves the page, and the demonstration on it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from phasewatch.cli import base

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phasewatch.dashboard.hub import Hub
    from phasewatch.dashboard.server import Producer
    from phasewatch.live.scorer import Scorer
    from phasewatch.produce.loop import Show
    from phasewatch.produce.replay import Recording
    from phasewatch.validate.verdict import Examined

DEFAULT_PORT = 8765
SPEED = 8.0
MOST_DEMO = 3  # hosts of which an episode is replayed


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=base.CODES)(dashboard)


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
    speed: float = typer.Option(SPEED, min=0.1, max=1000, help="Seconds of a recording in one of ours."),
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
    base.goes_with("--episode", "a run that is played", alone=bool(episode) and not plays)
    base.goes_with("--speed", "a run that is played", alone=speed != SPEED and not plays)
    if run is not None:
        base.need_run(run)
    for machine in watch:
        _find(machine)
    players = () if no_produce or run is None else _players(run, tuple(episode), speed)
    serve_page(
        run.name if run else "live", port=port, no_auth=no_auth, token_file=token_file, as_json=as_json,
        producers=(*players, *(_watcher(machine, run) for machine in watch)),
    )  # fmt: skip


def _find(machine: str) -> None:
    """Raise if a machine does not run here, or cannot be watched with what is installed."""
    from phasewatch.live.find import find_one

    _need_modules("onnxruntime", "qemu.qmp")
    is_pid = machine.isdigit()
    find_one(pid=int(machine) if is_pid else None, name=None if is_pid else machine, qmp=None)


def _need_modules(*names: str) -> None:
    """Raise ModuleNotFoundError for the first module that is not installed; nothing of it is loaded."""
    from importlib.util import find_spec

    for name in names:
        root = name.partition(".")[0]
        if find_spec(root) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _watcher(machine: str, run: Path | None) -> Producer:
    """Watch a machine in a process of its own: its guard cleans up whatever becomes of this one."""
    import sys

    from phasewatch.dashboard.watching import relay

    which = ["--pid", machine] if machine.isdigit() else ["--name", machine]
    model = ["--model", str(run)] if run is not None and (run / "models" / "deploy").is_dir() else []
    return lambda hub: relay([sys.executable, "-m", "phasewatch", "watch", *which, *model, "--json"], hub, machine)


def show_demo(run: Path, *, port: int, as_json: bool) -> None:
    """Replay bundled episodes on a dashboard: out of the demo's run if it is there, else judged by the bundled model."""
    from phasewatch.errors import RunError
    from phasewatch.live.models import find_models
    from phasewatch.predict import choose_offline, judge
    from phasewatch.produce.judged import recording_of
    from phasewatch.produce.loop import Show
    from phasewatch.train.predictions import PREDICTIONS

    if (run / PREDICTIONS).is_file():
        serve_page(
            run.name, port=port, no_auth=False, token_file=None, as_json=as_json, producers=_players(run, (), SPEED)
        )
        return
    corpus = base.bundled_corpus()
    edge = corpus.parent / base.EDGE
    if not edge.is_file():
        raise RunError(
            f"{run}: no run is here, and {edge}, the bundled model, is absent; `phasewatch demo --out {run}` makes the run in a few minutes"
        )
    scorer = choose_offline(find_models(edge))
    caveat = "the bundled model learnt from this very episode: this shows the page, not how well phases are told"
    recordings = [
        recording_of(found, scorer, judge(found, scorer)[0], caveat=caveat) for found in _bundled_episodes(corpus)
    ]
    show = Show(run=corpus)
    serve_page(
        corpus.name,
        port=port,
        no_auth=False,
        token_file=None,
        as_json=as_json,
        producers=players_of(show, recordings, scorer),
    )


def _bundled_episodes(corpus: Path) -> list[Examined]:
    """Read one malicious lab episode of each of a few hosts."""
    from phasewatch.episode.bundle import peek
    from phasewatch.errors import StoreError
    from phasewatch.store.disk import DiskStore
    from phasewatch.validate.verdict import Place, examine
    from phasewatch.vocab import Role, SampleKind

    store = DiskStore(corpus)
    found: dict[str, Examined] = {}
    for item in store.walk():
        if item.host_id is None or item.host_id in found or len(found) == MOST_DEMO:
            continue
        data = store.read(item)
        manifest = peek(data, file=item.path)
        if manifest.role is Role.LAB and manifest.sample_kind is not SampleKind.BENIGN and not manifest.agent:
            place = Place(path=item.path, host_id=item.host_id, episode_id=item.episode_id, receipt=item.receipt)
            found[item.host_id] = examine(data, place)
    if not found:
        raise StoreError(f"{corpus}: holds no malicious lab episode to replay")
    return list(found.values())


def _players(run: Path, episodes: tuple[str, ...], speed: float) -> tuple[Producer, ...]:
    from phasewatch.errors import PhasewatchError
    from phasewatch.produce import loop

    show = loop.Show(run=run, episodes=episodes, speed=speed)
    recordings = loop.read_show(show)
    with suppress(PhasewatchError):  # said by its producer; loading a model's library later would hold the page up
        loop.load_scorer(run, recordings[0])

    async def facts(hub: Hub) -> None:
        await loop.facts(run, hub.publish)

    return (*players_of(show, recordings), facts)


def players_of(show: Show, recordings: Sequence[Recording], scorer: Scorer | None = None) -> tuple[Producer, ...]:
    """Give what plays recordings, and says what judging them costs this process."""
    from phasewatch.produce import loop
    from phasewatch.produce.perf import Meter

    meter = Meter(
        "dashboard", about="A replay judged as it comes; memory and CPU are of the whole process, page included."
    )

    async def replays(hub: Hub) -> None:
        await loop.replays(show, recordings, hub.publish, meter)

    async def costs(hub: Hub) -> None:
        await loop.costs(show, recordings, hub.publish, meter, scorer=scorer, backlog=lambda: hub.behind)

    return replays, costs


def serve_page(
    title: str,
    *,
    port: int,
    no_auth: bool,
    token_file: Path | None,
    as_json: bool,
    producers: tuple[Producer, ...],
) -> None:
    """Bind the port, print the address, serve until told to stop.

    Raises:
        ModuleNotFoundError: If what serves is not installed.
        MachineError: If the port is taken, or the token can be kept nowhere.
    """
    from phasewatch.dashboard import server
    from phasewatch.dashboard.app import build_app
    from phasewatch.dashboard.gate import Gate
    from phasewatch.dashboard.token import ensure_token, token_path

    _need_modules("uvicorn")
    token = ensure_token(token_file or token_path())
    hub, gate = server.make_hub(), Gate(token=token, is_open=no_auth)
    build_app(hub, gate, title=title)  # what keeps the page from being served is found before its address is printed
    sock = server.bind(port)
    address = f"http://{server.ADDRESS}:{sock.getsockname()[1]}/"
    start = address if no_auth else f"{address}?token={token}"
    result = {"address": address, "start": start, "token_file": str(token_file or token_path())}
    base.answer(result, as_json=as_json, lines=["Open this in a browser; Ctrl-C ends it.", start])
    server.serve(
        sock, hub, gate, title=title,
        producers=producers, tell=lambda words: typer.echo(f"error: {base.plain(words)}", err=True),
    )  # fmt: skip
