"""Commands that use a trained model: export, predict, commission, watch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import typer

from phasewatch.cli import common

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phasewatch.events.schema import EventEnvelope
    from phasewatch.live.discover import RunningVm
    from phasewatch.live.ownership import WatchFolder
    from phasewatch.live.session import WatchReport

PrintLine = Callable[[str], None]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (export, predict, commission, watch):
        app.command(epilog=common.EXIT_CODES_HELP)(command)


def export(
    run: Path = typer.Argument(..., help="A run with trained models."),
    out: Path = typer.Option(..., help="X.zip: an edge bundle of all masks; X.onnx: one model alone."),
    model: str = typer.Option("gbt", help="Which model."),
    recipe: str = typer.Option("deploy", help="Which split it was trained on."),
    fold: str = typer.Option("", help="Which fold, where the recipe has several."),
    threat: str = typer.Option("", help="Only these masks, separated by commas."),
    seed: int = typer.Option(0, help="Of the model."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Take a trained model out of a run, for a watcher or any ONNX runtime; nothing in the run is touched.

    Example: phasewatch export runs/mine --out edge.zip
    """
    from dataclasses import asdict

    from phasewatch.artifacts import METRICS_FILE
    from phasewatch.evaluation.metric_table import HeadlineKey, parse_metrics, render_headline
    from phasewatch.inference.export import ExportRequest, export_run

    common.check_run_folder(run)
    path = run / METRICS_FILE
    metrics = parse_metrics(path.read_bytes(), file=str(path)) if path.is_file() else None

    def quote(name: str) -> str:
        return render_headline(metrics, HeadlineKey(channel_set=name, model=model)) if metrics is not None else ""

    wanted = ExportRequest(model=model, recipe=recipe, fold=fold, threats=common.parse_names(threat), seed=seed)
    done = export_run(run, out, wanted, quote=quote)
    words = (
        f"{model}, {' and '.join(done.threats)}: {done.bytes:,} bytes, at most {done.parity:.1g} from the model "
        f"on {done.windows} windows"
    )
    common.print_result(asdict(done), as_json=as_json, lines=[words, str(out)])


def predict(
    source: str = typer.Argument(..., help="A store of episodes, a folder or s3://bucket/prefix, or one bundle of it."),
    model: Path = typer.Option(None, help="A checkpoint, a run (its deploy cell) or an edge bundle; the bundled one."),
    out: Path = typer.Option(..., help="The table, X.parquet."),
    threat: str = typer.Option("", help="The model's mask; the largest if left out."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Score recorded episodes, labelled or not: phase, probabilities and alarm of every window.

    Example: phasewatch predict my-store --model runs/mine --out said.parquet
    """
    from dataclasses import asdict

    from phasewatch.inference.model_selection import find_models
    from phasewatch.inference.offline import choose_offline_model
    from phasewatch.inference.offline import predict as score
    from phasewatch.store.base import parse_store_location

    scorer = choose_offline_model(find_models(model or common.find_bundled_model()), threat)
    with common.show_progress(quiet=as_json) as tell:
        done = score(
            parse_store_location(source),
            scorer,
            out,
            progress=SimpleNamespace(update=tell),
        )
    for path, why in done.failed:
        typer.echo(common.escape_for_terminal(f"{path}: not scored: {why}"), err=True)
    words = (
        f"{done.windows:,} windows of {done.episodes} episodes by {done.model}, {done.threat}: {done.alarms} alarms; "
        f"{done.silent} windows unknown, {len(done.failed)} bundles not scored"
    )
    common.print_result(asdict(done), as_json=as_json, lines=[words, str(out)])
    if done.failed:
        raise typer.Exit(1 if done.episodes else 3)


def commission(
    pid: int = typer.Option(None, help="The QEMU process."),
    qmp: Path = typer.Option(None, help="Its QMP socket; must answer if named."),
    name: str = typer.Option(None, help="The VM's name."),
    minutes: float = typer.Option(10.0, min=0.2, help="How long to measure."),
    out: Path = typer.Option(..., help="The file, host.json."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Measure what is usual on a machine while it is known clean, for `watch --commission`.

    Example: phasewatch commission --name web01 --minutes 10 --out web01.json
    """
    from phasewatch import atomic
    from phasewatch.features.normalise import render_baseline
    from phasewatch.live.baseline import measure_vm_baseline
    from phasewatch.live.discover import find_running_vm

    machine = find_running_vm(pid=pid, name=name, qmp=qmp)
    with common.show_progress(quiet=as_json) as tell:
        day = measure_vm_baseline(
            machine, qmp=qmp, minutes=minutes, say=lambda line: typer.echo(common.escape_for_terminal(line), err=True),
            tell=lambda done, total: tell("measure", done, total, f"{done} of {total} s"),
        )  # fmt: skip
    atomic.make_folder(out.absolute().parent)
    atomic.write_atomic(out.absolute(), render_baseline(day))
    known = sum(m == m for m in day.median.tolist())
    words = f"{known} of {len(day.names)} channels over {day.bins / 120:.1f} minutes"
    result = {"host_id": day.host_id, "channels": known, "bins": day.bins, "file": str(out)}
    common.print_result(result, as_json=as_json, lines=[words, str(out)])


def watch(
    pid: int = typer.Option(None, help="The QEMU process."),
    qmp: Path = typer.Option(None, help="Its QMP socket; must answer if named."),
    name: str = typer.Option(None, help="The VM's name."),
    list_: bool = typer.Option(False, "--list", help="Only list the machines that run here."),
    model: Path = typer.Option(None, help="A checkpoint, a run (its deploy cell) or an edge bundle; the bundled one."),
    channel_set: str = typer.Option(
        "",
        metavar="NAME",
        help="Only a model of this channel set; the largest that the VM gives if left out.",
    ),
    commission: Path = typer.Option(
        None, metavar="FILE", help="The machine's clean day, from `phasewatch commission`."
    ),
    save: Path = typer.Option(None, metavar="DIR", help="Keep the readings as bundles of unknown phase in this store."),
    webhook: str = typer.Option("", metavar="URL", help="Post alarms there, as JSON."),
    seconds: float = typer.Option(0.0, min=0.0, help="Stop after so long; 0 watches until the VM is gone."),
    as_json: bool = typer.Option(False, "--json", help="Every event as a line of JSON, the result as the last line."),
) -> None:
    """Watch a running QEMU or libvirt machine from outside, and tell which phase it is in; alarms are lines of JSON.

    Nothing runs in the guest. Ctrl-C ends it and leaves the machine as it was; so does a kill -9.

    Example: phasewatch watch --name web01
    """
    from phasewatch.live.discover import find_running_vm, list_running_vms

    if list_:
        from phasewatch.live.ownership import find_watch_folders

        running, left = list_running_vms(), [folder for folder in find_watch_folders() if folder.is_alive is False]
        result = {
            "machines": [_describe_machine(m) for m in running],
            "left_behind": [_describe_leftover(f, running) for f in left],
        }
        common.print_result(
            result,
            as_json=as_json,
            lines=[*_render_machines(running), *(_render_leftover(row) for row in result["left_behind"])],
        )
        return
    from phasewatch.errors import MachineError
    from phasewatch.inference.model_selection import find_models
    from phasewatch.live.baseline import read_baseline_file
    from phasewatch.live.session import WatchRequest, run_watch

    machine = find_running_vm(pid=pid, name=name, qmp=qmp)
    candidates = find_models(model or common.find_bundled_model())
    request = WatchRequest(
        machine=machine, qmp=qmp, models=candidates, channels=channel_set, baseline=read_baseline_file(commission) if commission else None,
        save=save, webhook=webhook, seconds=seconds,
    )  # fmt: skip
    with _open_outputs(is_only=not webhook) as (out, say):
        report = run_watch(request, _build_event_printer(out, say, as_json=as_json), say)
        _print_report(report, out, say, as_json=as_json)
    if lost := report.watched.not_saved:
        raise MachineError(f"--save {save}: {lost} bundles were not written: {report.watched.save_failure}")


@contextmanager
def _open_outputs(*, is_only: bool) -> Iterator[tuple[PrintLine, PrintLine]]:
    """Yield what prints to stdout and what to stderr; neither waits for who reads it, and neither's end is the watch's.

    Args:
        is_only: Whether nobody but stdout's reader hears of an alarm: once he has left, there is nobody to watch for.

    Raises:
        BrokenPipeError: If the only reader has left.
        OSError: At the end, if events could not be written.
    """
    import sys

    from phasewatch.live.outputs import NonBlockingWriter

    err = NonBlockingWriter(sys.stderr)
    out = NonBlockingWriter(sys.stdout)

    is_told = False

    def say(line: str) -> None:
        err.put(common.escape_for_terminal(line))

    def put(line: str) -> None:
        nonlocal is_told
        out.put(line)
        if out.failure is not None and not is_told:
            is_told = True
            if out.is_gone and is_only:
                raise out.failure
            say(f"standard output: {out.failure.strerror}: events are lost there; the watch goes on")

    try:
        yield put, say
        unread = out.close()
        if out.failure is not None and not out.is_gone:
            raise out.failure
        if unread:
            say(f"{unread} lines of events were not written: their reader stood still or left")
    finally:
        err.close()


def _build_event_printer(out: PrintLine, say: PrintLine, *, as_json: bool) -> Callable[[EventEnvelope, bool], None]:
    from phasewatch.events.schema import PhaseEvent, render_event

    def emit(event: EventEnvelope, news: bool) -> None:
        if as_json or news:
            out(render_event(event).decode())
        if not as_json and isinstance(event.data, PhaseEvent):
            say(_render_decision(event.data))

    return emit


def _render_decision(seen: Any) -> str:
    """Give a decision as a line for people."""
    from datetime import UTC, datetime

    at = datetime.fromtimestamp(seen.t_end_ns / 1e9, UTC).strftime("%H:%M:%S")
    shares = " ".join(f"{p:4.2f}" for p in seen.p)
    alarm = "  ALARM" if seen.alarm else ""
    caveat = f"  ({seen.caveat})" if seen.caveat else ""
    return f"{at}Z {seen.decision:<9} {shares}{alarm}{caveat}"


def _print_report(report: WatchReport, out: PrintLine, say: PrintLine, *, as_json: bool) -> None:
    import json
    from dataclasses import asdict

    watched = report.watched
    if as_json:
        out(json.dumps({"result": asdict(report)}, sort_keys=True))
        return
    left = (
        "left as it was found"
        if report.left_as_found
        else "its monitor did not answer at the end, the guard goes on trying"
    )
    words = f"{watched.why}: {watched.windows} windows, {watched.alarms} alarms, {watched.late} late readings; {left}"
    say(words)
    if watched.lost:
        say("readings lost: " + ", ".join(f"{name} {count}" for name, count in watched.lost.items()))
    if watched.contended:
        say(f"contention in {watched.contended} of {watched.windows} windows: the vCPUs waited for a core")
    for path in watched.saved:
        out(path)


def _describe_machine(machine: RunningVm) -> dict[str, object]:
    return {
        "pid": machine.pid, "name": machine.name, "uuid": machine.uuid, "arch": machine.arch, "accel": machine.accel,
        "qmp": [str(path) for path in machine.qmp], "taps": list(machine.taps), "is_hidden": machine.is_hidden,
        "monitors": [{"kind": str(door.kind), "address": door.address} for door in machine.monitors],
    }  # fmt: skip


def _render_machines(running: Sequence[RunningVm]) -> list[str]:
    rows = [
        (
            str(m.pid),
            m.name,
            m.arch,
            m.accel or "?",
            _describe_monitor(m),
            " ".join(m.taps) or ("tap: ?" if m.is_hidden else ""),
        )
        for m in running
    ]
    lines = common.render_table(rows) or ["no QEMU machine runs among the processes that this user can see"]
    if any(m.is_hidden for m in running):
        lines.append(
            "?: this user may not see what these processes have open; run as root or as the machine's user and group"
        )
    return lines


def _describe_monitor(machine: RunningVm) -> str:
    from phasewatch.live.doors import MonitorEndpointKind, select_reported_endpoint

    if machine.qmp:
        return " ".join(map(str, machine.qmp))
    if not machine.monitors:
        return "no QMP"
    door = select_reported_endpoint(machine.monitors)
    words = {
        MonitorEndpointKind.HANDED_OVER: "QMP belongs to who started it", MonitorEndpointKind.CLIENT: "QMP connects elsewhere",
        MonitorEndpointKind.NETWORK: f"QMP on {door.address}, not a Unix socket", MonitorEndpointKind.SILENT: "QMP no longer listens",
    }  # fmt: skip
    return words.get(door.kind, f"QMP {door.address}")


def _describe_leftover(folder: WatchFolder, running: Sequence[RunningVm]) -> dict[str, object]:
    """Describe the leftovers of a dead watcher, and which machine that still runs they are in."""
    machine = next((m for m in running if folder.concerns(m.pid, m.start_ticks)), None)
    return {"folder": str(folder.path), "watcher": folder.owner.pid, "machine": machine.name if machine else None}


def _render_leftover(row: dict[str, object]) -> str:
    what = f"left behind by process {row['watcher']}, a watcher that was killed: {row['folder']}"
    if row["machine"] is None:
        return f"{what}; the next watch removes it"
    return f"{what}, and what it put into {row['machine']}; the next watch of that machine takes it out"
