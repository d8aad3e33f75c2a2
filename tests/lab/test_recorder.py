"""The recorder: phases of one slot, bundles of a plan, retries, resumption and waiting for an idle machine."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.factories.vms import (
    FakeClock,
    FakeMachine,
    FakeReader,
    RecordedProgress,
    capture_log,
    session_of,
    shape_of,
    slot_of,
)

from phasewatch import atomic
from phasewatch.bundle.archive import unpack_bundle
from phasewatch.bundle.model import Episode, LabelEvidence
from phasewatch.channels import CHANNELS
from phasewatch.errors import BootError, BusyError, CgroupError, MachineError, UsageError, VmError, WorkloadError
from phasewatch.lab import campaign, recorder
from phasewatch.lab.campaign import QemuFactory, RecordingOptions, record_plan
from phasewatch.lab.cgroup import CpuController
from phasewatch.lab.host import CpuUsage, parse_busy_cpu_s, wait_until_idle
from phasewatch.lab.network.world import draw_world
from phasewatch.lab.plan import RecordingSession
from phasewatch.lab.qemu_command import HostShape
from phasewatch.lab.recorder import PlanRecorder, RecordingSummary, SkipCode
from phasewatch.lab.session import LEAD_IN_S, RecordedEpisode, run_episode
from phasewatch.lab.walks import LoadSpan
from phasewatch.store.local import DiskStore
from phasewatch.telemetry.base import RowLog
from phasewatch.types import EpisodeRole, Phase, SourceKind


@pytest.fixture
def log() -> Iterator[list[str]]:
    with capture_log() as messages:
        yield messages


def record_on(machine: FakeMachine, **changes: object) -> RecordedEpisode:
    return machine.clock.run(run_episode(machine, slot_of(**changes), machine.clock))  # type: ignore[arg-type]


def list_steps(take: RecordedEpisode) -> list[tuple[str, float]]:
    """Return each label with its time after the first one, in seconds."""
    t0 = take.marks[0].t_mono_ns
    return [(str(mark.phase or "end"), round((mark.t_mono_ns - t0) / 1e9, 1)) for mark in take.marks]


def test_phases_follow_the_plan() -> None:
    take = record_on(FakeMachine(FakeClock()))

    assert list_steps(take) == [("clean", 0), ("infecting", 20), ("active", 40), ("end", 60)]


def test_next_phase_starts_when_an_infection_ends_early_and_the_last_phase_is_extended() -> None:
    take = record_on(FakeMachine(FakeClock(), ends_after_s={"infecting": 12.0}))

    assert list_steps(take) == [("clean", 0), ("infecting", 20), ("active", 32), ("end", 60)]


def test_last_phase_whose_work_ends_early_is_followed_by_dormant() -> None:
    take = record_on(FakeMachine(FakeClock(), ends_after_s={"active": 5.0}))

    assert list_steps(take) == [("clean", 0), ("infecting", 20), ("active", 40), ("dormant", 45), ("end", 60)]


def test_episode_end_cuts_the_phases() -> None:
    take = record_on(FakeMachine(FakeClock()), duration_s=30.0)

    assert list_steps(take) == [("clean", 0), ("infecting", 20), ("end", 30)]


def test_no_phase_starts_in_the_last_half_second() -> None:
    take = record_on(FakeMachine(FakeClock()), duration_s=40.2)

    assert list_steps(take) == [("clean", 0), ("infecting", 20), ("end", 40.2)]


def test_guest_is_prepared_before_the_first_label() -> None:
    machine = FakeMachine(FakeClock())
    loads = (LoadSpan(kind="compile", start_s=0.0, end_s=60.0, knobs=(("rate", 2.0),)),)
    record_on(machine, phases=((Phase.DORMANT, 60.0),), loads=loads, agent=True)

    commands = [command for _, command in machine.log]
    assert commands[:6] == [
        "hello",
        "warmup",
        "agent on",
        "chatter 1 10",
        "load compile 1 rate=2",
        "install dormant cryptomine throttled 1 duty=0.5",
    ]
    assert commands[6:] == ["phase dormant cryptomine throttled 1 duty=0.5", "hello"]


WALK = (
    LoadSpan(kind="compile", start_s=0.0, end_s=15.0, knobs=(("duty", 0.5),)),
    LoadSpan(kind="idle", start_s=15.0, end_s=30.0),
    LoadSpan(kind="backup", start_s=30.0, end_s=60.0),
)


def test_loads_start_at_their_times_beside_the_phases() -> None:
    machine = FakeMachine(FakeClock())
    take = record_on(machine, loads=WALK, cold=0.5)

    t0_s = (take.marks[0].t_mono_ns) / 1e9
    sent = [(round(at_s - t0_s, 1), command) for at_s, command in machine.log if command.startswith("load")]
    assert sent[0][0] < 0
    assert [(at_s, command) for at_s, command in sent[1:]] == [
        (15.0, "load idle 2 cold=0.5"),
        (30.0, "load backup 3 cold=0.5"),
    ]
    assert sent[0][1] == "load compile 1 duty=0.5 cold=0.5"
    assert list_steps(take) == [("clean", 0), ("infecting", 20), ("active", 40), ("end", 60)]


def test_loads_that_ran_are_remembered_without_the_idle_times() -> None:
    take = record_on(FakeMachine(FakeClock()), loads=WALK)

    t0_ns = take.marks[0].t_wall_ns
    assert [(kind, (end - t0_ns) / 1e9) for kind, _, end in take.loads] == [("compile", 15.0), ("backup", 60.0)]
    assert (take.loads[1][1] - t0_ns) / 1e9 == 30.0


def test_load_of_a_benign_episode_of_version_1_is_its_sample() -> None:
    benign = {"profile": "benign", "sample_name": "compile", "phases": ((Phase.CLEAN, 60.0),)}
    take = record_on(FakeMachine(FakeClock()), **benign)

    assert take.loads == (("compile", take.marks[0].t_wall_ns, take.marks[-1].t_wall_ns),)


def test_guest_gets_the_servers_routine_and_forms_of_its_episode() -> None:
    machine = FakeMachine(FakeClock())
    world = draw_world(np.random.default_rng(1))
    record_on(machine, world=world, routine="slow-drip", armed_form="dns", dormant_form="none", cold=0.25)

    assert machine.worlds == [world]
    (infecting,) = [command for _, command in machine.log if command.startswith("phase infecting")]
    words = infecting.split()
    assert {"seconds=20", "routine=slow-drip", "armed=dns", "dormant=none", "cold=0.25"} <= set(words)
    assert f"at.c2={dict(world.addresses)['c2']}" in words
    assert len(infecting) < 4000


def test_every_label_has_the_step_the_acknowledgement_and_the_exit_status() -> None:
    machine = FakeMachine(FakeClock(), ends_after_s={"infecting": 12.0})
    take = record_on(machine)

    assert [(each.phase, each.step, each.exit_code) for each in take.evidence] == [
        (Phase.CLEAN, "phase clean cryptomine throttled", None),
        (Phase.INFECTING, "phase infecting cryptomine throttled", 0),
        (Phase.ACTIVE, "phase active cryptomine throttled", None),
    ]
    numbers = [number for number, (_, command) in enumerate(machine.log, 1) if command.startswith("phase")]
    assert [each.ack_id for each in take.evidence] == numbers


@pytest.mark.parametrize(
    ("machine", "says"),
    [
        (FakeMachine(FakeClock(), ends_after_s={"active": 3.0}, exit_codes={"active": 3}), "phase active .* with 3"),
        (FakeMachine(FakeClock(), ends_after_s={"infecting": 3.0}, exit_codes={"infecting": 126}), "infecting .* 126"),
        (FakeMachine(FakeClock(), ends_after_s={"compile": 50.0}, exit_codes={"compile": 3}), "load compile.* with 3"),
        (FakeMachine(FakeClock(), ends_after_s={"compile": 50.0}), "load compile.* with 0"),
    ],
    ids=["active fails", "infecting fails", "load fails", "load ends by itself"],
)
def test_workload_that_fails_fails_the_episode(machine: FakeMachine, says: str) -> None:
    with pytest.raises(WorkloadError, match=says):
        record_on(machine, loads=(LoadSpan(kind="compile", start_s=0.0, end_s=60.0),))

    assert machine.stops == 1
    assert not any(source.is_open for source in machine.opened)


def test_first_label_is_at_a_whole_half_second_after_settling() -> None:
    take = record_on(FakeMachine(FakeClock()), settle_s=41.3)

    assert take.settle_s == 41.5
    assert take.marks[0].t_wall_ns % 500_000_000 == 0


def test_readings_begin_before_the_first_label_and_fall_into_the_middle_of_bins() -> None:
    take = record_on(FakeMachine(FakeClock()))

    stamps = [row[0] or 0 for row in take.logs[SourceKind.PROC].rows]
    before = [stamp for stamp in stamps if stamp < take.marks[0].t_wall_ns]
    assert len(before) == 2 * LEAD_IN_S
    assert len(stamps) - len(before) == 2 * 60
    assert {stamp % 500_000_000 for stamp in stamps} == {250_000_000}


def test_slow_preparation_postpones_the_first_label() -> None:
    take = record_on(FakeMachine(FakeClock()), settle_s=1.0)

    assert take.settle_s == LEAD_IN_S + 2.0  # the warm-up took two seconds


@pytest.mark.parametrize(
    ("machine", "says"),
    [
        pytest.param(FakeMachine(FakeClock(), boot_error="no word from the guest"), "no word", id="it does not boot"),
        pytest.param(FakeMachine(FakeClock(), dies_at_s=55.0), "died in the middle", id="it dies"),
        pytest.param(FakeMachine(FakeClock(), mute=("phase",)), "did not acknowledge", id="it hangs"),
    ],
)
def test_failing_vm_is_stopped_and_reported(machine: FakeMachine, says: str) -> None:
    with pytest.raises(VmError, match=says):
        record_on(machine)

    assert machine.stops == 1
    assert not any(source.is_open for source in machine.opened)


def test_preparation_that_fails_in_the_guest_is_a_failed_workload() -> None:
    with pytest.raises(WorkloadError, match="warmup : ended with 3 in the guest"):
        record_on(FakeMachine(FakeClock(), exit_code=3))


def test_vm_that_does_not_boot_is_told_from_one_that_fails_later() -> None:
    with pytest.raises(BootError, match="no word from the guest"):
        record_on(FakeMachine(FakeClock(), boot_error="no word from the guest"))


def test_stop_completes_although_the_recording_is_cancelled() -> None:
    class Slow(FakeMachine):
        async def stop(self) -> None:
            await self.clock.sleep_until(self.clock.now_ns + 1_000_000_000)
            self.stops += 1

    machine = Slow(FakeClock(), boot_error="no word from the guest")

    async def interrupted() -> None:
        task = asyncio.ensure_future(run_episode(machine, slot_of(), machine.clock))
        await machine.clock.sleep_until(3_500_000_000)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    machine.clock.run(interrupted())

    assert machine.stops == 1


def test_vcpu_wait_is_measured_between_first_label_and_end() -> None:
    take = record_on(FakeMachine(FakeClock(), wait_cores=0.25))

    assert take.vcpu_wait == pytest.approx(0.25)


# --- a plan ---------------------------------------------------------------------------------------------------------


class World:
    """A store, a clock, and a recorder whose VMs are created by a function of (attempt, place)."""

    def __init__(self, tmp_path: Path, make: Callable[[int, int], FakeMachine] | None = None) -> None:
        self.clock, self.progress, self.made = FakeClock(), RecordedProgress(), 0
        self.store = DiskStore(tmp_path / "store")
        self.make = make or (lambda number, place: FakeMachine(self.clock))
        self.cores: list[tuple[int, ...]] = []
        self.shape = ""

    def machine(self, shape: HostShape, place: int, cores: tuple[int, ...]) -> FakeMachine:
        self.shape = shape.host_id
        self.cores.append(cores)
        self.made += 1
        machine = self.make(self.made, place)
        machine.clock = self.clock
        return machine

    def record(
        self,
        *sessions: RecordingSession,
        vcpus: int = 1,
        room: tuple[Path, ...] = (),
        shapes: dict[str, HostShape] | None = None,
        vms: int = 2,
    ) -> RecordingSummary:
        work = PlanRecorder(
            store=self.store,
            shapes=shapes or {host: shape_of(host_id=host, vcpus=vcpus) for host in ("pc", "q35")},
            machines=self.machine,
            clock=self.clock,
            progress=self.progress,
            idle_wait_s=0.0,
            cores=(0, 1),
            vms=vms,
            disk_folders=room,
        )
        return self.clock.run(work.record(sessions))

    def episodes(self) -> list[Episode]:
        return [unpack_bundle(self.store.read(item), file=item.path) for item in self.store.walk()]


def test_pair_becomes_two_bundles_that_name_each_other_as_neighbours(tmp_path: Path) -> None:
    world = World(tmp_path)
    summary = world.record(session_of(slot_of(1), slot_of(2, agent=True)))

    one, two = sorted((episode.manifest for episode in world.episodes()), key=lambda m: m.plan_seed)
    assert summary.recorded == 2
    assert (one.neighbours, two.neighbours) == ((two.episode_id,), (one.episode_id,))
    assert (one.session, one.agent, two.agent) == ("s1", False, True)
    assert world.cores == [(0,), (1,)]


def test_soak_episodes_of_two_hosts_run_at_once_and_stay_two_sessions(tmp_path: Path) -> None:
    world = World(tmp_path)
    pc, q35 = (slot_of(seed, host_id=host, role=EpisodeRole.SOAK) for seed, host in ((1, "pc"), (2, "q35")))
    summary = world.record(session_of(pc, name="s1"), session_of(q35, name="s2"))

    one, two = sorted((episode.manifest for episode in world.episodes()), key=lambda m: m.plan_seed)
    assert summary.recorded == 2
    assert world.cores == [(0,), (1,)]
    assert (one.session, one.host.host_id, one.neighbours) == ("s1", "pc", (two.episode_id,))
    assert (two.session, two.host.host_id, two.neighbours) == ("s2", "q35", (one.episode_id,))
    assert world.progress.lines[0].startswith("[0/2] pc: cryptomine/throttled; q35: cryptomine/throttled; 2 min")


def test_failed_soak_episode_is_retried_in_its_own_session(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.make = lambda number, place: FakeMachine(world.clock, dies_at_s=50.0 if number == 2 else None)
    pc, q35 = (slot_of(seed, host_id=host, role=EpisodeRole.SOAK) for seed, host in ((1, "pc"), (2, "q35")))
    summary = world.record(session_of(pc, name="s1"), session_of(q35, name="s2"))

    assert (summary.recorded, summary.failed) == (2, ())
    assert {(episode.manifest.host.host_id, episode.manifest.session) for episode in world.episodes()} == {
        ("pc", "s1"),
        ("q35", "s2"),
    }


def test_manifest_describes_the_recording(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.record(session_of(slot_of(1)))

    manifest = world.episodes()[0].manifest
    assert manifest.duration_s == 60.0
    assert manifest.recording is not None
    assert (manifest.recording.boot_s, manifest.recording.settle_s) == (3.0, 40.0)
    assert manifest.recording.knobs == {"duty": 0.5}
    assert manifest.rows_emitted == dict.fromkeys((SourceKind.PROC, SourceKind.QMP, SourceKind.NETFLOW), 140)
    assert set(manifest.recording.absent) == {
        c.full_name for c in CHANNELS if c.source is SourceKind.GUEST or c.accel == "kvm"
    }
    assert len(manifest.channels_available) == len(CHANNELS) - 8 - 4
    assert set(manifest.clocks.pairs) == {"monotonic", "boottime"}
    assert manifest.host.recorder.endswith(", guest image 0123456789ab, on a fake processor")


def test_slots_in_the_store_are_not_recorded_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.record(session_of(slot_of(1)))
    summary = world.record(session_of(slot_of(1), slot_of(2)))

    assert (summary.recorded, summary.present) == (1, 1)
    assert sorted(episode.manifest.plan_seed for episode in world.episodes()) == [1, 2]


def test_slots_that_a_shipper_has_moved_are_not_recorded_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.record(session_of(slot_of(1)))
    (bundle,) = world.store.path.glob("*/*.tar.zst")
    (world.store.path / "sent" / bundle.parent.name).mkdir(parents=True)
    for name in (bundle.name, bundle.name + ".sha256"):
        (bundle.parent / name).rename(world.store.path / "sent" / bundle.parent.name / name)

    summary = world.record(session_of(slot_of(1)))

    assert (summary.recorded, summary.present) == (0, 1)


def test_slot_with_a_failed_vm_is_retried_alone_and_its_neighbour_is_kept(tmp_path: Path, log: list[str]) -> None:
    world = World(tmp_path)
    world.make = lambda number, place: FakeMachine(world.clock, dies_at_s=50.0 if number == 2 else None)
    summary = world.record(session_of(slot_of(1), slot_of(2)))

    assert (summary.recorded, summary.failed) == (2, ())
    assert [episode.manifest.neighbours for episode in world.episodes()] == [(), ()]
    assert any("QEMU died in the middle of throttled" in line for line in log)


def test_slot_is_abandoned_after_three_attempts_and_reported(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.make = lambda number, place: FakeMachine(world.clock, boot_error="no word from the guest")
    summary = world.record(session_of(slot_of(7)))

    assert world.made == 3
    assert summary.recorded == 0
    assert summary.failed == ("pc: cryptomine/throttled (seed 7): no word from the guest",)
    assert list(world.store.path.rglob("*")) == [] if world.store.path.exists() else True


def test_episode_with_cpu_contention_is_kept_and_its_slot_recorded_once_more(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.make = lambda number, place: FakeMachine(world.clock, wait_cores=0.2)
    summary = world.record(session_of(slot_of(1)))

    assert (summary.recorded, summary.crowded) == (2, 2)


def test_slot_whose_workload_failed_is_played_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    failing = {"ends_after_s": {"active": 3.0}, "exit_codes": {"active": 3}}
    world.make = lambda number, place: FakeMachine(world.clock, **(failing if number == 1 else {}))  # type: ignore[arg-type]
    summary = world.record(session_of(slot_of(1)))

    assert (summary.recorded, summary.failed) == (1, ())
    assert world.made == 2
    assert len(world.episodes()) == 1


def test_manifest_holds_loads_routine_twin_and_evidence(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.record(session_of(slot_of(1, loads=WALK, routine="memory-only", sample_name="full")))

    recording = world.episodes()[0].manifest.recording
    assert recording is not None
    assert [kind for kind, _, _ in recording.load] == ["compile", "backup"]
    assert (recording.routine, recording.twin, recording.background) == ("memory-only", "render", "compile")
    assert [each.phase for each in recording.evidence] == [Phase.CLEAN, Phase.INFECTING, Phase.ACTIVE]
    assert recording.knobs == {"duty": 0.5, "background.0.duty": 0.5}


def test_vcpus_are_not_pinned_where_cores_do_not_suffice(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.record(session_of(slot_of(1), slot_of(2)), vcpus=2)

    assert world.cores == [(0, 1), ()]


def test_full_disk_is_an_error_before_a_vm_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path)
    monkeypatch.setattr(recorder, "MIN_FREE_BYTES", 2**62)

    with pytest.raises(MachineError, match="MiB needed; make room"):
        world.record(session_of(slot_of(1)), room=(tmp_path,))
    assert world.made == 0


def test_write_error_of_the_store_is_a_machine_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiskStore, "put", full)

    with pytest.raises(MachineError, match="No space left on device; make room"):
        World(tmp_path).record(session_of(slot_of(1)))


def test_no_file_is_left_when_the_disk_fills_during_a_write(tmp_path: Path) -> None:
    world = World(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))  # the kernel refuses what goes beyond
    try:
        with pytest.raises(MachineError, match="make room or mend it, then record again: what is there is kept"):
            world.record(session_of(slot_of(1)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert [path for path in world.store.path.rglob("*") if path.is_file()] == []


def test_log_reports_refused_lines_of_the_agent(tmp_path: Path, log: list[str]) -> None:
    class Babbling(FakeMachine):
        def build_agent_reader(self, log: RowLog) -> FakeReader:
            return FakeReader(log, bad=3, dropped=4)

    world = World(tmp_path)
    world.make = lambda number, place: Babbling(world.clock)
    world.record(session_of(slot_of(1, agent=True)), session_of(slot_of(2)))

    assert [line for line in log if "agent's lines" in line] == [
        line for line in log if "(7 of the agent's lines refused)" in line
    ]
    assert sum("agent's lines" in line for line in log) == 1


def test_progress_names_the_session_and_the_time_left(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.record(session_of(slot_of(1)), session_of(slot_of(2), name="s2"))

    assert world.progress.lines == [
        "[0/2] pc: cryptomine/throttled; 4 min left",
        "[1/2] pc: cryptomine/throttled; 2 min left at 34 episodes an hour",
        "[2/2] ",
    ]


def test_second_recorder_on_a_store_is_refused(tmp_path: Path) -> None:
    with atomic.lock(tmp_path), pytest.raises(BusyError):
        record_plan([], store=tmp_path, options=RecordingOptions(cache=tmp_path, shapes=()))


def test_temporary_files_of_a_killed_recorder_are_removed_and_those_of_a_receiver_kept(tmp_path: Path) -> None:
    half, coming = (tmp_path / folder / ".x.tar.zst.0123456789ab.tmp" for folder in ("pc", ".incoming"))
    for each in (half, coming):
        each.parent.mkdir()
        each.write_bytes(b"half")

    shapes = (shape_of(), shape_of(host_id="never-recorded"))
    record_plan([], store=tmp_path, options=RecordingOptions(cache=tmp_path, shapes=shapes))

    assert (half.exists(), coming.exists()) == (False, True)


def test_plan_with_an_unknown_host_is_refused_before_recording(tmp_path: Path) -> None:
    options = RecordingOptions(cache=tmp_path, shapes=(shape_of(host_id="q35"),))

    with pytest.raises(UsageError, match="no host 'pc'; known: q35"):
        record_plan([session_of(slot_of(1))], store=tmp_path, options=options)


def test_cancelled_recording_stops_its_vms_and_writes_nothing(tmp_path: Path) -> None:
    world, machines = World(tmp_path), []

    def make(number: int, place: int) -> FakeMachine:
        machines.append(FakeMachine(world.clock))
        return machines[-1]

    world.make = make

    async def interrupted() -> None:
        work = PlanRecorder(
            store=world.store,
            shapes={"pc": shape_of()},
            machines=world.machine,
            clock=world.clock,
            idle_wait_s=0.0,
        )
        task = asyncio.ensure_future(work.record([session_of(slot_of(1), slot_of(2))]))
        await world.clock.sleep_until(60_000_000_000)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    world.clock.run(interrupted())

    assert [machine.stops for machine in machines] == [1, 1]
    assert not world.store.path.exists()


# --- CPU quotas -----------------------------------------------------------------------------------------------------


def test_time_stopped_by_the_quota_is_no_contention() -> None:
    take = record_on(FakeMachine(FakeClock(), wait_cores=0.5, throttled_cores=0.45))

    assert take.throttled_s == pytest.approx(27.0)
    assert take.vcpu_wait == pytest.approx(0.5)
    assert take.compute_contention(0.5) == pytest.approx(0.05, abs=0.01)


def test_episode_without_quota_keeps_its_waiting_time_as_contention() -> None:
    take = record_on(FakeMachine(FakeClock(), wait_cores=0.25))

    assert (take.throttled_s, take.compute_contention(0.0)) == (None, take.vcpu_wait)


def shapes_with_quota(cores: float) -> dict[str, HostShape]:
    return {"pc": shape_of(quota_cores=cores), "q35": shape_of(host_id="q35")}


def test_throttled_episode_is_not_recorded_again_and_says_what_its_quota_took(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.make = lambda number, place: FakeMachine(world.clock, wait_cores=0.5, throttled_cores=0.45)
    summary = world.record(session_of(slot_of(1)), shapes=shapes_with_quota(0.5))

    assert (summary.recorded, summary.crowded) == (1, 0)
    recording = world.episodes()[0].manifest.recording
    assert recording is not None
    assert recording.throttled_s == pytest.approx(27.0)
    assert recording.shape is not None
    assert (recording.shape["machine"], recording.shape["quota_cores"], recording.image) == ("pc", 0.5, "busybox")


def test_six_vms_with_a_quota_run_at_once_and_are_not_pinned(tmp_path: Path) -> None:
    world = World(tmp_path)
    summary = world.record(session_of(*(slot_of(seed) for seed in range(1, 7))), shapes=shapes_with_quota(0.25), vms=6)

    assert (summary.recorded, world.cores) == (6, [()] * 6)
    assert {len(episode.manifest.neighbours) for episode in world.episodes()} == {5}


def test_session_that_does_not_fit_is_recorded_in_parts_of_one_session(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.record(session_of(*(slot_of(seed) for seed in range(1, 5))), shapes=shapes_with_quota(0.8), vms=6)

    manifests = [episode.manifest for episode in world.episodes()]
    assert {(m.session, len(m.neighbours)) for m in manifests} == {("s1", 1)}
    assert len(manifests) == 4


# --- what fails -----------------------------------------------------------------------------------------------------


def test_host_that_never_boots_is_given_up_and_the_others_are_recorded(tmp_path: Path) -> None:
    world = World(tmp_path)
    dead = [session_of(slot_of(seed), name=f"pc-{seed}") for seed in range(1, 6)]
    alive = session_of(slot_of(9, host_id="q35"), name="q35")

    def make(number: int, place: int) -> FakeMachine:
        return FakeMachine(world.clock, boot_error="no word from the guest" if world.shape == "pc" else "")

    world.make = make
    summary = world.record(*dead, alive)

    (skipped,) = summary.skipped_hosts
    assert (summary.recorded, skipped.host_id, skipped.code) == (1, "pc", SkipCode.NO_BOOT)
    assert skipped.episodes == 5
    assert "no word from the guest" in skipped.reason


def test_host_that_boots_now_and_then_is_not_given_up(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.make = lambda number, place: FakeMachine(world.clock, boot_error="" if number in (3, 5) else "no word")
    summary = world.record(session_of(slot_of(1), name="s1"), session_of(slot_of(2), name="s2"))

    assert (summary.recorded, summary.skipped_hosts, summary.failed) == (2, (), ())


def test_slot_whose_workload_failed_is_discarded_and_played_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    codes = iter((1, 0))

    async def play(*arguments: Any) -> RecordedEpisode:
        take = await run_episode(*arguments)
        evidence = LabelEvidence(phase=Phase.ACTIVE, step="phase active", ack_id=9, exit_code=next(codes))
        return replace(take, evidence=(evidence,))

    monkeypatch.setattr(recorder, "run_episode", play)
    summary = world.record(session_of(slot_of(1)))

    assert (summary.recorded, summary.failed_workloads, summary.failed) == (1, 1, ())
    assert len(world.episodes()) == 1


def test_slot_whose_workload_always_fails_is_given_up_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*arguments: Any) -> RecordedEpisode:
        raise WorkloadError("pc: phase active: ended with exit code 3 in the guest")

    monkeypatch.setattr(recorder, "run_episode", fail)
    summary = World(tmp_path).record(session_of(slot_of(1)))

    assert (summary.recorded, summary.failed_workloads) == (0, 3)
    assert summary.failed == (
        "pc: cryptomine/throttled (seed 1): pc: phase active: ended with exit code 3 in the guest",
    )


def refuse_quotas() -> CpuController:
    raise CgroupError("no CPU quota can be set; record as root")


def test_a_shape_without_cgroup_rights_is_skipped_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[str] = []
    monkeypatch.setattr(QemuFactory, "prepare", lambda self, shape: prepared.append(shape.host_id))
    limited, free = shape_of(host_id="limited", quota_cores=0.5), shape_of(host_id="free")
    sessions = [session_of(slot_of(1, host_id="limited"), slot_of(2, host_id="limited"))]
    options = RecordingOptions(cache=tmp_path, shapes=(limited, free), open_controller=refuse_quotas)
    summary = record_plan(sessions, store=tmp_path / "store", options=options)

    (skipped,) = summary.skipped_hosts
    assert (skipped.host_id, skipped.episodes, skipped.code) == ("limited", 2, SkipCode.NO_QUOTA)
    assert "record as root" in skipped.reason
    assert (summary.recorded, prepared) == (0, [])


def test_hosts_are_skipped_if_their_debian_image_cannot_be_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: QemuFactory, shape: HostShape) -> None:
        raise MachineError("debootstrap: no network; check the mirror")

    monkeypatch.setattr(QemuFactory, "prepare", refuse)
    shape = shape_of(host_id="deb", image="debian")
    options = RecordingOptions(cache=tmp_path, shapes=(shape,))
    summary = record_plan([session_of(slot_of(1, host_id="deb"))], store=tmp_path / "store", options=options)

    (skipped,) = summary.skipped_hosts
    assert (skipped.code, skipped.reason) == (SkipCode.NO_IMAGE, "debootstrap: no network; check the mirror")


# --- an idle machine ------------------------------------------------------------------------------------------------


def test_low_priority_work_does_not_count_as_load() -> None:
    assert parse_busy_cpu_s("cpu  100 9999 50 7 7 3 2 1 55 0\ncpu0 1 1 1 1\n") == 1.56


def test_recorder_waits_for_other_work_and_does_not_count_its_own() -> None:
    clock = FakeClock()

    def read() -> CpuUsage:
        seconds = clock.now_ns / 1e9
        return CpuUsage(machine_s=1.5 * min(seconds, 30.0) + 0.9 * seconds, own_s=0.9 * seconds)

    load = clock.run(wait_until_idle(clock, at_most_s=600, read=read))

    assert load < 0.3
    assert 30 <= clock.now_ns / 1e9 <= 36


def test_idle_wait_ends_at_its_deadline_and_is_logged_once(log: list[str]) -> None:
    clock = FakeClock()

    def read() -> CpuUsage:
        return CpuUsage(machine_s=clock.now_ns / 1e9, own_s=0)

    load = clock.run(wait_until_idle(clock, at_most_s=60, purpose="s1", read=read))

    assert load == pytest.approx(1.0)
    assert clock.now_ns / 1e9 == 60
    assert len(log) == 1
    assert log[0].startswith("s1: other work keeps 1.0 cores busy")


@pytest.mark.vm
def test_real_pc_is_recorded_from_boot_to_bundle(tmp_path: Path) -> None:
    from tests.requirements import need_qemu

    need_qemu()
    slot = slot_of(1, phases=((Phase.CLEAN, 6.0), (Phase.ACTIVE, 6.0)), duration_s=12.0, settle_s=15.0, agent=True)
    options = RecordingOptions(cache=campaign.default_cache(), shapes=(shape_of(),), idle_wait_s=0.0)
    summary = record_plan([session_of(slot)], store=tmp_path / "store", options=options)
    store = DiskStore(tmp_path / "store")
    (episode,) = (unpack_bundle(store.read(item), file=item.path) for item in store.walk())

    assert summary.failed == ()
    assert [mark.phase for mark in episode.marks] == [Phase.CLEAN, Phase.ACTIVE, None]
    assert len(episode.rows[SourceKind.PROC]) >= 40
    assert len(episode.rows[SourceKind.GUEST]) >= 10
    never = {
        field
        for rows in episode.rows.values()
        for field, is_read in zip(rows.fields, rows.present.any(axis=0).tolist(), strict=True)
        if not is_read
    }
    assert never == {"kvm_exits", "kvm_io_exits", "kvm_halt_exits", "kvm_halt_polls"}
