"""What the emulated profiles do, with which intensities, within which bounds: the table that plan, guest and docs share.

Everything here is an emulation: CPU, files on a throw-away disk, sockets to the recorder's own sink. The ATT&CK
technique ids say what a profile resembles; no exploit and no payload exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log
from types import MappingProxyType
from typing import TYPE_CHECKING

from phasewatch.errors import UsageError, suggest_names
from phasewatch.types import Phase, SampleKind

if TYPE_CHECKING:
    import numpy as np

IDLE_SAMPLE = "idle"


N_SAMPLE_GROUPS = 4  # sample i of a profile belongs to group i mod 4; held_out_sample holds out a group


@dataclass(frozen=True, slots=True, kw_only=True)
class IntensityRange:
    """One intensity, drawn anew for each episode, log-uniform between `low` and `high`."""

    name: str
    low: float
    high: float
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetyBounds:
    """The safety contract of a profile, for one episode of at most ten minutes; a test holds each sample to it."""

    written_bytes: int
    sent_bytes: int
    processes: int
    networks: tuple[str, ...] = ("10.0.2.0/24", "198.18.0.0/15", "198.51.100.0/24")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSample:
    """One way to reach a profile's end."""

    name: str
    about: str
    knobs: tuple[IntensityRange, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadProfile:
    """What the emulated malware is for, or the benign life of a machine."""

    name: str
    kind: SampleKind
    about: str
    attack: tuple[str, ...]
    samples: tuple[ProfileSample, ...]
    bounds: SafetyBounds


def _parse_intensities(words: str) -> tuple[IntensityRange, ...]:
    """Read `name low high unit` groups, separated by commas."""
    parts = [part.split() for part in words.split(",") if part.strip()]
    return tuple(
        IntensityRange(name=name, low=float(low), high=float(high), unit=unit) for name, low, high, unit in parts
    )


# How any profile arrives, infects and sleeps; quiet enough that an install of a package looks alike.
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
    _malicious_profile("cryptomine", "Burns CPU for somebody else.", "T1496", 2e8, 2e6, (
        ("full", "hashes nearly all the time", "duty 0.5 0.9 1"),
        ("throttled", "hashes for a fixed share of each tenth of a second", "duty 0.1 0.5 1"),
        ("bursty", "works and rests in turns", "duty 0.2 0.8 1, period_s 2 20 s"),
        ("memory-hard", "hashes over a large table", "duty 0.15 0.9 1, mem_mib 4 32 MiB"),
    )),
    _malicious_profile("ransom-walk", "Walks the documents and scrambles them.", "T1486 T1083", 4e9, 2e6, (
        ("overwrite", "scrambles each file in place", "rate_kbps 200 4000 kB/s"),
        ("write-new-delete-old", "writes a copy beside it, deletes the original", "rate_kbps 200 3000 kB/s"),
        ("intermittent", "scrambles the head of each file and rests", "rate_kbps 100 1500 kB/s, pause_s 1 8 s"),
        ("throttled", "as overwrite, slow enough to go unseen", "rate_kbps 20 200 kB/s"),
    )),
    _malicious_profile("scan-and-dial", "Looks for open ports and dials what answers.", "T1046 T1018", 2e8, 2e7, (
        ("sequential", "address after address, a dozen ports each", "rate_hz 2 20 1/s"),
        ("random", "random addresses and ports", "rate_hz 1 15 1/s"),
        ("low-and-slow", "one attempt in seconds", "rate_hz 0.15 1.5 1/s"),
        ("one-port", "one port over many addresses", "rate_hz 1 15 1/s"),
    )),
    _malicious_profile("beacon-c2", "Asks its controller what to do.", "T1071.001 T1071.004 T1573", 2e8, 1e7, (
        ("fixed", "asks at a fixed interval", "period_s 1.5 12 s"),
        ("jittered", "asks at random intervals", "period_s 1.5 12 s"),
        ("dns-only", "asks by TXT questions", "period_s 1 10 s"),
        ("long-poll", "holds a question open until it is answered", "period_s 1.5 10 s"),
    )),
    _malicious_profile("exfil-drip", "Carries documents out.", "T1041 T1048.003 T1030", 2e8, 4e8, (
        ("http-bulk", "few large uploads", "rate_kbps 50 500 kB/s"),
        ("small-posts", "many small uploads", "rate_kbps 5 60 kB/s"),
        ("dns-labels", "in the labels of DNS questions", "rate_kbps 0.2 2 kB/s"),
        ("low-and-slow", "small uploads with long rests", "rate_kbps 5 30 kB/s"),
    )),
    _malicious_profile("dropper-persist", "Fetches the next stage and makes sure that it stays.", "T1105 T1053.003 T1547", 4e8, 1e7, (
        ("fetch-unpack", "downloads and unpacks", "period_s 3 20 s, piece_kib 50 800 KiB"),
        ("cron-like", "rewrites its timers and checks itself", "period_s 1.5 10 s"),
        ("self-copy", "copies itself to many places", "period_s 2 15 s, piece_kib 50 1000 KiB"),
        ("in-pieces", "downloads in small pieces with rests", "period_s 3 20 s, piece_kib 50 800 KiB"),
    )),
    WorkloadProfile(
        name="benign", kind=SampleKind.BENIGN, about="The life of a healthy machine.", attack=(),
        bounds=SafetyBounds(written_bytes=int(4e9), sent_bytes=int(4e8), processes=24),
        samples=tuple(ProfileSample(name=n, about=a, knobs=_parse_intensities(k)) for n, a, k in (
            ("idle", "nothing but the chatter of every machine", ""),
            ("compile", "a process a unit: reads, thinks, writes an object", "duty 0.2 0.9 1"),
            ("backup", "copies the documents", "rate_kbps 100 3000 kB/s"),
            ("poller", "asks a server for news", "period_s 1.5 12 s"),
            ("compress", "packs documents", "duty 0.1 0.9 1"),
            ("find-grep", "searches the documents", "period_s 0.5 8 s"),
            ("download", "fetches files", "rate_kbps 50 1000 kB/s, period_s 2 15 s"),
            ("upload", "sends a backup away", "rate_kbps 10 400 kB/s, period_s 2 15 s"),
            ("hash", "checks digests", "duty 0.1 0.9 1"),
            ("database", "small random writes, each made durable", "rate_kbps 20 600 kB/s"),
            ("health-checks", "asks known servers on known ports", "period_s 2 20 s"),
            ("package-install", "fetches and unpacks packages", "rate_kbps 100 1500 kB/s, period_s 2 20 s"),
            ("render", "computes", "duty 0.1 0.9 1"),
            ("log-rotate", "writes logs and packs them", "rate_kbps 30 1000 kB/s, period_s 2 20 s"),
        )),
    ),
)  # fmt: skip


def find_profile(name: str) -> WorkloadProfile:
    """Give a profile by name.

    Raises:
        UsageError: If there is none; the message names the nearest.
    """
    for row in PROFILES:
        if row.name == name:
            return row
    raise UsageError(f"no profile {name!r}; {suggest_names(name, [row.name for row in PROFILES])}")


def find_sample(profile_name: str, name: str) -> ProfileSample:
    """Give a sample of a profile by name.

    Raises:
        UsageError: If there is none; the message names the nearest.
    """
    rows = find_profile(profile_name).samples
    for row in rows:
        if row.name == name:
            return row
    raise UsageError(f"{profile_name} has no sample {name!r}; {suggest_names(name, [row.name for row in rows])}")


def find_sample_group(profile_name: str, name: str) -> int:
    """Give the sample's group, 0 to 3: its place in the registry mod 4."""
    found = find_sample(profile_name, name)
    return find_profile(profile_name).samples.index(found) % N_SAMPLE_GROUPS


def draw_intensities(drawn: ProfileSample, rng: np.random.Generator) -> dict[str, float]:
    """Draw one episode's intensities, log-uniform, one draw a knob in the sample's order."""
    return {knob.name: float(exp(rng.uniform(log(knob.low), log(knob.high)))) for knob in drawn.knobs}


def _check_table() -> None:
    """Refuse a table that contradicts itself, at import."""
    for row in PROFILES:
        names = [s.name for s in row.samples]
        if len(names) < N_SAMPLE_GROUPS or len(set(names)) != len(names):
            raise ValueError(f"profiles: {row.name} needs {N_SAMPLE_GROUPS} samples of different names")
        for one in row.samples:
            if any(not 0 < knob.low < knob.high for knob in one.knobs):
                raise ValueError(f"profiles: {row.name}/{one.name} has a knob without a range")


_check_table()


# DESIGN section 2, "Plan". Elapsed time alone scores 0.22 under this walk (simulated), 0.51 under a one-way order.
START_PROBABILITIES: tuple[tuple[Phase, float], ...] = (
    (Phase.CLEAN, 0.35), (Phase.ARMED, 0.15), (Phase.INFECTING, 0.10), (Phase.ACTIVE, 0.20), (Phase.DORMANT, 0.20),
)  # fmt: skip
TRANSITION_PROBABILITIES = MappingProxyType(
    {
        Phase.CLEAN: ((Phase.ARMED, 0.75), (Phase.INFECTING, 0.25)),
        Phase.ARMED: ((Phase.INFECTING, 0.75), (Phase.CLEAN, 0.25)),
        Phase.INFECTING: ((Phase.ACTIVE, 0.60), (Phase.DORMANT, 0.25), (Phase.CLEAN, 0.15)),
        Phase.ACTIVE: ((Phase.DORMANT, 0.75), (Phase.CLEAN, 0.25)),
        Phase.DORMANT: ((Phase.ACTIVE, 0.65), (Phase.CLEAN, 0.25), (Phase.INFECTING, 0.10)),
    }
)
PHASE_RANGE_S = (20.0, 45.0)  # shortest and longest stay in a phase
EPISODE_RANGE_S = (100.0, 180.0)
_MIN_REST_S = 1.0  # a rest shorter than this is given to the phase before it


def draw_episode_length(rng: np.random.Generator, *, between_s: tuple[float, float] = EPISODE_RANGE_S) -> float:
    """Draw an episode's length in seconds, to the millisecond; it must not depend on what the episode shows."""
    return round(float(rng.uniform(*between_s)), 3)


def draw_phase_walk(
    rng: np.random.Generator, *, length_s: float, between_s: tuple[float, float] = PHASE_RANGE_S
) -> tuple[tuple[Phase, float], ...]:
    """Draw the phases of one malicious episode.

    Args:
        rng: Used for nothing else, so that other draws don't shift the walk.
        length_s: Where the walk is cut, without regard to where it stands.
        between_s: Shortest and longest stay in a phase.

    Returns:
        ``(phase, seconds)`` in order; the seconds, to the millisecond, sum to ``length_s``.
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
    at = rng.random() * sum(weight for _, weight in choices)
    for phase, weight in choices:
        at -= weight
        if at < 0:
            return phase
    return choices[-1][0]
