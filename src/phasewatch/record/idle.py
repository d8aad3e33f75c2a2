"""Waiting until the machine has nothing else to do: a neighbour that nobody planned would stand in every channel."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from phasewatch.record.base import Clock

IDLE_CORES = 0.3
LOOK_S = 3.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """CPU seconds spent so far: by the whole machine without low-priority work, and by this process and its children."""

    machine_s: float
    own_s: float


def parse_stat(text: str) -> float:
    """Read the busy CPU seconds of all cores from /proc/stat.

    Work at low priority (`nice`) is left out: it yields. So are `guest` times, which user time holds already.
    """
    for line in text.splitlines():
        if line.startswith("cpu "):
            user, _nice, system, _idle, _iowait, irq, softirq, steal = (int(part) for part in line.split()[1:9])
            return (user + system + irq + softirq + steal) / _TICKS_PER_S
    raise ValueError("/proc/stat has no line `cpu`")


def read_effort() -> Effort:
    """Read what was spent so far."""
    own = os.times()
    return Effort(
        machine_s=parse_stat(Path("/proc/stat").read_text(encoding="utf-8")),
        own_s=own.user + own.system + own.children_user + own.children_system,
    )


async def wait_until_idle(
    clock: Clock,
    *,
    at_most_s: float,
    read: Callable[[], Effort] = read_effort,
    on_busy: Callable[[float], None] = lambda load: None,
) -> float:
    """Wait until the others keep fewer than `IDLE_CORES` cores busy for `LOOK_S`, or `at_most_s` has passed.

    Args:
        clock: The host's.
        at_most_s: How long.
        read: Gives what the machine and we have spent.
        on_busy: Hears the load once, when there is something to wait for.

    Returns:
        The last load that was seen, in cores; `IDLE_CORES` or more if patience ran out.
    """
    give_up_ns = clock.mono_ns() + round(at_most_s * 1e9)
    told = False
    while True:
        before, began_ns = read(), clock.mono_ns()
        await clock.sleep_until(began_ns + round(LOOK_S * 1e9))
        after, ended_ns = read(), clock.mono_ns()
        spent_s = after.machine_s - before.machine_s - (after.own_s - before.own_s)
        load = max(0.0, spent_s / ((ended_ns - began_ns) / 1e9))
        if load < IDLE_CORES or clock.mono_ns() >= give_up_ns:
            return load
        if not told:
            told = True
            on_busy(load)
