"""Recording plans: parse a plan and draw its sessions from its seed.

Nothing here does input or output.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from math import exp, log
from typing import Any, Literal

import msgspec
import numpy as np

from phasewatch.errors import PlanError, UsageError
from phasewatch.lab.host_distribution import draw_host_shapes, load_host_distribution
from phasewatch.lab.network.world import NO_WORLD, draw_world
from phasewatch.lab.qemu_command import HostShape, find_host_shape
from phasewatch.lab.scheduling import HostDemand, ProfileGroup, ScheduledSession, build_schedule
from phasewatch.lab.slots import (
    PhaseWalk,
    PlanPart,
    RecordingSession,
    RecordingSlot,
    build_rng,
    compute_slot_seed,
    select_part,
    select_sessions,
)
from phasewatch.lab.walks import LoadSpan, draw_load_walk, list_load_kinds
from phasewatch.profiles import (
    EPISODE_RANGE_S,
    IDLE_SAMPLE,
    IDLE_SAMPLES,
    N_SAMPLE_GROUPS,
    PHASE_RANGE_S,
    PROFILES,
    ContactForm,
    draw_episode_length,
    draw_intensities,
    draw_phase_walk,
    find_profile,
    find_sample,
    find_sample_group,
    list_routines,
    list_samples,
)
from phasewatch.toml_config import parse_toml
from phasewatch.types import BENIGN_PROFILE, EpisodeRole, Phase

__all__ = [
    "MALICIOUS_PROFILES",
    "MAX_PARALLEL_VMS",
    "DrawnHosts",
    "PhaseWalk",
    "PlanHost",
    "PlanSpec",
    "RecordingSession",
    "RecordingSlot",
    "build_rng",
    "build_sessions",
    "check_plan_spec",
    "compute_slot_seed",
    "draw_log_uniform",
    "draw_phases",
    "list_plan_hosts",
    "parse_plan",
    "select_sessions",
]

MALICIOUS_PROFILES = tuple(row.name for row in PROFILES if row.name != BENIGN_PROFILE)
_PLAN_NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
_MAX_DURATION_S = 3600.0  # of an episode
_MIN_PHASE_S = 2.0
MAX_PARALLEL_VMS = 6  # more was not measured
# No episode ends sooner after an onset of infecting: an alarm needs 30 s, and acknowledgements take up to a second.
AFTER_ONSET_S = 31.0
_COLD_RANGE = (0.2, 1.0)  # share of reads that reach the disk
_COIN_BLOCK_EPISODES = 2  # of each two episodes of a host, benign or malicious, busy_share × 2 run beside loads
_LOAD_BLOCK_EPISODES = 3  # of each three malicious episodes of a host, busy_share × 3 run beside a load


class PlanHost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One host of a plan; empty `profiles` select all malicious profiles. The benign profile always runs."""

    host_id: str
    profiles: tuple[str, ...] = ()


class DrawnHosts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Hosts that are drawn at random from the declared distribution (`lab/hosts.toml`)."""

    count: int
    seed: int
    profiles: tuple[str, ...] = ()


class PlanSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A recording plan.

    Attributes:
        name, seed: With host and index they determine every draw; another seed gives another campaign.
        hosts: Chosen hosts, and the profiles that run on each.
        drawn_hosts: Hosts drawn at random, after the chosen ones.
        parallel_vms: Largest number of VMs of a session; all are of one host and one sample group.
        session_cores: Largest sum of their CPU quotas, in cores; a VM without a quota counts one for each vCPU.
        lab_per_host: Episodes per host for training and test.
        benign_share: Smallest benign share of them.
        busy_share: Share of the malicious ones that run beside a benign load; with `workloads` 2, of all of them.
        agent_share: Probability that the guest agent is on.
        commission_per_host, commission_s: Number and length of the known-clean episodes: benign idle, agent off.
        soak_per_host, soak_s: Number and length of the long benign episodes: agent off, a different sample group each.
        settle_s: Shortest and longest time from boot to the first label, in seconds.
        episode_s, phase_s: Shortest and longest lab episode and phase, in seconds.
        chatter_s: Smallest and largest mean time between background events, in seconds.
        workloads: Version of the workload table. Version 2 draws samples, routines, addresses and loads of the second
            laboratory: phases and loads have log-uniform lengths, and benign episodes walk over kinds and idleness.
        idle_share: With `workloads` 2, the probability that a span of a load walk is idle.
        part: The part of the plan that is recorded; None for all of it.
        order: Phases in a fixed order instead of the random walk. This leaks the phase through elapsed time;
            `plan_checks` measures how much.
    """

    name: str
    seed: int
    hosts: tuple[PlanHost, ...] = ()
    drawn_hosts: DrawnHosts | None = None
    parallel_vms: int = 2
    session_cores: float = 2.0
    lab_per_host: int
    benign_share: float = 1 / 3
    busy_share: float = 1 / 3
    agent_share: float = 0.5
    commission_per_host: int = 3
    commission_s: float = 120.0
    soak_per_host: int = 4
    soak_s: float = 600.0
    settle_s: tuple[float, float] = (40.0, 80.0)
    episode_s: tuple[float, float] = EPISODE_RANGE_S
    phase_s: tuple[float, float] = PHASE_RANGE_S
    chatter_s: tuple[float, float] = (6.0, 30.0)
    workloads: Literal[1, 2] = 1
    idle_share: float = 0.3
    order: tuple[Phase, ...] = ()
    part: PlanPart | None = None


def parse_plan(text: str, *, where: str) -> PlanSpec:
    """Parse a plan.

    Args:
        text: TOML.
        where: Name of the file, for messages.

    Raises:
        PlanError: If the text is not TOML, has unknown or missing keys, unknown names, or a value out of range.
    """
    spec = parse_toml(text, PlanSpec, where=where)
    try:
        check_plan_spec(spec)
    except (UsageError, PlanError) as exc:
        raise PlanError(f"{where}: {exc}") from exc
    return spec


def check_plan_spec(spec: PlanSpec) -> None:
    """Raise PlanError if a plan has an unknown name or a value out of range; the message names the allowed values.

    Raises:
        PlanError: If a name or number is not allowed.
        UsageError: If a profile does not exist.
    """
    if not _PLAN_NAME_PATTERN.fullmatch(spec.name):
        raise PlanError(f"name {spec.name!r}: expected 1 to 40 of the characters a-z, 0-9, dot, dash and underscore")
    hosts = list_plan_hosts(spec)
    if not hosts or len({shape.host_id for shape, _ in hosts}) != len(hosts):
        raise PlanError("hosts: expected at least one, and none twice")
    for shape, profiles in hosts:
        for name in profiles:
            find_profile(name)
        if BENIGN_PROFILE in profiles or len(set(profiles)) != len(profiles):
            raise PlanError(f"hosts: {shape.host_id}: expected malicious profiles, each once; benign always runs")
    if not 1 <= spec.parallel_vms <= MAX_PARALLEL_VMS:
        raise PlanError(f"parallel_vms: {spec.parallel_vms}, expected 1 to {MAX_PARALLEL_VMS}")
    if not spec.session_cores > 0:
        raise PlanError(f"session_cores: {spec.session_cores:g}, expected more than 0")
    for key in ("lab_per_host", "commission_per_host", "soak_per_host"):
        if not 0 <= getattr(spec, key) <= 10_000:
            raise PlanError(f"{key}: {getattr(spec, key)}, expected 0 to 10000")
    if not spec.lab_per_host + spec.commission_per_host + spec.soak_per_host:
        raise PlanError("lab_per_host, commission_per_host and soak_per_host are all 0: there is nothing to record")
    for key in ("benign_share", "busy_share", "agent_share", "idle_share"):
        if not 0 <= getattr(spec, key) <= 1:
            raise PlanError(f"{key}: {getattr(spec, key)}, expected 0 to 1")
    shortest = {"settle_s": 0.0, "episode_s": 1.0, "phase_s": _MIN_PHASE_S, "chatter_s": 1.0}
    for key, least in shortest.items():
        low, high = getattr(spec, key)
        if not least <= low <= high <= _MAX_DURATION_S:
            raise PlanError(
                f"{key}: {low} to {high}, expected an interval within {least:g} to {_MAX_DURATION_S:g} seconds"
            )
    for key in ("commission_s", "soak_s"):
        if not 1 <= getattr(spec, key) <= _MAX_DURATION_S:
            raise PlanError(f"{key}: {getattr(spec, key)}, expected 1 to {_MAX_DURATION_S:g} seconds")
    if Phase.UNKNOWN in spec.order:
        raise PlanError("order: unknown is not a phase that can be recorded")


def list_plan_hosts(spec: PlanSpec) -> tuple[tuple[HostShape, tuple[str, ...]], ...]:
    """Return the shape and the profiles of each host of a plan; no profiles stand for all malicious ones.

    Raises:
        PlanError: If a chosen host does not exist, or the drawn ones have a count or seed out of range.
    """
    hosts = [(find_host_shape(host.host_id), host.profiles) for host in spec.hosts]
    if (drawn := spec.drawn_hosts) is not None:
        shapes = draw_host_shapes(load_host_distribution(), count=drawn.count, seed=drawn.seed)
        hosts += [(shape, drawn.profiles) for shape in shapes]
    return tuple(hosts)


def _count_session_vms(spec: PlanSpec, shape: HostShape) -> int:
    """Return the number of VMs of a shape that a session may hold."""
    return max(1, min(spec.parallel_vms, int(spec.session_cores / shape.cores + 1e-9)))


def build_sessions(spec: PlanSpec) -> tuple[RecordingSession, ...]:
    """Build all sessions of a plan in recording order: known-clean episodes, then lab episodes mixed with soak."""
    plan_hosts = list_plan_hosts(spec)
    hosts = [(shape.host_id, _count_session_vms(spec, shape)) for shape, _ in plan_hosts]
    demands = [
        HostDemand(
            host_id=shape.host_id,
            episodes=spec.lab_per_host,
            profiles=profiles or MALICIOUS_PROFILES,
            vms=_count_session_vms(spec, shape),
        )
        for shape, profiles in plan_hosts
    ]
    builder = _SessionBuilder(spec, images={shape.host_id: shape.image for shape, _ in plan_hosts})
    most = max(vms for _, vms in hosts)
    for first in range(0, spec.commission_per_host, most):
        many = min(most, spec.commission_per_host - first)
        for host_id, vms in hosts:
            for done in range(0, many, vms):
                builder.add(host_id, EpisodeRole.COMMISSION, [(BENIGN_PROFILE, IDLE_SAMPLE)] * min(vms, many - done))
    lab = build_schedule(demands, benign_share=spec.benign_share)
    soak = [(host_id, place, turn) for turn in range(spec.soak_per_host) for place, (host_id, _) in enumerate(hosts)]
    placed = 0
    for n_done, scheduled in enumerate(lab, start=1):
        builder.add_lab(scheduled)
        while placed < len(soak) * n_done // len(lab):
            builder.add_soak(*soak[placed])
            placed += 1
    for rest in soak[placed:]:
        builder.add_soak(*rest)
    return select_part(builder.sessions, spec.part) if spec.part else tuple(builder.sessions)


def draw_phases(spec: PlanSpec, rng: np.random.Generator, length_s: float) -> PhaseWalk:
    """Draw the phases of a malicious episode: a random walk, or the plan's fixed order."""
    if not spec.order:
        is_second = spec.workloads >= 2
        return draw_phase_walk(
            rng,
            length_s=length_s,
            between_s=spec.phase_s,
            is_log_uniform=is_second,
            after_onset_s=AFTER_ONSET_S if is_second else 0.0,
        )
    walk: list[tuple[Phase, float]] = []
    left_s = length_s
    for place, phase in enumerate(spec.order):
        stay_s = left_s if place == len(spec.order) - 1 else min(left_s, round(float(rng.uniform(*spec.phase_s)), 3))
        left_s = round(left_s - stay_s, 3)
        if stay_s > 0:
            walk.append((phase, stay_s))
    return tuple(walk)


def draw_log_uniform(rng: np.random.Generator, between: tuple[float, float]) -> float:
    """Draw a number from a log-uniform distribution over an interval."""
    return exp(rng.uniform(log(between[0]), log(between[1])))


class _SessionBuilder:
    """Turns profile groups into sessions of slots, and balances the use of samples, routines and loads.

    Args:
        spec: The plan.
        images: Host id → guest image; other hosts run busybox.
    """

    def __init__(self, spec: PlanSpec, images: Mapping[str, str] | None = None) -> None:
        self.sessions: list[RecordingSession] = []
        self._spec = spec
        self._images = images or {}
        self._index: Counter[str] = Counter()
        self._turns: Counter[tuple[str, ...]] = Counter()
        self._used: Counter[tuple[str, ...]] = Counter()

    def add(self, host_id: str, role: EpisodeRole, names: Sequence[tuple[str, str]]) -> None:
        """Add a session of (profile, sample) pairs."""
        self._add_slots(host_id, [self._build_slot(host_id, role, *pair) for pair in names])

    def add_lab(self, session: ScheduledSession) -> None:
        """Add a scheduled lab session, with the least used samples of its groups."""
        role, host_id = EpisodeRole.LAB, session.host_id
        if self._spec.workloads >= 2:
            self._add_slots(host_id, [self._build_walk_slot(host_id, role, each) for each in session.profile_groups])
        else:
            names = [(each.profile, self._choose_sample(host_id, each)) for each in session.profile_groups]
            self.add(host_id, role, names)

    def add_soak(self, host_id: str, place: int, turn: int) -> None:
        """Add a soak episode as a session of its own: a second one would need the same group and length."""
        role, profile_group = EpisodeRole.SOAK, ProfileGroup(BENIGN_PROFILE, (turn + place) % N_SAMPLE_GROUPS)
        if self._spec.workloads >= 2:
            self._add_slots(host_id, [self._build_walk_slot(host_id, role, profile_group)])
        else:
            sample_name = self._choose_sample(host_id, profile_group, use="soak")
            self.add(host_id, role, [(BENIGN_PROFILE, sample_name)])

    def _add_slots(self, host_id: str, slots: Sequence[RecordingSlot]) -> None:
        name = f"{self._spec.name}-{len(self.sessions):04d}"
        self.sessions.append(RecordingSession(session=name, host_id=host_id, slots=tuple(slots)))

    def _choose_sample(
        self, host_id: str, profile_group: ProfileGroup, *, use: str = "lab", is_busy: bool = False
    ) -> str:
        """Return the least used sample of a group; uses on this host count first, in version 2 those on all hosts."""
        profile, group = profile_group
        image, workloads = self._images.get(host_id, "busybox"), self._spec.workloads
        samples = {each.name: each for each in list_samples(profile, group, workloads=workloads, image=image)}
        names = [name for name in samples if not (is_busy and name in IDLE_SAMPLES)]
        used = self._used
        if workloads >= 2:  # breadth before repetition
            chosen = min(
                names,
                key=lambda name: (used[use, profile, name] / samples[name].weight, used[use, host_id, profile, name]),
            )
        else:
            chosen = min(names, key=lambda name: (used[use, host_id, profile, name], used[use, name]))
        for key in ((use, host_id, profile, chosen), (use, chosen), (use, profile, chosen)):
            self._used[key] += 1
        return chosen

    def _is_busy(self, host_id: str) -> bool:
        """Return whether the host's next malicious episode of a version 1 plan runs beside a load.

        Each block of episodes has a fixed number of them, at random places.
        """
        return self._draw_from_block(host_id, "busy block", _LOAD_BLOCK_EPISODES)

    def _draw_from_block(self, host_id: str, purpose: str, size: int) -> bool:
        block, place = divmod(self._turns[host_id, purpose], size)
        self._turns[host_id, purpose] += 1
        rng = build_rng(compute_slot_seed(self._spec.name, self._spec.seed, host_id, block), purpose)
        ranks = rng.permutation(size)
        return bool((ranks[place] + rng.random()) / size < self._spec.busy_share)

    def _build_slot(self, host_id: str, role: EpisodeRole, profile_name: str, sample_name: str) -> RecordingSlot:
        """Build a slot of laboratory version 1, or a known-clean one."""
        spec, index = self._spec, self._index[host_id]
        self._index[host_id] += 1
        seed = compute_slot_seed(spec.name, spec.seed, host_id, index)
        rng = partial(build_rng, seed)
        lab = role is EpisodeRole.LAB
        if lab:
            duration_s = draw_episode_length(rng("length"), between_s=spec.episode_s)
        else:
            duration_s = spec.soak_s if role is EpisodeRole.SOAK else spec.commission_s
        is_malicious = profile_name != BENIGN_PROFILE
        phases = draw_phases(spec, rng("walk"), duration_s) if is_malicious else ((Phase.CLEAN, duration_s),)
        loads: tuple[LoadSpan, ...] = ()
        if is_malicious and self._is_busy(host_id):
            profile_group = ProfileGroup(BENIGN_PROFILE, find_sample_group(profile_name, sample_name))
            kind = self._choose_sample(host_id, profile_group, use="background", is_busy=True)
            knobs = draw_intensities(find_sample(BENIGN_PROFILE, kind), rng("background"))
            loads = (LoadSpan(kind=kind, start_s=0.0, end_s=duration_s, knobs=tuple(knobs.items())),)
        return self._fill_slot(
            index,
            seed,
            host_id=host_id,
            role=role,
            profile=profile_name,
            sample_name=sample_name,
            duration_s=duration_s,
            phases=phases,
            knobs=tuple(draw_intensities(find_sample(profile_name, sample_name), rng("knobs")).items()),
            loads=loads,
        )

    def _fill_slot(
        self, index: int, seed: int, *, host_id: str, role: EpisodeRole, profile: str, **chosen: Any
    ) -> RecordingSlot:
        """Build a slot with what both laboratory versions draw alike."""
        spec, rng = self._spec, partial(build_rng, seed)
        return RecordingSlot(
            index=index,
            host_id=host_id,
            role=role,
            profile=profile,
            sample_kind=find_profile(profile).kind,
            plan_seed=seed,
            agent=bool(role is EpisodeRole.LAB and rng("agent").random() < spec.agent_share),
            settle_s=round(float(rng("settle").uniform(*spec.settle_s)), 3),
            chatter_s=round(draw_log_uniform(rng("chatter"), spec.chatter_s), 3),
            world=draw_world(rng("world")) if spec.workloads >= 2 else NO_WORLD,
            **chosen,
        )

    def _build_walk_slot(self, host_id: str, role: EpisodeRole, profile_group: ProfileGroup) -> RecordingSlot:
        """Build a slot of laboratory version 2: the same coin and the same walk of loads whatever the profile."""
        spec, index = self._spec, self._index[host_id]
        profile, group = profile_group
        self._index[host_id] += 1
        seed = compute_slot_seed(spec.name, spec.seed, host_id, index)
        rng = partial(build_rng, seed)
        is_lab, is_malicious = role is EpisodeRole.LAB, profile != BENIGN_PROFILE
        duration_s = draw_episode_length(rng("length"), between_s=spec.episode_s) if is_lab else spec.soak_s
        has_loads = not is_lab or self._draw_from_block(host_id, f"coin {is_malicious}", _COIN_BLOCK_EPISODES)
        loads = self._draw_loads(host_id, role, profile_group, rng("loads"), duration_s, has_loads=has_loads)
        if is_malicious:
            sample_name = self._choose_sample(host_id, profile_group)
            phases = draw_phases(spec, rng("walk"), duration_s)
        else:
            sample_name = (*list_load_kinds(loads), IDLE_SAMPLES[group])[0]
            phases = ((Phase.CLEAN, duration_s),)
        forms = [str(form) for form in ContactForm]
        knobs = draw_intensities(find_sample(profile, sample_name), rng("knobs")) if is_malicious else {}
        return self._fill_slot(
            index,
            seed,
            host_id=host_id,
            role=role,
            profile=profile,
            sample_name=sample_name,
            duration_s=duration_s,
            phases=phases,
            knobs=tuple(knobs.items()),
            loads=loads,
            routine=self._choose_routine(host_id, group, phases) if is_malicious else "",
            armed_form=forms[int(rng("armed").integers(0, len(forms)))] if is_malicious else "",
            dormant_form=forms[int(rng("dormant").integers(0, len(forms)))] if is_malicious else "",
            cold=round(float(rng("cold").uniform(*_COLD_RANGE)), 3),
        )

    def _draw_loads(
        self,
        host_id: str,
        role: EpisodeRole,
        profile_group: ProfileGroup,
        rng: np.random.Generator,
        length_s: float,
        *,
        has_loads: bool,
    ) -> tuple[LoadSpan, ...]:
        idle_kind = IDLE_SAMPLES[profile_group.group]
        if not has_loads:
            return (LoadSpan(kind=idle_kind, start_s=0.0, end_s=length_s),)
        benign_group = ProfileGroup(BENIGN_PROFILE, profile_group.group)
        use = "soak" if role is EpisodeRole.SOAK else "load"
        return draw_load_walk(
            rng,
            length_s=length_s,
            between_s=self._spec.phase_s,
            idle_share=self._spec.idle_share,
            idle_kind=idle_kind,
            choose_kind=lambda: self._choose_sample(host_id, benign_group, use=use, is_busy=True),
            draw_knobs=lambda kind: tuple(draw_intensities(find_sample(BENIGN_PROFILE, kind), rng).items()),
        )

    def _choose_routine(self, host_id: str, group: int, phases: PhaseWalk) -> str:
        """Return the least used infection routine of a sample group; only episodes with an infection count."""
        names = [row.name for row in list_routines(group, image=self._images.get(host_id, "busybox"))]
        chosen = min(names, key=lambda name: (self._used["routine", name], self._used["routine", host_id, name]))
        if any(phase is Phase.INFECTING for phase, _ in phases):
            self._used["routine", chosen] += 1
            self._used["routine", host_id, chosen] += 1
        return chosen
