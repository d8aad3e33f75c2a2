"""Keep what a watcher reads as bundles of unknown phase, so that people with other machines can contribute recordings."""

from __future__ import annotations

import errno
import os
import tempfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from phasewatch import __version__
from phasewatch.atomic import make_folder
from phasewatch.channels import CHANNELS, raw_fields
from phasewatch.episode.bundle import encode_labels, pack
from phasewatch.episode.model import FORMAT, Clocks, Host, LabelMark, Manifest, Recording
from phasewatch.episode.rows import encode_rows
from phasewatch.errors import MachineError, PhasewatchError
from phasewatch.live.attach import Survey
from phasewatch.record.base import Clock, Row
from phasewatch.store.disk import DiskStore
from phasewatch.vocab import BIN_NS, ClockBase, Origin, Phase, Role, SampleKind, Source, uuid7

SEGMENT_NS = 30 * 60 * 1_000_000_000  # a bundle holds an hour at most
SHORTEST_NS = 12_000_000_000  # below it there is no window
MOST_WAITING = 2  # bundles that wait for a slow disk; each holds half an hour of readings
UNKNOWN = "unknown"
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})

_First = tuple[dict[ClockBase, int], int]  # the other clocks and the wall at a bundle's first reading


def _ignore(line: str) -> None:
    """Do nothing."""


def check_folder(folder: Path) -> str:
    """Return what keeps bundles from being written into a folder now and may pass, such as a full disk; empty if nothing.

    Raises:
        MachineError: If nothing could ever be written there: no folder can be made, or it is read-only.
    """
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
            probe.flush()
    except OSError as exc:
        if exc.errno in _NO_ROOM:
            return exc.strerror or str(exc)
        raise MachineError(f"--save {folder}: {exc.strerror}; name a folder that this user may write into") from exc
    return ""


class Saver:
    """Collects the readings of one VM and writes a bundle every half hour, and one at the end.

    A step of the wall clock ends a bundle: its bins could not be laid on one grid. Bundles are written in a thread beside
    the watch: packing half an hour takes two seconds of CPU, and a slow disk as long as it likes. A bundle that cannot be
    written is given up and counted, because the watch matters more than the copy beside it; the next one is tried.

    Args:
        folder: The store that the bundles go to.
        found: The attached VM.
        tell: Called with each bundle's path.
        say: Takes a line for people.

    Attributes:
        lost: Bundles that were not written.
        failure: Why the last of them was not; empty so far.
    """

    def __init__(
        self,
        folder: Path,
        found: Survey,
        clock: Clock,
        tell: Callable[[Path], None],
        say: Callable[[str], None] = _ignore,
    ) -> None:
        self._store, self._found, self._clock, self._tell, self._say = DiskStore(folder), found, clock, tell, say
        self.lost, self.failure = 0, ""
        self._is_failing = False
        self._rows: dict[Source, list[Row]] = {}
        self._first: _First = ({}, 0)
        self._writer = ThreadPoolExecutor(1)
        self._writing: deque[Future[Path | None]] = deque()

    def keep(self, source: Source, row: Row) -> None:
        """Add one reading; hand a bundle to the writer when it is full."""
        while self._writing and self._writing[0].done():
            self._end_one()
        wall_ns, mono_ns = int(row[0] or 0), int(row[1] or 0)
        if self._rows:
            begun_wall, begun = self._first[1], self._first[0][ClockBase.MONOTONIC]
            stepped = abs((wall_ns - begun_wall) - (mono_ns - begun)) > BIN_NS
            if stepped or mono_ns - begun >= SEGMENT_NS:
                self._hand_over()
        if not self._rows:
            self._first = ({ClockBase.MONOTONIC: mono_ns, ClockBase.BOOTTIME: self._clock.boot_ns()}, wall_ns)
        self._rows.setdefault(source, []).append(row)

    def close(self) -> None:
        """Write what there is, unless it is too short for one window, and wait until all is written."""
        self._hand_over()
        while self._writing:
            self._end_one()

    def _hand_over(self) -> None:
        rows, self._rows = self._rows, {}
        if len(self._writing) >= MOST_WAITING:
            self._give_up("the disk is too slow: earlier bundles still wait to be written")
            return
        self._writing.append(self._writer.submit(self._write, rows, self._first))

    def _end_one(self) -> None:
        try:
            path = self._writing.popleft().result()
        except (OSError, PhasewatchError) as exc:
            self._give_up(exc.strerror or str(exc) if isinstance(exc, OSError) else str(exc))
            return
        if path is not None:
            self._is_failing = False
            self._tell(path)

    def _give_up(self, why: str) -> None:
        """Count a bundle that is lost, and say so once until one can be written again."""
        self.lost, self.failure = self.lost + 1, why
        if not self._is_failing:
            self._say(f"--save {self._store.path}: a bundle could not be written: {why}; the watch goes on without it")
        self._is_failing = True

    def _write(self, rows: dict[Source, list[Row]], begun: _First) -> Path | None:
        """Write one bundle; None if it is too short."""
        proc = rows.get(Source.PROC, [])
        if len(proc) < 2:
            return None
        first, last = proc[0], proc[-1]
        t0_ns = -(-int(first[0] or 0) // BIN_NS) * BIN_NS
        lead_ns = t0_ns - int(first[0] or 0)
        end_ns = int(last[0] or 0)
        if end_ns - t0_ns < SHORTEST_NS:
            return None
        marks = (
            LabelMark(t_wall_ns=t0_ns, t_mono_ns=int(first[1] or 0) + lead_ns, phase=Phase.UNKNOWN),
            LabelMark(t_wall_ns=end_ns, t_mono_ns=int(last[1] or 0), phase=None),
        )
        members = {"labels.jsonl": encode_labels(marks)}
        # A sequence number counts on over bundles; each begins with its own 0.
        members |= {
            f"{source}.jsonl": encode_rows(source, [(r[0], r[1], n, *r[3:]) for n, r in enumerate(kept)])
            for source, kept in rows.items()
        }
        manifest = self._manifest(rows, begun, marks, end_ns)
        return self._store.put(manifest.host.host_id, manifest.episode_id, pack(manifest, members))

    def _manifest(
        self, rows: dict[Source, list[Row]], begun: _First, marks: tuple[LabelMark, ...], end_ns: int
    ) -> Manifest:
        facts, masked = self._found.facts, self._found.masked
        mono0, wall0 = begun
        passed_ns = end_ns - wall0
        duration_s = round((marks[1].t_wall_ns - marks[0].t_wall_ns) / 1e9, 3)
        episode_id = uuid7(end_ns // 1_000_000, os.urandom(10))
        return Manifest(
            format=FORMAT,
            episode_id=episode_id,
            host=Host(
                host_id=facts.host_id, arch=facts.arch or UNKNOWN, accel=facts.accel or UNKNOWN,
                machine=facts.machine or UNKNOWN, cpu="", vcpus=facts.vcpus, mem_mib=facts.mem_mib, disk="",
                nic=facts.nic, hypervisor=facts.hypervisor, guest_kernel="", recorder=f"phasewatch {__version__}, watch",
            ),
            profile=UNKNOWN,
            sample_name=UNKNOWN,
            sample_kind=SampleKind.LIVE,
            origin=Origin.RECORDED,
            role=Role.LAB,
            started_wall_ns=marks[0].t_wall_ns,
            duration_s=duration_s,
            session=episode_id,
            neighbours=(),
            plan_seed=0,
            plan=((Phase.UNKNOWN, duration_s),),
            agent=False,
            nominal_hz=dict.fromkeys(rows, 2.0),
            rows_emitted={source: len(kept) for source, kept in rows.items()},
            channels_available=tuple(c.full_name for c in CHANNELS if c.full_name not in masked),
            fields={source: tuple(spec.field for spec in raw_fields(source)) for source in rows},
            clocks=Clocks(
                base=dict.fromkeys(rows, ClockBase.UNIX),
                pairs={base: ((c, wall0), (c + passed_ns, end_ns)) for base, c in mono0.items()},
            ),
            recording=Recording(
                boot_s=0.0, settle_s=0.0, pinning=(), knobs={}, background="",
                absent={name: _ascii(why) for name, why in masked.items()},
            ),
            members={},
        )  # fmt: skip


def _ascii(text: str) -> str:
    """Give words as a manifest may hold them."""
    plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)[:200]
    return plain or "not said"
