"""One watch over a fake QEMU and a fake clock: events, states of the VM, alarms, saved bundles."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.factories.qemu import PID, FakeProc, FakeQemu, make_process
from tests.factories.vms import FakeClock, FakeSource
from tests.live.test_tracker import scorer

from phasewatch.bundle.archive import pack_bundle, unpack_bundle
from phasewatch.channels import list_raw_fields
from phasewatch.errors import MachineError, VmError
from phasewatch.events.schema import EventEnvelope, PerfEvent, PhaseEvent, TelemetryEvent, parse_event, render_event
from phasewatch.inference.predictor import PhasePredictor
from phasewatch.live import recording
from phasewatch.live.attach import attach, detach
from phasewatch.live.discover import read_running_vm
from phasewatch.live.events import CostMeter
from phasewatch.live.recording import WatchRecorder, check_recording_folder
from phasewatch.live.survey import VmSurvey, survey_vm
from phasewatch.live.watcher import VmWatcher, WatchCallbacks, WatchResult
from phasewatch.telemetry.base import HostClock, ReadingValues, build_missing_reading
from phasewatch.telemetry.capture import NetworkNoticeCode, SourceNotice
from phasewatch.telemetry.netflow import FLOW_FIELDS
from phasewatch.telemetry.qmp import QmpMonitor
from phasewatch.types import Phase, SourceKind
from phasewatch.validate.verdict import USABLE_STATUSES, BundleLocation, validate_bundle


class BusyNetwork(FakeSource):
    """A network source that sends a lot from the 30th to the 60th second."""

    async def read(self) -> ReadingValues:
        self.reads += 1
        at_s = self.clock.now_ns / 1e9
        sent = int(1e3 * at_s + 1.2e5 * min(max(at_s - 30, 0), 30))
        named = {"out_bytes": sent, "out_pkts": sent // 100}
        return tuple(named.get(spec.field, 0) for spec in list_raw_fields(self.source))


class UnreadableNetwork(BusyNetwork):
    """A network source whose flows are unknown from the 20th second on."""

    def __init__(self, source: SourceKind, clock: FakeClock) -> None:
        super().__init__(source, clock)
        self.notices = [SourceNotice(code=NetworkNoticeCode.UNREADABLE, text="reported once")]

    @property
    def unknown_fields(self) -> frozenset[str]:
        return FLOW_FIELDS if self.clock.now_ns > 20e9 else frozenset()

    def pop_notices(self) -> list[SourceNotice]:
        notices, self.notices = (self.notices, []) if self.unknown_fields else ([], self.notices)
        return notices

    async def read(self) -> ReadingValues:
        values = zip(list_raw_fields(self.source), await super().read(), strict=True)
        return tuple(None if spec.field in self.unknown_fields else value for spec, value in values)


@dataclass
class World:
    """A VM, a clock and the events of a watch."""

    survey: VmSurvey
    clock: FakeClock
    proc: FakeProc
    events: list[EventEnvelope] = field(default_factory=list)
    alarm_changes: list[EventEnvelope] = field(default_factory=list)

    def emit(self, event: EventEnvelope, is_alarm_change: bool) -> None:
        assert parse_event(render_event(event)) == event
        self.events.append(event)
        if is_alarm_change:
            self.alarm_changes.append(event)

    def events_of(self, kind: type[Any]) -> list[Any]:
        return [event.data for event in self.events if isinstance(event.data, kind)]

    def watcher(self, model: PhasePredictor | None, **outlets: Any) -> VmWatcher:
        sources = [FakeSource(SourceKind.PROC, self.clock), BusyNetwork(SourceKind.NETFLOW, self.clock)]
        return VmWatcher(
            self.survey, sources, model, WatchCallbacks(on_event=self.emit, **outlets), self.clock, host="h"
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    proc = make_process(tmp_path / "proc")
    clock = FakeClock()
    machine = read_running_vm(PID, proc.root)
    assert machine is not None
    survey = asyncio.run(survey_vm(machine, qmp=None, clock=clock, proc=proc.root))
    return World(survey=survey, clock=clock, proc=proc)


def test_decisions_are_reported_on_time_and_an_alarm_changes_twice(world: World) -> None:
    watched = world.clock.run(world.watcher(scorer()).run(seconds=120))

    seen = world.events_of(PhaseEvent)
    assert watched.why == "the time is up"
    assert watched.windows == len(seen) == 109  # the first bin begins at 0.5 s, and 1 s is for late readings
    assert watched.alarms == watched.activity_alarms == 1
    assert (watched.late, watched.skipped, watched.failed, watched.restarts) == (0, 0, 0, 0)
    assert [event.data.alarm for event in world.alarm_changes] == [True, False]  # type: ignore[union-attr]
    changes = [event.data.alarm_changes for event in world.alarm_changes]  # type: ignore[union-attr]
    assert changes == [("infection", "activity")] * 2
    assert {s.model for s in seen} == {"fake"}
    assert {s.latency_ms for s in seen} == {1000.0}  # closed a second after the window's end, told at once
    raised = world.alarm_changes[0].data
    assert isinstance(raised, PhaseEvent)
    assert raised.alarm_since_ns == raised.t_end_ns
    assert raised.evidence
    assert [e for e in seen if e.evidence] == [raised]
    assert raised.filter == "phase"  # the alarms do not wait for it
    assert {s.decision for s in seen} >= {"clean", "active"}


def test_bins_are_reported_in_order_with_the_masked_channels(world: World) -> None:
    world.clock.run(world.watcher(None).run(seconds=30))

    told = world.events_of(TelemetryEvent)
    assert all(len(t.values) == 1 for t in told)
    assert [t.t0_ns for t in told] == [told[0].t0_ns + i * 500_000_000 for i in range(len(told))]
    assert "qmp.jit_tb" in told[0].masked
    assert {t.lateness_s for t in told} == {1.0}
    assert world.events_of(PhaseEvent) == []


def test_network_fields_that_become_unknown_are_masked_and_logged(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    sources = [FakeSource(SourceKind.PROC, world.clock), UnreadableNetwork(SourceKind.NETFLOW, world.clock)]
    outlets = WatchCallbacks(on_event=world.emit)
    watched = world.clock.run(VmWatcher(world.survey, sources, None, outlets, world.clock).run(seconds=40))

    told = world.events_of(TelemetryEvent)
    flows = [told[0].channels.index(f"netflow.{name}") for name in ("new_flows", "dst_ips")]
    assert watched.states == ["network-frames-unreadable"]
    assert sum("network-frames-unreadable" in record.message for record in caplog.records) == 1
    assert "netflow.new_flows" not in told[0].masked
    assert {"netflow.new_flows", "netflow.dst_ips"} <= set(told[-1].masked)
    assert "netflow.out_pkts" not in told[-1].masked
    assert {told[-1].values[0][at] for at in flows} == {None}
    assert told[-1].values[0][told[0].channels.index("netflow.out_pkts")] is not None


def test_the_watcher_reports_its_own_cost(world: World) -> None:
    world.clock.run(world.watcher(scorer()).run(seconds=60))

    perf = world.events_of(PerfEvent)
    assert 5 <= len(perf) <= 12
    assert perf[-1].process == "watch"
    assert perf[-1].windows == sum(perf[-1].latency_counts) > 5
    assert perf[-1].p99_ms == 0.0
    assert 10 << 20 < perf[-1].rss_bytes < 2 << 30
    assert perf[-1].late_ticks == 0


def test_the_cost_of_a_long_watch_covers_its_last_minutes() -> None:
    meter = CostMeter(0, 100.0)
    for at_s in range(5, 24 * 3600, 5):
        meter.add_window(at_s * 10**9, 1.0)
        cost = meter.read(at_s * 10**9, 100.0 + at_s * 0.02, rss_bytes=1, late=0, backlog=0)

    assert cost.measured_s == 300
    assert len(cost.latencies_ms) / cost.measured_s == 0.2
    assert cost.cpu_cores == pytest.approx(0.02)


class SilentSource(FakeSource):
    """A source that gives no reading from the 20th second on."""

    async def read(self) -> ReadingValues:
        return await super().read() if self.clock.now_ns < 20e9 else build_missing_reading(self.source)


def test_a_silent_source_is_logged_and_its_lost_readings_are_counted(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    sources = [FakeSource(SourceKind.PROC, world.clock), SilentSource(SourceKind.NETFLOW, world.clock)]
    watcher = VmWatcher(world.survey, sources, scorer(), WatchCallbacks(on_event=world.emit), world.clock)

    watched = world.clock.run(watcher.run(seconds=60))

    assert watched.states == ["netflow silent"]
    assert watched.lost == {"netflow": 80}
    assert any("netflow" in record.message for record in caplog.records)
    assert world.events_of(TelemetryEvent)[-1].lost_rows >= 70
    assert "netflow" in (world.events_of(PhaseEvent)[-1].caveat or "")


def test_cpu_contention_is_a_caveat_of_the_windows_concerned(world: World) -> None:
    sources = [FakeSource(SourceKind.PROC, world.clock, wait_cores=0.4), BusyNetwork(SourceKind.NETFLOW, world.clock)]
    watcher = VmWatcher(world.survey, sources, scorer(), WatchCallbacks(on_event=world.emit), world.clock)

    watched = world.clock.run(watcher.run(seconds=60))

    assert watched.contended == watched.windows
    assert watched.states == ["contended"]
    assert all("contention" in (seen.caveat or "") for seen in world.events_of(PhaseEvent))


def test_a_failing_monitor_query_is_counted_and_reported(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        proc = make_process(tmp_path / "proc", qmp=qemu.path)

        async def main() -> WatchResult:
            machine = read_running_vm(PID, proc.root)
            assert machine is not None
            clock = HostClock()
            survey = await survey_vm(machine, qmp=None, clock=clock, proc=proc.root)
            sources = await attach(survey)
            qemu.refused.add("query-blockstats")
            try:
                outlets = WatchCallbacks(on_event=lambda event, is_alarm_change: None)
                return await VmWatcher(survey, sources, None, outlets, clock).run(seconds=8)
            finally:
                await detach(survey, sources)

        watched = asyncio.run(main())

        assert watched.lost["qmp query-blockstats"] >= 8
        assert watched.lost.get("qmp", 0) <= watched.skipped + watched.failed
        assert "qmp partly silent" in watched.states


def test_a_vm_that_is_gone_ends_the_watch(world: World) -> None:
    watcher = world.watcher(scorer())

    async def main() -> WatchResult:
        running = asyncio.ensure_future(watcher.run())
        await world.clock.sleep_until(20_000_000_000)
        world.proc.dir.rename(world.proc.root / "buried")
        return await running

    watched = world.clock.run(main())
    assert watched.why == "the VM is gone"
    assert watched.states == ["gone"]
    assert watched.windows in (9, 10)


def test_a_zombie_process_counts_as_gone(world: World) -> None:
    world.proc.write("stat", f"{PID} (qemu) Z " + "0 " * 40)

    assert world.clock.run(world.watcher(None).run()).why == "the VM is gone"


def test_a_later_process_with_the_pid_of_the_vm_is_not_the_vm(world: World) -> None:
    world.proc.write("stat", f"{PID} (sh) S " + "0 " * 18 + "99 0")

    assert world.clock.run(world.watcher(None).run()).why == "the VM is gone"


def test_a_failing_callback_is_not_taken_for_the_end_of_the_vm(world: World) -> None:
    def emit(event: EventEnvelope, is_alarm_change: bool) -> None:
        if isinstance(event.data, PerfEvent):
            raise BrokenPipeError

    outlets = WatchCallbacks(on_event=emit)
    watcher = VmWatcher(world.survey, [FakeSource(SourceKind.PROC, world.clock)], None, outlets, world.clock)

    with pytest.raises(BrokenPipeError):
        world.clock.run(watcher.run(seconds=20))


def test_an_interrupted_watch_ends_in_order(world: World) -> None:
    watcher = world.watcher(scorer())

    async def main() -> WatchResult:
        running = asyncio.ensure_future(watcher.run())
        await world.clock.sleep_until(15_000_000_000)
        running.cancel()
        watched = await running
        # A cancellation that was taken is taken off, or the time-outs of what follows would count it as theirs.
        assert running.cancelling() == 0
        return watched

    watched = world.clock.run(main())
    assert watched.why == "interrupted"
    assert watched.windows == 4


def test_windows_start_again_after_a_clock_jump(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    jump = {"ns": 0}
    before = type(world.clock).wall_ns
    monkeypatch.setattr(type(world.clock), "wall_ns", lambda self: before(self) + jump["ns"])
    watcher = world.watcher(scorer())

    async def main() -> WatchResult:
        running = asyncio.ensure_future(watcher.run(seconds=60))
        await world.clock.sleep_until(30_100_000_000)
        jump["ns"] = -3_600_000_000_000
        return await running

    watched = world.clock.run(main())
    assert watched.restarts == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert watched.windows == 19 + 19
    assert watched.late <= 4  # stamped after the jump, before it was noticed


class ScriptedMonitor(QmpMonitor):
    """A monitor whose state a test sets."""

    def __init__(self, answers: Callable[[], str]) -> None:
        super().__init__(Path("scripted"))
        self._answers = answers
        self.reconnects = 0

    async def ask(self, command: str, **arguments: object) -> Any:
        state = self._answers()
        if state == "silent":
            raise VmError("no answer")
        return {"status": state}

    async def connect(self) -> None:
        self.reconnects += 1

    @property
    def is_connected(self) -> bool:
        return False


def test_the_watch_goes_on_through_pauses_reboots_and_a_silent_monitor(world: World) -> None:
    def read_state() -> str:
        at_s = world.clock.now_ns / 1e9
        return "paused" if 10 < at_s < 20 else "silent" if 30 < at_s < 40 else "running"

    monitor = world.survey.monitor = ScriptedMonitor(read_state)
    watcher = world.watcher(scorer())

    async def main() -> WatchResult:
        running = asyncio.ensure_future(watcher.run(seconds=60))
        await world.clock.sleep_until(50_000_000_000)
        monitor.events["RESET"] += 1
        return await running

    watched = world.clock.run(main())
    assert watched.states == ["paused", "running", "silent", "running", "rebooted"]
    assert monitor.reconnects >= 4
    assert watched.windows == 49


def test_saved_readings_are_a_valid_bundle_of_unknown_phase(world: World, tmp_path: Path) -> None:
    recorder = WatchRecorder(tmp_path / "store", world.survey, world.clock)

    world.clock.run(world.watcher(None, on_row=recorder.add_row).run(seconds=60))
    recorder.close()

    (path,) = recorder.saved
    episode_id = path.name.removesuffix(".tar.zst")
    place = BundleLocation(path=str(path), host_id=path.parent.name, episode_id=episode_id, receipt=None)
    found = validate_bundle(path.read_bytes(), place)
    assert path.parent.name == "made-up"
    assert found.verdict.status in USABLE_STATUSES, found.verdict.detail
    assert found.episode is not None
    assert [mark.phase for mark in found.episode.marks] == [Phase.UNKNOWN, None]
    assert found.episode.manifest.profile == "unknown"
    assert "qmp.jit_tb" in (found.episode.manifest.recording.absent if found.episode.manifest.recording else {})


def record_for(minutes: int, recorder: WatchRecorder, clock: FakeClock) -> None:
    for i in range(2 * minutes * 60):
        clock.now_ns = i * 500_000_000
        for source in (SourceKind.PROC, SourceKind.NETFLOW):
            recorder.add_row(source, (clock.wall_ns(), clock.mono_ns(), i, *(i for _ in list_raw_fields(source))))


def test_a_write_failure_is_logged_once_and_the_next_bundle_is_tried(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    obstacle = tmp_path / "store" / "made-up"
    obstacle.parent.mkdir()
    obstacle.touch()  # a file where the host's folder should be
    recorder = WatchRecorder(tmp_path / "store", world.survey, world.clock)
    for _ in range(2):
        record_for(1, recorder, world.clock)
        recorder.close()
    assert (recorder.lost, len(caplog.records), recorder.saved) == (2, 1, [])

    obstacle.unlink()
    record_for(1, recorder, world.clock)
    recorder.close()
    assert (recorder.lost, len(recorder.saved)) == (2, 1)


def test_the_watch_goes_on_when_its_store_cannot_be_written(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "store").touch()
    recorder = WatchRecorder(tmp_path / "store", world.survey, world.clock)

    watched = world.clock.run(world.watcher(scorer(), on_row=recorder.add_row).run(seconds=4000))
    recorder.close()

    assert watched.why == "the time is up"
    assert recorder.lost == 3
    assert len(caplog.records) == 1


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_can_never_be_written_is_refused_before_the_watch(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(MachineError):
        check_recording_folder(tmp_path / place)
    assert check_recording_folder(tmp_path / "new" / "store") is None


def test_a_slow_disk_delays_no_reading_and_a_full_disk_is_reported(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_free = threading.Event()

    def pack_slowly(*arguments: Any) -> bytes:
        is_free.wait(5)
        return pack_bundle(*arguments)

    monkeypatch.setattr(recording, "pack_bundle", pack_slowly)
    recorder = WatchRecorder(tmp_path / "store", world.survey, world.clock)
    record_for(31, recorder, world.clock)
    assert recorder.saved == []  # the first half hour is still being written
    is_free.set()
    recorder.close()
    assert len(recorder.saved) == 2

    def pack_never(*arguments: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording, "pack_bundle", pack_never)
    record_for(1, recorder, world.clock)
    recorder.close()
    assert recorder.failure == "No space left on device"


def test_a_bundle_holds_half_an_hour_and_a_few_seconds_make_none(world: World, tmp_path: Path) -> None:
    recorder = WatchRecorder(tmp_path / "store", world.survey, world.clock)
    record_for(31, recorder, world.clock)
    recorder.close()
    assert len(recorder.saved) == 2
    assert unpack_bundle(recorder.saved[0].read_bytes(), file="x").manifest.duration_s == pytest.approx(1799.5)

    recorder.add_row(
        SourceKind.PROC,
        (world.clock.wall_ns(), world.clock.mono_ns(), 0, *(0 for _ in list_raw_fields(SourceKind.PROC))),
    )
    recorder.close()
    assert len(recorder.saved) == 2


def test_a_watch_over_a_real_socket_leaves_the_vm_unchanged(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        proc = make_process(tmp_path / "proc", qmp=qemu.path)
        events: list[EventEnvelope] = []

        async def main() -> WatchResult:
            machine = read_running_vm(PID, proc.root)
            assert machine is not None
            clock = HostClock()
            survey = await survey_vm(machine, qmp=None, clock=clock, proc=proc.root)
            sources = await attach(survey)
            try:
                outlets = WatchCallbacks(on_event=lambda event, is_alarm_change: events.append(event))
                return await VmWatcher(survey, sources, None, outlets, clock).run(seconds=8)
            finally:
                assert await detach(survey, sources)

        watched = asyncio.run(main())
        told = [event.data for event in events if isinstance(event.data, TelemetryEvent)]
        assert watched.why == "the time is up"
        assert len(told) >= 1
        assert qemu.objects == {}
        assert qemu.interval == 7


def test_a_hanging_monitor_costs_only_its_own_channels(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        proc = make_process(tmp_path / "proc", qmp=qemu.path)
        told: list[TelemetryEvent] = []

        def emit(event: EventEnvelope, is_alarm_change: bool) -> None:
            if isinstance(event.data, TelemetryEvent):
                told.append(event.data)

        async def main() -> WatchResult:
            machine = read_running_vm(PID, proc.root)
            assert machine is not None
            clock = HostClock()
            survey = await survey_vm(machine, qmp=None, clock=clock, proc=proc.root)
            sources = await attach(survey)
            try:
                watcher = VmWatcher(survey, sources, None, WatchCallbacks(on_event=emit), clock)
                running = asyncio.ensure_future(watcher.run(seconds=16))
                await asyncio.sleep(1)
                qemu.mute.set()
                await asyncio.sleep(7)
                qemu.mute.clear()
                return await running
            finally:
                assert await detach(survey, sources)

        watched = asyncio.run(main())
        at = {name: told[0].channels.index(name) for name in ("proc.main_run", "qmp.blk_rd_bytes")}
        seen = {name: [t.values[0][place] is not None for t in told] for name, place in at.items()}
        assert watched.why == "the time is up"
        assert "silent" in watched.states
        # A busy machine may lose ticks of its own; the monitor's are lost for as long as it hangs.
        assert sum(seen["proc.main_run"]) > sum(seen["qmp.blk_rd_bytes"])
        assert qemu.objects == {}
        assert qemu.interval == 7
