"""The data model of an episode: manifest, phase marks, and the rows of each source as columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.types import BIN_NS, ClockBase, EpisodeOrigin, EpisodeRole, Phase, SampleKind, SourceKind

__all__ = [
    "BUNDLE_FORMAT",
    "KNOWN_BUNDLE_FORMATS",
    "RECORDING_KEYS_2",
    "BundleMember",
    "ClockMetadata",
    "Episode",
    "HostMetadata",
    "LabelEvidence",
    "LabelMark",
    "LabellingMetadata",
    "Manifest",
    "OperatorLabel",
    "RecordingMetadata",
    "SourceRows",
]

BUNDLE_FORMAT = "phasewatch-episode/2"  # what is written
KNOWN_BUNDLE_FORMATS = ("phasewatch-episode/1", BUNDLE_FORMAT)  # what is read; version 1 lacks `RECORDING_KEYS_2`


class HostMetadata(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The host and the VM of an episode: hardware, hypervisor and the VM's configuration."""

    host_id: str
    arch: str
    accel: str
    machine: str
    cpu: str
    vcpus: int
    mem_mib: int
    disk: str
    nic: str
    hypervisor: str
    guest_kernel: str
    recorder: str


class ClockMetadata(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The clock of each source's wall stamps, and readings of the host's clocks.

    Attributes:
        base: Clock of the wall stamps, by source.
        pairs: By clock: (its reading, Unix time) in ns, at the start and at the end.
    """

    base: dict[SourceKind, ClockBase]
    pairs: dict[ClockBase, tuple[tuple[int, int], tuple[int, int]]]


class BundleMember(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Size, SHA-256 and number of lines of one member of the bundle."""

    bytes: int
    sha256: str
    rows: int


class LabelEvidence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the guest answered to the command that began a label.

    Attributes:
        phase: Phase of the label.
        step: The command as it was sent, without its knobs.
        ack_id: Number of the command that the guest acknowledged.
        exit_code: Exit status of its work; null if the work was still running when the label ended.
    """

    phase: Phase
    step: str
    ack_id: int
    exit_code: int | None


class RecordingMetadata(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the recorder ran an episode; none of it is a feature.

    Attributes:
        boot_s: Time from the start of QEMU to the guest's first message.
        settle_s: Time from there to the first label.
        pinning: Core of each vCPU; empty if they are not pinned.
        knobs: Intensities that were drawn for the episode.
        background: Benign load that ran beside the profile during the whole episode; empty without one.
        absent: Reason by channel that this host does not have.
        load: (kind, start, end) of every benign load that ran, in the order of their starts; Unix time in ns.
        routine: Infection routine of the sample; null without one.
        shape: The drawn facts of the host, `quota_cores` among them; null in bundles of format version 1.
        image: Guest image, `busybox` or `debian`; empty if it is not known.
        twin: Benign kind that was declared to do the same as the sample; null without one.
        evidence: Evidence of each label, in their order; empty if none was kept.
        throttled_s: Time between first label and end that the CPU quota kept the VM from running; null without a quota.
    """

    boot_s: float
    settle_s: float
    pinning: tuple[int, ...]
    knobs: dict[str, float]
    background: str
    absent: dict[str, str]
    load: tuple[tuple[str, int, int], ...] = ()
    routine: str | None = None
    shape: dict[str, str | int | float] | None = None
    image: str = ""
    twin: str | None = None
    evidence: tuple[LabelEvidence, ...] = ()
    throttled_s: float | None = None


RECORDING_KEYS_2 = ("load", "routine", "shape", "image", "twin", "evidence", "throttled_s")  # since format version 2


class OperatorLabel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A phase that a person gave to a time range of a finished recording, and the reason.

    Attributes:
        start_wall_ns, end_wall_ns: The range, in Unix ns.
        phase: Its phase; never `unknown`.
        by: Who labelled it.
        when_wall_ns: When it was labelled, in Unix ns.
        why: How that person knows.
    """

    start_wall_ns: int
    end_wall_ns: int
    phase: Phase
    by: str
    when_wall_ns: int
    why: str


class LabellingMetadata(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a labelled bundle comes from, and what its labels rest on.

    Attributes:
        ancestor_id: Episode id of the bundle that was labelled.
        ancestor_sha256: Digest of that bundle's file.
        labels: The labels, in the order of time; no two overlap, and the time between them is `unknown`.
    """

    ancestor_id: str
    ancestor_sha256: str
    labels: tuple[OperatorLabel, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`manifest.json` (docs/formats/bundle.md).

    `pack_bundle` fills in `members`; `recording` is null if simulated; `labelling` is absent unless a person labelled
    a finished recording.
    """

    format: str
    episode_id: str
    host: HostMetadata
    profile: str
    sample_name: str
    sample_kind: SampleKind
    origin: EpisodeOrigin
    role: EpisodeRole
    started_wall_ns: int
    duration_s: float
    session: str
    neighbours: tuple[str, ...]
    plan_seed: int
    plan: tuple[tuple[Phase, float], ...]
    agent: bool
    nominal_hz: dict[SourceKind, float]
    rows_emitted: dict[SourceKind, int]
    channels_available: tuple[str, ...]
    fields: dict[SourceKind, tuple[str, ...]]
    clocks: ClockMetadata
    recording: RecordingMetadata | None
    members: dict[str, BundleMember]
    labelling: LabellingMetadata | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelMark:
    """The start of a phase: when the guest acknowledged it, by the host's clocks in ns; phase None marks the end."""

    t_wall_ns: int
    t_mono_ns: int
    phase: Phase | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SourceRows:
    """The rows of one source as columns, in file order.

    Attributes:
        fields: Raw fields, in the order of `channels.RAW_FIELDS`.
        t_wall_ns, t_mono_ns, seq: ``(n,)`` int64.
        columns: One ``(n,)`` array per field, int64 or float64; 0 where the row is null.
        present: ``(n, len(fields))`` bool; False where the row is null (no reading of that field).
    """

    source: SourceKind
    fields: tuple[str, ...]
    t_wall_ns: NDArray[np.int64]
    t_mono_ns: NDArray[np.int64]
    seq: NDArray[np.int64]
    columns: tuple[NDArray[np.int64] | NDArray[np.float64], ...]
    present: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.t_wall_ns)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Episode:
    """One decoded bundle. The phase of the last mark is None; `rows` lacks sources without a member."""

    manifest: Manifest
    marks: tuple[LabelMark, ...]
    rows: Mapping[SourceKind, SourceRows]

    @property
    def t0_ns(self) -> int:
        """Wall stamp of the first label, where the first bin begins, in ns."""
        return self.marks[0].t_wall_ns

    @property
    def t_end_ns(self) -> int:
        """Wall stamp of the end mark, in ns."""
        return self.marks[-1].t_wall_ns

    @property
    def n_bins(self) -> int:
        """Number of complete bins between the two."""
        return (self.t_end_ns - self.t0_ns) // BIN_NS
