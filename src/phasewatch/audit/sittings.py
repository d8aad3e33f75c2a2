"""When a corpus was recorded, on which processor, and how fast that machine was (pure)."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

APART_S = 45 * 60.0  # a longer pause between two starts begins a new sitting
UNKNOWN = "not written down"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How one episode began.

    Attributes:
        started_s: Seconds since 1970.
        recorder: `Host.recorder` of its manifest.
        boot_s: To the guest's first word; None where nobody booted it.
    """

    host_id: str
    started_s: float
    recorder: str
    boot_s: float | None


def processor_of(recorder: str) -> str:
    """Read the processor from a manifest's ``host.recorder``; recordings before November 29, 2026 do not name it."""
    found = re.search(r", on (.+)$", recorder)
    return found[1] if found else UNKNOWN


def sittings(starts: Sequence[Start]) -> list[list[Start]]:
    """Group episodes into sittings: by processor, and by pauses of more than APART_S."""
    found: list[list[Start]] = []
    for start in sorted(starts, key=lambda s: s.started_s):
        last = found[-1][-1] if found else None
        if (
            last is None
            or start.started_s - last.started_s > APART_S
            or processor_of(start.recorder) != processor_of(last.recorder)
        ):
            found.append([])
        found[-1].append(start)
    return found


def render_sittings(starts: Sequence[Start], hosts: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Give a table's head and rows: a sitting a row, the median boot time of each host's machines in seconds."""
    rows = []
    for sitting in sittings(starts):
        began = datetime.fromtimestamp(sitting[0].started_s, UTC)
        boots = [[s.boot_s for s in sitting if s.host_id == host and s.boot_s is not None] for host in hosts]
        of = [began.strftime("%Y-%m-%d %H:%M"), str(len(sitting)), processor_of(sitting[0].recorder)]
        rows.append([*of, *(f"{statistics.median(b):.1f}" if b else "·" for b in boots)])
    return ["from (UTC)", "episodes", "processor", *hosts], rows
