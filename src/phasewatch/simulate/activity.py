"""What a make-believe machine does, tick by tick: idle life, chatter, a benign load and the malware's phases, added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from phasewatch.simulate.tables import ARRIVAL, AT, BUSY, IDLE, LATENTS, Activity, activity_of, rates_of
from phasewatch.vocab import Phase

TICK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """How far simulated hosts, episodes and ticks lie apart; all in units of a natural logarithm's standard deviation.

    Attributes:
        host_effect: Of a counter between hosts.
        episode_effect: Of a counter between episodes of one host: what makes windows of an episode alike.
        tick_noise: Of an activity from tick to tick.
        drift_per_week: How far a host's effect moves in seven days.
        malware_intensity: Factor on everything that malware does; below 1 it is harder to tell.
    """

    host_effect: float = 0.20
    episode_effect: float = 0.25
    tick_noise: float = 0.50
    drift_per_week: float = 0.05
    malware_intensity: float = 1.0


def named_rng(*names: object) -> np.random.Generator:
    """Give the generator of one purpose; a new purpose elsewhere does not shift it."""
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
    knobs: Knobs,
) -> NDArray[np.float64]:
    """Draw the rates of each tick.

    Args:
        rng: Of this episode.
        at_s: ``(n,)`` time of each tick since the first label.
        profile: What runs; ``benign`` is a machine on which nothing malicious is.
        sample_name: Its variant; moves the intensity by a factor that is the same in every episode.
        busy: The benign load that runs through the whole episode, or empty.
        phases: As walked; their lengths end to end.
        knobs: How noisy the world is.

    Returns:
        ``(n, 12)`` rates per second in the order of LATENTS.
    """
    n = len(at_s)
    total = np.tile(rates_of(IDLE), (n, 1)) * _noise(rng, n, 0.3)[:, None]
    total += _chatter(rng, n)
    if busy:
        load = dict(BUSY)[busy]
        total += _run(rng, load, at_s, 0.0, float(at_s[-1]) + 1.0, 10 ** rng.uniform(-0.5, 0.2), knobs)
    variant = 10 ** named_rng("sample", sample_name).uniform(-0.25, 0.25) * knobs.malware_intensity
    start_s = 0.0
    for place, (phase, length_s) in enumerate(phases):
        # The state before the first label is installed unseen, so its phase began earlier than the telemetry.
        from_s = -60.0 if place == 0 else start_s
        end_s = start_s + length_s
        force = variant * 10 ** rng.uniform(-0.6, 0.4)
        if phase is Phase.ARMED and profile != "benign":
            arrives_s = rng.uniform(start_s, start_s + min(length_s, 20.0))
            takes_s = float(rng.uniform(1.0, 6.0))
            total += _run(rng, ARRIVAL, at_s, arrives_s, arrives_s + takes_s, force, knobs)
        elif profile != "benign" and (activity := activity_of(profile, phase)) is not None:
            total += _run(rng, activity, at_s, from_s, end_s, force, knobs)
        start_s = end_s
    cpu = total[:, AT["cpu"]]
    total[:, AT["user"]] *= np.minimum(1.0, 0.98 / np.maximum(cpu, 1e-9))
    np.minimum(cpu, 0.98, out=cpu)
    return total


def _run(
    rng: np.random.Generator,
    activity: Activity,
    at_s: NDArray[np.float64],
    from_s: float,
    to_s: float,
    force: float,
    knobs: Knobs,
) -> NDArray[np.float64]:
    """Draw one activity between two times: on and off in pulses, each tick with its own noise."""
    is_within = (at_s > from_s) & (at_s <= to_s)
    duty = min(0.95, activity.duty * min(2.0, force**0.4)) if activity.duty < 1 else 1.0
    is_on = is_within & _pulses(rng, len(at_s), duty, activity.pulse_s)
    rates = rates_of(activity) * max(force, 1e-3) ** np.where(np.arange(len(LATENTS)) < 2, 0.35, 1.0)
    shape = is_on * _noise(rng, len(at_s), knobs.tick_noise)
    return np.asarray(shape[:, None] * rates[None, :], np.float64)


def _pulses(rng: np.random.Generator, n: int, duty: float, pulse_s: float) -> NDArray[np.bool_]:
    """Draw an on-off sequence of exponential stays whose share of on is about ``duty``."""
    if duty >= 1:
        return np.ones(n, np.bool_)
    rounds = max(4, int(2 * n * TICK_S / pulse_s) + 4)
    stays = rng.exponential(1.0, (rounds, 2)) * (pulse_s * duty / TICK_S, pulse_s * (1 - duty) / TICK_S)
    edges = np.cumsum(np.maximum(stays, 0.5).ravel()) - rng.uniform(0, pulse_s / TICK_S)
    return np.asarray(np.searchsorted(edges, np.arange(n)) % 2 == 0, np.bool_)


def _noise(rng: np.random.Generator, n: int, spread: float) -> NDArray[np.float64]:
    """Draw a factor per tick: half of the spread wanders slowly, half is new each tick."""
    fresh = rng.standard_normal((2, n))
    slow = np.repeat(fresh[1, ::8], 8)[:n]
    return np.asarray(np.exp(spread * (0.7 * fresh[0] + 0.7 * slow) - spread**2 / 2), np.float64)


def _chatter(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """Draw the rare benign life of every machine in every phase: a question, a clock, a small page, a log line."""
    total = np.zeros((n, len(LATENTS)))
    at = int(rng.integers(0, 30))
    while at < n:
        kind = int(rng.integers(0, 4))
        if kind == 0:
            total[at, [AT["asked"], AT["sent"], AT["received"], AT["cpu"]]] += (2.0, 140.0, 200.0, 0.05)
        elif kind == 1:
            total[at, [AT["sent"], AT["received"]]] += (180.0, 180.0)
        elif kind == 2:
            total[at, [AT["opened"], AT["asked"], AT["sent"], AT["received"], AT["cpu"]]] += (
                2.0,
                2.0,
                900.0,
                1500.0,
                0.12,
            )
        else:
            total[at, [AT["write"], AT["forks"], AT["cpu"]]] += (8192.0, 4.0, 0.06)
        at += int(rng.integers(12, 61))  # 6 to 30 s
    return total
