"""A recording plan as its author writes it: TOML text → a checked value (pure)."""

from __future__ import annotations

import re

import msgspec

from phasewatch.errors import PlanError, UsageError
from phasewatch.profiles import PROFILES, profile
from phasewatch.record.deal import BENIGN
from phasewatch.record.hosts import host_shape
from phasewatch.record.spelling import parse_toml
from phasewatch.vocab import Phase
from phasewatch.walk import EPISODE_S, PHASE_S

PLAN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
MALICIOUS = tuple(row.name for row in PROFILES if row.name != BENIGN)
_LONGEST_S = 3600.0  # an episode is 1 s to 1 h
_SHORTEST_PHASE_S = 2.0


class PlanHost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One host of a plan; `profiles` empty means all malicious ones (benign always runs)."""

    host_id: str
    profiles: tuple[str, ...] = ()


class PlanSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to be recorded.

    Attributes:
        name, seed: With host and index they decide every draw; another seed is another campaign.
        lab_per_host: Episodes to learn and test on.
        benign_share: Least share of them that is benign.
        busy_share: Share of the malicious ones that run over a busy benign load.
        agent_share: Chance that the guest's agent is on.
        commission_per_host, commission_s: The day a VM is known clean: benign idle, agent off.
        soak_per_host, soak_s: Long benign hours, agent off, another sample group each.
        settle_s, episode_s, phase_s, chatter_s: Shortest and longest; chatter is the mean time between its signs.
        order: Phases in a fixed order instead of the random walk. It leaks: the gate will say how much.
    """

    name: str
    seed: int
    hosts: tuple[PlanHost, ...]
    lab_per_host: int
    benign_share: float = 1 / 3
    busy_share: float = 1 / 3
    agent_share: float = 0.5
    commission_per_host: int = 3
    commission_s: float = 120.0
    soak_per_host: int = 4
    soak_s: float = 600.0
    settle_s: tuple[float, float] = (40.0, 80.0)
    episode_s: tuple[float, float] = EPISODE_S
    phase_s: tuple[float, float] = PHASE_S
    chatter_s: tuple[float, float] = (6.0, 30.0)
    order: tuple[Phase, ...] = ()


def parse_plan(text: str, *, where: str) -> PlanSpec:
    """Read a plan.

    Args:
        text: TOML.
        where: Its file, for messages.

    Raises:
        PlanError: If it is not TOML, has unknown or missing keys, names what does not exist, or asks for the impossible.
    """
    spec = parse_toml(text, PlanSpec, where=where)
    try:
        check_plan(spec)
    except (UsageError, PlanError) as exc:
        raise PlanError(f"{where}: {exc}") from exc
    return spec


def check_plan(spec: PlanSpec) -> None:
    """Refuse a plan that asks for the impossible.

    Raises:
        PlanError: It says what, and what is possible.
    """
    if not PLAN_NAME.fullmatch(spec.name):
        raise PlanError(f"name {spec.name!r}: letters a-z, digits, dot, dash and underscore, 1 to 40 of them")
    if not spec.hosts or len({host.host_id for host in spec.hosts}) != len(spec.hosts):
        raise PlanError("hosts: at least one, and none twice")
    for host in spec.hosts:
        host_shape(host.host_id)
        for name in host.profiles:
            profile(name)
        if BENIGN in host.profiles or len(set(host.profiles)) != len(host.profiles):
            raise PlanError(f"hosts: {host.host_id}: profiles name malicious ones, each once; benign always runs")
    for key in ("lab_per_host", "commission_per_host", "soak_per_host"):
        if not 0 <= getattr(spec, key) <= 10_000:
            raise PlanError(f"{key}: {getattr(spec, key)}, expected 0 to 10000")
    if not spec.lab_per_host + spec.commission_per_host + spec.soak_per_host:
        raise PlanError("lab_per_host, commission_per_host and soak_per_host are all 0: there is nothing to record")
    for key in ("benign_share", "busy_share", "agent_share"):
        if not 0 <= getattr(spec, key) <= 1:
            raise PlanError(f"{key}: {getattr(spec, key)}, expected 0 to 1")
    shortest = {"settle_s": 0.0, "episode_s": 1.0, "phase_s": _SHORTEST_PHASE_S, "chatter_s": 1.0}
    for key, least in shortest.items():
        low, high = getattr(spec, key)
        if not least <= low <= high <= _LONGEST_S:
            raise PlanError(f"{key}: {low} to {high}, expected an interval within {least:g} to {_LONGEST_S:g} seconds")
    for key in ("commission_s", "soak_s"):
        if not 1 <= getattr(spec, key) <= _LONGEST_S:
            raise PlanError(f"{key}: {getattr(spec, key)}, expected 1 to {_LONGEST_S:g} seconds")
    if Phase.UNKNOWN in spec.order:
        raise PlanError("order: a plan knows its phases; unknown is not one to play")
