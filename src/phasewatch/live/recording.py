"""Save the readings of a watch as bundles of unknown phase, which can be contributed as recordings."""

from __future__ import annotations

import logging
import os
import tempfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from phasewatch._version import __version__
from phasewatch.atomic import DISK_FULL_ERRNOS, make_folder
from phasewatch.bundle.archive import encode_labels, pack_bundle
from phasewatch.bundle.model import BUNDLE_FORMAT, ClockMetadata, HostMetadata, LabelMark, Manifest, RecordingMetadata
from phasewatch.bundle.rows import encode_rows
from phasewatch.channels import CHANNELS, list_raw_fields
from phasewatch.errors import MachineError, PhasewatchError
from phasewatch.live.survey import VmSurvey
from phasewatch.store.local import DiskStore
from phasewatch.telemetry.base import AsyncClock, ReadingRow
from phasewatch.types import (
    BIN_NS,
    UNKNOWN_PROFILE,
    ClockBase,
    EpisodeOrigin,
    EpisodeRole,
    Phase,
    SampleKind,
    SourceKind,
    build_uuid7,
)

__all__ = ["WatchRecorder", "check_recording_folder"]

logger = logging.getLogger(__name__)

_MAX_SEGMENT_NS = 30 * 60 * 1_000_000_000  # a bundle may hold at most an hour
_MIN_SEGMENT_NS = 12_000_000_000  # a shorter bundle holds no complete window
_MAX_PENDING_BUNDLES = 2  # bundles that wait for a slow disk; each holds half an hour of readings
_MAX_REASON_CHARACTERS = 200
_UNKNOWN = "unknown"

_SegmentStart = tuple[dict[ClockBase, int], int]  # the other clocks, and the wall clock, at the first reading (ns)


def check_recording_folder(folder: Path) -> OSError | None:
    """Return the error that prevents writing into a folder now but may pass, such as a full disk; None if writable.

    Raises:
        MachineError: If nothing can ever be written there: the folder cannot be made, or is read-only.
    """
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
            probe.flush()
    except OSError as exc:
        if exc.errno in DISK_FULL_ERRNOS:
            return exc
        raise MachineError(f"--save {folder}: {exc.strerror}; name a folder that this user may write into") from exc
    return None


class WatchRecorder:
    """Collects the readings of one VM and writes a bundle every half hour, and one at the end.

    A step of the wall clock ends a bundle, because bins must have one common time base. Bundles are written in a
    thread: packing half an hour takes two seconds of CPU, and a slow disk may take any time. A bundle that cannot be
    written is dropped and counted, because the watch is more important than the recording; the next bundle is tried.

    Args:
        folder: The store that receives the bundles.
        survey: The attached VM.
        clock: Clock of the host.
        writer: Thread that writes the bundles, which several recorders may share; None for one of its own.

    Attributes:
        saved: Paths of the bundles that were written.
        lost: Number of bundles that could not be written.
        failure: The last write error; empty if there was none.
    """

    def __init__(
        self, folder: Path, survey: VmSurvey, clock: AsyncClock, writer: ThreadPoolExecutor | None = None
    ) -> None:
        self._store, self._survey, self._clock = DiskStore(folder), survey, clock
        self.saved: list[Path] = []
        self.lost, self.failure = 0, ""
        self._is_failing = False
        self._rows: dict[SourceKind, list[ReadingRow]] = {}
        self._first: _SegmentStart = ({}, 0)
        self._writer = writer or ThreadPoolExecutor(1)
        self._writing: deque[Future[Path | None]] = deque()

    def add_row(self, source: SourceKind, row: ReadingRow) -> None:
        """Add one reading; submit the bundle to the writer thread when it is full."""
        while self._writing and self._writing[0].done():
            self._collect_result()
        wall_ns, mono_ns = int(row[0] or 0), int(row[1] or 0)
        if self._rows:
            first_mono_ns, first_wall_ns = self._first[0][ClockBase.MONOTONIC], self._first[1]
            has_stepped = abs((wall_ns - first_wall_ns) - (mono_ns - first_mono_ns)) > BIN_NS
            if has_stepped or mono_ns - first_mono_ns >= _MAX_SEGMENT_NS:
                self._submit_bundle()
        if not self._rows:
            self._first = ({ClockBase.MONOTONIC: mono_ns, ClockBase.BOOTTIME: self._clock.boot_ns()}, wall_ns)
        self._rows.setdefault(source, []).append(row)

    def close(self) -> None:
        """Write the remaining readings, unless they are too short for one window, and wait until all is written."""
        self._submit_bundle()
        while self._writing:
            self._collect_result()

    def _submit_bundle(self) -> None:
        rows, self._rows = self._rows, {}
        if len(self._writing) >= _MAX_PENDING_BUNDLES:
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
            self.saved.append(path)

    def _count_lost(self, reason: str) -> None:
        """Count a lost bundle; log the first one after a success."""
        self.lost, self.failure = self.lost + 1, reason
        if not self._is_failing:
            logger.warning(
                "--save %s: a bundle could not be written: %s; the watch goes on without it", self._store.path, reason
            )
        self._is_failing = True

    def _write_bundle(self, rows: dict[SourceKind, list[ReadingRow]], start: _SegmentStart) -> Path | None:
        """Write one bundle and return its path; None if it is too short."""
        proc = rows.get(SourceKind.PROC, [])
        if len(proc) < 2:
            return None
        first, last = proc[0], proc[-1]
        t0_ns = -(-int(first[0] or 0) // BIN_NS) * BIN_NS
        lead_ns = t0_ns - int(first[0] or 0)
        end_ns = int(last[0] or 0)
        if end_ns - t0_ns < _MIN_SEGMENT_NS:
            return None
        marks = (
            LabelMark(t_wall_ns=t0_ns, t_mono_ns=int(first[1] or 0) + lead_ns, phase=Phase.UNKNOWN),
            LabelMark(t_wall_ns=end_ns, t_mono_ns=int(last[1] or 0), phase=None),
        )
        members = {"labels.jsonl": encode_labels(marks)}
        # Sequence numbers run on over bundles; each bundle must begin with 0.
        members |= {
            f"{source}.jsonl": encode_rows(source, [(r[0], r[1], n, *r[3:]) for n, r in enumerate(source_rows)])
            for source, source_rows in rows.items()
        }
        manifest = self._build_manifest(rows, start, marks, end_ns)
        return self._store.put(manifest.host.host_id, manifest.episode_id, pack_bundle(manifest, members))

    def _build_manifest(
        self, rows: dict[SourceKind, list[ReadingRow]], start: _SegmentStart, marks: tuple[LabelMark, ...], end_ns: int
    ) -> Manifest:
        facts, masked = self._survey.facts, self._survey.masked
        start_ns, start_wall_ns = start
        passed_ns = end_ns - start_wall_ns
        duration_s = round((marks[1].t_wall_ns - marks[0].t_wall_ns) / 1e9, 3)
        episode_id = build_uuid7(end_ns // 1_000_000, os.urandom(10))
        return Manifest(
            format=BUNDLE_FORMAT,
            episode_id=episode_id,
            host=HostMetadata(
                host_id=facts.host_id,
                arch=facts.arch or _UNKNOWN,
                accel=facts.accel or _UNKNOWN,
                machine=facts.machine or _UNKNOWN,
                cpu="",
                vcpus=facts.vcpus,
                mem_mib=facts.mem_mib,
                disk="",
                nic=facts.nic,
                hypervisor=facts.hypervisor,
                guest_kernel="",
                recorder=f"phasewatch {__version__}, watch",
            ),
            profile=UNKNOWN_PROFILE,
            sample_name=_UNKNOWN,
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
            rows_emitted={source: len(source_rows) for source, source_rows in rows.items()},
            channels_available=tuple(c.full_name for c in CHANNELS if c.full_name not in masked),
            fields={source: tuple(spec.field for spec in list_raw_fields(source)) for source in rows},
            clocks=ClockMetadata(
                base=dict.fromkeys(rows, ClockBase.UNIX),
                pairs={base: ((t, start_wall_ns), (t + passed_ns, end_ns)) for base, t in start_ns.items()},
            ),
            recording=RecordingMetadata(
                boot_s=0.0,
                settle_s=0.0,
                pinning=(),
                knobs={},
                background="",
                absent={name: _to_ascii(reason) for name, reason in masked.items()},
            ),
            members={},
        )


def _to_ascii(text: str) -> str:
    """Return a text as printable ASCII, which is all that a manifest may hold."""
    plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)[:_MAX_REASON_CHARACTERS]
    return plain or "not said"
