"""How busy a make-believe machine is at what: one row of rates for each profile, phase and benign load."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from phasewatch.vocab import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What something costs a second while it is on, and how it pulses.

    Attributes:
        cpu: Cores.
        user: Cores, the part of them in user mode.
        write, read: Disk, B/s.
        sent, received: Network, B/s.
        opened: TCP connections opened a second.
        refused: Of them refused a second.
        asked: DNS questions a second.
        spread: Distinct ports and addresses a second beyond the first.
        forks: Processes made a second.
        touched: Anonymous memory taken, B/s.
        duty: Share of the time that it is on; 1 is always.
        pulse_s: Mean length of an on-off round.
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


LATENTS = tuple(field.name for field in fields(Activity))[:-2]
AT = {name: i for i, name in enumerate(LATENTS)}


def rates_of(activity: Activity) -> NDArray[np.float64]:
    """Give the rates as an array in the order of LATENTS."""
    return np.array(astuple(activity)[:-2], np.float64)


# Magnitudes follow what was seen on emulated machines: idle 0.05 cores, mining 0.75, unpacking 0.42, a scan 10 SYN/s.
IDLE = Activity(cpu=0.045, user=0.012, forks=0.5, touched=200.0)

ACTIVE: dict[str, Activity] = {
    "cryptomine": Activity(cpu=0.75, user=0.70, sent=40, received=30, opened=0.02, forks=0.2, duty=0.55, pulse_s=3.0),
    "ransom-walk": Activity(
        cpu=0.25, user=0.12, write=250e3, read=500e3, forks=6, touched=4e3, duty=0.6, pulse_s=5.0
    ),
    "scan-and-dial": Activity(
        cpu=0.08, user=0.03, sent=700, received=300, opened=8, refused=3.5, asked=0.1, spread=6, forks=3, duty=0.7, pulse_s=4.0
    ),
    "beacon-c2": Activity(cpu=0.02, user=0.01, sent=350, received=300, opened=0.8, asked=0.5, forks=1.5, duty=0.3, pulse_s=5.0),
    "exfil-drip": Activity(cpu=0.1, user=0.04, read=60e3, sent=80e3, received=4e3, opened=0.8, forks=1.5, duty=0.7, pulse_s=5.0),
    "dropper-persist": Activity(
        cpu=0.12, user=0.07, write=60e3, sent=150, received=12e3, opened=0.2, asked=0.1, forks=5, touched=2e3, duty=0.3, pulse_s=7.0
    ),
}  # fmt: skip
UNPACKING = Activity(
    cpu=0.35, user=0.18, write=300e3, read=8e3, sent=150, received=500, opened=0.1, asked=0.3, forks=14, touched=6e3,
    duty=0.6, pulse_s=4.0,
)  # fmt: skip
ARRIVAL = Activity(
    cpu=0.15, user=0.05, write=300e3, sent=900, received=200e3, opened=0.3, asked=0.2, forks=3, touched=2e3
)
HEARTBEAT = Activity(
    cpu=0.01, user=0.004, sent=260, received=300, opened=0.5, asked=0.5, forks=0.6, duty=0.09, pulse_s=11.0
)

# Benign loads that look like a profile at some angle: one malicious profile each, and some like none.
BUSY: tuple[tuple[str, Activity], ...] = (
    ("compile", Activity(cpu=0.7, user=0.5, write=60e3, read=40e3, forks=20, touched=8e3, duty=0.7, pulse_s=6.0)),
    ("compress", Activity(cpu=0.6, user=0.5, write=80e3, read=200e3, forks=1, touched=5e3, duty=0.6, pulse_s=5.0)),
    ("render", Activity(cpu=0.8, user=0.75, forks=0.3, touched=2e3, duty=0.6, pulse_s=5.0)),
    ("hash", Activity(cpu=0.75, user=0.7, read=150e3, forks=0.5, duty=0.6, pulse_s=4.0)),
    ("backup", Activity(cpu=0.25, user=0.1, write=220e3, read=450e3, forks=4, duty=0.6, pulse_s=5.0)),
    ("find-grep", Activity(cpu=0.3, user=0.12, read=600e3, forks=8, duty=0.5, pulse_s=4.0)),
    ("database", Activity(cpu=0.2, user=0.12, write=90e3, read=90e3, forks=1, touched=3e3, duty=0.8, pulse_s=2.0)),
    ("poller", Activity(cpu=0.02, user=0.01, sent=180, received=260, opened=0.4, asked=0.3, forks=0.8, duty=0.25, pulse_s=6.0)),
    ("download", Activity(cpu=0.12, user=0.04, write=90e3, sent=2e3, received=120e3, opened=0.3, forks=1, duty=0.6, pulse_s=6.0)),
    ("upload", Activity(cpu=0.1, user=0.04, read=60e3, sent=90e3, received=4e3, opened=0.6, forks=1.2, duty=0.6, pulse_s=5.0)),
    ("health-checks", Activity(cpu=0.06, user=0.03, sent=450, received=300, opened=4, refused=1, asked=0.2, spread=2.5, forks=3, duty=0.6)),
    ("package-install", Activity(cpu=0.35, user=0.2, write=250e3, received=40e3, opened=0.2, asked=0.2, forks=12, touched=5e3, duty=0.5)),
    ("log-rotate", Activity(cpu=0.15, user=0.08, write=120e3, read=30e3, forks=4, duty=0.25, pulse_s=8.0)),
)  # fmt: skip


def activity_of(profile: str, phase: Phase) -> Activity | None:
    """Give what the malware itself does in a phase; None where it does nothing, or only once (armed: see ARRIVAL)."""
    if phase is Phase.ACTIVE:
        return ACTIVE[profile]
    if phase is Phase.INFECTING:
        return UNPACKING
    if phase is Phase.DORMANT:
        return HEARTBEAT
    return None
