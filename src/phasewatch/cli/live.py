"""Commands on running machines: baseline, watch.

Nothing of training is imported here: the watcher runs on small machines with the extra `live` alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phasewatch.cli import common
from phasewatch.cli.folders import find_bundled_model
from phasewatch.cli.logs import route_logs
from phasewatch.cli.options import AsJson, ModelPath, Smoothing, SmoothingOption, VmName, VmPid, VmQmp
from phasewatch.cli.progress import show_progress
from phasewatch.cli.streams import escape_for_terminal
from phasewatch.errors import MachineError, UsageError
from phasewatch.types import BIN_NS

if TYPE_CHECKING:
    from phasewatch.events.schema import EventEnvelope, PhaseEvent
    from phasewatch.live.config import WatchConfig
    from phasewatch.live.discover import RunningVm
    from phasewatch.live.fleet import FleetReport, FleetRequest
    from phasewatch.live.fleet_member import MemberStatus
    from phasewatch.live.ownership import WatchFolder
    from phasewatch.live.session import WatchReport

__all__ = ["baseline", "watch"]

_PrintLine = Callable[[str], None]


def baseline(
    out: Annotated[Path, typer.Option(help="File to write, host.json.")],
    name: VmName = None,
    pid: VmPid = None,
    qmp: VmQmp = None,
    minutes: Annotated[float, typer.Option(min=0.2, help="How long to measure.")] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Measure the normal telemetry of a VM while it is clean.

    A model that was trained on normalised input needs the file: `watch --baseline FILE`.

    Example: phasewatch baseline --name web01 --minutes 10 --out web01.json
    """
    from phasewatch import atomic
    from phasewatch.features.normalise import render_baseline
    from phasewatch.live.baseline import measure_vm_baseline
    from phasewatch.live.discover import find_running_vm

    machine = find_running_vm(pid=pid, name=name, qmp=qmp)
    with show_progress(quiet=as_json) as progress:
        measured = measure_vm_baseline(
            machine,
            qmp=qmp,
            minutes=minutes,
            progress=progress,
        )
    atomic.make_folder(out.absolute().parent)
    atomic.write_atomic(out.absolute(), render_baseline(measured))
    known = sum(m == m for m in measured.median.tolist())  # not NaN
    summary = f"{known} of {len(measured.names)} channels over {measured.bins * BIN_NS / 60e9:.1f} minutes"
    result = {"host_id": measured.host_id, "channels": known, "bins": measured.bins, "file": str(out)}
    common.print_result(result, as_json=as_json, lines=[summary, str(out)])


def watch(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME|GLOB]...", help="Names or UUIDs of VMs, or patterns of names such as 'web*'."),
    ] = None,
    name: VmName = None,
    pid: VmPid = None,
    qmp: VmQmp = None,
    all_: Annotated[
        bool, typer.Option("--all", help="Watch all VMs of this host, also those that start later.")
    ] = False,
    match: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Watch all VMs whose name matches; may be repeated.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Do not watch VMs whose name matches; may be repeated.")
    ] = None,
    max_vms: Annotated[int, typer.Option(min=1, max=4096, help="Watch at most this many VMs at a time.")] = 256,
    list_: Annotated[bool, typer.Option("--list", help="Only list the running VMs.")] = False,
    model: ModelPath = None,
    channels: Annotated[
        str,
        typer.Option(
            "--channels",
            metavar="NAME",
            help="Channel set of the model; default: the largest that fits. For channels see `phasewatch channels`.",
        ),
    ] = "",
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="FILE", help="Baseline of the VM, from `phasewatch baseline`.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Store for the readings, as bundles without labels.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Configuration (TOML); options win over it. See check-config.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the alarms, which outlive the watch.")
    ] = None,
    webhook: Annotated[str, typer.Option(metavar="URL", help="Post alarms there as JSON.")] = "",
    on_alarm: Annotated[
        str, typer.Option(metavar="COMMAND", help="Run this program for infection alarms, without a shell.")
    ] = "",
    metrics: Annotated[
        int, typer.Option(metavar="PORT", min=0, max=65_535, help="Serve OpenMetrics on this port of 127.0.0.1.")
    ] = 0,
    syslog: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Send alarms to udp://HOST:PORT, tcp://HOST:PORT or unix:/path.")
    ] = "",
    smoothing: SmoothingOption = Smoothing.NONE,
    seconds: Annotated[float, typer.Option(min=0.0, help="Stop after this time; 0 watches until the end.")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print events and then the result as JSON lines.")] = False,
) -> None:
    """Watch running VMs and print their phases and alarms.

    VMs are chosen by their names, by patterns, by --all, or a single one by --name, --pid or --qmp. Works with QEMU and
    libvirt, from outside: nothing runs in the guests. It decides every second. Alarms are JSON lines: infection alarms
    page, activity alarms inform.

    The watch of a single VM ends with it. The watch of several goes on: it finds VMs that start later. Ctrl-C ends it
    and leaves the VMs as they were. A cleanup process restores them even after kill -9.

    Example: phasewatch watch web01
    """
    from phasewatch.alarms.config import OutputConfig
    from phasewatch.cli.alarm_outputs import (
        OutputOptions,
        attach_outputs,
        describe_counters,
        read_configuration,
        run_outputs,
    )
    from phasewatch.inference.model_selection import find_models
    from phasewatch.live.baseline import read_baseline_file
    from phasewatch.live.discover import find_running_vm
    from phasewatch.live.fleet import FleetRequest
    from phasewatch.live.session import WatchRequest, run_watch
    from phasewatch.live.watcher import WatchCallbacks, WatchEndReason

    if list_:
        _list_machines(as_json=as_json)
        return
    configuration = read_configuration(
        OutputOptions(config=config, state=state, webhook=webhook, on_alarm=on_alarm, metrics=metrics, syslog=syslog)
    )
    chosen = configuration.watch
    state = Path(chosen.state) if chosen.state else None
    save = save or (Path(chosen.save) if chosen.save else None)
    model = model or (Path(chosen.model) if chosen.model else None)
    is_named = name is not None or pid is not None or qmp is not None
    patterns = (*(names or ()), *(match or ()), *(("*",) if all_ else ()))
    if patterns and is_named:
        raise UsageError("--name, --pid and --qmp choose a single VM; leave them out, or the names, --match and --all")
    is_fleet = len(patterns) > 1 or any(map(_is_glob, patterns)) or bool(match)
    if not patterns and not is_named:
        patterns = chosen.match
        is_fleet = bool(patterns)
    if is_fleet:
        if baseline is not None:
            raise UsageError("--baseline FILE belongs to one VM; watch that VM alone")
        fleet = FleetRequest(
            patterns=patterns,
            exclude=(*(exclude or ()), *chosen.exclude),
            models=find_models(model or find_bundled_model()),
            channels=channels or chosen.channels,
            save=save,
            smoothing=smoothing if smoothing is not Smoothing.NONE else chosen.smoothing,
            seconds=seconds,
            state=state,
            max_vms=max_vms,
        )
        _watch_fleet(fleet, configuration, as_json=as_json)
        return
    machine = find_running_vm(pid=pid, name=patterns[0] if patterns else name, qmp=qmp)
    request = WatchRequest(
        machine=machine,
        qmp=qmp,
        models=find_models(model or find_bundled_model()),
        channels=channels or chosen.channels,
        baseline=read_baseline_file(baseline) if baseline else None,
        save=save,
        smoothing=smoothing if smoothing is not Smoothing.NONE else chosen.smoothing,
        seconds=seconds,
        state=state,
    )
    is_only = configuration.outputs == OutputConfig()
    with _open_outputs(is_only=is_only) as (out, err), route_logs(err):
        with run_outputs(configuration, write_line=out) as outputs:
            callbacks = WatchCallbacks(
                on_event=_build_event_printer(out, err, as_json=as_json), wants_bins=as_json or outputs is not None
            )
            report = run_watch(request, attach_outputs(callbacks, outputs))
            if outputs is not None and report.watched.why is WatchEndReason.VM_GONE:
                outputs.on_vm_gone(machine.host_id)
        counters = outputs.counters() if outputs is not None else ()
        hook = next((each for each in counters if each.name == "webhook"), None)
        if hook is not None:
            report = replace(report, posted=hook.sent, not_posted=hook.lost)
        _print_report(report, out, err, as_json=as_json)
        for line in () if as_json else describe_counters(counters):
            err(line)
    if lost := report.watched.not_saved:
        raise MachineError(f"--save {save}: {lost} bundles were not written: {report.watched.save_failure}")


def _is_glob(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def _watch_fleet(request: FleetRequest, configuration: WatchConfig, *, as_json: bool) -> None:
    from phasewatch.alarms.config import OutputConfig
    from phasewatch.cli.alarm_outputs import attach_outputs, describe_counters, run_outputs
    from phasewatch.cli.fleet_view import EndedVms, FleetView
    from phasewatch.events.schema import render_event
    from phasewatch.live.fleet import FleetWatch
    from phasewatch.live.session import run_until_interrupted
    from phasewatch.live.watcher import WatchCallbacks

    is_only = configuration.outputs == OutputConfig()
    with _open_outputs(is_only=is_only) as (out, err), route_logs(err):
        view = FleetView(err)
        with run_outputs(configuration, write_line=out) as outputs:
            ended = EndedVms(outputs.on_vm_gone if outputs is not None else lambda host: None)

            def add_event(event: EventEnvelope, is_alarm_change: bool) -> None:
                ended.report_due()
                if as_json or is_alarm_change:
                    out(render_event(event).decode())
                if not as_json:
                    view.add_event(event, is_alarm_change)

            def add_status(status: MemberStatus) -> None:
                ended.add_status(status)
                if as_json:
                    out(json.dumps({"vm": asdict(status)}, sort_keys=True))
                else:
                    view.add_status(status)

            callbacks = attach_outputs(
                WatchCallbacks(on_event=add_event, wants_bins=as_json or outputs is not None), outputs
            )
            fleet = FleetWatch(request, callbacks, on_status=add_status)
            if not as_json:
                view.start(request.patterns)
            report = run_until_interrupted(fleet.run())
        _print_fleet_report(report, out, err, as_json=as_json)
        for line in () if as_json or outputs is None else describe_counters(outputs.counters()):
            err(line)
    if lost := sum(vm.watched.not_saved for vm in report.vms):
        raise MachineError(f"--save {request.save}: {lost} bundles were not written")


def _print_fleet_report(report: FleetReport, out: _PrintLine, err: _PrintLine, *, as_json: bool) -> None:
    if as_json:
        out(json.dumps({"result": asdict(report)}, sort_keys=True))
        return
    restored = (
        "all VMs are as they were"
        if report.left_as_found
        else "the monitors of "
        + ", ".join(vm.name for vm in report.vms if not vm.left_as_found)
        + " did not answer at the end; the cleanup process keeps trying"
    )
    err(
        f"{report.why}: {len(report.vms)} VMs, {report.windows} windows, {report.alarms} infection alarms, "
        f"{report.activity_alarms} activity alarms; {restored}"
    )
    for vm in report.vms:
        for path in vm.watched.saved:
            out(path)


@contextmanager
def _open_outputs(*, is_only: bool) -> Iterator[tuple[_PrintLine, _PrintLine]]:
    """Yield functions that print to stdout and to stderr without blocking; a stalled reader cannot stop the watch.

    Args:
        is_only: Whether alarms go to stdout alone: the watch then ends when its reader has closed the pipe.

    Raises:
        BrokenPipeError: If `is_only` and the reader has closed the pipe.
        OSError: At the end, if events could not be written.
    """
    from phasewatch.live.outputs import NonBlockingWriter

    err = NonBlockingWriter(sys.stderr)
    out = NonBlockingWriter(sys.stdout)
    is_reported = False

    def print_err(line: str) -> None:
        err.put(escape_for_terminal(line))

    def print_out(line: str) -> None:
        nonlocal is_reported
        out.put(line)
        if out.failure is not None and not is_reported:
            is_reported = True
            if out.is_gone and is_only:
                raise out.failure
            print_err(f"standard output: {out.failure.strerror}: events are lost there; the watch continues")

    try:
        yield print_out, print_err
        unread = out.close()
        if out.failure is not None and not out.is_gone:
            raise out.failure
        if unread:
            print_err(f"{unread} lines of events were not written: the reader was too slow or has closed the pipe")
    finally:
        err.close()


def _build_event_printer(out: _PrintLine, err: _PrintLine, *, as_json: bool) -> Callable[[EventEnvelope, bool], None]:
    from phasewatch.events.schema import PhaseEvent, render_event

    def print_event(event: EventEnvelope, is_news: bool) -> None:
        if as_json or is_news:
            out(render_event(event).decode())
        if not as_json and isinstance(event.data, PhaseEvent):
            err(_render_decision(event.data))

    return print_event


def _render_decision(event: PhaseEvent) -> str:
    at = datetime.fromtimestamp(event.t_end_ns / 1e9, UTC).strftime("%H:%M:%S")
    probabilities = " ".join(f"{p:4.2f}" for p in event.p)
    alarm = ("  ALARM" if event.alarm else "") + ("  activity" if event.activity_alarm else "")
    caveat = f"  ({event.caveat})" if event.caveat else ""
    return f"{at}Z {event.decision:<9} {probabilities}{alarm}{caveat}"


def _print_report(report: WatchReport, out: _PrintLine, err: _PrintLine, *, as_json: bool) -> None:
    watched = report.watched
    if as_json:
        out(json.dumps({"result": asdict(report)}, sort_keys=True))
        return
    restored = (
        "the VM is as it was"
        if report.left_as_found
        else "its monitor did not answer at the end; the cleanup process keeps trying"
    )
    alarms = f"{watched.alarms} infection alarms, {watched.activity_alarms} activity alarms"
    err(f"{watched.why}: {watched.windows} windows, {alarms}, {watched.late} late readings; {restored}")
    if watched.lost:
        err("readings lost: " + ", ".join(f"{name} {count}" for name, count in watched.lost.items()))
    if watched.contended:
        err(f"CPU contention in {watched.contended} of {watched.windows} windows: the vCPUs waited for a core")
    for path in watched.saved:
        out(path)


def _list_machines(*, as_json: bool) -> None:
    from phasewatch.live.discover import list_running_vms
    from phasewatch.live.ownership import find_watch_folders

    running, dead = list_running_vms(), [folder for folder in find_watch_folders() if folder.is_alive is False]
    leftovers = [_describe_leftover(folder, running) for folder in dead]
    result = {"machines": [_describe_machine(m) for m in running], "left_behind": leftovers}
    lines = [*_render_machines(running), *(_render_leftover(row) for row in leftovers)]
    common.print_result(result, as_json=as_json, lines=lines)


def _describe_machine(machine: RunningVm) -> dict[str, object]:
    return {
        "pid": machine.pid,
        "name": machine.name,
        "uuid": machine.uuid,
        "arch": machine.arch,
        "accel": machine.accel,
        "qmp": [str(path) for path in machine.qmp],
        "taps": list(machine.taps),
        "is_hidden": machine.is_hidden,
        "monitors": [{"kind": str(door.kind), "address": door.address} for door in machine.monitors],
    }


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
    lines = common.render_table(rows) or ["no QEMU process is visible to this user"]
    if any(m.is_hidden for m in running):
        lines.append("?: this user may not read the open files of these processes; run as root or as the VM's user")
    return lines


def _describe_monitor(machine: RunningVm) -> str:
    from phasewatch.live.monitor_endpoints import MonitorEndpointKind, select_reported_endpoint

    if machine.qmp:
        return " ".join(map(str, machine.qmp))
    if not machine.monitors:
        return "no QMP"
    door = select_reported_endpoint(machine.monitors)
    descriptions = {
        MonitorEndpointKind.HANDED_OVER: "QMP belongs to the process that started it",
        MonitorEndpointKind.CLIENT: "QMP connects elsewhere",
        MonitorEndpointKind.NETWORK: f"QMP on {door.address}, not a Unix socket",
        MonitorEndpointKind.SILENT: "QMP no longer listens",
    }
    return descriptions.get(door.kind, f"QMP {door.address}")


def _describe_leftover(folder: WatchFolder, running: Sequence[RunningVm]) -> dict[str, object]:
    """Describe what a killed watcher left behind, and the running VM that it affects."""
    machine = next((m for m in running if folder.concerns(m.pid, m.start_ticks)), None)
    return {"folder": str(folder.path), "watcher": folder.owner.pid, "machine": machine.name if machine else None}


def _render_leftover(row: dict[str, object]) -> str:
    what = f"left behind by the killed watcher {row['watcher']}: {row['folder']}"
    if row["machine"] is None:
        return f"{what}; the next watch removes it"
    return f"{what}, and objects in {row['machine']}; the next watch of that VM removes them"
