"""The history of alarms: bounded, shared by processes, and refused with a remedy when it is damaged or foreign."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.factories.alarms import T0_NS, S, life, raised, silence_of

from phasewatch.alarms import history
from phasewatch.alarms.history import (
    ALARMS_FILE,
    MAX_AGE_NS,
    AlarmHistory,
    read_alarms,
    read_changes,
    read_silences,
)
from phasewatch.alarms.life import AlarmChange, AlarmChangeKind, AlarmStatus
from phasewatch.errors import AlarmStoreError, UsageError


def test_a_state_folder_without_a_history_has_no_alarms(tmp_path: Path) -> None:
    assert read_alarms(tmp_path) == ()
    assert read_changes(tmp_path, "a") == ()
    assert read_silences(tmp_path, now_ns=T0_NS) == ()
    assert list(tmp_path.iterdir()) == []


def test_an_alarm_comes_back_as_it_was_written(tmp_path: Path) -> None:
    first, last = life(caveat='contention: "0.5 cores"', vm="web-01")
    with AlarmHistory(tmp_path) as kept:
        kept.record([first])
        assert read_alarms(tmp_path, is_open=True) == (first.alarm,)
        kept.record([last])

    assert read_alarms(tmp_path) == (last.alarm,)
    assert read_alarms(tmp_path, is_open=True) == ()
    assert [row.kind for row in read_changes(tmp_path, last.alarm.id)] == ["raised", "resolved"]


def test_an_acknowledgement_of_another_process_is_not_undone_by_the_watch(tmp_path: Path) -> None:
    first, last = life()
    with AlarmHistory(tmp_path) as watch, AlarmHistory(tmp_path) as command:
        watch.record([first])
        version = watch.read_version()
        command.acknowledge(first.alarm.id[:3], T0_NS + 1, by="ann", note="looking")
        assert watch.read_version() != version
        watch.update([replace(first.alarm, seen_ns=T0_NS + 5)])
        assert watch.read_alarms()[0].status is AlarmStatus.ACKNOWLEDGED
        watch.record([last])

    (alarm,) = read_alarms(tmp_path)
    assert (alarm.status, alarm.acknowledged_by, alarm.note) == (AlarmStatus.RESOLVED, "ann", "looking")


def test_only_an_open_alarm_can_be_acknowledged_and_only_once(tmp_path: Path) -> None:
    first, last = life()
    with AlarmHistory(tmp_path) as kept:
        kept.record([first])
        kept.acknowledge(first.alarm.id, T0_NS, by="ann")
        with pytest.raises(UsageError, match="acknowledged already"):
            kept.acknowledge(first.alarm.id, T0_NS, by="ann")
        with pytest.raises(UsageError, match="no alarm has this id"):
            kept.acknowledge("x", T0_NS, by="ann")
        kept.record([last])
        with pytest.raises(UsageError, match="is resolved"):
            kept.acknowledge(first.alarm.id, T0_NS, by="ann")


def test_an_ambiguous_beginning_of_an_id_is_refused(tmp_path: Path) -> None:
    with AlarmHistory(tmp_path) as kept:
        kept.record([raised(host=f"vm{number}") for number in range(40)])  # 40 ids, 16 first digits
        first = kept.read_alarms()[0].id[0]
        ids = [alarm.id for alarm in kept.read_alarms() if alarm.id[0] == first]
        if len(ids) == 1:
            first = next(a.id[0] for a in kept.read_alarms() if a.id[0] != first)

        with pytest.raises(UsageError, match="several open alarms"):
            kept.acknowledge(first, T0_NS, by="ann")


def test_a_silence_lasts_until_its_end_or_until_it_is_ended(tmp_path: Path) -> None:
    with AlarmHistory(tmp_path) as kept:
        kept.add_silence(silence_of())
        kept.add_silence(silence_of(id="52", vm="db*", until_ns=T0_NS + S))

        assert [s.id for s in kept.read_silences(T0_NS)] == ["52", "51"]
        assert [s.id for s in kept.read_silences(T0_NS + S)] == ["51"]
        kept.end_silence("51", T0_NS + 2 * S)
        assert kept.read_silences(T0_NS + 2 * S) == ()
        with pytest.raises(UsageError, match="no silence"):
            kept.end_silence("51", T0_NS + 3 * S)


def test_the_number_of_silences_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_SILENCES", 2)
    with AlarmHistory(tmp_path) as kept:
        kept.add_silence(silence_of(id="1"))
        kept.add_silence(silence_of(id="2"))

        with pytest.raises(UsageError, match="silences have not ended"):
            kept.add_silence(silence_of(id="3"))


def test_old_alarms_go_and_open_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_ALARMS", 20)
    with AlarmHistory(tmp_path) as kept:
        kept.record([raised(host="open")])
        for number in range(60):
            kept.record(list(life(host=f"vm{number}", alarm_since_ns=T0_NS + number * S)))

        alarms = kept.read_alarms()
        n_changes = kept._db.execute("SELECT count(*) FROM changes").fetchone()[0]

    assert 18 <= len(alarms) <= 21
    assert alarms[0].vm_id == "vm59"
    assert [alarm.vm_id for alarm in alarms if alarm.is_open] == ["open"]
    assert n_changes == 2 * (len(alarms) - 1) + 1


def test_alarms_beyond_the_longest_age_go(tmp_path: Path) -> None:
    first, last = life()
    new = raised(host="new", alarm_since_ns=T0_NS + MAX_AGE_NS + S)
    with AlarmHistory(tmp_path) as kept:
        kept.record([first, last])
        kept.record([replace(new, at_ns=T0_NS + MAX_AGE_NS + S)])

        assert [alarm.vm_id for alarm in kept.read_alarms()] == ["new"]


def test_a_full_disk_is_an_error_that_leaves_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_MAX_PAGES", 20)
    written: list[AlarmChange] = []
    with AlarmHistory(tmp_path) as kept:

        def fill() -> None:
            for number in range(1000):
                change = raised(host=f"vm{number}", caveat="x" * 600)
                kept.record([change])
                written.append(change)

        with pytest.raises(AlarmStoreError, match="make room on its disk"):
            fill()
        assert len(kept.read_alarms(limit=1000)) == len(written) > 10


def test_a_reader_and_a_writer_work_at_once(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def write() -> None:
        try:
            with AlarmHistory(tmp_path) as kept:
                for number in range(100):
                    kept.record(list(life(host=f"vm{number}", alarm_since_ns=T0_NS + number)))
        except Exception as exc:
            errors.append(exc)

    AlarmHistory(tmp_path).close()
    thread = threading.Thread(target=write)
    thread.start()
    seen = [len(read_alarms(tmp_path)) for _ in range(50)]
    thread.join()

    assert errors == []
    assert seen == sorted(seen)
    assert len(read_alarms(tmp_path)) == 100


def test_a_killed_writer_leaves_whole_changes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from phasewatch.alarms.history import AlarmHistory\n"
        "from tests.factories.alarms import T0_NS, life\n"
        "kept = AlarmHistory(Path(sys.argv[1]))\n"
        "n = 0\n"
        "while True:\n"
        "    kept.record(list(life(host=f'vm{n}', alarm_since_ns=T0_NS + n))); n += 1\n"
        "    print(n, flush=True)\n"
    )
    root = str(Path(__file__).parents[2])
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path), root], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(20):
            process.stdout.readline()
        process.kill()

    alarms = read_alarms(tmp_path)
    assert len(alarms) >= 20
    assert all(len(read_changes(tmp_path, alarm.id)) == 2 for alarm in alarms)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"SQLite format 3\0" + bytes(4080), "damaged, or not"),
        (b"no database at all " * 300, "damaged, or not"),
    ],
)
def test_a_damaged_file_is_refused_with_the_remedy(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / ALARMS_FILE).write_bytes(content)

    for attempt in (lambda: read_alarms(tmp_path), lambda: AlarmHistory(tmp_path)):
        with pytest.raises(AlarmStoreError, match=words):
            attempt()
    assert (tmp_path / ALARMS_FILE).read_bytes() == content


def test_a_database_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / ALARMS_FILE)
    db.execute("CREATE TABLE mine (x)")
    db.commit()
    db.close()
    before = (tmp_path / ALARMS_FILE).read_bytes()

    for attempt in (lambda: read_alarms(tmp_path), lambda: AlarmHistory(tmp_path)):
        with pytest.raises(AlarmStoreError, match="another program"):
            attempt()
    assert (tmp_path / ALARMS_FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("PRAGMA user_version = 2", "version 2"),
        ("CREATE TRIGGER t AFTER INSERT ON alarms BEGIN DELETE FROM alarms; END", "tables were changed"),
        ("ALTER TABLE alarms ADD COLUMN more TEXT", "tables were changed"),
        ("DROP TABLE silences", "tables were changed"),
    ],
)
def test_a_history_with_other_tables_or_of_another_version_is_refused(tmp_path: Path, sql: str, words: str) -> None:
    AlarmHistory(tmp_path).close()
    db = sqlite3.connect(tmp_path / ALARMS_FILE)
    db.execute(sql)
    db.commit()
    db.close()

    with pytest.raises(AlarmStoreError, match=words):
        read_alarms(tmp_path)
    with pytest.raises(AlarmStoreError, match=words):
        AlarmHistory(tmp_path)


def test_what_is_no_regular_file_is_refused_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ALARMS_FILE)

    with pytest.raises(AlarmStoreError, match="not a regular file"):
        read_alarms(tmp_path)
    with pytest.raises(AlarmStoreError, match="not a regular file"):
        AlarmHistory(tmp_path)


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / ALARMS_FILE).open("wb") as file:
        file.truncate(1 << 30)

    with pytest.raises(AlarmStoreError, match="at most"):
        read_alarms(tmp_path)


def test_a_row_with_impossible_values_is_left_out(tmp_path: Path) -> None:
    with AlarmHistory(tmp_path) as kept:
        kept.record([raised(host="good"), raised(host="bad")])
        kept._db.execute("UPDATE alarms SET kind = 'worm', p = '[[' WHERE vm_id = 'bad'")

        assert [alarm.vm_id for alarm in read_alarms(tmp_path)] == ["good"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    with AlarmHistory(folder) as kept:
        for number in range(30):
            kept.record(list(life(host=f"vm{number}")))
    return (folder / ALARMS_FILE).read_bytes()


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(at=st.integers(0, 40_000), value=st.binary(min_size=1, max_size=64))
def test_a_spoilt_byte_is_an_error_or_harmless(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, at: int, value: bytes
) -> None:
    folder = tmp_path_factory.mktemp("spoilt")
    at %= len(whole)
    (folder / ALARMS_FILE).write_bytes(whole[:at] + value + whole[at + len(value) :])

    try:
        read_alarms(folder)
        with AlarmHistory(folder) as kept:
            kept.record([raised(host="new")])
    except AlarmStoreError:
        pass


def test_the_kind_of_a_change_is_part_of_the_history(tmp_path: Path) -> None:
    first, _ = life()
    with AlarmHistory(tmp_path) as kept:
        kept.record([replace(first, kind=AlarmChangeKind.SILENCED, by="ann", note="until later", is_silenced=True)])

    (row,) = read_changes(tmp_path, first.alarm.id)
    assert (row.kind, row.by, row.note, row.is_silenced) == (AlarmChangeKind.SILENCED, "ann", "until later", True)
