"""Types and constants that every package uses: phases, sources, statuses, ids, and the length of bins and windows."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NewType

__all__ = [
    "BENIGN_PROFILE",
    "BIN_NS",
    "CONTEXT_BINS",
    "EPISODE_ID_PATTERN",
    "HOST_ID_PATTERN",
    "HOST_SOURCES",
    "LIVE_STRIDE_BINS",
    "MAX_WAIT_CORES",
    "MIN_FINITE_BINS",
    "PHASES",
    "STALE_NS",
    "STRIDE_BINS",
    "STRIDE_NS",
    "STRIDE_S",
    "UNKNOWN_PROFILE",
    "WINDOW_BINS",
    "WINDOW_S",
    "BundleStatus",
    "ChannelGroup",
    "ChannelKind",
    "ChannelTrust",
    "ClockBase",
    "EpisodeId",
    "EpisodeOrigin",
    "EpisodeRole",
    "HostId",
    "Phase",
    "SampleKind",
    "SourceKind",
    "build_uuid7",
]

HostId = NewType("HostId", str)
EpisodeId = NewType("EpisodeId", str)

BIN_NS = 500_000_000  # length of one bin
STALE_NS = 2_500_000_000  # a reading is repeated in later bins for at most this long
WINDOW_BINS = 20
STRIDE_BINS = 10
STRIDE_NS = BIN_NS * STRIDE_BINS
STRIDE_S = BIN_NS * STRIDE_BINS / 1e9
WINDOW_S = BIN_NS * WINDOW_BINS / 1e9
LIVE_STRIDE_BINS = 2  # live windows begin every second; training windows every five
CONTEXT_BINS = 240  # two minutes: the longest history of a context input
MAX_WAIT_CORES = 0.10  # mean vCPU waiting time, in cores; above it an episode is degraded and recorded once more
BENIGN_PROFILE = "benign"  # the only profile that is not malicious
UNKNOWN_PROFILE = "unknown"  # of recordings that nobody has labelled
MIN_FINITE_BINS = 10  # with fewer finite bins in a window, its statistics are NaN

HOST_ID_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
EPISODE_ID_PATTERN = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


class Phase(StrEnum):
    """The state of a VM with respect to one piece of malware (docs/formats/bundle.md, "Phases")."""

    CLEAN = "clean"  # no malware is on the VM, or it was removed; benign programs may run
    ARMED = "armed"  # the malware's files are on the disk; it has not been run
    INFECTING = "infecting"  # the first run: the malware unpacks, installs itself and spreads
    ACTIVE = "active"  # the installed malware does what it is for: it encrypts, mines, scans or sends data
    DORMANT = "dormant"  # the malware is installed and quiet; it may contact its server from time to time
    UNKNOWN = "unknown"  # no label; such windows are in no split and no metric

    @property
    def code(self) -> int:
        """The number that files and models use: the place in `PHASES`, or −1 for unknown."""
        return -1 if self is Phase.UNKNOWN else PHASES.index(self)


PHASES = (Phase.CLEAN, Phase.ARMED, Phase.INFECTING, Phase.ACTIVE, Phase.DORMANT)


class SourceKind(StrEnum):
    """Where readings come from: the host's /proc, the QEMU monitor, the VM's network card, or an agent in the guest."""

    PROC = "proc"
    QMP = "qmp"
    NETFLOW = "netflow"
    GUEST = "guest"


HOST_SOURCES = (SourceKind.PROC, SourceKind.QMP, SourceKind.NETFLOW)


class ChannelKind(StrEnum):
    """How the readings of a bin become its value (docs/formats/run.md)."""

    RATE = "rate"  # increase of a counter per second
    DELTA = "delta"  # change of a level per second
    RATIO = "ratio"  # increase of one counter over that of another
    GAUGE = "gauge"  # mean of a level
    COUNT = "count"  # maximum of a count per tick


class ChannelGroup(StrEnum):
    """The part of the registry that a channel belongs to; models of base channels do not depend on the other part."""

    BASE = "base"
    EXTENDED = "extended"


class ChannelTrust(StrEnum):
    """Whether the host measures a channel or the guest reports it; malware in the guest can forge the latter."""

    HOST = "host"
    GUEST = "guest"


class BundleStatus(StrEnum):
    """The result of validating a bundle, best first; accepted and degraded bundles are usable."""

    ACCEPTED = "accepted"  # no finding
    DEGRADED = "degraded"  # something is missing or was repaired
    REJECTED = "rejected"  # it can be read and breaks a rule
    ERRORED = "errored"  # it cannot be read, or would exceed a limit


class EpisodeRole(StrEnum):
    """The purpose of an episode."""

    LAB = "lab"  # training and test
    COMMISSION = "commission"  # baseline: the host without malware, for normalisation
    SOAK = "soak"  # long benign operation, for the false-alarm rate


class EpisodeOrigin(StrEnum):
    """Whether an episode was recorded on a real VM, simulated, or imported from a recording of another program."""

    RECORDED = "recorded"
    SIMULATED = "simulated"
    IMPORTED = "imported"


class SampleKind(StrEnum):
    """What ran in the VM: emulated malware, a benign load, or a real sample (recorded by a user)."""

    EMULATED = "emulated"
    BENIGN = "benign"
    LIVE = "live"


class ClockBase(StrEnum):
    """The clock of a source's wall stamps."""

    UNIX = "unix"
    MONOTONIC = "monotonic"
    BOOTTIME = "boottime"
    GUEST = "guest"


def build_uuid7(unix_ms: int, random: bytes) -> EpisodeId:
    """Build an episode id: a UUIDv7 (RFC 9562, section 5.7).

    Args:
        unix_ms: Unix time in milliseconds.
        random: At least ten random bytes.
    """
    value = (unix_ms & (2**48 - 1)) << 80 | int.from_bytes(random[:10], "big")
    value = value & ~(0xF << 76) | 7 << 76
    value = value & ~(0b11 << 62) | 0b10 << 62
    text = f"{value:032x}"
    return EpisodeId("-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])))


CHANNELS_VARIABLE = "PHASEWATCH_CUSTOM_CHANNELS"  # path of the custom channels' file; worker processes inherit it
CHANNELS_FILE = "channels.toml"  # the copy of that file in a run
