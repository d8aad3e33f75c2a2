"""What the emulated profiles do, with which intensities, within which bounds: the table that plan, guest and docs share.

Everything here is an emulation: CPU, files on a throw-away disk, sockets to the recorder's own sink. The ATT&CK
technique ids say what a profile resembles; no exploit and no payload exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log
from typing import TYPE_CHECKING

from phasewatch.errors import UsageError, name_the_nearest
from phasewatch.vocab import SampleKind

if TYPE_CHECKING:
    import numpy as np

SAMPLE_GROUPS = 4  # sample i of a profile belongs to group i mod 4; held_out_sample holds out a group


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One intensity, drawn anew for each episode, log-uniform between `low` and `high`."""

    name: str
    low: float
    high: float
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The safety contract of a profile, for one episode of at most ten minutes; a test holds each sample to it."""

    written_bytes: int
    sent_bytes: int
    processes: int
    networks: tuple[str, ...] = ("10.0.2.0/24", "198.18.0.0/15", "198.51.100.0/24")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One way to reach a profile's end."""

    name: str
    about: str
    knobs: tuple[Knob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What the emulated malware is for, or the benign life of a machine."""

    name: str
    kind: SampleKind
    about: str
    attack: tuple[str, ...]
    samples: tuple[Sample, ...]
    bounds: Bounds


def _knobs(words: str) -> tuple[Knob, ...]:
    """Read `name low high unit` groups, separated by commas."""
    parts = [part.split() for part in words.split(",") if part.strip()]
    return tuple(Knob(name=name, low=float(low), high=float(high), unit=unit) for name, low, high, unit in parts)


# How any profile arrives, infects and sleeps; quiet enough that an install of a package looks alike.
COMMON = _knobs("payload_kib 50 2000 KiB, arrive_s 1 12 s, infect_mb 0.2 20 MB, infect_s 10 25 s, heartbeat_s 6 60 s")


def _malicious(
    name: str, about: str, attack: str, written: float, sent: float, samples: tuple[tuple[str, str, str], ...]
) -> Profile:
    return Profile(
        name=name,
        kind=SampleKind.EMULATED,
        about=about,
        attack=tuple(attack.split()),
        samples=tuple(Sample(name=n, about=a, knobs=COMMON + _knobs(k)) for n, a, k in samples),
        bounds=Bounds(written_bytes=int(written), sent_bytes=int(sent), processes=24),
    )


PROFILES: tuple[Profile, ...] = (
    _malicious("cryptomine", "Burns CPU for somebody else.", "T1496", 2e8, 2e6, (
        ("full", "hashes nearly all the time", "duty 0.5 0.9 1"),
        ("throttled", "hashes for a fixed share of each tenth of a second", "duty 0.1 0.5 1"),
        ("bursty", "works and rests in turns", "duty 0.2 0.8 1, period_s 2 20 s"),
        ("memory-hard", "hashes over a large table", "duty 0.15 0.9 1, mem_mib 4 32 MiB"),
    )),
    _malicious("ransom-walk", "Walks the documents and scrambles them.", "T1486 T1083", 4e9, 2e6, (
        ("overwrite", "scrambles each file in place", "rate_kbps 200 4000 kB/s"),
        ("write-new-delete-old", "writes a copy beside it, deletes the original", "rate_kbps 200 3000 kB/s"),
        ("intermittent", "scrambles the head of each file and rests", "rate_kbps 100 1500 kB/s, pause_s 1 8 s"),
        ("throttled", "as overwrite, slow enough to go unseen", "rate_kbps 20 200 kB/s"),
    )),
    _malicious("scan-and-dial", "Looks for open ports and dials what answers.", "T1046 T1018", 2e8, 2e7, (
        ("sequential", "address after address, a dozen ports each", "rate_hz 2 20 1/s"),
        ("random", "random addresses and ports", "rate_hz 1 15 1/s"),
        ("low-and-slow", "one attempt in seconds", "rate_hz 0.15 1.5 1/s"),
        ("one-port", "one port over many addresses", "rate_hz 1 15 1/s"),
    )),
    _malicious("beacon-c2", "Asks its controller what to do.", "T1071.001 T1071.004 T1573", 2e8, 1e7, (
        ("fixed", "asks at a fixed interval", "period_s 1.5 12 s"),
        ("jittered", "asks at random intervals", "period_s 1.5 12 s"),
        ("dns-only", "asks by TXT questions", "period_s 1 10 s"),
        ("long-poll", "holds a question open until it is answered", "period_s 1.5 10 s"),
    )),
    _malicious("exfil-drip", "Carries documents out.", "T1041 T1048.003 T1030", 2e8, 4e8, (
        ("http-bulk", "few large uploads", "rate_kbps 50 500 kB/s"),
        ("small-posts", "many small uploads", "rate_kbps 5 60 kB/s"),
        ("dns-labels", "in the labels of DNS questions", "rate_kbps 0.2 2 kB/s"),
        ("low-and-slow", "small uploads with long rests", "rate_kbps 5 30 kB/s"),
    )),
    _malicious("dropper-persist", "Fetches the next stage and makes sure that it stays.", "T1105 T1053.003 T1547", 4e8, 1e7, (
        ("fetch-unpack", "downloads and unpacks", "period_s 3 20 s, piece_kib 50 800 KiB"),
        ("cron-like", "rewrites its timers and checks itself", "period_s 1.5 10 s"),
        ("self-copy", "copies itself to many places", "period_s 2 15 s, piece_kib 50 1000 KiB"),
        ("in-pieces", "downloads in small pieces with rests", "period_s 3 20 s, piece_kib 50 800 KiB"),
    )),
    Profile(
        name="benign", kind=SampleKind.BENIGN, about="The life of a healthy machine.", attack=(),
        bounds=Bounds(written_bytes=int(4e9), sent_bytes=int(4e8), processes=24),
        samples=tuple(Sample(name=n, about=a, knobs=_knobs(k)) for n, a, k in (
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


def profile(name: str) -> Profile:
    """Give a profile by name.

    Raises:
        UsageError: If there is none; the message names the nearest.
    """
    for row in PROFILES:
        if row.name == name:
            return row
    raise UsageError(f"no profile {name!r}; {name_the_nearest(name, [row.name for row in PROFILES])}")


def sample(profile_name: str, name: str) -> Sample:
    """Give a sample of a profile by name.

    Raises:
        UsageError: If there is none; the message names the nearest.
    """
    rows = profile(profile_name).samples
    for row in rows:
        if row.name == name:
            return row
    raise UsageError(f"{profile_name} has no sample {name!r}; {name_the_nearest(name, [row.name for row in rows])}")


def sample_group(profile_name: str, name: str) -> int:
    """Give the sample's group, 0 to 3: its place in the registry mod 4."""
    found = sample(profile_name, name)
    return profile(profile_name).samples.index(found) % SAMPLE_GROUPS


def draw_knobs(drawn: Sample, rng: np.random.Generator) -> dict[str, float]:
    """Draw one episode's intensities, log-uniform, one draw a knob in the sample's order."""
    return {knob.name: float(exp(rng.uniform(log(knob.low), log(knob.high)))) for knob in drawn.knobs}


def _check_table() -> None:
    """Refuse a table that contradicts itself, at import."""
    for row in PROFILES:
        names = [s.name for s in row.samples]
        if len(names) < SAMPLE_GROUPS or len(set(names)) != len(names):
            raise ValueError(f"profiles: {row.name} needs {SAMPLE_GROUPS} samples of different names")
        for one in row.samples:
            if any(not 0 < knob.low < knob.high for knob in one.knobs):
                raise ValueError(f"profiles: {row.name}/{one.name} has a knob without a range")


_check_table()
