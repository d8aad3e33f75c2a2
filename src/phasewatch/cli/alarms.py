"""Commands on alarms: alarms, check-config."""

from __future__ import annotations

import asyncio
import getpass
import os
import re
import secrets
import time
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from phasewatch.alarms.config import describe_outputs
from phasewatch.alarms.history import ALARMS_FILE, AlarmHistory, read_alarms, read_changes, read_silences
from phasewatch.alarms.life import Alarm, Silence, find_silence, render_time
from phasewatch.cli import common
from phasewatch.cli.options import AsJson
from phasewatch.errors import AlarmStoreError, UsageError
from phasewatch.live.config import find_config_faults, read_example, read_watch_config
from phasewatch.live.state import STATE_FILE
from phasewatch.models.alarm import AlarmKind

__all__ = ["alarms", "check_config", "parse_duration_ns"]

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_LONGEST_S = 366 * 86_400


class AlarmAction(StrEnum):
    """What to do with alarms."""

    LIST = "list"
    SHOW = "show"
    ACK = "ack"
    SILENCE = "silence"


def alarms(
    what: Annotated[AlarmAction, typer.Argument(help="list, show ID, ack ID or silence.")],
    alarm_id: Annotated[str, typer.Argument(metavar="[ID]", help="Alarm; the first digits of its id are enough.")] = "",
    state: Annotated[Path | None, typer.Option(metavar="DIR", help="State folder of the watch.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Configuration that names the folder.")] = None,
    is_open: Annotated[bool, typer.Option("--open", help="List only alarms that are not resolved.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="List at most so many.")] = 100,
    vm: Annotated[str, typer.Option(metavar="GLOB", help="Silence: names of VMs, such as 'web*'.")] = "*",
    kind: Annotated[AlarmKind | None, typer.Option(help="Silence: only this kind of alarm.")] = None,
    duration: Annotated[str, typer.Option("--for", help="Silence: how long, such as 30m, 2h or 1d.")] = "",
    end: Annotated[str, typer.Option(metavar="ID", help="Silence: end this one now.")] = "",
    note: Annotated[str, typer.Option(help="Why; kept in the history.")] = "",
    by: Annotated[str, typer.Option(help="Who; default: the name of the user.")] = "",
    as_json: AsJson = False,
) -> None:
    """List the alarms of a watch, acknowledge one, or silence some.

    An acknowledged alarm stays open until the model no longer raises it. A silence keeps alarms from webhook,
    Alertmanager and the command of --on-alarm; history, syslog, ECS and metrics still have them. Times are in UTC.

    Example: phasewatch alarms ack 3f9a --note "reimaging" --state /var/lib/phasewatch
    """
    folder = _find_state(state, config)
    who, now_ns = by or _find_user(), time.time_ns()
    if what in (AlarmAction.SHOW, AlarmAction.ACK) and not alarm_id:
        raise UsageError(f"alarms {what}: the id of an alarm is needed; `phasewatch alarms list` shows them")
    if what in (AlarmAction.LIST, AlarmAction.SILENCE) and alarm_id:
        raise UsageError(f"alarms {what} takes no id: {alarm_id}")
    if what is AlarmAction.LIST:
        _list(folder, limit=limit, is_open=is_open, now_ns=now_ns, as_json=as_json)
    elif what is AlarmAction.SHOW:
        _show(folder, alarm_id, now_ns=now_ns, as_json=as_json)
    elif what is AlarmAction.ACK:
        with _open_history(folder, alarm_id) as history:
            alarm = history.acknowledge(alarm_id, now_ns, by=who, note=note)
        line = f"alarm {alarm.id} of {alarm.vm} is acknowledged by {who}"
        common.print_result(_describe_alarm(alarm, ()), as_json=as_json, lines=[line])
    elif end:
        with _open_history(folder, end) as history:
            silence = history.end_silence(end, now_ns)
        common.print_result(_describe_silence(silence), as_json=as_json, lines=[f"silence {silence.id} is ended"])
    else:
        silence = Silence(
            id=secrets.token_hex(4),
            vm=vm,
            kind=kind,
            from_ns=now_ns,
            until_ns=now_ns + parse_duration_ns(duration),
            reason=note,
            by=who,
        )
        with AlarmHistory(folder) as history:
            history.add_silence(silence)
        common.print_result(_describe_silence(silence), as_json=as_json, lines=[_render_silence(silence)])


def check_config(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Configuration of a watch.")] = None,
    example: Annotated[bool, typer.Option("--example", help="Print an example with all tables and keys.")] = False,
    connect: Annotated[bool, typer.Option("--connect", help="Connect to each receiver; send no alarm.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a configuration, and show what would be sent where.

    All faults are reported, each with its line. Without --connect nothing is connected; nothing is ever sent.

    Example: phasewatch check-config /etc/phasewatch/watch.toml
    """
    if example:
        common.print_result({"example": read_example()}, as_json=as_json, lines=read_example().splitlines())
        return
    if file is None:
        raise UsageError("check-config: name a FILE, or --example to see one")
    config, faults = find_config_faults(file)
    problems = list(faults)
    sections: dict[str, Any] = {}
    lines: list[str] = []
    if config is not None:
        watch = config.watch
        sections["watch"] = msgspec.structs.asdict(watch)
        sections["outputs"] = [{"name": name, "to": to} for name, to in describe_outputs(config.outputs)]
        lines += [f"watch: {', '.join(watch.match) or 'the VMs that the command names'}"]
        lines += [f"state: {watch.state or 'none: no history, no silences'}"]
        lines += common.render_table([(name, to) for name, to in describe_outputs(config.outputs)]) or ["no outputs"]
        if watch.state:
            try:
                read_alarms(Path(watch.state), limit=1)
            except AlarmStoreError as exc:
                problems.append(str(exc))
        if connect and not faults:
            from phasewatch.alarms.probe import probe_receivers

            results = asyncio.run(probe_receivers(config.outputs))
            sections["connections"] = [asdict(result) for result in results]
            lines += [f"{result.name}: {result.words}" for result in results if result.is_reached is not False]
            problems += [
                f"{result.name}: not reached: {result.words}" for result in results if result.is_reached is False
            ]
    common.print_result({"file": str(file), "faults": problems, **sections}, as_json=as_json, lines=[*problems, *lines])
    if problems:
        raise typer.Exit(1)


def parse_duration_ns(text: str) -> int:
    """Parse a duration such as ``90s``, ``30m``, ``2h`` or ``1d``.

    Raises:
        UsageError: If it is none, or longer than a year.
    """
    match = re.fullmatch(r"([0-9]{1,6})([smhd])", text)
    seconds = int(match[1]) * _UNITS_S[match[2]] if match else 0
    if not 0 < seconds <= _LONGEST_S:
        raise UsageError(f"--for {text}: a duration such as 30m, 2h or 1d is needed, at most 366d")
    return seconds * 1_000_000_000


def _find_state(state: Path | None, config: Path | None) -> Path:
    if state is None and config is not None:
        named = read_watch_config(config).watch.state
        state = Path(named) if named else None
    if state is None:
        raise UsageError("--state DIR is needed, the state folder of the watch (or --config FILE that names it)")
    if not state.is_dir():
        raise UsageError(f"{state}: no such folder; name the --state folder of the watch")
    if not any((state / name).is_file() for name in (ALARMS_FILE, STATE_FILE)) and any(state.iterdir()):
        raise UsageError(
            f"{state}: not the state of a watch: it holds neither {ALARMS_FILE} nor {STATE_FILE}; "
            "name the --state folder of the watch"
        )
    return state


def _open_history(folder: Path, wanted: str) -> AlarmHistory:
    """Open the history that holds an alarm or silence; a folder without one is not changed."""
    if not (folder / ALARMS_FILE).is_file():
        raise UsageError(f"{wanted}: {folder} has no history of alarms yet; `phasewatch alarms list` shows them")
    return AlarmHistory(folder)


def _find_user() -> str:
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):  # a user id without an entry
        return str(os.getuid())


def _list(folder: Path, *, limit: int, is_open: bool, now_ns: int, as_json: bool) -> None:
    silences = read_silences(folder, now_ns=now_ns)
    known = read_alarms(folder, limit=limit, is_open=is_open)
    result = {
        "alarms": [_describe_alarm(alarm, silences, now_ns) for alarm in known],
        "silences": [_describe_silence(silence) for silence in silences],
    }
    rows = [_render_alarm(alarm, silences, now_ns) for alarm in known]
    header = [("ID", "STATUS", "KIND", "VM", "RAISED (UTC)", "DURATION", "BY")] if rows else []
    lines = common.render_table([*header, *rows]) or ["no alarms"]
    common.print_result(result, as_json=as_json, lines=[*lines, *map(_render_silence, silences)])


def _show(folder: Path, alarm_id: str, *, now_ns: int, as_json: bool) -> None:
    found = read_alarms(folder, alarm_id=alarm_id, limit=2)
    if len(found) != 1:
        words = "no alarm has this id" if not found else "several alarms begin with this; write more digits"
        raise UsageError(f"{alarm_id}: {words}; `phasewatch alarms list` shows them")
    alarm, silences = found[0], read_silences(folder, now_ns=now_ns)
    changes = read_changes(folder, alarm.id)
    rows = [{"at": render_time(c.at_ns), "change": str(c.kind), "by": c.by, "note": c.note} for c in changes]
    probabilities = " ".join(f"{name} {p:.2f}" for name, p in alarm.probabilities.items())
    lines = [
        f"alarm {alarm.id}: {alarm.kind} on {alarm.vm} ({alarm.vm_id}), {_describe_status(alarm, silences, now_ns)}",
        f"raised {render_time(alarm.raised_ns)}, last seen {render_time(alarm.seen_ns)}",
        f"predicted {alarm.decision}: {probabilities}",
        f"model {alarm.model}, channel set {alarm.threat}",
        *([f"caveat: {alarm.caveat}"] if alarm.caveat else []),
        *common.render_table([(r["at"], r["change"], r["by"], r["note"]) for r in rows]),
    ]
    common.print_result(_describe_alarm(alarm, silences, now_ns) | {"changes": rows}, as_json=as_json, lines=lines)


def _describe_status(alarm: Alarm, silences: tuple[Silence, ...], now_ns: int) -> str:
    is_silenced = alarm.is_open and find_silence(alarm, silences, now_ns) is not None
    return f"{alarm.status}{', silenced' if is_silenced else ''}"


def _render_alarm(alarm: Alarm, silences: tuple[Silence, ...], now_ns: int) -> tuple[str, ...]:
    end_ns = alarm.resolved_ns if alarm.resolved_ns is not None else now_ns
    return (
        alarm.id,
        _describe_status(alarm, silences, now_ns),
        str(alarm.kind),
        alarm.vm,
        render_time(alarm.raised_ns)[:19].replace("T", " "),
        _render_duration(max(0, end_ns - alarm.raised_ns)),
        " ".join(part for part in (alarm.acknowledged_by, alarm.note) if part),
    )


def _render_duration(ns: int) -> str:
    seconds = ns // 1_000_000_000
    for unit, length_s in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds // length_s}{unit}"
    return f"{seconds}s"


def _render_silence(silence: Silence) -> str:
    of = f" {silence.kind} alarms" if silence.kind else ""
    reason = f": {silence.reason}" if silence.reason else ""
    return f"silence {silence.id}: {silence.vm}{of} until {render_time(silence.until_ns)} by {silence.by}{reason}"


def _describe_alarm(alarm: Alarm, silences: tuple[Silence, ...], now_ns: int = 0) -> dict[str, Any]:
    return {
        "id": alarm.id,
        "vm": alarm.vm,
        "vm_id": alarm.vm_id,
        "kind": str(alarm.kind),
        "status": str(alarm.status),
        "is_silenced": alarm.is_open and find_silence(alarm, silences, now_ns) is not None,
        "raised_at": render_time(alarm.raised_ns),
        "seen_at": render_time(alarm.seen_ns),
        "resolved_at": None if alarm.resolved_ns is None else render_time(alarm.resolved_ns),
        "resolution": None if alarm.resolution is None else str(alarm.resolution),
        "acknowledged_at": None if alarm.acknowledged_ns is None else render_time(alarm.acknowledged_ns),
        "acknowledged_by": alarm.acknowledged_by,
        "note": alarm.note,
        "phase": alarm.decision,
        "probabilities": dict(alarm.probabilities),
        "model": alarm.model,
        "channels": alarm.threat,
        "caveat": alarm.caveat,
    }


def _describe_silence(silence: Silence) -> dict[str, Any]:
    return {
        "id": silence.id,
        "vm": silence.vm,
        "kind": None if silence.kind is None else str(silence.kind),
        "from": render_time(silence.from_ns),
        "until": render_time(silence.until_ns),
        "reason": silence.reason,
        "by": silence.by,
    }
