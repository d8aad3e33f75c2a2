"""Profiles, samples, intensities and safety bounds of the emulated workloads, and the random walk over phases.

The lab, the guest program, the simulator and the docs share this table. Every profile is an emulation: CPU time, files
on a scratch disk, and sockets to the recorder's own sink. The ATT&CK technique ids name what a profile resembles; there
is no exploit and no payload.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log
from types import MappingProxyType
from typing import TYPE_CHECKING

from phasewatch.errors import UsageError, suggest_names
from phasewatch.types import BENIGN_PROFILE, Phase, SampleKind

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "COMMON_INTENSITIES",
    "EPISODE_RANGE_S",
    "IDLE_SAMPLE",
    "N_SAMPLE_GROUPS",
    "PHASE_RANGE_S",
    "PROFILES",
    "START_PROBABILITIES",
    "TRANSITION_PROBABILITIES",
    "IntensityRange",
    "ProfileSample",
    "SafetyBounds",
    "WorkloadProfile",
    "draw_episode_length",
    "draw_intensities",
    "draw_phase_walk",
    "find_profile",
    "find_sample",
    "find_sample_group",
]

IDLE_SAMPLE = "idle"  # the benign sample without a load
N_SAMPLE_GROUPS = 4  # sample i of a profile belongs to group i mod 4; held_out_sample holds out a group


@dataclass(frozen=True, slots=True, kw_only=True)
class IntensityRange:
    """One intensity; its value is drawn for each episode, log-uniform between `low` and `high`."""

    name: str
    low: float
    high: float
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetyBounds:
    """Limits of a profile in one episode of at most ten minutes; a test checks each sample."""

    written_bytes: int
    sent_bytes: int
    processes: int
    networks: tuple[str, ...] = ("10.0.2.0/24", "198.18.0.0/15", "198.51.100.0/24")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSample:
    """One variant of a profile."""

    name: str
    about: str
    knobs: tuple[IntensityRange, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadProfile:
    """A kind of emulated malware, or the benign loads.

    Attributes:
        attack: ATT&CK technique ids that it resembles.
        samples: Its variants; sample i belongs to sample group i mod 4.
        bounds: Limits that every sample keeps.
    """

    name: str
    kind: SampleKind
    about: str
    attack: tuple[str, ...]
    samples: tuple[ProfileSample, ...]
    bounds: SafetyBounds


def _parse_intensities(text: str) -> tuple[IntensityRange, ...]:
    """Parse groups of `name low high unit`, separated by commas."""
    parts = [part.split() for part in text.split(",") if part.strip()]
    return tuple(
        IntensityRange(name=name, low=float(low), high=float(high), unit=unit) for name, low, high, unit in parts
    )


# Intensities of arrival, infection and dormancy in every profile; low enough to resemble a package installation.
COMMON_INTENSITIES = _parse_intensities(
    "payload_kib 50 2000 KiB, arrive_s 1 12 s, infect_mb 0.2 20 MB, infect_s 10 25 s, heartbeat_s 6 60 s"
)


def _malicious_profile(
    name: str, about: str, attack: str, written: float, sent: float, samples: tuple[tuple[str, str, str], ...]
) -> WorkloadProfile:
    return WorkloadProfile(
        name=name,
        kind=SampleKind.EMULATED,
        about=about,
        attack=tuple(attack.split()),
        samples=tuple(
            ProfileSample(name=n, about=a, knobs=COMMON_INTENSITIES + _parse_intensities(k)) for n, a, k in samples
        ),
        bounds=SafetyBounds(written_bytes=int(written), sent_bytes=int(sent), processes=24),
    )


PROFILES: tuple[WorkloadProfile, ...] = (
    _malicious_profile("cryptomine", "Mines cryptocurrency.", "T1496", 2e8, 2e6, (
        ("full", "computes hashes nearly all the time", "duty 0.5 0.9 1"),
        ("throttled", "computes hashes for a fixed share of each tenth of a second", "duty 0.1 0.5 1"),
        ("bursty", "alternates between computing and pausing", "duty 0.2 0.8 1, period_s 2 20 s"),
        ("memory-hard", "computes hashes over a large table", "duty 0.15 0.9 1, mem_mib 4 32 MiB"),
    )),
    _malicious_profile("ransom-walk", "Encrypts documents, one after the other.", "T1486 T1083", 4e9, 2e6, (
        ("overwrite", "overwrites each file in place", "rate_kbps 200 4000 kB/s"),
        ("write-new-delete-old", "writes an encrypted copy, deletes the original", "rate_kbps 200 3000 kB/s"),
        ("intermittent", "overwrites the head of each file, with pauses", "rate_kbps 100 1500 kB/s, pause_s 1 8 s"),
        ("throttled", "as overwrite, at a low rate", "rate_kbps 20 200 kB/s"),
    )),
    _malicious_profile("scan-and-dial", "Scans for open ports and connects to them.", "T1046 T1018", 2e8, 2e7, (
        ("sequential", "address after address, twelve ports each", "rate_hz 2 20 1/s"),
        ("random", "random addresses and ports", "rate_hz 1 15 1/s"),
        ("low-and-slow", "one attempt every few seconds", "rate_hz 0.15 1.5 1/s"),
        ("one-port", "one port on many addresses", "rate_hz 1 15 1/s"),
    )),
    _malicious_profile("beacon-c2", "Polls a command-and-control server.", "T1071.001 T1071.004 T1573", 2e8, 1e7, (
        ("fixed", "polls at a fixed interval", "period_s 1.5 12 s"),
        ("jittered", "polls at random intervals", "period_s 1.5 12 s"),
        ("dns-only", "polls by DNS TXT queries", "period_s 1 10 s"),
        ("long-poll", "keeps a request open until it is answered", "period_s 1.5 10 s"),
    )),
    _malicious_profile("exfil-drip", "Exfiltrates documents.", "T1041 T1048.003 T1030", 2e8, 4e8, (
        ("http-bulk", "few large uploads", "rate_kbps 50 500 kB/s"),
        ("small-posts", "many small uploads", "rate_kbps 5 60 kB/s"),
        ("dns-labels", "data in the labels of DNS queries", "rate_kbps 0.2 2 kB/s"),
        ("low-and-slow", "small uploads with long pauses", "rate_kbps 5 30 kB/s"),
    )),
    _malicious_profile("dropper-persist", "Downloads stages and persists.", "T1105 T1053.003 T1547", 4e8, 1e7, (
        ("fetch-unpack", "downloads and unpacks", "period_s 3 20 s, piece_kib 50 800 KiB"),
        ("cron-like", "rewrites its cron files and checks its own digest", "period_s 1.5 10 s"),
        ("self-copy", "copies itself to many places", "period_s 2 15 s, piece_kib 50 1000 KiB"),
        ("in-pieces", "downloads in small pieces", "period_s 3 20 s, piece_kib 50 800 KiB"),
    )),
    WorkloadProfile(
        name=BENIGN_PROFILE, kind=SampleKind.BENIGN, about="Benign loads.", attack=(),
        bounds=SafetyBounds(written_bytes=int(4e9), sent_bytes=int(4e8), processes=24),
        samples=tuple(ProfileSample(name=n, about=a, knobs=_parse_intensities(k)) for n, a, k in (
            ("idle", "only background events", ""),
            ("compile", "one process per unit: read, compute, write an object file", "duty 0.2 0.9 1"),
            ("backup", "copies the documents", "rate_kbps 100 3000 kB/s"),
            ("poller", "polls a web server", "period_s 1.5 12 s"),
            ("compress", "compresses documents", "duty 0.1 0.9 1"),
            ("find-grep", "searches the documents", "period_s 0.5 8 s"),
            ("download", "downloads files", "rate_kbps 50 1000 kB/s, period_s 2 15 s"),
            ("upload", "uploads a backup", "rate_kbps 10 400 kB/s, period_s 2 15 s"),
            ("hash", "computes digests of documents", "duty 0.1 0.9 1"),
            ("database", "small random writes with fsync", "rate_kbps 20 600 kB/s"),
            ("health-checks", "connects to known servers on known ports", "period_s 2 20 s"),
            ("package-install", "downloads and unpacks packages", "rate_kbps 100 1500 kB/s, period_s 2 20 s"),
            ("render", "computes", "duty 0.1 0.9 1"),
            ("log-rotate", "writes and compresses logs", "rate_kbps 30 1000 kB/s, period_s 2 20 s"),
        )),
    ),
)  # fmt: skip


def find_profile(name: str) -> WorkloadProfile:
    """Return the profile with this name.

    Raises:
        UsageError: If no profile has this name; the message suggests the nearest.
    """
    for row in PROFILES:
        if row.name == name:
            return row
    raise UsageError(f"no profile {name!r}; {suggest_names(name, [row.name for row in PROFILES])}")


def find_sample(profile_name: str, name: str) -> ProfileSample:
    """Return a sample of a profile.

    Raises:
        UsageError: If the profile or the sample does not exist; the message suggests the nearest.
    """
    rows = find_profile(profile_name).samples
    for row in rows:
        if row.name == name:
            return row
    raise UsageError(f"{profile_name} has no sample {name!r}; {suggest_names(name, [row.name for row in rows])}")


def find_sample_group(profile_name: str, name: str) -> int:
    """Return the sample group of a sample, 0 to 3: its index in the profile modulo 4.

    Raises:
        UsageError: If the profile or the sample does not exist.
    """
    sample = find_sample(profile_name, name)
    return find_profile(profile_name).samples.index(sample) % N_SAMPLE_GROUPS


def draw_intensities(sample: ProfileSample, rng: np.random.Generator) -> dict[str, float]:
    """Draw the intensities of one episode, log-uniform, in the order of the sample's knobs."""
    return {knob.name: float(exp(rng.uniform(log(knob.low), log(knob.high)))) for knob in sample.knobs}


def _check_table() -> None:
    """Raise ValueError at import if the table is inconsistent."""
    for row in PROFILES:
        names = [s.name for s in row.samples]
        if len(names) < N_SAMPLE_GROUPS or len(set(names)) != len(names):
            raise ValueError(f"profiles: {row.name} needs at least {N_SAMPLE_GROUPS} samples with different names")
        for sample in row.samples:
            if any(not 0 < knob.low < knob.high for knob in sample.knobs):
                raise ValueError(f"profiles: {row.name}/{sample.name} has a knob without a range")


_check_table()


# Elapsed time alone scores macro-F1 0.22 under this walk (simulated), 0.51 under a fixed
# order of phases.
START_PROBABILITIES: tuple[tuple[Phase, float], ...] = (
    (Phase.CLEAN, 0.35),
    (Phase.ARMED, 0.15),
    (Phase.INFECTING, 0.10),
    (Phase.ACTIVE, 0.20),
    (Phase.DORMANT, 0.20),
)
TRANSITION_PROBABILITIES = MappingProxyType(
    {
        Phase.CLEAN: ((Phase.ARMED, 0.75), (Phase.INFECTING, 0.25)),
        Phase.ARMED: ((Phase.INFECTING, 0.75), (Phase.CLEAN, 0.25)),
        Phase.INFECTING: ((Phase.ACTIVE, 0.60), (Phase.DORMANT, 0.25), (Phase.CLEAN, 0.15)),
        Phase.ACTIVE: ((Phase.DORMANT, 0.75), (Phase.CLEAN, 0.25)),
        Phase.DORMANT: ((Phase.ACTIVE, 0.65), (Phase.CLEAN, 0.25), (Phase.INFECTING, 0.10)),
    }
)
PHASE_RANGE_S = (20.0, 45.0)  # shortest and longest phase
EPISODE_RANGE_S = (100.0, 180.0)  # shortest and longest lab episode
_MIN_REST_S = 1.0  # a shorter remainder is added to the phase before it


def draw_episode_length(rng: np.random.Generator, *, between_s: tuple[float, float] = EPISODE_RANGE_S) -> float:
    """Draw the length of an episode in seconds, to the millisecond; it must not depend on profile or phases."""
    return round(float(rng.uniform(*between_s)), 3)


def draw_phase_walk(
    rng: np.random.Generator, *, length_s: float, between_s: tuple[float, float] = PHASE_RANGE_S
) -> tuple[tuple[Phase, float], ...]:
    """Draw the phases of one malicious episode.

    Args:
        rng: A generator for this purpose alone, so that other draws do not change the walk.
        length_s: Length of the episode; the walk is cut there, in whatever phase it is.
        between_s: Shortest and longest phase.

    Returns:
        ``(phase, seconds)`` in order. The seconds, to the millisecond, sum to ``length_s``.
    """
    walk: list[tuple[Phase, float]] = []
    left_s, choices = length_s, START_PROBABILITIES
    while left_s > 0:
        phase = _draw_phase(rng, choices)
        stay_s = min(left_s, round(float(rng.uniform(*between_s)), 3))
        left_s = round(left_s - stay_s, 3)
        if left_s < _MIN_REST_S:
            stay_s, left_s = round(stay_s + left_s, 3), 0.0
        walk.append((phase, stay_s))
        choices = TRANSITION_PROBABILITIES[phase]
    return tuple(walk)


def _draw_phase(rng: np.random.Generator, choices: tuple[tuple[Phase, float], ...]) -> Phase:
    rest = rng.random() * sum(weight for _, weight in choices)
    for phase, weight in choices:
        rest -= weight
        if rest < 0:
            return phase
    return choices[-1][0]
