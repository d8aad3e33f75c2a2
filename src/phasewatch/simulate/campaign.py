"""Who runs where and when in a simulated campaign: sessions of two machines, roles, profiles, samples and ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from phasewatch.simulate.activity import Knobs, named_rng
from phasewatch.simulate.counters import draw_machine
from phasewatch.simulate.episode import Slot
from phasewatch.simulate.samples import BENIGN, GROUPS, IDLE, benign_samples, malicious_samples
from phasewatch.simulate.tables import BUSY
from phasewatch.vocab import EpisodeId, Phase, Role, uuid7
from phasewatch.walk import EPISODE_S, draw_length, draw_walk

_EPOCH_NS = 1_767_571_200_000_000_000  # 5 January 2026, 00:00 UTC: simulated stores must not depend on today
_SLOT_NS = 720_000_000_000  # boot, settle and the longest episode
_SOAK_S = 600.0
_COMMISSION_S = 120.0
_BENIGN_SHARE = 0.3
_BUSY_SHARE = 1 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """A simulated campaign, whole: the same campaign always gives the same store.

    Attributes:
        hosts, episodes: How many; the episodes, all roles together, are dealt over the hosts.
        seed: Of everything.
        days: Over how many days at least the sessions are spread.
        between_s: Shortest and longest lab episode.
        knobs: How noisy the world is.
    """

    hosts: int
    episodes: int
    seed: int
    days: float = 10.0
    between_s: tuple[float, float] = EPISODE_S
    knobs: Knobs = Knobs()  # noqa: RUF009  frozen


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One or two episodes that ran side by side on one host."""

    host: int
    number: int  # on this host
    size: int
    first: int  # the running number of its first episode on this host


def sessions_of(campaign: Campaign) -> Iterator[Session]:
    """Give every session, hosts interleaved as they would be in time."""
    share = [
        campaign.episodes // campaign.hosts + (h < campaign.episodes % campaign.hosts) for h in range(campaign.hosts)
    ]
    for number in range((max(share) + 1) // 2):
        for host, episodes in enumerate(share):
            if (size := min(2, episodes - 2 * number)) > 0:
                yield Session(host=host, number=number, size=size, first=2 * number)


def slots_of(campaign: Campaign, session: Session) -> tuple[Slot, ...]:
    """Draw what runs in a session.

    The two machines carry samples of one sample group, or no sample could be held out.
    """
    rng = named_rng(campaign.seed, "session", session.host, session.number)
    machine = draw_machine(campaign.seed, session.host, campaign.knobs)
    on_host = campaign.episodes // campaign.hosts
    gap_ns = max(_SLOT_NS, int(campaign.days * 86_400e9) // max(1, (on_host + 1) // 2))
    since_ns = session.number * gap_ns + int(rng.integers(0, gap_ns - _SLOT_NS + 1))
    started_ns = _EPOCH_NS + since_ns + session.host * 7_000_000 + int(rng.integers(0, 1_000_000_000))
    group = int(rng.integers(0, GROUPS))
    ids = sorted(_episode_id(rng, started_ns) for _ in range(session.size))
    slots = []
    for place, episode_id in enumerate(ids):
        role = _role(session.first + place, on_host)
        profile, sample, busy = _cast(rng, role, group, session.first + place)
        slots.append(
            Slot(
                episode_id=episode_id, machine=machine, profile=profile, sample_name=sample, busy=busy, role=role,
                agent=bool(rng.integers(0, 2)) and role is Role.LAB,
                phases=_phases(rng, role, profile, campaign.between_s),
                started_wall_ns=started_ns + place * int(rng.integers(1, 2_000_000_000)), since_campaign_ns=since_ns,
                session=f"{machine.host_id}-{session.number:05d}",
                neighbours=tuple(other for other in ids if other != episode_id),
                plan_seed=int(rng.integers(0, 2**63)),
            )
        )  # fmt: skip
    return tuple(slots)


def _episode_id(rng: np.random.Generator, started_ns: int) -> EpisodeId:
    return uuid7(started_ns // 1_000_000, rng.bytes(10))


def _role(place: int, on_host: int) -> Role:
    """First the days known clean, then the long benign hours, then the lab; fewer of each in a small store."""
    commission, soak = min(3, on_host // 10), min(4, on_host // 12)
    if place < commission:
        return Role.COMMISSION
    return Role.SOAK if place < commission + soak else Role.LAB


def _cast(rng: np.random.Generator, role: Role, group: int, place: int) -> tuple[str, str, str]:
    """Draw profile, sample and benign load of one machine."""
    if role is Role.COMMISSION:
        return BENIGN, IDLE, ""
    if role is Role.SOAK:  # one of each sample group, in turn
        kinds = benign_samples(place % GROUPS)
        kind = kinds[int(rng.integers(0, len(kinds)))]
        return BENIGN, kind, _load_of(kind)
    if rng.random() < _BENIGN_SHARE:
        kinds = benign_samples(group)
        kind = kinds[int(rng.integers(0, len(kinds)))]
        return BENIGN, kind, _load_of(kind)
    choices = malicious_samples(group)
    profile, sample = choices[int(rng.integers(0, len(choices)))]
    busy = BUSY[int(rng.integers(0, len(BUSY)))][0] if rng.random() < _BUSY_SHARE else ""
    return profile, sample, busy


def _load_of(kind: str) -> str:
    """Give the benign load of a benign kind: the one of its name, but idle is none."""
    return "" if kind == IDLE else kind


def _phases(
    rng: np.random.Generator, role: Role, profile: str, between_s: tuple[float, float]
) -> tuple[tuple[Phase, float], ...]:
    if role is Role.COMMISSION:
        return ((Phase.CLEAN, _COMMISSION_S),)
    if role is Role.SOAK:
        return ((Phase.CLEAN, _SOAK_S),)
    length_s = draw_length(rng, between_s=between_s)
    return ((Phase.CLEAN, length_s),) if profile == BENIGN else draw_walk(rng, length_s=length_s)
