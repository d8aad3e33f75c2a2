"""The words that every room uses: phases, sources, statuses, ids, and the constants of the clock."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NewType

HostId = NewType("HostId", str)
EpisodeId = NewType("EpisodeId", str)

BIN_NS = 500_000_000  # one cell of the grid
STALE_NS = 2_500_000_000  # a reading older than this says nothing about now
WINDOW_BINS = 20
STRIDE_BINS = 10
STRIDE_NS = BIN_NS * STRIDE_BINS
STRIDE_S = BIN_NS * STRIDE_BINS / 1e9
MAX_WAIT_CORES = 0.10  # cores' worth of waiting above which an episode is degraded, and its slot queued once more
BENIGN_PROFILE = "benign"  # the one profile that is not malicious
MIN_FINITE_BINS = 10  # finite bins of a window below which its stats are NaN

HOST_ID_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
EPISODE_ID_PATTERN = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


class Phase(StrEnum):
    """What a VM is going through; `code` is the number that stands in files, −1 for unknown."""

    CLEAN = "clean"
    ARMED = "armed"
    INFECTING = "infecting"
    ACTIVE = "active"
    DORMANT = "dormant"
    UNKNOWN = "unknown"

    @property
    def code(self) -> int:
        """The number that stands in files."""
        return -1 if self is Phase.UNKNOWN else PHASES.index(self)


PHASES = (Phase.CLEAN, Phase.ARMED, Phase.INFECTING, Phase.ACTIVE, Phase.DORMANT)


class SourceKind(StrEnum):
    """Who counts: the host's /proc, the QEMU monitor, the network card, an agent in the guest."""

    PROC = "proc"
    QMP = "qmp"
    NETFLOW = "netflow"
    GUEST = "guest"


HOST_SOURCES = (SourceKind.PROC, SourceKind.QMP, SourceKind.NETFLOW)


class ChannelKind(StrEnum):
    """How readings become a bin's value (DESIGN section 4, "Bin")."""

    RATE = "rate"
    DELTA = "delta"
    RATIO = "ratio"
    GAUGE = "gauge"
    COUNT = "count"


class ChannelTrust(StrEnum):
    """Who reports a channel; the guest may lie."""

    HOST = "host"
    GUEST = "guest"


class BundleStatus(StrEnum):
    """What the validator says of a bundle, best first."""

    ACCEPTED = "accepted"
    DEGRADED = "degraded"
    REJECTED = "rejected"
    ERRORED = "errored"


class EpisodeRole(StrEnum):
    """What an episode is for: to learn and test on, the VM's clean day, long benign hours."""

    LAB = "lab"
    COMMISSION = "commission"
    SOAK = "soak"


class EpisodeOrigin(StrEnum):
    """A real VM, or a generator; never mixed without being said."""

    RECORDED = "recorded"
    SIMULATED = "simulated"


class SampleKind(StrEnum):
    """What ran: an emulation, a benign load, or (recorded by a user) a real sample."""

    EMULATED = "emulated"
    BENIGN = "benign"
    LIVE = "live"


class ClockBase(StrEnum):
    """The clock in which a source's wall stamps really are."""

    UNIX = "unix"
    MONOTONIC = "monotonic"
    BOOTTIME = "boottime"
    GUEST = "guest"


def build_uuid7(unix_ms: int, random: bytes) -> EpisodeId:
    """Build a UUIDv7 (RFC 9562, section 5.7) from a time in milliseconds and ten random bytes."""
    value = (unix_ms & (2**48 - 1)) << 80 | int.from_bytes(random[:10], "big")
    value = value & ~(0xF << 76) | 7 << 76
    value = value & ~(0b11 << 62) | 0b10 << 62
    text = f"{value:032x}"
    return EpisodeId("-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])))

CHANNELS_VARIABLE = "PHASEWATCH_CUSTOM_CHANNELS"  # path of the custom channels' file; worker processes inherit it
CHANNELS_FILE = "channels.toml"  # the copy of that file in a run
