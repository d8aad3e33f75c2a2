"""One watch over a make-believe QEMU and a clock that a test turns: events, states of the VM, alarms, what is kept."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.factories.qemu import PID, FakeQemu, MadeUpProc, make_process
from tests.factories.vms import FakeClock, FakeSource
from tests.live.test_tracker import scorer

from phasewatch.bundle.archive import pack_bundle, unpack_bundle
from phasewatch.channels import list_raw_fields
from phasewatch.errors import MachineError, VmError
from phasewatch.events.schema import EventEnvelope, PerfEvent, PhaseEvent, TelemetryEvent, parse_event, render_event
from phasewatch.inference.predictor import PhasePredictor
from phasewatch.live import recording
from phasewatch.live.attach import VmSurvey, attach, detach, survey_vm
from phasewatch.live.discover import read_running_vm
from phasewatch.live.events import CostMeter
from phasewatch.live.recording import WatchRecorder, check_recording_folder
from phasewatch.live.watcher import VmWatcher, WatchCallbacks, WatchResult
from phasewatch.telemetry.base import HostClock, ReadingValues, build_missing_reading
from phasewatch.telemetry.capture import NetworkNoticeCode, SourceNotice
from phasewatch.telemetry.netflow import FLOW_FIELDS
from phasewatch.telemetry.qmp import QmpMonitor
from phasewatch.types import Phase, SourceKind
from phasewatch.validate.verdict import USABLE_STATUSES, BundleLocation, validate_bundle


class Loud(FakeSource):
    """A card that sends a lot from the 30th to the 60th second."""

    async def read(self) -> ReadingValues:
        self.reads += 1
        at_s = self.clock.now_ns / 1e9
        sent = int(1e3 * at_s + 1.2e5 * min(max(at_s - 30, 0), 30))
        named = {"out_bytes": sent, "out_pkts": sent // 100}
        return tuple(named.get(spec.field, 0) for spec in list_raw_fields(self.source))


class Fading(Loud):
    """A card whose flows are unknown from the 20th second on."""

    def __init__(self, source: SourceKind, clock: FakeClock) -> None:
        super().__init__(source, clock)
        self.notices = [SourceNotice(code=NetworkNoticeCode.UNREADABLE, text="said once")]

    @property
    def unknown_fields(self) -> frozenset[str]:
        return FLOW_FIELDS if self.clock.now_ns > 20e9 else frozenset()

    def take_notices(self) -> list[SourceNotice]:
        notices, self.notices = (self.notices, []) if self.unknown_fields else ([], self.notices)
        return notices

    async def read(self) -> ReadingValues:
        values = zip(list_raw_fields(self.source), await super().read(), strict=True)
        return tuple(None if spec.field in self.unknown_fields else value for spec, value in values)


@dataclass
class World:
    """A VM, a clock and what came out."""

    found: VmSurvey
    clock: FakeClock
    proc: MadeUpProc
    events: list[EventEnvelope] = field(default_factory=list)
    news: list[EventEnvelope] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def emit(self, event: EventEnvelope, news: bool) -> None:
        assert parse_event(render_event(event)) == event
        self.events.append(event)
        if news:
            self.news.append(event)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event.data for event in self.events if isinstance(event.data, kind)]

    def watcher(self, model: PhasePredictor | None, **outlets: Any) -> VmWatcher:
        sources = [FakeSource(SourceKind.PROC, self.clock), Loud(SourceKind.NETFLOW, self.clock)]
        return VmWatcher(
            self.found, sources, model, WatchCallbacks(on_event=self.emit, on_message=self.said.append, **outlets), self.clock, host="h"
        )  # fmt: skip


@pytest.fixture
def world(tmp_path: Path) -> World:
    proc = make_process(tmp_path / "proc")
    clock = FakeClock()
    machine = read_running_vm(PID, proc.root)
    assert machine is not None
    found = asyncio.run(survey_vm(machine, qmp=None, clock=clock, proc=proc.root))
    return World(found=found, clock=clock, proc=proc)


def test_windows_are_told_as_they_close_and_an_alarm_is_news_twice(world: World) -> None:
    watched = world.clock.run(world.watcher(scorer()).run(seconds=120))

    seen = world.of(PhaseEvent)
    assert watched.why == "the time is up"
    assert watched.windows == len(seen) == 22
    assert watched.alarms == 1
    assert (watched.late, watched.skipped, watched.failed, watched.restarts) == (0, 0, 0, 0)
    assert [event.data.alarm for event in world.news] == [True, False]  # type: ignore[union-attr]
    assert {s.model for s in seen} == {"fake"}
    assert {s.latency_ms for s in seen} == {1000.0}  # closed a second after the window's end, told at once
    raised = world.news[0].data
    assert isinstance(raised, PhaseEvent)
    assert raised.alarm_since_ns == raised.t_end_ns
    assert raised.decision == "active"


def test_bins_are_told_one_after_the_other_with_what_is_missing(world: World) -> None:
    world.clock.run(world.watcher(None).run(seconds=30))

    told = world.of(TelemetryEvent)
    assert all(len(t.values) == 1 for t in told)
    assert [t.t0_ns for t in told] == [told[0].t0_ns + i * 500_000_000 for i in range(len(told))]
    assert "qmp.jit_tb" in told[0].masked
    assert {t.lateness_s for t in told} == {1.0}
    assert world.of(PhaseEvent) == []


def test_a_network_that_cannot_be_told_any_more_is_masked_and_said_with_a_code(world: World) -> None:
    sources = [FakeSource(SourceKind.PROC, world.clock), Fading(SourceKind.NETFLOW, world.clock)]
    outlets = WatchCallbacks(on_event=world.emit, on_message=world.said.append)
    watched = world.clock.run(VmWatcher(world.found, sources, None, outlets, world.clock).run(seconds=40))

    told = world.of(TelemetryEvent)
    flows = [told[0].channels.index(f"netflow.{name}") for name in ("new_flows", "dst_ips")]
    assert watched.states == ["network-frames-unreadable"]
    assert sum("network-frames-unreadable" in line for line in world.said) == 1
    assert "netflow.new_flows" not in told[0].masked
    assert {"netflow.new_flows", "netflow.dst_ips"} <= set(told[-1].masked)
    assert "netflow.out_pkts" not in told[-1].masked
    assert {told[-1].values[0][at] for at in flows} == {None}
    assert told[-1].values[0][told[0].channels.index("netflow.out_pkts")] is not None


def test_what_watching_costs_is_measured_on_the_process_itself(world: World) -> None:
    world.clock.run(world.watcher(scorer()).run(seconds=60))

    perf = world.of(PerfEvent)
    assert 5 <= len(perf) <= 12
    assert perf[-1].process == "watch"
    assert perf[-1].windows == sum(perf[-1].latency_counts) > 5
    assert perf[-1].p99_ms == 0.0
    assert 10 << 20 < perf[-1].rss_bytes < 2 << 30
    assert perf[-1].late_ticks == 0


def test_the_cost_of_a_long_watch_is_that_of_its_last_minutes() -> None:
    meter = CostMeter(0, 100.0)
    for at_s in range(5, 24 * 3600, 5):
        meter.add_window(at_s * 10**9, 1.0)
        cost = meter.read(at_s * 10**9, 100.0 + at_s * 0.02, rss_bytes=1, late=0, backlog=0)

    assert cost.measured_s == 300
    assert len(cost.latencies_ms) / cost.measured_s == 0.2
    assert cost.cpu_cores == pytest.approx(0.02)


class Mute(FakeSource):
    """A source that gives nothing from the 20th second on."""

    async def read(self) -> ReadingValues:
        return await super().read() if self.clock.now_ns < 20e9 else build_missing_reading(self.source)


def test_a_source_that_goes_blind_is_said_and_its_lost_readings_are_counted(world: World) -> None:
    sources = [FakeSource(SourceKind.PROC, world.clock), Mute(SourceKind.NETFLOW, world.clock)]
    watcher = VmWatcher(
        world.found, sources, scorer(), WatchCallbacks(on_event=world.emit, on_message=world.said.append), world.clock
    )

    watched = world.clock.run(watcher.run(seconds=60))

    assert watched.states == ["netflow silent"]
    assert watched.lost == {"netflow": 80}
    assert any("netflow" in line for line in world.said)
    assert world.of(TelemetryEvent)[-1].lost_rows >= 70
    assert "netflow" in (world.of(PhaseEvent)[-1].caveat or "")


def test_contention_is_told_with_the_windows_that_it_touches(world: World) -> None:
    sources = [FakeSource(SourceKind.PROC, world.clock, wait_cores=0.4), Loud(SourceKind.NETFLOW, world.clock)]
    watcher = VmWatcher(
        world.found, sources, scorer(), WatchCallbacks(on_event=world.emit, on_message=world.said.append), world.clock
    )

    watched = world.clock.run(watcher.run(seconds=60))

    assert watched.contended == watched.windows
    assert watched.states == ["contended"]
    assert all("contention" in (seen.caveat or "") for seen in world.of(PhaseEvent))


def test_a_question_that_fails_is_counted_and_told(tmp_path: Path) -> None:
    said: list[str] = []
    with FakeQemu(tmp_path / "q.sock") as qemu:
        proc = make_process(tmp_path / "proc", qmp=qemu.path)

        async def main() -> WatchResult:
            machine = read_running_vm(PID, proc.root)
            assert machine is not None
            clock = HostClock()
            found = await survey_vm(machine, qmp=None, clock=clock, proc=proc.root)
            sources = await attach(found)
            qemu.refused.add("query-blockstats")
            try:
                outlets = WatchCallbacks(on_event=lambda event, news: None, on_message=said.append)
                return await VmWatcher(found, sources, None, outlets, clock).run(seconds=8)
            finally:
                await detach(found, sources)

        watched = asyncio.run(main())

        assert watched.lost["qmp query-blockstats"] >= 8
        assert "qmp" not in watched.lost
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
    assert watched.windows == 2


def test_a_process_that_waits_to_be_buried_is_gone(world: World) -> None:
    world.proc.write("stat", f"{PID} (qemu) Z " + "0 " * 40)

    assert world.clock.run(world.watcher(None).run()).why == "the VM is gone"


def test_a_process_that_got_the_number_of_the_vm_is_not_the_vm(world: World) -> None:
    world.proc.write("stat", f"{PID} (sh) S " + "0 " * 18 + "99 0")

    assert world.clock.run(world.watcher(None).run()).why == "the VM is gone"


def test_an_outlet_that_breaks_is_not_called_the_end_of_the_vm(world: World) -> None:
    def emit(event: EventEnvelope, news: bool) -> None:
        if isinstance(event.data, PerfEvent):
            raise BrokenPipeError

    outlets = WatchCallbacks(on_event=emit, on_message=world.said.append)
    watcher = VmWatcher(world.found, [FakeSource(SourceKind.PROC, world.clock)], None, outlets, world.clock)

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
    assert watched.windows == 1


def test_a_clock_that_jumps_is_said_and_windows_begin_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert world.said == ["the clock jumped, or the machine slept: windows begin anew"]
    assert watched.windows == 4 + 4
    assert watched.late <= 4  # stamped after the jump, before it was noticed


class ScriptedMonitor(QmpMonitor):
    """Says what a test wants said."""

    def __init__(self, answers: Callable[[], str]) -> None:
        super().__init__(Path("scripted"))
        self._answers = answers
        self.reconnects = 0

    async def ask(self, command: str, **arguments: object) -> Any:
        said = self._answers()
        if said == "silent":
            raise VmError("no answer")
        return {"status": said}

    async def connect(self) -> None:
        self.reconnects += 1

    @property
    def is_connected(self) -> bool:
        return False


def test_a_vm_that_pauses_reboots_or_whose_monitor_hangs_is_watched_on(world: World) -> None:
    def say() -> str:
        at_s = world.clock.now_ns / 1e9
        return "paused" if 10 < at_s < 20 else "silent" if 30 < at_s < 40 else "running"

    monitor = world.found.monitor = ScriptedMonitor(say)
    watcher = world.watcher(scorer())

    async def main() -> WatchResult:
        running = asyncio.ensure_future(watcher.run(seconds=60))
        await world.clock.sleep_until(50_000_000_000)
        monitor.events["RESET"] += 1
        return await running

    watched = world.clock.run(main())
    assert watched.states == ["paused", "running", "silent", "running", "rebooted"]
    assert monitor.reconnects >= 4
    assert watched.windows == 10


def test_what_is_kept_is_a_bundle_of_unknown_phase_that_the_validator_accepts(world: World, tmp_path: Path) -> None:
    paths: list[Path] = []
    saver = WatchRecorder(tmp_path / "store", world.found, world.clock, paths.append)

    world.clock.run(world.watcher(None, keep=saver.add_row).run(seconds=60))
    saver.close()

    (path,) = paths
    episode_id = path.name.removesuffix(".tar.zst")
    place = BundleLocation(path=str(path), host_id=path.parent.name, episode_id=episode_id, receipt=None)
    found = validate_bundle(path.read_bytes(), place)
    assert path.parent.name == "made-up"
    assert found.verdict.status in USABLE_STATUSES, found.verdict.detail
    assert found.episode is not None
    assert [mark.phase for mark in found.episode.marks] == [Phase.UNKNOWN, None]
    assert found.episode.manifest.profile == "unknown"
    assert "qmp.jit_tb" in (found.episode.manifest.recording.absent if found.episode.manifest.recording else {})


def keep_for(minutes: int, saver: WatchRecorder, clock: FakeClock) -> None:
    for i in range(2 * minutes * 60):
        clock.now_ns = i * 500_000_000
        for source in (SourceKind.PROC, SourceKind.NETFLOW):
            saver.add_row(source, (clock.wall_ns(), clock.mono_ns(), i, *(i for _ in list_raw_fields(source))))


def test_a_store_that_cannot_be_written_is_said_once_and_the_next_bundle_is_tried(world: World, tmp_path: Path) -> None:
    paths: list[Path] = []
    in_the_way = tmp_path / "store" / "made-up"
    in_the_way.parent.mkdir()
    in_the_way.touch()  # a file where the host's folder should be
    saver = WatchRecorder(tmp_path / "store", world.found, world.clock, paths.append, world.said.append)
    for _ in range(2):
        keep_for(1, saver, world.clock)
        saver.close()
    assert (saver.lost, len(world.said), paths) == (2, 1, [])

    in_the_way.unlink()
    keep_for(1, saver, world.clock)
    saver.close()
    assert (saver.lost, len(paths)) == (2, 1)


def test_a_watch_outlives_the_store_that_it_saves_to(world: World, tmp_path: Path) -> None:
    (tmp_path / "store").touch()
    saver = WatchRecorder(tmp_path / "store", world.found, world.clock, lambda path: None, world.said.append)

    watched = world.clock.run(world.watcher(scorer(), keep=saver.add_row).run(seconds=4000))
    saver.close()

    assert watched.why == "the time is up"
    assert saver.lost == 3
    assert len(world.said) == 1


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_store_that_can_never_be_written_is_refused_before_the_watch(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(MachineError):
        check_recording_folder(tmp_path / place)
    assert check_recording_folder(tmp_path / "new" / "store") == ""


def test_a_disk_that_is_slow_holds_up_no_reading_and_one_that_is_full_is_told(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: list[Path] = []
    is_free = threading.Event()

    def pack_slowly(*arguments: Any) -> bytes:
        is_free.wait(5)
        return pack_bundle(*arguments)

    monkeypatch.setattr(recording, "pack_bundle", pack_slowly)
    saver = WatchRecorder(tmp_path / "store", world.found, world.clock, paths.append)
    keep_for(31, saver, world.clock)
    assert paths == []  # the first half hour is still being written
    is_free.set()
    saver.close()
    assert len(paths) == 2

    def pack_never(*arguments: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording, "pack_bundle", pack_never)
    keep_for(1, saver, world.clock)
    saver.close()
    assert saver.failure == "No space left on device"


def test_half_an_hour_is_a_bundle_and_a_few_seconds_are_none(world: World, tmp_path: Path) -> None:
    paths: list[Path] = []
    saver = WatchRecorder(tmp_path / "store", world.found, world.clock, paths.append)
    keep_for(31, saver, world.clock)
    saver.close()
    assert len(paths) == 2
    assert unpack_bundle(paths[0].read_bytes(), file="x").manifest.duration_s == pytest.approx(1799.5)

    saver.add_row(
        SourceKind.PROC,
        (world.clock.wall_ns(), world.clock.mono_ns(), 0, *(0 for _ in list_raw_fields(SourceKind.PROC))),
    )
    saver.close()
    assert len(paths) == 2


def test_a_whole_watch_over_a_real_socket_leaves_the_machine_as_it_was(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        proc = make_process(tmp_path / "proc", qmp=qemu.path)
        events: list[EventEnvelope] = []

        async def main() -> WatchResult:
            machine = read_running_vm(PID, proc.root)
            assert machine is not None
            clock = HostClock()
            found = await survey_vm(machine, qmp=None, clock=clock, proc=proc.root)
            sources = await attach(found)
            try:
                outlets = WatchCallbacks(
                    on_event=lambda event, news: events.append(event), on_message=lambda line: None
                )
                return await VmWatcher(found, sources, None, outlets, clock).run(seconds=8)
            finally:
                assert await detach(found, sources)

        watched = asyncio.run(main())
        told = [event.data for event in events if isinstance(event.data, TelemetryEvent)]
        assert watched.why == "the time is up"
        assert len(told) >= 1
        assert qemu.objects == {}
        assert qemu.interval == 7


def test_a_monitor_that_hangs_costs_its_own_channels_and_nothing_else(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        proc = make_process(tmp_path / "proc", qmp=qemu.path)
        told: list[TelemetryEvent] = []

        def emit(event: EventEnvelope, news: bool) -> None:
            if isinstance(event.data, TelemetryEvent):
                told.append(event.data)

        async def main() -> WatchResult:
            machine = read_running_vm(PID, proc.root)
            assert machine is not None
            clock = HostClock()
            found = await survey_vm(machine, qmp=None, clock=clock, proc=proc.root)
            sources = await attach(found)
            try:
                watcher = VmWatcher(
                    found, sources, None, WatchCallbacks(on_event=emit, on_message=lambda line: None), clock
                )
                running = asyncio.ensure_future(watcher.run(seconds=16))
                await asyncio.sleep(1)
                qemu.mute.set()
                await asyncio.sleep(7)
                qemu.mute.clear()
                return await running
            finally:
                assert await detach(found, sources)

        watched = asyncio.run(main())
        at = {name: told[0].channels.index(name) for name in ("proc.main_run", "qmp.blk_rd_bytes")}
        seen = {name: [t.values[0][place] is not None for t in told] for name, place in at.items()}
        assert watched.why == "the time is up"
        assert "silent" in watched.states
        # A busy machine may lose ticks of its own; the monitor's are lost for as long as it hangs.
        assert sum(seen["proc.main_run"]) > sum(seen["qmp.blk_rd_bytes"])
        assert qemu.objects == {}
        assert qemu.interval == 7
