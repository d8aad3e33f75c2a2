"""The command that sends a run's events to a dashboard, a file or a pipe."""

from __future__ import annotations

import os
from contextlib import ExitStack, aclosing
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from phasewatch.cli import base

if TYPE_CHECKING:
    from phasewatch.live.events import Data
    from phasewatch.produce.loop import Show
    from phasewatch.produce.send import Receiver


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=base.CODES)(produce)


class What(StrEnum):
    """A producer."""

    REPLAY = "replay"
    METRICS = "metrics"
    PERF = "perf"
    PROFILES = "profiles"


def produce(
    what: What = typer.Argument(..., help="What to send."),
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
    from phasewatch.produce.loop import Show
    from phasewatch.produce.replay import Choice

    if as_json and to == "-":
        raise UsageError("--json with --to -: standard output holds either the events or the answer; name a file")
    choice = Choice(recipe=recipe, threat=threat, model=model)
    show = Show(run=base.need_run(run), choice=choice, episodes=(episode,) if episode else (), speed=speed)
    with ExitStack() as stack:
        is_page = "://" in to
        receiver = _receiver(to, stack, token_file)
        sent = asyncio.run(_send(what, show, receiver, paced=is_page or what is What.PERF))
    if to != "-":
        base.answer({"events": sent, "to": to}, as_json=as_json, lines=[f"{sent:,} events", to])


def _receiver(to: str, stack: ExitStack, token_file: Path | None) -> Receiver:
    import sys

    from phasewatch import atomic
    from phasewatch.dashboard.token import VARIABLE, read_token, token_path
    from phasewatch.produce.send import Lines, Poster

    if to == "-":
        return Lines(sys.stdout.buffer)
    if "://" not in to:
        return Lines(stack.enter_context(atomic.writer(Path(to))))
    told = os.environ.get(VARIABLE) if token_file is None else None
    return Poster(to, told or read_token(token_file or token_path()))


async def _send(what: What, show: Show, receiver: Receiver, *, paced: bool) -> int:
    async with aclosing(receiver):
        return await _produce(what, show, receiver, paced=paced)


async def _produce(what: What, show: Show, receiver: Receiver, *, paced: bool) -> int:
    from phasewatch.produce import loop
    from phasewatch.produce.perf import Meter
    from phasewatch.produce.replay import play
    from phasewatch.produce.send import Numberer, keep_time

    numberer = Numberer(str(what), show.run.name)
    sent = 0

    async def hand_on(data: Data) -> None:
        nonlocal sent
        await receiver.send([numberer.envelop(data)])
        sent += 1

    if what is What.REPLAY:
        recording = loop.read_show(show)[0]
        speed = show.speed if paced else 0.0
        steps = play(recording, vm=recording.row.host_id, bins_per_event=loop.bins_per_event(show.speed))
        await keep_time(steps, hand_on, speed=speed)
    elif what is What.PERF:
        meter = Meter(
            "perf", about=f"{show.choice.model} judging one recorded episode, {show.speed:g} times as fast as it was."
        )

        async def tick() -> None:
            await hand_on(meter.read())

        recording = loop.read_show(show)[0]
        await loop.judge_in_time(recording, loop.load_scorer(show.run, recording), meter, speed=show.speed, tick=tick)
    else:
        kinds = ("score", "confusion") if what is What.METRICS else ("profile",)
        for data in loop.read_facts(show.run):
            event = numberer.envelop(data)
            if event.type in kinds:
                await receiver.send([event])
                sent += 1
    return sent
