"""What an episode is in memory: a manifest, phase marks, and the rows of each source as columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.types import BIN_NS, ClockBase, EpisodeOrigin, EpisodeRole, Phase, SampleKind, SourceKind

BUNDLE_FORMAT = "phasewatch-episode/1"


class HostMetadata(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where an episode was recorded: hardware, hypervisor and the VM's shape."""

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
    """In which clock each source's wall stamps are, and how the host's clocks read together at start and end (ns)."""

    base: dict[SourceKind, ClockBase]
    pairs: dict[ClockBase, tuple[tuple[int, int], tuple[int, int]]]


class BundleMember(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Size, digest and number of lines of one file of the bundle."""

    bytes: int
    sha256: str
    rows: int


class RecordingMetadata(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the recorder drove this run; nothing in it is ever a feature.

    Attributes:
        boot_s, settle_s: Seconds to the guest's first word, and from there to the first label.
        pinning: Core of each vCPU, empty when unpinned.
        knobs: The intensities drawn for this episode.
        background: The benign load that ran beside the profile, or empty.
        absent: Channel → why this host cannot give it.
    """

    boot_s: float
    settle_s: float
    pinning: tuple[int, ...]
    knobs: dict[str, float]
    background: str
    absent: dict[str, str]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`manifest.json`, DESIGN section 2. `members` is filled by `episode.bundle.pack`; `recording` is null when simulated."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelMark:
    """The moment (host clock, ns) at which the guest acknowledged that a phase began; phase None marks the end."""

    t_wall_ns: int
    t_mono_ns: int
    phase: Phase | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SourceRows:
    """The rows of one source as columns, in file order.

    Attributes:
        fields: Raw fields in the order of RAW.
        t_wall_ns, t_mono_ns, seq: ``(n,)`` int64.
        columns: One ``(n,)`` array per field, int64 or float64 as RAW says; 0 where the row said null.
        present: ``(n, len(fields))`` bool; False where the row said null (no reading of that field).
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
    """One decoded bundle. `marks` ends with the mark whose phase is None; a source that has no member is not in `rows`."""

    manifest: Manifest
    marks: tuple[LabelMark, ...]
    rows: Mapping[SourceKind, SourceRows]

    @property
    def t0_ns(self) -> int:
        """Wall stamp of the first label: where the first bin begins."""
        return self.marks[0].t_wall_ns

    @property
    def t_end_ns(self) -> int:
        """Wall stamp of the `end` row."""
        return self.marks[-1].t_wall_ns

    @property
    def n_bins(self) -> int:
        """Whole bins between the two."""
        return (self.t_end_ns - self.t0_ns) // BIN_NS
