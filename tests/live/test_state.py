"""The alarms that outlive a watcher: what is continued, what is forgotten, and what a broken disk or file does."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from phasewatch.inference.predictor import AlarmMemory
from phasewatch.live.discover import VmIdentity
from phasewatch.live.state import STATE_FILE, WatchState
from phasewatch.models.alarm import AlarmKind, AlarmState

T0 = 1_800_000_000_000_000_000
SECOND = 1_000_000_000
WEB = VmIdentity(key="uuid:1", process="boot:7:70")
ON = AlarmMemory(state=AlarmState(recent=(True, True, False), is_active=True), since_ns=T0 - 9)
OFF = AlarmMemory(state=AlarmState(recent=(True, False), is_active=False))


def save(folder: Path, identity: VmIdentity = WEB, infection: AlarmMemory = ON, now_ns: int = T0) -> None:
    with WatchState(folder) as state:
        state.update(identity, "web", {AlarmKind.INFECTION: infection, AlarmKind.ACTIVITY: OFF}, now_ns)


def load(folder: Path, identity: VmIdentity = WEB, now_ns: int = T0 + SECOND) -> dict[AlarmKind, AlarmMemory]:
    with WatchState(folder) as state:
        return state.find_alarms(identity, now_ns)


def test_alarms_are_continued_with_the_windows_that_their_rules_remember(tmp_path: Path) -> None:
    save(tmp_path)

    assert load(tmp_path) == {AlarmKind.INFECTION: ON, AlarmKind.ACTIVITY: OFF}


@pytest.mark.parametrize(
    ("identity", "now_ns"),
    [
        (VmIdentity(key="uuid:1", process="boot:8:80"), T0 + SECOND),
        (WEB, T0 + 3600 * SECOND),
        (WEB, T0 - 3600 * SECOND),
    ],
    ids=["another process", "after an hour", "before it was saved"],
)
def test_an_alarm_stays_on_without_the_windows_of_another_process_or_time(
    tmp_path: Path, identity: VmIdentity, now_ns: int
) -> None:
    save(tmp_path)

    found = load(tmp_path, identity, now_ns)

    assert found[AlarmKind.INFECTION].state == AlarmState(recent=(True,), is_active=True)
    assert found[AlarmKind.INFECTION].since_ns == ON.since_ns
    assert found[AlarmKind.ACTIVITY].state == AlarmState()


def test_a_vm_is_found_by_its_process_when_its_name_became_ambiguous(tmp_path: Path) -> None:
    save(tmp_path)

    assert load(tmp_path, VmIdentity(key="process:boot:7:70", process="boot:7:70"))[AlarmKind.INFECTION] == ON
    assert load(tmp_path, VmIdentity(key="name:other", process="boot:9:90")) == {}


def test_a_change_of_an_alarm_is_on_the_disk_while_the_watch_goes_on(tmp_path: Path) -> None:
    with WatchState(tmp_path) as state:
        state.update(WEB, "web", {AlarmKind.INFECTION: OFF}, T0)
        state._collect_result(timeout_s=5)
        before = (tmp_path / STATE_FILE).read_bytes()
        state.update(WEB, "web", {AlarmKind.INFECTION: ON}, T0 + SECOND)
        state._collect_result(timeout_s=5)

        assert (tmp_path / STATE_FILE).read_bytes() != before


def test_quiet_vms_are_forgotten_after_an_hour_and_active_ones_are_kept(tmp_path: Path) -> None:
    quiet, active = VmIdentity(key="uuid:2", process="p"), VmIdentity(key="uuid:3", process="q")
    save(tmp_path, quiet, OFF)
    save(tmp_path, active, ON)
    save(tmp_path, now_ns=T0 + 7200 * SECOND)

    assert load(tmp_path, quiet) == {}
    assert load(tmp_path, active)[AlarmKind.INFECTION].state.is_active


@pytest.mark.parametrize(
    "text", ["", "{", '{"format": "phasewatch-watch-state-9", "vms": []}', '{"format": 1}', "[" * 100_000]
)
def test_a_damaged_file_is_moved_aside_and_reported(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / STATE_FILE).write_text(text)

    assert load(tmp_path) == {}
    assert len(caplog.records) == 1
    assert [path.read_text() for path in tmp_path.glob("*.damaged")] == [text]


def test_a_disk_that_cannot_be_written_is_reported_once_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / STATE_FILE).mkdir()  # cannot be replaced by a file
    (tmp_path / STATE_FILE / "x").touch()
    state = WatchState(tmp_path)
    state._read = lambda path: None  # type: ignore[method-assign]
    with state:
        for second in range(4):
            state.update(WEB, "web", {AlarmKind.INFECTION: ON if second % 2 else OFF}, T0 + second * 20 * SECOND)
            state._collect_result(timeout_s=5)
        assert len(caplog.records) == 1
        (tmp_path / STATE_FILE / "x").unlink()
        (tmp_path / STATE_FILE).rmdir()
        state.update(WEB, "web", {AlarmKind.INFECTION: ON}, T0 + 100 * SECOND)
        state._collect_result(timeout_s=5)

    assert len(caplog.records) == 2
    assert load(tmp_path, now_ns=T0 + 101 * SECOND)[AlarmKind.INFECTION].state.is_active


def test_without_a_folder_alarms_are_kept_in_memory() -> None:
    with WatchState() as state:
        state.update(WEB, "web", {AlarmKind.INFECTION: ON}, T0)

        assert state.find_alarms(WEB, T0)[AlarmKind.INFECTION] == ON
