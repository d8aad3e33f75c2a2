"""Store the history of alarms and silences in SQLite; a watch writes it while commands and the dashboard read it.

One file, `ALARMS_FILE` in the state folder. Readers and writers of several processes take turns by SQLite's own locks
(write-ahead log). The file is bounded: `MAX_ALARMS`, `MAX_AGE_NS` and `_MAX_PAGES`.
"""

from __future__ import annotations

import json
import os
import sqlite3
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from phasewatch import atomic
from phasewatch.alarms.life import Alarm, AlarmChange, AlarmChangeKind, AlarmStatus, Silence
from phasewatch.errors import AlarmStoreError, UsageError, describe_os_error

__all__ = [
    "ALARMS_FILE",
    "MAX_AGE_NS",
    "MAX_ALARMS",
    "AlarmChangeRow",
    "AlarmHistory",
    "read_alarms",
    "read_changes",
    "read_silences",
]

ALARMS_FILE = "alarms.sqlite"
MAX_ALARMS = 20_000  # resolved alarms that are kept
MAX_AGE_NS = 400 * 86_400 * 1_000_000_000  # how long a resolved alarm or an ended silence is kept
MAX_SILENCES = 1000  # that have not ended

_APPLICATION_ID = 0x70776131  # "pwa1"
_SCHEMA_VERSION = 1
_MAX_PAGES = 32_768  # of 4 KiB: 128 MiB
_MAX_FILE_BYTES = 2 * _MAX_PAGES * 4096
_MAX_VALUE_BYTES = 1 << 20
_BUSY_TIMEOUT_S = 3.0
_PRUNE_SHARE = 0.9  # of `MAX_ALARMS` remain, so that not every alarm prunes
_TABLES = {
    "alarms": (
        "CREATE TABLE alarms (id TEXT PRIMARY KEY, vm_id TEXT NOT NULL, vm TEXT NOT NULL, kind TEXT NOT NULL, "
        "status TEXT NOT NULL, raised_ns INTEGER NOT NULL, seen_ns INTEGER NOT NULL, resolved_ns INTEGER, "
        "resolution TEXT, acknowledged_ns INTEGER, acknowledged_by TEXT NOT NULL, note TEXT NOT NULL, "
        "p TEXT NOT NULL, decision TEXT NOT NULL, model TEXT NOT NULL, threat TEXT NOT NULL, caveat TEXT NOT NULL, "
        "is_notified INTEGER NOT NULL) STRICT"
    ),
    "changes": (
        "CREATE TABLE changes (number INTEGER PRIMARY KEY, alarm TEXT NOT NULL, kind TEXT NOT NULL, "
        "at_ns INTEGER NOT NULL, by TEXT NOT NULL, note TEXT NOT NULL, is_silenced INTEGER NOT NULL) STRICT"
    ),
    "silences": (
        "CREATE TABLE silences (id TEXT PRIMARY KEY, vm TEXT NOT NULL, kind TEXT, from_ns INTEGER NOT NULL, "
        "until_ns INTEGER NOT NULL, reason TEXT NOT NULL, by TEXT NOT NULL) STRICT"
    ),
}
_INDEXES = {
    "alarms_by_time": "CREATE INDEX alarms_by_time ON alarms (raised_ns)",
    "changes_by_alarm": "CREATE INDEX changes_by_alarm ON changes (alarm)",
}
_ALARM_COLUMNS = (
    "id, vm_id, vm, kind, status, raised_ns, seen_ns, resolved_ns, resolution, acknowledged_ns, acknowledged_by, note, "
    "p, decision, model, threat, caveat, is_notified"
)
# A watch that has not yet read an acknowledgement must not undo it.
_KEEP_ACKNOWLEDGEMENT = """ON CONFLICT (id) DO UPDATE SET
  status = CASE WHEN excluded.status = 'raised' THEN alarms.status ELSE excluded.status END,
  seen_ns = excluded.seen_ns,
  resolved_ns = excluded.resolved_ns,
  resolution = excluded.resolution,
  acknowledged_by = CASE WHEN excluded.acknowledged_ns IS NULL THEN alarms.acknowledged_by
    ELSE excluded.acknowledged_by END,
  note = CASE WHEN excluded.acknowledged_ns IS NULL THEN alarms.note ELSE excluded.note END,
  acknowledged_ns = coalesce(excluded.acknowledged_ns, alarms.acknowledged_ns),
  is_notified = max(excluded.is_notified, alarms.is_notified)"""
_SILENCE_COLUMNS = "id, vm, kind, from_ns, until_ns, reason, by"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmChangeRow:
    """One step in the life of an alarm, as the history keeps it.

    Attributes:
        kind: What happened.
        at_ns: Wall time.
        by, note: Who did it and their words; empty if the watch did.
        is_silenced: Whether a silence covered the alarm.
    """

    kind: AlarmChangeKind
    at_ns: int
    by: str
    note: str
    is_silenced: bool


class AlarmHistory:
    """The history in a state folder, opened for reading and writing; two threads may not use it at once.

    Args:
        state: State folder; created if it does not exist.

    Raises:
        AlarmStoreError: If the file is damaged or is not a history of alarms.
    """

    def __init__(self, state: Path) -> None:
        atomic.make_folder(state.absolute())
        self.path = state / ALARMS_FILE
        _check_file(self.path)
        with suppress(FileExistsError):
            os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640))
        self._db = _connect(self.path, is_writable=True)
        try:
            with _describe_errors(self.path):
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> AlarmHistory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with suppress(sqlite3.Error):
            self._db.close()

    def record(self, changes: Collection[AlarmChange]) -> None:
        """Write changes and the alarms after them, all or nothing.

        Raises:
            AlarmStoreError: If they cannot be written, for example because the disk is full.
        """
        with self._write():
            for change in changes:
                self._put_alarm(change.alarm)
                row = (change.alarm.id, str(change.kind), change.at_ns, change.by, change.note, change.is_silenced)
                self._db.execute(
                    "INSERT INTO changes (alarm, kind, at_ns, by, note, is_silenced) VALUES (?, ?, ?, ?, ?, ?)", row
                )
            self._prune(max((change.at_ns for change in changes), default=0))

    def update(self, alarms: Sequence[Alarm]) -> None:
        """Write the newest state of open alarms, without a change.

        An acknowledgement that another process wrote in the meantime remains.
        """
        with self._write():
            for alarm in alarms:
                self._db.execute(
                    "UPDATE alarms SET seen_ns = ?, is_notified = ? WHERE id = ?",
                    (alarm.seen_ns, alarm.is_notified, alarm.id),
                )

    def acknowledge(self, alarm_id: str, now_ns: int, *, by: str, note: str = "") -> Alarm:
        """Acknowledge an open alarm.

        Args:
            alarm_id: Its id, or the beginning of its id if no other alarm begins with it.
            now_ns: Wall time.
            by: Who saw it.
            note: Their words.

        Raises:
            UsageError: If no open alarm has the id.
        """
        with self._write():
            alarm = self._find_open(alarm_id)
            if alarm.status is AlarmStatus.ACKNOWLEDGED:
                raise UsageError(f"alarm {alarm.id} is acknowledged already, by {alarm.acknowledged_by or 'nobody'}")
            known = replace(
                alarm, status=AlarmStatus.ACKNOWLEDGED, acknowledged_ns=now_ns, acknowledged_by=by, note=note
            )
            self._put_alarm(known)
            row = (known.id, str(AlarmChangeKind.ACKNOWLEDGED), now_ns, by, note, False)
            self._db.execute(
                "INSERT INTO changes (alarm, kind, at_ns, by, note, is_silenced) VALUES (?, ?, ?, ?, ?, ?)", row
            )
        return known

    def add_silence(self, silence: Silence) -> None:
        """Add a silence.

        Raises:
            UsageError: If `MAX_SILENCES` have not ended yet.
        """
        with self._write():
            count = self._db.execute("SELECT count(*) FROM silences WHERE until_ns > ?", (silence.from_ns,)).fetchone()
            if int(count[0]) >= MAX_SILENCES:
                raise UsageError(f"{MAX_SILENCES} silences have not ended; end some with `alarms silence --end ID`")
            kind = str(silence.kind) if silence.kind else None
            self._db.execute(
                f"INSERT INTO silences ({_SILENCE_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (silence.id, silence.vm, kind, silence.from_ns, silence.until_ns, silence.reason, silence.by),
            )

    def end_silence(self, silence_id: str, now_ns: int) -> Silence:
        """End a silence now.

        Raises:
            UsageError: If no silence that lasts has the id.
        """
        with self._write():
            found = [s for s in self.read_silences(now_ns) if s.id.startswith(silence_id)] if silence_id else []
            if len(found) != 1:
                raise UsageError(f"{silence_id}: no silence that lasts has this id; `alarms list` shows them")
            self._db.execute("UPDATE silences SET until_ns = ? WHERE id = ?", (now_ns, found[0].id))
        return replace(found[0], until_ns=now_ns)

    def read_alarms(self, *, limit: int = 500, is_open: bool = False, alarm_id: str = "") -> tuple[Alarm, ...]:
        """Return alarms, the newest first."""
        with _describe_errors(self.path):
            return _read_alarms(self._db, limit=limit, is_open=is_open, alarm_id=alarm_id)

    def read_silences(self, now_ns: int) -> tuple[Silence, ...]:
        """Return the silences that have not ended."""
        with _describe_errors(self.path):
            return _read_silences(self._db, now_ns)

    def read_version(self) -> int:
        """Return a number that changes when another process has written."""
        with _describe_errors(self.path):
            return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def _prepare(self) -> None:
        """Check the file, and create the tables in an empty one.

        Raises:
            AlarmStoreError: If it is damaged, or of another program or version.
        """
        if _is_empty(self._db):
            self._db.execute("PRAGMA journal_mode = WAL")
            with self._write():
                if _is_empty(self._db):  # no other process was first
                    for sql in (*_TABLES.values(), *_INDEXES.values()):
                        self._db.execute(sql)
                    self._db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                    self._db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        _check_schema(self._db, self.path)
        fault = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if fault != "ok":
            raise AlarmStoreError(_describe_damage(self.path, str(fault)))
        self._db.execute(f"PRAGMA max_page_count = {_MAX_PAGES}")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA journal_size_limit = 4194304")

    @contextmanager
    def _write(self) -> Iterator[None]:
        """Run a block as one transaction; roll back if it raises."""
        with _describe_errors(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    def _put_alarm(self, alarm: Alarm) -> None:
        row = (
            alarm.id,
            alarm.vm_id,
            alarm.vm,
            str(alarm.kind),
            str(alarm.status),
            alarm.raised_ns,
            alarm.seen_ns,
            alarm.resolved_ns,
            str(alarm.resolution) if alarm.resolution else None,
            alarm.acknowledged_ns,
            alarm.acknowledged_by,
            alarm.note,
            json.dumps(alarm.p),
            alarm.decision,
            alarm.model,
            alarm.threat,
            alarm.caveat,
            alarm.is_notified,
        )
        marks = ", ".join("?" * len(row))
        self._db.execute(f"INSERT INTO alarms ({_ALARM_COLUMNS}) VALUES ({marks}) {_KEEP_ACKNOWLEDGEMENT}", row)

    def _find_open(self, alarm_id: str) -> Alarm:
        known = self.read_alarms(alarm_id=alarm_id, limit=3) if alarm_id else ()
        found = [alarm for alarm in known if alarm.is_open]
        if len(found) == 1:
            return found[0]
        if len(found) > 1:
            raise UsageError(f"{alarm_id}: several open alarms begin with this; write more digits")
        if known:
            raise UsageError(f"alarm {known[0].id} is resolved; only an open alarm can be acknowledged")
        raise UsageError(f"{alarm_id}: no alarm has this id; `phasewatch alarms list` shows them")

    def _prune(self, now_ns: int) -> None:
        """Remove old resolved alarms with their changes, and silences that ended long ago."""
        count = int(self._db.execute("SELECT count(*) FROM alarms").fetchone()[0])
        oldest = self._db.execute("SELECT min(raised_ns) FROM alarms WHERE status = 'resolved'").fetchone()[0]
        if count <= MAX_ALARMS and (oldest is None or oldest >= now_ns - MAX_AGE_NS):
            return
        self._db.execute(
            "DELETE FROM alarms WHERE status = 'resolved' AND raised_ns < ?",
            (now_ns - MAX_AGE_NS,),
        )
        excess = int(self._db.execute("SELECT count(*) FROM alarms").fetchone()[0]) - MAX_ALARMS
        if excess > 0:
            excess += int(MAX_ALARMS * (1 - _PRUNE_SHARE))
            self._db.execute(
                "DELETE FROM alarms WHERE id IN "
                "(SELECT id FROM alarms WHERE status = 'resolved' ORDER BY raised_ns LIMIT ?)",
                (excess,),
            )
        self._db.execute("DELETE FROM changes WHERE alarm NOT IN (SELECT id FROM alarms)")
        self._db.execute("DELETE FROM silences WHERE until_ns < ?", (now_ns - MAX_AGE_NS,))


def read_alarms(state: Path, *, limit: int = 500, is_open: bool = False, alarm_id: str = "") -> tuple[Alarm, ...]:
    """Return the alarms of a state folder, the newest first; none if no watch has written there.

    Args:
        state: State folder; nothing in it is changed.
        limit: Maximum number.
        is_open: Whether resolved alarms are left out.
        alarm_id: Beginning of the ids to return; empty for all.

    Raises:
        AlarmStoreError: If the file is damaged or is not a history of alarms.
    """
    with _open_reader(state) as db:
        return () if db is None else _read_alarms(db, limit=limit, is_open=is_open, alarm_id=alarm_id)


def read_changes(state: Path, alarm_id: str) -> tuple[AlarmChangeRow, ...]:
    """Return the life of one alarm in order of time; the arguments are those of `read_alarms`."""
    with _open_reader(state) as db:
        if db is None:
            return ()
        rows = db.execute(
            "SELECT kind, at_ns, by, note, is_silenced FROM changes WHERE alarm = ? ORDER BY number LIMIT 1000",
            (alarm_id,),
        ).fetchall()
    names = ("kind", "at_ns", "by", "note", "is_silenced")
    return tuple(_parse_rows([(*row[:4], bool(row[4])) for row in rows], names, AlarmChangeRow))


def read_silences(state: Path, *, now_ns: int) -> tuple[Silence, ...]:
    """Return the silences that have not ended at a wall time."""
    with _open_reader(state) as db:
        return () if db is None else _read_silences(db, now_ns)


def _read_alarms(db: sqlite3.Connection, *, limit: int, is_open: bool, alarm_id: str) -> tuple[Alarm, ...]:
    rows = db.execute(
        f"SELECT {_ALARM_COLUMNS} FROM alarms WHERE (status != 'resolved' OR ?) AND substr(id, 1, ?) = ? "
        "ORDER BY raised_ns DESC, id LIMIT ?",
        (not is_open, len(alarm_id), alarm_id, limit),
    ).fetchall()
    names = tuple(_ALARM_COLUMNS.split(", "))
    at = names.index("p")
    return tuple(
        _parse_rows([(*row[:at], _parse_p(row[at]), *row[at + 1 : -1], bool(row[-1])) for row in rows], names, Alarm)
    )


def _read_silences(db: sqlite3.Connection, now_ns: int) -> tuple[Silence, ...]:
    rows = db.execute(
        f"SELECT {_SILENCE_COLUMNS} FROM silences WHERE until_ns > ? ORDER BY until_ns LIMIT ?", (now_ns, MAX_SILENCES)
    ).fetchall()
    return tuple(_parse_rows(rows, tuple(_SILENCE_COLUMNS.split(", ")), Silence))


def _parse_rows(rows: Sequence[Sequence[Any]], names: Sequence[str], into: type[_T]) -> Iterator[_T]:
    """Yield the rows as values; a row that another program has spoilt is left out."""
    for row in rows:
        with suppress(msgspec.ValidationError):
            yield msgspec.convert(dict(zip(names, row, strict=True)), into)


def _parse_p(text: object) -> object:
    try:
        return json.loads(str(text))
    except (ValueError, RecursionError):
        return ()


@contextmanager
def _open_reader(state: Path) -> Iterator[sqlite3.Connection | None]:
    path = state / ALARMS_FILE
    if not os.path.lexists(path):
        yield None
        return
    _check_file(path)
    db = _connect(path, is_writable=False)
    try:
        with _describe_errors(path):
            if _is_empty(db):  # a watch is about to begin
                yield None
                return
            _check_schema(db, path)
            yield db
    finally:
        db.close()


def _connect(path: Path, *, is_writable: bool) -> sqlite3.Connection:
    mode = "rw" if is_writable else "ro"
    with _describe_errors(path):
        db = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=_BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,  # one thread opens it and another one uses it
        )
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
        db.execute("PRAGMA trusted_schema = OFF")
    return db


def _check_file(path: Path) -> None:
    """Raise AlarmStoreError if the path exists and is no regular file of a possible size."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    except OSError as exc:
        raise AlarmStoreError(describe_os_error(exc)) from exc
    if not stat.S_ISREG(found.st_mode):
        raise AlarmStoreError(f"{path}: it is not a regular file; remove it, or name another folder with --state")
    if found.st_size > _MAX_FILE_BYTES:
        raise AlarmStoreError(
            f"{path}: {found.st_size:,} bytes, and a history of alarms has at most {_MAX_FILE_BYTES:,}; move it away"
        )


def _is_empty(db: sqlite3.Connection) -> bool:
    return int(db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]) == 0


def _check_schema(db: sqlite3.Connection, path: Path) -> None:
    """Raise AlarmStoreError unless the tables are exactly ours: a foreign file could hold triggers."""
    application_id = int(db.execute("PRAGMA application_id").fetchone()[0])
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if application_id != _APPLICATION_ID:
        raise AlarmStoreError(f"{path}: a database of another program; name another folder with --state")
    if version != _SCHEMA_VERSION:
        raise AlarmStoreError(
            f"{path}: a history of version {version}, and this phasewatch reads version {_SCHEMA_VERSION}; "
            "use the phasewatch that wrote it, or move the file away"
        )
    rows = db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL LIMIT 100").fetchall()
    if dict(rows) != _TABLES | _INDEXES:
        raise AlarmStoreError(_describe_damage(path, "its tables were changed"))


@contextmanager
def _describe_errors(path: Path) -> Iterator[None]:
    """Raise SQLite's errors as AlarmStoreError, with a remedy."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as exc:
        code = getattr(exc, "sqlite_errorcode", None)
        primary = code & 0xFF if isinstance(code, int) else None
        if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or primary is None:
            raise AlarmStoreError(_describe_damage(path, str(exc))) from exc
        remedies = {
            sqlite3.SQLITE_FULL: "make room on its disk",
            sqlite3.SQLITE_BUSY: "another process holds it; try again",
            sqlite3.SQLITE_READONLY: "run as the user of the watch, or as root",
            sqlite3.SQLITE_CANTOPEN: "run as the user of the watch, or as root",
        }
        remedy = remedies.get(primary, "check its disk and its permissions")
        raise AlarmStoreError(f"{path}: {exc}; {remedy}") from exc


def _describe_damage(path: Path, words: str) -> str:
    return f"{path}: damaged, or not a history of alarms ({words[:200]}); move it away, and a new one is begun"
