"""Watch many fake VMs in one process: they come and go, fail, share names, and keep their alarms."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.factories.fleet import BusyEstimator, FakeHost, build_candidate
from tests.factories.qemu import NETWORK, FakeQemu
from tests.factories.vms import FakeClock

from phasewatch.errors import BusyError, UsageError
from phasewatch.events.schema import EventEnvelope, PhaseEvent, parse_event, render_event
from phasewatch.live import fleet_member
from phasewatch.live.fleet import FleetReport, FleetRequest, FleetWatch
from phasewatch.live.fleet_member import MemberStatus, MemberStatusKind
from phasewatch.live.watcher import WatchCallbacks
from phasewatch.telemetry.base import AsyncClock, HostClock

SECOND = 1_000_000_000
ONE, OTHER = "11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"


@dataclass
class Fleet:
    """A fake host, a clock, and what a fleet's watch reported."""

    host: FakeHost
    clock: FakeClock
    events: list[EventEnvelope] = field(default_factory=list)
    alarm_changes: list[PhaseEvent] = field(default_factory=list)
    statuses: list[tuple[int, MemberStatus]] = field(default_factory=list)

    def watch(
        self, *patterns: str, clock: AsyncClock | None = None, files: int = 100_000, **changes: Any
    ) -> FleetWatch:
        request = FleetRequest(patterns=patterns or ("*",), **({"models": (build_candidate(),)} | changes))
        return FleetWatch(
            request,
            WatchCallbacks(on_event=self.add_event),
            on_status=lambda status: self.statuses.append((self.clock.now_ns, status)),
            clock=clock or self.clock,
            proc=self.host.proc,
            file_limit=files,
        )

    def add_event(self, event: EventEnvelope, is_alarm_change: bool) -> None:
        assert parse_event(render_event(event)) == event
        self.events.append(event)
        if is_alarm_change:
            assert isinstance(event.data, PhaseEvent)
            self.alarm_changes.append(event.data)

    def run(self, watch: FleetWatch, meanwhile: Callable[[], Coroutine[Any, Any, None]] | None = None) -> FleetReport:
        """Run a watch to its end, and something beside it."""

        async def main() -> FleetReport:
            beside = asyncio.ensure_future(meanwhile()) if meanwhile else None
            try:
                return await watch.run()
            finally:
                if beside is not None:
                    beside.cancel()

        return self.clock.run(main())

    async def sleep(self, seconds: float) -> None:
        await self.clock.sleep_until(self.clock.now_ns + round(seconds * SECOND))

    async def work(self, pid: int, seconds: float) -> None:
        """Keep the vCPU of a VM busy for some seconds."""
        for _ in range(round(2 * seconds)):
            await self.sleep(0.5)
            self.host.work(pid, 0.5)

    def kinds_of(self, pid: int) -> list[MemberStatusKind]:
        kinds: list[MemberStatusKind] = []
        for _, status in self.statuses:
            if status.pid == pid and kinds[-1:] != [status.kind]:
                kinds.append(status.kind)
        return kinds

    def windows_of(self, host: str) -> list[PhaseEvent]:
        return [e.data for e in self.events if isinstance(e.data, PhaseEvent) and e.data.host == host]


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(host=FakeHost(tmp_path / "proc"), clock=FakeClock())


def test_all_vms_that_match_are_watched_by_one_loaded_model(fleet: Fleet) -> None:
    for name in ("web01", "web02", "db01", "web-test"):
        fleet.host.start(name)
    loads: list[str] = []

    report = fleet.run(
        fleet.watch("web*", "db01", exclude=("*-test",), models=(build_candidate(loads=loads),), seconds=30)
    )

    assert sorted(vm.name for vm in report.vms) == ["db01", "web01", "web02"]
    assert loads == ["proc"]
    assert report.windows == sum(vm.watched.windows for vm in report.vms) >= 3 * 17
    assert report.why == "the time is up"
    assert report.left_as_found


def test_the_windows_of_all_vms_end_at_the_same_instants(fleet: Fleet) -> None:
    fleet.host.start("a")

    async def start_another() -> None:
        await fleet.sleep(3.5)
        fleet.host.start("b")

    fleet.run(fleet.watch(seconds=40), start_another)

    ends_a, ends_b = ({event.t_end_ns for event in fleet.windows_of(host)} for host in "ab")
    assert ends_b
    assert ends_b <= ends_a
    assert all(end % SECOND == 0 for end in ends_a)


def test_a_vm_that_starts_later_is_watched_within_five_seconds(fleet: Fleet) -> None:
    pids: list[int] = []

    async def start_one() -> None:
        await fleet.sleep(10.1)
        pids.append(fleet.host.start("late"))

    fleet.run(fleet.watch(seconds=40), start_one)

    watched_ns = next(at_ns for at_ns, status in fleet.statuses if status.kind is MemberStatusKind.WATCHED)
    assert 10 * SECOND < watched_ns < 15 * SECOND
    assert fleet.windows_of("late")


def test_a_vm_that_ends_is_reported_and_the_others_go_on(fleet: Fleet) -> None:
    dying, living = fleet.host.start("dying"), fleet.host.start("living")

    async def stop_one() -> None:
        await fleet.sleep(20)
        fleet.host.stop(dying)

    report = fleet.run(fleet.watch(seconds=60), stop_one)

    assert fleet.kinds_of(dying) == [MemberStatusKind.ATTACHING, MemberStatusKind.WATCHED, MemberStatusKind.GONE]
    assert report.n_gone == 1
    windows = {vm.name: vm.watched.windows for vm in report.vms}
    assert windows["dying"] < 12
    assert windows["living"] >= 47
    assert fleet.kinds_of(living)[-1] is MemberStatusKind.WATCHED


def test_a_vm_that_cannot_be_watched_is_named_with_the_reason_and_tried_again(fleet: Fleet) -> None:
    closed, free = fleet.host.start("closed"), fleet.host.start("free")
    fleet.host.forbid(closed)

    async def allow() -> None:
        await fleet.sleep(60)
        fleet.host.allow(closed)

    report = fleet.run(fleet.watch(seconds=200), allow)

    K = MemberStatusKind
    assert fleet.kinds_of(closed) == [K.ATTACHING, K.NOT_WATCHED, K.WATCHED]
    assert next(status.reason for _, status in fleet.statuses if status.kind is K.NOT_WATCHED)
    assert {vm.name: vm.reason for vm in report.vms} == {"closed": "", "free": ""}
    assert fleet.windows_of("closed")
    assert fleet.kinds_of(free) == [K.ATTACHING, K.WATCHED]
    assert len(fleet.windows_of("free")) >= 187


def test_a_model_that_fails_on_one_vm_does_not_touch_the_others(fleet: Fleet) -> None:
    bad, good = fleet.host.start("bad"), fleet.host.start("good")
    models = (build_candidate(BusyEstimator(fails_above=0.9)),)

    report = fleet.run(fleet.watch(models=models, seconds=40), lambda: fleet.work(bad, 40))

    assert MemberStatusKind.NOT_WATCHED in fleet.kinds_of(bad)
    assert any("the model is broken" in status.reason for _, status in fleet.statuses)
    assert fleet.kinds_of(good) == [MemberStatusKind.ATTACHING, MemberStatusKind.WATCHED]
    assert len(fleet.windows_of("good")) >= 27
    assert report.left_as_found


def test_two_vms_with_one_name_have_two_host_ids(fleet: Fleet) -> None:
    fleet.host.start("web", uuid=ONE)
    fleet.host.start("web", uuid=OTHER)

    report = fleet.run(fleet.watch(seconds=20))

    assert {vm.identity for vm in report.vms} == {f"uuid:{ONE}", f"uuid:{OTHER}"}
    hosts = {vm.host for vm in report.vms}
    assert len(hosts) == 2
    assert all(fleet.windows_of(host) for host in hosts)
    assert len({event.id for event in fleet.events}) == len(fleet.events)


def test_a_uuid_that_two_vms_share_identifies_neither(fleet: Fleet) -> None:
    fleet.host.start("one", uuid=ONE)
    fleet.host.start("two", uuid=ONE)
    fleet.host.start("")

    report = fleet.run(fleet.watch(seconds=20))

    identities = {vm.name: vm.identity for vm in report.vms}
    assert (identities.pop("one"), identities.pop("two")) == ("name:one", "name:two")
    assert next(iter(identities.values())).startswith("process:")


def test_a_storm_of_vms_is_bounded_and_the_rest_is_named(fleet: Fleet) -> None:
    pids = [fleet.host.start(f"vm{number:03}") for number in range(60)]

    async def stop_one() -> None:
        await fleet.sleep(20)
        fleet.host.stop(pids[0])

    report = fleet.run(fleet.watch(max_vms=8, seconds=40), stop_one)

    refused = {status.pid for _, status in fleet.statuses if status.kind is MemberStatusKind.NOT_WATCHED}
    assert refused == set(pids[8:])
    assert {vm.pid for vm in report.vms} == set(pids[:9])


def test_the_number_of_vms_is_bounded_by_the_files_that_may_be_open(fleet: Fleet) -> None:
    for number in range(10):
        fleet.host.start(f"vm{number}")

    report = fleet.run(fleet.watch(seconds=10, files=300))

    assert 1 <= len(report.vms) < 5


@pytest.mark.parametrize("name", ["a b", "a\"b'c", "a\nb\x1b[2J", "жук", "a" * 5000, "a,b=c", "*"])
def test_odd_names_are_watched(fleet: Fleet, name: str) -> None:
    fleet.host.start(name)
    fleet.host.start("plain")

    report = fleet.run(fleet.watch(seconds=20))

    assert [vm.watched.windows > 5 for vm in report.vms] == [True, True]


def test_a_receiver_that_fails_ends_the_watch(fleet: Fleet) -> None:
    fleet.host.start("a")

    def fail(event: EventEnvelope, is_alarm_change: bool) -> None:
        raise BrokenPipeError

    watch = FleetWatch(
        FleetRequest(patterns=("*",)), WatchCallbacks(on_event=fail), clock=fleet.clock, proc=fleet.host.proc
    )

    with pytest.raises(BrokenPipeError):
        fleet.run(watch)


def test_an_interrupted_watch_ends_in_order(fleet: Fleet) -> None:
    fleet.host.start("a")

    async def main() -> FleetReport:
        running = asyncio.ensure_future(fleet.watch().run())
        await fleet.sleep(20)
        running.cancel()
        return await running

    report = fleet.clock.run(main())

    assert report.why == "interrupted"
    assert [vm.watched.windows > 5 for vm in report.vms] == [True]


def test_an_unknown_channel_set_ends_the_command_at_once(fleet: Fleet) -> None:
    with pytest.raises(UsageError):
        fleet.watch(channels="realistc")


def test_an_alarm_is_neither_repeated_nor_forgotten_by_a_restarted_watcher(fleet: Fleet, tmp_path: Path) -> None:
    pid = fleet.host.start("web", uuid=ONE)
    state = tmp_path / "state"
    fleet.run(fleet.watch(state=state, seconds=30), lambda: fleet.work(pid, 30))
    first = list(fleet.alarm_changes)
    fleet.run(fleet.watch(state=state, seconds=30), lambda: fleet.work(pid, 30))
    second = fleet.alarm_changes[len(first) :]
    fleet.run(fleet.watch(state=state, seconds=30))
    third = fleet.alarm_changes[len(first) + len(second) :]

    assert [(change.alarm, change.alarm_changes) for change in first] == [(True, ("infection", "activity"))]
    assert second == []
    assert [(change.alarm, change.alarm_changes) for change in third] == [(False, ("infection", "activity"))]
    assert fleet.windows_of("web")[25].alarm_since_ns == first[0].t_end_ns


def test_a_vm_that_restarts_keeps_its_alarm(fleet: Fleet) -> None:
    pid = fleet.host.start("web", uuid=ONE)

    async def restart() -> None:
        await fleet.work(pid, 30)
        fleet.host.stop(pid)
        again = fleet.host.start("web", uuid=ONE)
        await fleet.work(again, 30)

    report = fleet.run(fleet.watch(seconds=60), restart)

    assert len(report.vms) == 2
    assert [change.alarm for change in fleet.alarm_changes] == [True]
    assert fleet.windows_of("web")[-1].alarm


def test_an_alarm_is_not_passed_on_to_another_vm_of_the_same_name(fleet: Fleet) -> None:
    pid = fleet.host.start("web", uuid=ONE)

    async def replace_it() -> None:
        await fleet.work(pid, 30)
        fleet.host.stop(pid)
        fleet.host.start("web", uuid=OTHER)

    fleet.run(fleet.watch(seconds=60), replace_it)

    assert [change.alarm for change in fleet.alarm_changes] == [True]
    assert not fleet.windows_of("web")[-1].alarm


def test_two_watchers_do_not_use_one_state_folder(fleet: Fleet, tmp_path: Path) -> None:
    other = Fleet(host=fleet.host, clock=fleet.clock)

    async def main() -> None:
        running = asyncio.ensure_future(fleet.watch(state=tmp_path / "state", seconds=20).run())
        await fleet.sleep(5)
        with pytest.raises(BusyError):
            await other.watch(state=tmp_path / "state").run()
        await running

    fleet.clock.run(main())


def test_a_monitor_that_never_answers_does_not_hold_up_another_vm(tmp_path: Path) -> None:
    fleet = Fleet(host=FakeHost(tmp_path / "proc"), clock=FakeClock())
    with FakeQemu(tmp_path / "hung.sock", greets=False) as hung, FakeQemu(tmp_path / "good.sock", tids=()) as good:
        fleet.host.start("hung", qmp=hung.path)
        fleet.host.start("good", qmp=good.path)

        report = asyncio.run(fleet.watch(clock=HostClock(), models=(), seconds=9).run())

        assert {vm.name: vm.reason for vm in report.vms} == {"hung": "", "good": ""}
        assert "qom-list" in good.commands
        assert good.objects == {}
        assert good.interval == 7
        assert report.left_as_found


def test_a_vm_that_gets_its_first_network_card_is_attached_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_member, "PROBE_INTERVAL_NS", SECOND)
    fleet = Fleet(host=FakeHost(tmp_path / "proc"), clock=FakeClock())
    with FakeQemu(tmp_path / "q.sock", tids=(), network="") as qemu:
        fleet.host.start("web", qmp=qemu.path)

        async def plug_card() -> None:
            await asyncio.sleep(4)
            qemu.network = NETWORK
            qemu.peripherals.append("nic9")

        async def main() -> FleetReport:
            plugging = asyncio.ensure_future(plug_card())
            try:
                return await fleet.watch(clock=HostClock(), models=(), seconds=9).run()
            finally:
                plugging.cancel()

        asyncio.run(main())

        masked = [status.masked for _, status in fleet.statuses if status.kind is MemberStatusKind.WATCHED]
        assert max(masked) > min(masked)
        assert qemu.objects == {}


def test_a_vm_whose_monitor_answers_later_is_attached_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_member, "PROBE_INTERVAL_NS", SECOND)
    fleet = Fleet(host=FakeHost(tmp_path / "proc"), clock=FakeClock())
    with FakeQemu(tmp_path / "q.sock", tids=(), greets=False) as qemu:
        fleet.host.start("web", qmp=qemu.path)

        async def main() -> FleetReport:
            asyncio.get_running_loop().call_later(4, setattr, qemu, "greets", True)
            return await fleet.watch(clock=HostClock(), models=(), seconds=12).run()

        report = asyncio.run(main())

        masked = [status.masked for _, status in fleet.statuses if status.kind is MemberStatusKind.WATCHED]
        assert max(masked) > min(masked)
        assert report.left_as_found
