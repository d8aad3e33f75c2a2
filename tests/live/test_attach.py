"""Attach to a fake QEMU over a real socket: which channels it provides, why others are masked, and its restoration."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from tests.factories.libvirt import UUID, FakeDaemon
from tests.factories.proc import WORKER
from tests.factories.qemu import MAC, PID, VCPU, FakeProc, FakeQemu, make_process

from phasewatch.channels import CHANNELS, build_channel_mask, list_raw_fields
from phasewatch.errors import MachineError, UsageError, VmError
from phasewatch.live.attach import attach, detach
from phasewatch.live.discover import read_running_vm
from phasewatch.live.ownership import WATCH_RECORD_FORMAT, WatchRecord, write_watch_record
from phasewatch.live.survey import VmSurvey, choose_jit_use, choose_sensor_use, survey_vm
from phasewatch.telemetry.base import HostClock, TelemetrySource
from phasewatch.telemetry.qmp import JitUse
from phasewatch.types import SourceKind

REALISTIC = {c.full_name for c, on in zip(CHANNELS, build_channel_mask("realistic"), strict=True) if on}
JIT = {"qmp.jit_tb", "qmp.jit_tlb_partial"}
KVM = {c.full_name for c in CHANNELS if c.accel == "kvm"}
SENSORS = {"qmp.blk_clusters", "qmp.blk_rewritten", "qmp.mem_dirty_rate"} | KVM
LIBVIRT = {c.full_name for c, on in zip(CHANNELS, build_channel_mask("libvirt"), strict=True) if on}
LIBVIRT_BLOCKS = {name for name in LIBVIRT if name.startswith("qmp.")}
TAP = {c.full_name for c, on in zip(CHANNELS, build_channel_mask("tap"), strict=True) if on}


def run(
    proc: Path,
    then: Callable[[VmSurvey, tuple[TelemetrySource, ...]], Coroutine[Any, Any, Any]],
    *,
    qmp: Path | None = None,
    jit: JitUse = JitUse.NEVER,
    sensors: bool = False,
    daemon: FakeDaemon | None = None,
) -> VmSurvey:
    """Survey, attach, do something, detach."""

    async def main() -> VmSurvey:
        machine = read_running_vm(PID, proc)
        assert machine is not None
        hypervisor = daemon.hypervisor(HostClock()) if daemon is not None else None
        survey = await survey_vm(machine, qmp=qmp, clock=HostClock(), proc=proc, hypervisor=hypervisor)
        survey.jit = jit
        if sensors:
            survey.enable_sensors()
        sources = await attach(survey)
        try:
            await then(survey, sources)
        finally:
            await detach(survey, sources)
        return survey

    return asyncio.run(main())


def run_to_the_end(
    proc: Path, end: Callable[[VmSurvey, tuple[TelemetrySource, ...]], Coroutine[Any, Any, bool]]
) -> bool:
    """Survey, attach, and let a test detach; return its result."""

    async def main() -> bool:
        machine = read_running_vm(PID, proc)
        assert machine is not None
        survey = await survey_vm(machine, qmp=None, clock=HostClock(), proc=proc)
        return await end(survey, await attach(survey))

    return asyncio.run(main())


async def nothing(survey: VmSurvey, sources: tuple[TelemetrySource, ...]) -> None:
    """Do nothing with the attached sources."""


def test_a_vm_with_a_monitor_provides_every_host_channel_and_is_left_unchanged(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_process(tmp_path / "proc", qmp=qemu.path)

        async def look(survey: VmSurvey, sources: tuple[TelemetrySource, ...]) -> None:
            assert [s.source for s in sources] == [SourceKind.PROC, SourceKind.NETFLOW, SourceKind.QMP]
            assert sorted(qemu.filters.values()) == [("n0", "rx"), ("n0", "tx")]  # one for each direction
            assert set(qemu.objects) <= set(survey.task.objects)
            assert qemu.interval == 1
            assert next(iter(qemu.objects.values())).parent == Path(survey.task.folder)
            assert Path(survey.task.folder).stat().st_mode & 0o777 == 0o700

        survey = run(tmp_path / "proc", look)

        assert survey.available >= REALISTIC - JIT
        assert set(survey.masked) == {c.full_name for c in CHANNELS if c.source is SourceKind.GUEST} | JIT | SENSORS
        assert (survey.facts.accel, survey.facts.arch, survey.facts.mem_mib) == ("tcg", "x86_64", 256)
        assert qemu.objects == {}
        assert qemu.interval == 7


def test_translation_counters_are_not_read_by_default(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_process(tmp_path / "proc", qmp=qemu.path)

        async def look(survey: VmSurvey, sources: tuple[TelemetrySource, ...]) -> None:
            for source in sources:
                await source.read()

        run(tmp_path / "proc", look)

        assert "x-query-jit" not in qemu.commands


@pytest.mark.parametrize(
    ("channels", "takes_s", "is_given"),
    [("realistic", 0.0, True), ("realistic", 0.02, False), ("portable", 0.0, False)],
)
def test_translation_counters_are_read_for_a_named_channel_set_while_fast(
    tmp_path: Path, channels: str, takes_s: float, is_given: bool
) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_process(tmp_path / "proc", qmp=qemu.path)
        qemu.delays_s["x-query-jit"] = takes_s

        survey = run(tmp_path / "proc", nothing, jit=choose_jit_use(channels))
        masked = JIT & set(survey.masked)

        assert masked == (set() if is_given else JIT)


def test_refused_translation_counters_are_masked(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_process(tmp_path / "proc", qmp=qemu.path)
        qemu.refused.add("x-query-jit")

        survey = run(tmp_path / "proc", nothing, jit=choose_jit_use("realistic"))

        assert {name for name in survey.masked if not name.startswith("guest.")} == JIT | SENSORS


def test_an_unknown_channel_set_is_an_error() -> None:
    with pytest.raises(UsageError, match="realistc"):
        choose_jit_use("realistc")


@pytest.mark.parametrize("slow", ["query-blockstats", "x-query-virtio-queue-status", "qom-get"])
def test_a_slow_query_costs_its_own_fields_and_delays_no_other(tmp_path: Path, slow: str) -> None:
    own = {
        "query-blockstats": {
            "blk_rd_bytes",
            "blk_wr_bytes",
            "blk_rd_ops",
            "blk_wr_ops",
            "blk_flush_ops",
            "blk_wr_ns",
            "wr_highest_bytes",
        },
        "x-query-virtio-queue-status": {"vq_blk"},
        "qom-get": set(),
    }[slow]
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_process(tmp_path / "proc", qmp=qemu.path)
        rows: list[dict[str, Any]] = []

        async def look(survey: VmSurvey, sources: tuple[TelemetrySource, ...]) -> None:
            qemu.delays_s[slow] = 1.0
            for _ in range(2):
                async with asyncio.timeout(0.4):
                    rows.append(
                        dict(
                            zip(
                                (s.field for s in list_raw_fields(SourceKind.QMP)), await sources[2].read(), strict=True
                            )
                        )
                    )
            qemu.delays_s.clear()

        run(tmp_path / "proc", look)

        asked = {"blk_rd_bytes", "vq_blk", "wr_highest_bytes", "blk_wr_ns"}
        for row in rows:
            assert {name for name in asked if row[name] is None} == asked & own


def test_vcpus_are_looked_up_again_when_threads_change(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock", tids=(VCPU, WORKER)) as qemu:
        made = make_process(tmp_path / "proc", qmp=qemu.path)
        fields = [s.field for s in list_raw_fields(SourceKind.PROC)]
        rows: list[dict[str, Any]] = []

        async def look(survey: VmSurvey, sources: tuple[TelemetrySource, ...]) -> None:
            rows.append(dict(zip(fields, await sources[0].read(), strict=True)))
            qemu.tids = (VCPU,)
            made.end_thread(WORKER)
            for _ in range(2):
                rows.append(dict(zip(fields, await sources[0].read(), strict=True)))
                await asyncio.sleep(0.05)

        run(tmp_path / "proc", look)

        assert [row["vcpu_run_ns"] for row in rows] == [1040, 1040, 1040]
        assert qemu.commands.count("query-cpus-fast") >= 3


def test_detach_removes_a_filter_that_no_source_removed(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_process(tmp_path / "proc", qmp=qemu.path)

        async def lose(survey: VmSurvey, sources: tuple[TelemetrySource, ...]) -> bool:
            for source in sources:
                if source.source is not SourceKind.NETFLOW:  # as if an interrupt came before it was handed over
                    await source.close()
            return await detach(survey, ())

        assert run_to_the_end(tmp_path / "proc", lose) is True
        assert qemu.objects == {}
        assert qemu.interval == 7


@pytest.mark.parametrize("refused", ["object-del", "qom-set"])
def test_detach_reports_changes_that_it_could_not_undo(tmp_path: Path, refused: str) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_process(tmp_path / "proc", qmp=qemu.path)

        async def end(survey: VmSurvey, sources: tuple[TelemetrySource, ...]) -> bool:
            qemu.refused.add(refused)
            return await detach(survey, sources)

        assert run_to_the_end(tmp_path / "proc", end) is False
        assert (qemu.objects == {}) == (refused != "object-del")
        assert (qemu.interval == 7) == (refused != "qom-set")


def leave_behind(tmp_path: Path, qemu: FakeQemu, owner: str, *, interval_s: int) -> Path:
    """Create what a watcher leaves if it is killed with its cleanup process: a filter, a dump, a polled balloon."""
    folder = tmp_path / f"{owner}-abcdefgh"
    folder.mkdir(mode=0o700)
    record = WatchRecord(
        format=WATCH_RECORD_FORMAT,
        vm_pid=PID,
        vm_start_ticks=0,
        balloon="/machine/peripheral/balloon0",
        interval_s=interval_s,
    )
    write_watch_record(str(folder), record)
    qemu.objects[f"{owner}-b"], qemu.interval = folder / f"{owner}-b-1", 1
    (folder / f"{owner}-b-1").write_bytes(b"frames")
    return folder


def test_leftovers_of_a_dead_watcher_are_removed_and_the_interval_is_restored(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_process(tmp_path / "proc", qmp=qemu.path)
        folder = leave_behind(tmp_path, qemu, "phasewatch-4711-5-0", interval_s=7)

        async def look(survey: VmSurvey, sources: tuple[TelemetrySource, ...]) -> None:
            assert len(qemu.objects) == 2  # one filter a direction
            assert not folder.exists()

        run(tmp_path / "proc", look)

        assert qemu.objects == {}
        assert qemu.interval == 7


def test_changes_of_another_running_watcher_are_kept(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_process(tmp_path / "proc", qmp=qemu.path)
        folder = leave_behind(tmp_path, qemu, f"phasewatch-{PID}-0-0", interval_s=7)  # a process that runs

        run(tmp_path / "proc", nothing)

        assert list(qemu.objects) == [f"phasewatch-{PID}-0-0-b"]
        assert qemu.interval == 1
        assert folder.exists()


def test_the_last_of_two_watchers_restores_the_original_interval(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_process(tmp_path / "proc", qmp=qemu.path)
        folder = leave_behind(tmp_path, qemu, f"phasewatch-{PID}-0-0", interval_s=7)

        async def end_the_first(survey: VmSurvey, sources: tuple[TelemetrySource, ...]) -> None:
            qemu.objects.pop(f"phasewatch-{PID}-0-0-b")
            shutil.rmtree(folder)

        run(tmp_path / "proc", end_the_first)

        assert qemu.interval == 7


def test_threads_of_a_container_are_found_by_their_ids_inside(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock", tids=(8,)) as qemu:
        proc = make_process(tmp_path / "proc", qmp=qemu.path)
        proc.write("status", f"Name:\tqemu\nNSpid:\t{PID}\t7\n")
        proc.write(
            f"task/{VCPU}/status", f"NSpid:\t{VCPU}\t8\nvoluntary_ctxt_switches:\t1\nnonvoluntary_ctxt_switches:\t2\n"
        )

        survey = run(tmp_path / "proc", nothing)

        assert survey.monitor is not None
        assert survey.tids == (VCPU,)


def test_a_survey_changes_nothing(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_process(tmp_path / "proc", qmp=qemu.path)

        async def main() -> None:
            machine = read_running_vm(PID, tmp_path / "proc")
            assert machine is not None
            survey = await survey_vm(machine, qmp=None, clock=HostClock(), proc=tmp_path / "proc")
            await detach(survey, ())

        asyncio.run(main())

        assert not {"object-add", "object-del"} & set(qemu.commands)
        assert qemu.interval == 7


def test_frames_are_counted_by_direction(tmp_path: Path) -> None:
    out = b"\xff" * 6 + MAC + b"\x08\x06" + b"\0" * 200
    back = MAC + b"\xff" * 6 + b"\x08\x06" + b"\0" * 40
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_process(tmp_path / "proc", qmp=qemu.path)

        async def look(survey: VmSurvey, sources: tuple[TelemetrySource, ...]) -> None:
            qemu.write_frames([out, out, back])
            read = dict(
                zip((s.field for s in list_raw_fields(SourceKind.NETFLOW)), await sources[1].read(), strict=True)
            )
            assert (read["out_pkts"], read["out_bytes"], read["in_pkts"], read["in_bytes"]) == (2, 428, 1, 54)

        run(tmp_path / "proc", look)


@pytest.mark.parametrize(
    ("refused", "masked"),
    [
        pytest.param("x-query-virtio", {"qmp.vq_blk"}, id="no virtio disk"),
        pytest.param(
            "object-add", {c.full_name for c in CHANNELS if c.source is SourceKind.NETFLOW}, id="no filter and no tap"
        ),
        pytest.param(
            "qom-list", {"qmp.bal_minor_faults", "qmp.bal_free_delta", "qmp.bal_cache_delta"}, id="no balloon"
        ),
        pytest.param(
            "query-blockstats",
            {c.full_name for c in CHANNELS if c.full_name.startswith("qmp.blk_")},
            id="no disk counters",
        ),
    ],
)
def test_refused_queries_are_masked_with_a_reason(tmp_path: Path, refused: str, masked: set[str]) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_process(tmp_path / "proc", qmp=qemu.path)
        qemu.refused.add(refused)

        survey = run(tmp_path / "proc", nothing)

        assert {name for name in survey.masked if not name.startswith("guest.")} == masked | JIT | SENSORS
        assert all(survey.masked.values())
        assert qemu.objects == {}


def test_under_kvm_only_portable_channels_are_available(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_process(tmp_path / "proc", qmp=qemu.path)
        qemu.accel = "kvm"
        asked: list[int] = []

        async def look(survey: VmSurvey, sources: tuple[TelemetrySource, ...]) -> None:
            asked.append(qemu.commands.count("human-monitor-command"))
            await asyncio.sleep(0.5)
            asked.append(qemu.commands.count("human-monitor-command"))

        survey = run(tmp_path / "proc", look)

        assert asked[0] == asked[1]  # registers would stop a vCPU ten times a second for nothing
        portable = {c.full_name for c, on in zip(CHANNELS, build_channel_mask("portable"), strict=True) if on}
        assert survey.available & REALISTIC == portable
        assert "runs on kvm" in survey.masked["qmp.jit_tb"]


def test_without_a_monitor_proc_and_tap_counters_are_read(tmp_path: Path) -> None:
    proc = make_process(tmp_path / "proc", taps=("vnet0",), names=True)
    proc.write("cmdline", "qemu-system-x86_64\0-chardev\0socket,id=m,fd=3\0-mon\0chardev=m,mode=control\0")
    proc.write("net/dev", "vnet0: 500 5 0 0 0 0 0 0 900 7 0 0 0 0 0 0\n")

    async def look(survey: VmSurvey, sources: tuple[TelemetrySource, ...]) -> None:
        assert (await sources[1].read())[:4] == (5, 500, 7, 900)  # what the tap receives the guest sent

    survey = run(tmp_path / "proc", look)

    assert survey.available == {c.full_name for c in CHANNELS if c.source is SourceKind.PROC} | TAP
    assert "libvirt" in survey.masked["qmp.blk_rd_bytes"]


def make_domain(root: Path, *, more: str = "", taps: tuple[str, ...] = ("vnet0",)) -> FakeProc:
    """Return a fake /proc with one QEMU process as libvirt starts it."""
    proc = make_process(root, taps=taps, names=True)
    line = f"qemu-system-x86_64\0-name\0guest=made-up,debug-threads=on\0-uuid\0{UUID.upper()}\0"
    proc.write("cmdline", f"{line}-chardev\0socket,id=charmonitor,fd=3\0-mon\0chardev=charmonitor,mode=control\0{more}")
    proc.write("net/dev", "vnet0: 500 5 0 0 0 0 0 0 900 7 0 0 0 0 0 0\n")
    return proc


def test_a_libvirt_domain_provides_its_channel_set_without_a_monitor(tmp_path: Path) -> None:
    make_domain(tmp_path / "proc")
    daemon = FakeDaemon()
    rows: list[dict[str, object]] = []

    async def look(survey: VmSurvey, sources: tuple[TelemetrySource, ...]) -> None:
        assert [s.source for s in sources] == [SourceKind.PROC, SourceKind.NETFLOW, SourceKind.QMP]
        fields = [s.field for s in list_raw_fields(SourceKind.QMP)]
        rows.append(dict(zip(fields, await sources[2].read(), strict=True)))

    survey = run(tmp_path / "proc", look, daemon=daemon)

    assert (rows[0]["blk_rd_bytes"], rows[0]["vq_blk"]) == (5632, None)
    assert survey.available >= LIBVIRT
    more = {n for n in survey.available if n.startswith("qmp.")} - LIBVIRT_BLOCKS
    assert more == {"qmp.blk_rd_size", "qmp.blk_rd_lat", "qmp.blk_wr_size", "qmp.blk_flush_lat"}  # group extended
    assert "dommemstat" in survey.masked["qmp.bal_minor_faults"]  # the guest reported long ago
    assert survey.facts.mem_mib == 96


def test_balloon_fields_are_read_from_libvirt_while_the_guest_reports_them(tmp_path: Path) -> None:
    make_domain(tmp_path / "proc")
    daemon = FakeDaemon()
    name, values = daemon.domains[UUID]
    daemon.domains[UUID] = (name, values | {"balloon.last-update": HostClock().wall_ns() // 10**9})

    survey = run(tmp_path / "proc", nothing, daemon=daemon)

    assert survey.available >= {"qmp.bal_minor_faults", "qmp.bal_free_delta", "qmp.bal_cache_delta"}


def test_a_user_without_rights_on_the_process_gets_what_libvirt_and_the_kernel_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc = make_domain(tmp_path / "proc", taps=())
    refuse_io(monkeypatch)
    proc.write("status", "Uid:\t0 0 0 0\nGid:\t54321 54321 54321 54321\n" + (proc.dir / "status").read_text())

    async def look(survey: VmSurvey, sources: tuple[TelemetrySource, ...]) -> None:
        assert (await sources[1].read())[:4] == (5, 500, 7, 900)
        assert survey.taps == ("vnet0",)

    survey = run(tmp_path / "proc", look, daemon=FakeDaemon())

    assert LIBVIRT - survey.available == {"proc.io_rchar", "proc.io_wchar_net", "proc.io_write_bytes"}
    assert "root:54321" in survey.masked["proc.io_rchar"]


def test_a_domain_with_a_monitor_of_its_own_is_not_asked_of_libvirt(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_domain(tmp_path / "proc", more=f"-qmp\0unix:{qemu.path},server=on\0")
        daemon = FakeDaemon()

        survey = run(tmp_path / "proc", nothing, daemon=daemon)

        assert survey.monitor is not None
        assert daemon.opened == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda daemon: daemon.domains.clear(), "no running domain", id="unknown to libvirt"),
        pytest.param(lambda daemon: daemon.domains.update({UUID: ("other", {})}), "another name", id="another name"),
        pytest.param(lambda daemon: setattr(daemon, "is_down", True), "connection refused", id="daemon down"),
    ],
)
def test_without_libvirt_a_domain_is_watched_without_its_disks_and_the_reason_is_shown(
    tmp_path: Path, change: Callable[[FakeDaemon], object], words: str
) -> None:
    make_domain(tmp_path / "proc")
    daemon = FakeDaemon()
    change(daemon)

    survey = run(tmp_path / "proc", nothing, daemon=daemon)

    assert words in survey.masked["qmp.blk_rd_bytes"]
    assert survey.available == {c.full_name for c in CHANNELS if c.source is SourceKind.PROC} | TAP


def test_disks_that_libvirt_cannot_read_are_masked(tmp_path: Path) -> None:
    make_domain(tmp_path / "proc")
    daemon = FakeDaemon()
    daemon.hide_disks()

    survey = run(tmp_path / "proc", nothing, daemon=daemon)

    assert "monitor hangs" in survey.masked["qmp.blk_wr_bytes"]


def test_without_thread_names_the_vcpu_fields_are_masked(tmp_path: Path) -> None:
    make_process(tmp_path / "proc")

    async def look(survey: VmSurvey, sources: tuple[TelemetrySource, ...]) -> None:
        fields = [s.field for s in list_raw_fields(SourceKind.PROC)]
        read = dict(zip(fields, await sources[0].read(), strict=True))
        assert read["vcpu_run_ns"] is None
        assert read["main_run_ns"] == 5

    survey = run(tmp_path / "proc", look)

    blind = {"vcpu_run", "vcpu_wait", "vcpu_vcs", "vcpu_ics", "aux_run"}
    assert {n for n in survey.masked if n.startswith("proc.")} == {f"proc.{n}" for n in blind}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda path: path.write_text("no socket"), "did not answer", id="a file"),
        pytest.param(lambda path: None, "did not answer", id="nothing"),
    ],
)
def test_a_named_path_that_is_no_monitor_raises_vm_error(
    tmp_path: Path, make: Callable[[Path], Any], words: str
) -> None:
    make_process(tmp_path / "proc")
    make(tmp_path / "x.sock")

    with pytest.raises(VmError, match=words):
        run(tmp_path / "proc", nothing, qmp=tmp_path / "x.sock")


def test_a_second_client_of_a_monitor_gets_an_error(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock", greets=False) as qemu:
        make_process(tmp_path / "proc")

        with pytest.raises(VmError, match="time-out"):
            run(tmp_path / "proc", nothing, qmp=qemu.path)


def test_the_reason_of_the_first_failed_monitor_is_reported(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock", tids=(4711,)) as qemu:
        proc = make_process(tmp_path / "proc", names=True)
        proc.write("cmdline", f"qemu-system-x86_64\0-qmp\0unix:{qemu.path},server=on\0-qmp\0unix:/gone,server=on\0")

        survey = run(tmp_path / "proc", nothing)

        assert "another machine" in survey.masked["qmp.blk_rd_bytes"]


def test_a_later_process_with_the_same_pid_is_not_watched(tmp_path: Path) -> None:
    proc = make_process(tmp_path / "proc")
    machine = read_running_vm(PID, proc.root)
    assert machine is not None
    proc.write("stat", f"{PID} (sh) S " + "0 " * 18 + "99 0")

    with pytest.raises(MachineError):
        asyncio.run(survey_vm(machine, qmp=None, clock=HostClock(), proc=proc.root))


def test_the_socket_of_another_vm_is_refused(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock", tids=(4711,)) as qemu:
        make_process(tmp_path / "proc")

        with pytest.raises(VmError, match=f"process {PID}"):
            run(tmp_path / "proc", nothing, qmp=qemu.path)
        assert not {"object-add", "qom-set"} & set(qemu.commands)


def test_a_socket_of_another_service_is_refused(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_process(tmp_path / "proc")
        qemu.refused.add("query-cpus-fast")

        with pytest.raises(VmError, match="query-cpus-fast"):
            run(tmp_path / "proc", nothing, qmp=qemu.path)


def refuse_io(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse /proc/PID/io, as the kernel does to other users."""
    read, open_ = Path.read_bytes, os.open

    def refuse(path: Path) -> bytes:
        if path.name == "io":
            raise PermissionError(13, "Permission denied")
        return read(path)

    def refuse_open(path: Any, *arguments: Any, **more: Any) -> int:
        if isinstance(path, Path) and path.name == "io":
            raise PermissionError(13, "Permission denied")
        return open_(path, *arguments, **more)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(os, "open", refuse_open)


def test_a_permission_error_names_who_may_read_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc = make_process(tmp_path / "proc")
    refuse_io(monkeypatch)
    proc.write("status", "Uid:\t0 0 0 0\nGid:\t54321 54321 54321 54321\n")
    with pytest.raises(MachineError, match="root:54321"):  # the group decides as much as the user
        run(proc.root, nothing)


def test_sensors_add_bitmaps_to_the_disks_and_detach_removes_them(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_process(tmp_path / "proc", qmp=qemu.path)
        rows: list[dict[str, object]] = []

        async def look(survey: VmSurvey, sources: tuple[TelemetrySource, ...]) -> None:
            fields = [s.field for s in list_raw_fields(SourceKind.QMP)]
            for marked in (0, 3):
                for name in qemu.bitmaps:
                    qemu.bitmaps[name] += marked << 16
                rows.append(dict(zip(fields, await sources[2].read(), strict=True)))
            assert set(qemu.bitmaps) == set(survey.task.bitmaps)

        survey = run(tmp_path / "proc", look, sensors=True)

        assert [(row["blk_clusters"], row["blk_rewritten"]) for row in rows] == [(0, 0), (3, 0)]
        assert rows[-1]["mem_dirty_rate"] == 3 << 20
        assert {name for name in survey.masked if not name.startswith("guest.")} == JIT | KVM
        assert qemu.bitmaps == {}


def test_without_sensors_the_disks_get_no_bitmap(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_process(tmp_path / "proc", qmp=qemu.path)

        run(tmp_path / "proc", nothing)

        assert not {"block-dirty-bitmap-add", "calc-dirty-rate", "query-stats"} & set(qemu.commands)


def test_bitmaps_of_a_dead_watcher_are_removed_and_others_are_kept(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_process(tmp_path / "proc", qmp=qemu.path)
        kept = {f"phasewatch-{PID}-0-0-written": 1, "backup": 2}  # of a watcher that runs, and of a backup program
        qemu.bitmaps = {"phasewatch-4711-5-0-written": 0, "phasewatch-4711-5-0-reading": 0, **kept}

        survey = run(tmp_path / "proc", nothing)

        assert qemu.bitmaps == kept
        assert sum("dirty bitmap" in note for note in survey.notes) == 2


def test_detach_reports_a_bitmap_that_it_could_not_remove(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_process(tmp_path / "proc", qmp=qemu.path)

        async def main() -> bool:
            machine = read_running_vm(PID, tmp_path / "proc")
            assert machine is not None
            survey = await survey_vm(machine, qmp=None, clock=HostClock(), proc=tmp_path / "proc")
            survey.enable_sensors()
            sources = await attach(survey)
            qemu.refused.add("block-dirty-bitmap-remove")
            return await detach(survey, sources)

        assert not asyncio.run(main())


@pytest.mark.parametrize(
    ("channels", "is_saved", "expected"),
    [("", False, False), ("", True, True), ("realistic", False, False), ("extended", False, True)],
)
def test_sensors_are_opened_for_extended_channels_and_saved_telemetry(
    channels: str, is_saved: bool, expected: bool
) -> None:
    assert choose_sensor_use(channels, is_saved=is_saved) is expected


def test_kvm_statistics_are_read_where_they_answer(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        make_process(tmp_path / "proc", qmp=qemu.path)
        qemu.accel = "kvm"
        stats = [{"name": "exits", "value": 5}, {"name": "io_exits", "value": 2}, {"name": "mmio_exits", "value": 1}]
        qemu.vcpu_stats = [{"provider": "kvm", "qom-path": f"/cpu{i}", "stats": stats} for i in range(2)]
        row: dict[str, object] = {}

        async def look(survey: VmSurvey, sources: tuple[TelemetrySource, ...]) -> None:
            fields = [s.field for s in list_raw_fields(SourceKind.QMP)]
            row.update(zip(fields, await sources[2].read(), strict=True))

        survey = run(tmp_path / "proc", look, sensors=True)

        assert (row["kvm_exits"], row["kvm_io_exits"], row["kvm_halt_exits"]) == (10, 6, None)
        assert "qmp.kvm_exits" in survey.available
