"""Draw the activity of a simulated host, tick by tick.

The activity is a sum of rates: idle activity, background events, a benign load and the phases of the malware.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from phasewatch.types import BENIGN_PROFILE, Phase

__all__ = [
    "ACTIVE_BY_PROFILE",
    "BUSY_LOADS",
    "RATE_INDEX",
    "RATE_NAMES",
    "TICK_S",
    "ActivityRates",
    "SimulationSettings",
    "build_named_rng",
    "build_rate_array",
    "draw_activity",
    "find_malware_activity",
]

TICK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivityRates:
    """Rates of an activity while it is on, and its on-off pattern.

    Attributes:
        cpu: Cores.
        user: Cores in user mode, a part of `cpu`.
        write, read: Disk, B/s.
        sent, received: Network, B/s.
        opened: TCP connections opened per second.
        refused: TCP connections refused per second, a part of `opened`.
        asked: DNS queries per second.
        spread: Distinct ports and addresses per second beyond the first.
        forks: Processes created per second.
        touched: Growth of anonymous memory, B/s.
        duty: Share of the time that the activity is on; 1 is always.
        pulse_s: Mean length of an on-off cycle, in seconds.
    """

    cpu: float = 0.0
    user: float = 0.0
    write: float = 0.0
    read: float = 0.0
    sent: float = 0.0
    received: float = 0.0
    opened: float = 0.0
    refused: float = 0.0
    asked: float = 0.0
    spread: float = 0.0
    forks: float = 0.0
    touched: float = 0.0
    duty: float = 1.0
    pulse_s: float = 4.0


RATE_NAMES = tuple(field.name for field in fields(ActivityRates))[:-2]
RATE_INDEX = {name: i for i, name in enumerate(RATE_NAMES)}


def build_rate_array(activity: ActivityRates) -> NDArray[np.float64]:
    """Return the rates as a ``(12,)`` float64 array in the order of `RATE_NAMES`."""
    return np.array(astuple(activity)[:-2], np.float64)


# Magnitudes follow measurements on recorded VMs: idle 0.05 cores, mining 0.75, unpacking 0.42, a scan 10 SYN/s.
_IDLE_ACTIVITY = ActivityRates(cpu=0.045, user=0.012, forks=0.5, touched=200.0)

ACTIVE_BY_PROFILE: dict[str, ActivityRates] = {
    "cryptomine": ActivityRates(
        cpu=0.75, user=0.70, sent=40, received=30, opened=0.02, forks=0.2, duty=0.55, pulse_s=3.0
    ),
    "ransom-walk": ActivityRates(
        cpu=0.25, user=0.12, write=250e3, read=500e3, forks=6, touched=4e3, duty=0.6, pulse_s=5.0
    ),
    "scan-and-dial": ActivityRates(
        cpu=0.08,
        user=0.03,
        sent=700,
        received=300,
        opened=8,
        refused=3.5,
        asked=0.1,
        spread=6,
        forks=3,
        duty=0.7,
        pulse_s=4.0,
    ),
    "beacon-c2": ActivityRates(
        cpu=0.02, user=0.01, sent=350, received=300, opened=0.8, asked=0.5, forks=1.5, duty=0.3, pulse_s=5.0
    ),
    "exfil-drip": ActivityRates(
        cpu=0.1, user=0.04, read=60e3, sent=80e3, received=4e3, opened=0.8, forks=1.5, duty=0.7, pulse_s=5.0
    ),
    "dropper-persist": ActivityRates(
        cpu=0.12,
        user=0.07,
        write=60e3,
        sent=150,
        received=12e3,
        opened=0.2,
        asked=0.1,
        forks=5,
        touched=2e3,
        duty=0.3,
        pulse_s=7.0,
    ),
}
_INFECTING_ACTIVITY = ActivityRates(
    cpu=0.35,
    user=0.18,
    write=300e3,
    read=8e3,
    sent=150,
    received=500,
    opened=0.1,
    asked=0.3,
    forks=14,
    touched=6e3,
    duty=0.6,
    pulse_s=4.0,
)
_ARMED_ACTIVITY = ActivityRates(
    cpu=0.15, user=0.05, write=300e3, sent=900, received=200e3, opened=0.3, asked=0.2, forks=3, touched=2e3
)
_DORMANT_ACTIVITY = ActivityRates(
    cpu=0.01, user=0.004, sent=260, received=300, opened=0.5, asked=0.5, forks=0.6, duty=0.09, pulse_s=11.0
)

_BACKGROUND_EVENTS: tuple[dict[str, float], ...] = (
    {"asked": 2.0, "sent": 140.0, "received": 200.0, "cpu": 0.05},  # DNS query
    {"sent": 180.0, "received": 180.0},  # NTP query
    {"opened": 2.0, "asked": 2.0, "sent": 900.0, "received": 1500.0, "cpu": 0.12},  # small page
    {"write": 8192.0, "forks": 4.0, "cpu": 0.06},  # log line
)

# Benign loads. Most resemble one malicious profile in some rates, some resemble none.
BUSY_LOADS: tuple[tuple[str, ActivityRates], ...] = (
    ("compile", ActivityRates(cpu=0.7, user=0.5, write=60e3, read=40e3, forks=20, touched=8e3, duty=0.7, pulse_s=6.0)),
    ("compress", ActivityRates(cpu=0.6, user=0.5, write=80e3, read=200e3, forks=1, touched=5e3, duty=0.6, pulse_s=5.0)),
    ("render", ActivityRates(cpu=0.8, user=0.75, forks=0.3, touched=2e3, duty=0.6, pulse_s=5.0)),
    ("hash", ActivityRates(cpu=0.75, user=0.7, read=150e3, forks=0.5, duty=0.6, pulse_s=4.0)),
    ("backup", ActivityRates(cpu=0.25, user=0.1, write=220e3, read=450e3, forks=4, duty=0.6, pulse_s=5.0)),
    ("find-grep", ActivityRates(cpu=0.3, user=0.12, read=600e3, forks=8, duty=0.5, pulse_s=4.0)),
    ("database", ActivityRates(cpu=0.2, user=0.12, write=90e3, read=90e3, forks=1, touched=3e3, duty=0.8, pulse_s=2.0)),
    (
        "poller",
        ActivityRates(
            cpu=0.02, user=0.01, sent=180, received=260, opened=0.4, asked=0.3, forks=0.8, duty=0.25, pulse_s=6.0
        ),
    ),
    (
        "download",
        ActivityRates(
            cpu=0.12, user=0.04, write=90e3, sent=2e3, received=120e3, opened=0.3, forks=1, duty=0.6, pulse_s=6.0
        ),
    ),
    (
        "upload",
        ActivityRates(
            cpu=0.1, user=0.04, read=60e3, sent=90e3, received=4e3, opened=0.6, forks=1.2, duty=0.6, pulse_s=5.0
        ),
    ),
    (
        "health-checks",
        ActivityRates(
            cpu=0.06, user=0.03, sent=450, received=300, opened=4, refused=1, asked=0.2, spread=2.5, forks=3, duty=0.6
        ),
    ),
    (
        "package-install",
        ActivityRates(
            cpu=0.35, user=0.2, write=250e3, received=40e3, opened=0.2, asked=0.2, forks=12, touched=5e3, duty=0.5
        ),
    ),
    ("log-rotate", ActivityRates(cpu=0.15, user=0.08, write=120e3, read=30e3, forks=4, duty=0.25, pulse_s=8.0)),
)


def find_malware_activity(profile: str, phase: Phase) -> ActivityRates | None:
    """Return the continuous activity of the malware in a phase; None for clean and for armed, which has one event."""
    if phase is Phase.ACTIVE:
        return ACTIVE_BY_PROFILE[profile]
    if phase is Phase.INFECTING:
        return _INFECTING_ACTIVITY
    if phase is Phase.DORMANT:
        return _DORMANT_ACTIVITY
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    """Spread of simulated hosts, episodes and ticks, as standard deviations of the natural logarithm.

    Attributes:
        host_effect: Spread of a counter between hosts.
        episode_effect: Spread of a counter between episodes of one host; it correlates the windows of an episode.
        tick_noise: Spread of an activity between ticks.
        drift_per_week: Change of a host's effect in seven days.
        malware_intensity: Factor on all rates of the malware; below 1 it is harder to detect.
    """

    host_effect: float = 0.20
    episode_effect: float = 0.25
    tick_noise: float = 0.50
    drift_per_week: float = 0.05
    malware_intensity: float = 1.0


def build_named_rng(*names: object) -> np.random.Generator:
    """Build the random generator of one purpose. Each purpose has its own, so a new one does not change others."""
    digest = sha256("\0".join(map(str, names)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))


def draw_activity(
    rng: np.random.Generator,
    *,
    at_s: NDArray[np.float64],
    profile: str,
    sample_name: str,
    busy: str,
    phases: Sequence[tuple[Phase, float]],
    settings: SimulationSettings,
) -> NDArray[np.float64]:
    """Draw the rates of each tick.

    Args:
        rng: Random generator of the episode.
        at_s: ``(n,)`` float64 time of each tick since the first label, in seconds.
        profile: The profile that runs; ``benign`` for a host without malware.
        sample_name: The sample; it scales the intensity by a factor that is the same in every episode.
        busy: The benign load that runs through the whole episode; empty for none.
        phases: ``(phase, seconds)`` in order.
        settings: Spread of ticks and intensity of the malware.

    Returns:
        ``(n, 12)`` float64 rates per second in the order of `RATE_NAMES`.
    """
    n = len(at_s)
    total = np.tile(build_rate_array(_IDLE_ACTIVITY), (n, 1)) * _draw_noise(rng, n, 0.3)[:, None]
    total += _draw_background_events(rng, n)
    if busy:
        load = dict(BUSY_LOADS)[busy]
        total += _draw_pulsed_activity(
            rng, load, at_s, 0.0, float(at_s[-1]) + 1.0, 10 ** rng.uniform(-0.5, 0.2), settings
        )
    variant = 10 ** build_named_rng("sample", sample_name).uniform(-0.25, 0.25) * settings.malware_intensity
    start_s = 0.0
    for place, (phase, length_s) in enumerate(phases):
        # The first phase began before the telemetry, because its state is installed before the first label.
        from_s = -60.0 if place == 0 else start_s
        end_s = start_s + length_s
        intensity = variant * 10 ** rng.uniform(-0.6, 0.4)
        if phase is Phase.ARMED and profile != BENIGN_PROFILE:
            arrives_s = rng.uniform(start_s, start_s + min(length_s, 20.0))
            takes_s = float(rng.uniform(1.0, 6.0))
            total += _draw_pulsed_activity(
                rng, _ARMED_ACTIVITY, at_s, arrives_s, arrives_s + takes_s, intensity, settings
            )
        elif profile != BENIGN_PROFILE and (activity := find_malware_activity(profile, phase)) is not None:
            total += _draw_pulsed_activity(rng, activity, at_s, from_s, end_s, intensity, settings)
        start_s = end_s
    cpu = total[:, RATE_INDEX["cpu"]]
    total[:, RATE_INDEX["user"]] *= np.minimum(1.0, 0.98 / np.maximum(cpu, 1e-9))
    np.minimum(cpu, 0.98, out=cpu)
    return total


def _draw_pulsed_activity(
    rng: np.random.Generator,
    activity: ActivityRates,
    at_s: NDArray[np.float64],
    from_s: float,
    to_s: float,
    intensity: float,
    settings: SimulationSettings,
) -> NDArray[np.float64]:
    """Draw an activity between two times, in pulses and with noise per tick: ``(n, 12)`` float64 rates per second."""
    is_within = (at_s > from_s) & (at_s <= to_s)
    duty = min(0.95, activity.duty * min(2.0, intensity**0.4)) if activity.duty < 1 else 1.0
    is_on = is_within & _draw_pulses(rng, len(at_s), duty, activity.pulse_s)
    rates = build_rate_array(activity) * max(intensity, 1e-3) ** np.where(np.arange(len(RATE_NAMES)) < 2, 0.35, 1.0)
    shape = is_on * _draw_noise(rng, len(at_s), settings.tick_noise)
    return np.asarray(shape[:, None] * rates[None, :], np.float64)


def _draw_pulses(rng: np.random.Generator, n: int, duty: float, pulse_s: float) -> NDArray[np.bool_]:
    """Draw an on-off sequence with exponential durations and an on-share of about ``duty``: ``(n,)`` bool."""
    if duty >= 1:
        return np.ones(n, np.bool_)
    rounds = max(4, int(2 * n * TICK_S / pulse_s) + 4)
    stays = rng.exponential(1.0, (rounds, 2)) * (pulse_s * duty / TICK_S, pulse_s * (1 - duty) / TICK_S)
    edges = np.cumsum(np.maximum(stays, 0.5).ravel()) - rng.uniform(0, pulse_s / TICK_S)
    return np.asarray(np.searchsorted(edges, np.arange(n)) % 2 == 0, np.bool_)


def _draw_noise(rng: np.random.Generator, n: int, spread: float) -> NDArray[np.float64]:
    """Draw a factor per tick, ``(n,)`` float64: one half of the spread changes slowly, one half every tick."""
    fresh = rng.standard_normal((2, n))
    slow = np.repeat(fresh[1, ::8], 8)[:n]
    return np.asarray(np.exp(spread * (0.7 * fresh[0] + 0.7 * slow) - spread**2 / 2), np.float64)


def _draw_background_events(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """Draw the rare background events of every host: ``(n, 12)`` float64 rates per second."""
    total = np.zeros((n, len(RATE_NAMES)))
    tick = int(rng.integers(0, 30))
    while tick < n:
        for name, rate in _BACKGROUND_EVENTS[int(rng.integers(0, len(_BACKGROUND_EVENTS)))].items():
            total[tick, RATE_INDEX[name]] += rate
        tick += int(rng.integers(12, 61))  # 6 to 30 s
    return total
