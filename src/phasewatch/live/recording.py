"""Keep what a watcher reads as bundles of unknown phase, so that people with other machines can contribute recordings."""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from phasewatch._version import __version__
from phasewatch.atomic import DISK_FULL_ERRNOS, make_folder
from phasewatch.bundle.archive import encode_labels, pack_bundle
from phasewatch.bundle.model import BUNDLE_FORMAT, ClockMetadata, HostMetadata, LabelMark, Manifest, RecordingMetadata
from phasewatch.bundle.rows import encode_rows
from phasewatch.channels import CHANNELS, list_raw_fields
from phasewatch.errors import MachineError, PhasewatchError
from phasewatch.live.attach import VmSurvey
from phasewatch.store.local import DiskStore
from phasewatch.telemetry.base import AsyncClock, ReadingRow
from phasewatch.types import BIN_NS, ClockBase, EpisodeOrigin, EpisodeRole, Phase, SampleKind, SourceKind, build_uuid7

MAX_SEGMENT_NS = 30 * 60 * 1_000_000_000  # a bundle holds an hour at most
MIN_SEGMENT_NS = 12_000_000_000  # below it there is no window
MAX_PENDING_BUNDLES = 2  # bundles that wait for a slow disk; each holds half an hour of readings
UNKNOWN_TEXT = "unknown"

_SegmentStart = tuple[dict[ClockBase, int], int]  # the other clocks and the wall at a bundle's first reading


def _ignore_line(line: str) -> None:
    """Do nothing."""


def check_recording_folder(folder: Path) -> str:
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
        if exc.errno in DISK_FULL_ERRNOS:
            return exc.strerror or str(exc)
        raise MachineError(f"--save {folder}: {exc.strerror}; name a folder that this user may write into") from exc
    return ""


class WatchRecorder:
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
        found: VmSurvey,
        clock: AsyncClock,
        tell: Callable[[Path], None],
        say: Callable[[str], None] = _ignore_line,
    ) -> None:
        self._store, self._found, self._clock, self._tell, self._say = DiskStore(folder), found, clock, tell, say
        self.lost, self.failure = 0, ""
        self._is_failing = False
        self._rows: dict[SourceKind, list[ReadingRow]] = {}
        self._first: _SegmentStart = ({}, 0)
        self._writer = ThreadPoolExecutor(1)
        self._writing: deque[Future[Path | None]] = deque()

    def add_row(self, source: SourceKind, row: ReadingRow) -> None:
        """Add one reading; hand a bundle to the writer when it is full."""
        while self._writing and self._writing[0].done():
            self._collect_result()
        wall_ns, mono_ns = int(row[0] or 0), int(row[1] or 0)
        if self._rows:
            begun_wall, begun = self._first[1], self._first[0][ClockBase.MONOTONIC]
            stepped = abs((wall_ns - begun_wall) - (mono_ns - begun)) > BIN_NS
            if stepped or mono_ns - begun >= MAX_SEGMENT_NS:
                self._submit_bundle()
        if not self._rows:
            self._first = ({ClockBase.MONOTONIC: mono_ns, ClockBase.BOOTTIME: self._clock.boot_ns()}, wall_ns)
        self._rows.setdefault(source, []).append(row)

    def close(self) -> None:
        """Write what there is, unless it is too short for one window, and wait until all is written."""
        self._submit_bundle()
        while self._writing:
            self._collect_result()

    def _submit_bundle(self) -> None:
        rows, self._rows = self._rows, {}
        if len(self._writing) >= MAX_PENDING_BUNDLES:
            self._count_lost("the disk is too slow: earlier bundles still wait to be written")
            return
        self._writing.append(self._writer.submit(self._write_bundle, rows, self._first))

    def _collect_result(self) -> None:
        try:
            path = self._writing.popleft().result()
        except (OSError, PhasewatchError) as exc:
            self._count_lost(exc.strerror or str(exc) if isinstance(exc, OSError) else str(exc))
            return
        if path is not None:
            self._is_failing = False
            self._tell(path)

    def _count_lost(self, why: str) -> None:
        """Count a bundle that is lost, and say so once until one can be written again."""
        self.lost, self.failure = self.lost + 1, why
        if not self._is_failing:
            self._say(f"--save {self._store.path}: a bundle could not be written: {why}; the watch goes on without it")
        self._is_failing = True

    def _write_bundle(self, rows: dict[SourceKind, list[ReadingRow]], begun: _SegmentStart) -> Path | None:
        """Write one bundle; None if it is too short."""
        proc = rows.get(SourceKind.PROC, [])
        if len(proc) < 2:
            return None
        first, last = proc[0], proc[-1]
        t0_ns = -(-int(first[0] or 0) // BIN_NS) * BIN_NS
        lead_ns = t0_ns - int(first[0] or 0)
        end_ns = int(last[0] or 0)
        if end_ns - t0_ns < MIN_SEGMENT_NS:
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
        manifest = self._build_manifest(rows, begun, marks, end_ns)
        return self._store.put(manifest.host.host_id, manifest.episode_id, pack_bundle(manifest, members))

    def _build_manifest(
        self, rows: dict[SourceKind, list[ReadingRow]], begun: _SegmentStart, marks: tuple[LabelMark, ...], end_ns: int
    ) -> Manifest:
        facts, masked = self._found.facts, self._found.masked
        mono0, wall0 = begun
        passed_ns = end_ns - wall0
        duration_s = round((marks[1].t_wall_ns - marks[0].t_wall_ns) / 1e9, 3)
        episode_id = build_uuid7(end_ns // 1_000_000, os.urandom(10))
        return Manifest(
            format=BUNDLE_FORMAT,
            episode_id=episode_id,
            host=HostMetadata(
                host_id=facts.host_id, arch=facts.arch or UNKNOWN_TEXT, accel=facts.accel or UNKNOWN_TEXT,
                machine=facts.machine or UNKNOWN_TEXT, cpu="", vcpus=facts.vcpus, mem_mib=facts.mem_mib, disk="",
                nic=facts.nic, hypervisor=facts.hypervisor, guest_kernel="", recorder=f"phasewatch {__version__}, watch",
            ),
            profile=UNKNOWN_TEXT,
            sample_name=UNKNOWN_TEXT,
            sample_kind=SampleKind.LIVE,
            origin=EpisodeOrigin.RECORDED,
            role=EpisodeRole.LAB,
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
            fields={source: tuple(spec.field for spec in list_raw_fields(source)) for source in rows},
            clocks=ClockMetadata(
                base=dict.fromkeys(rows, ClockBase.UNIX),
                pairs={base: ((c, wall0), (c + passed_ns, end_ns)) for base, c in mono0.items()},
            ),
            recording=RecordingMetadata(
                boot_s=0.0, settle_s=0.0, pinning=(), knobs={}, background="",
                absent={name: _to_ascii(why) for name, why in masked.items()},
            ),
            members={},
        )  # fmt: skip


def _to_ascii(text: str) -> str:
    """Give words as a manifest may hold them."""
    plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)[:200]
    return plain or "not said"
