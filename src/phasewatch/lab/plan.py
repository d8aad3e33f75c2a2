"""What is recorded, when, on which host: a plan's slots and sessions, all drawn from its seed (pure)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from math import exp, log

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.errors import PlanError, UsageError, suggest_names
from phasewatch.lab.qemu_command import find_host_shape
from phasewatch.lab.scheduling import HostDemand, ProfileGroup, ScheduledSession, build_schedule
from phasewatch.profiles import (
    EPISODE_RANGE_S,
    IDLE_SAMPLE,
    N_SAMPLE_GROUPS,
    PHASE_RANGE_S,
    PROFILES,
    draw_episode_length,
    draw_intensities,
    draw_phase_walk,
    find_profile,
    find_sample,
    find_sample_group,
)
from phasewatch.toml_config import parse_toml
from phasewatch.types import BENIGN_PROFILE, PHASES, EpisodeRole, Phase, SampleKind

PLAN_NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
MALICIOUS_PROFILES = tuple(row.name for row in PROFILES if row.name != BENIGN_PROFILE)
_MAX_DURATION_S = 3600.0  # an episode is 1 s to 1 h
_MIN_PHASE_S = 2.0


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
    episode_s: tuple[float, float] = EPISODE_RANGE_S
    phase_s: tuple[float, float] = PHASE_RANGE_S
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
        check_plan_spec(spec)
    except (UsageError, PlanError) as exc:
        raise PlanError(f"{where}: {exc}") from exc
    return spec


def check_plan_spec(spec: PlanSpec) -> None:
    """Refuse a plan that asks for the impossible.

    Raises:
        PlanError: It says what, and what is possible.
    """
    if not PLAN_NAME_PATTERN.fullmatch(spec.name):
        raise PlanError(f"name {spec.name!r}: letters a-z, digits, dot, dash and underscore, 1 to 40 of them")
    if not spec.hosts or len({host.host_id for host in spec.hosts}) != len(spec.hosts):
        raise PlanError("hosts: at least one, and none twice")
    for host in spec.hosts:
        find_host_shape(host.host_id)
        for name in host.profiles:
            find_profile(name)
        if BENIGN_PROFILE in host.profiles or len(set(host.profiles)) != len(host.profiles):
            raise PlanError(f"hosts: {host.host_id}: profiles name malicious ones, each once; benign always runs")
    for key in ("lab_per_host", "commission_per_host", "soak_per_host"):
        if not 0 <= getattr(spec, key) <= 10_000:
            raise PlanError(f"{key}: {getattr(spec, key)}, expected 0 to 10000")
    if not spec.lab_per_host + spec.commission_per_host + spec.soak_per_host:
        raise PlanError("lab_per_host, commission_per_host and soak_per_host are all 0: there is nothing to record")
    for key in ("benign_share", "busy_share", "agent_share"):
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
        raise PlanError("order: a plan knows its phases; unknown is not one to play")


WINDOW_S, STRIDE_S = 10.0, 5.0
N_SIMULATED_EPISODES = 1500  # to learn from, and as many again to score on
_SMOOTHING_WINDOWS = 1  # neighbouring windows on either side that are averaged in

PhaseWalk = tuple[tuple[Phase, float], ...]


def compute_window_phases(walk: PhaseWalk) -> NDArray[np.int64]:
    """Give the phase code of each 10 s window, one every 5 s: the phase with most of it, on a tie the later one."""
    ends = np.cumsum([seconds for _, seconds in walk])
    starts = ends - [seconds for _, seconds in walk]
    count = int((ends[-1] - WINDOW_S) // STRIDE_S) + 1 if ends[-1] >= WINDOW_S else 0
    at = np.arange(count)[:, None] * STRIDE_S
    inside = np.clip(np.minimum(ends, at + WINDOW_S) - np.maximum(starts, at), 0, None)
    codes = np.array([phase.code for phase, _ in walk])
    share = np.stack([inside[:, codes == code].sum(axis=1) for code in range(len(PHASES))], axis=1).round(6)
    last = np.stack(
        [np.where((inside > 0) & (codes == code), starts, -1.0).max(axis=1) for code in range(len(PHASES))], axis=1
    )
    return np.lexsort((last, share), axis=1)[:, -1]


def compute_elapsed_time_f1(draw: Callable[[np.random.Generator], PhaseWalk], rng: np.random.Generator) -> float:
    """Score the best classifier that knows nothing but the seconds since the first label.

    Args:
        draw: Draws the walk of one malicious episode.

    Returns:
        Macro-F1 over the five phases on unseen walks, the higher of plain and class-balanced voting.
    """
    learn = [compute_window_phases(draw(rng)) for _ in range(N_SIMULATED_EPISODES)]
    score = [compute_window_phases(draw(rng)) for _ in range(N_SIMULATED_EPISODES)]
    length = max(len(codes) for codes in learn + score)
    votes = np.zeros((length + 2 * _SMOOTHING_WINDOWS, len(PHASES)))
    for codes in learn:
        votes[_SMOOTHING_WINDOWS + np.arange(len(codes)), codes] += 1
    smooth = np.stack([votes[shift : shift + length] for shift in range(2 * _SMOOTHING_WINDOWS + 1)]).sum(axis=0)
    truth = np.concatenate(score)
    window = np.concatenate([np.arange(len(codes)) for codes in score])
    balanced = smooth / np.maximum(smooth.sum(axis=0), 1)
    return max(_compute_macro_f1(truth, table.argmax(axis=1)[window]) for table in (smooth, balanced))


def _compute_macro_f1(truth: NDArray[np.int64], said: NDArray[np.int64]) -> float:
    scores = []
    for code in range(len(PHASES)):
        right = int(((truth == code) & (said == code)).sum())
        named = int((truth == code).sum() + (said == code).sum())
        scores.append(2 * right / named if named else 0.0)
    return float(np.mean(scores))


MAX_ELAPSED_TIME_F1 = 0.25  # DESIGN section 2: above it a plan tells the phase by the clock
_LOAD_BLOCK_EPISODES = 3  # of each three malicious episodes of a host, busy_share × 3 have a load beside them


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingSlot:
    """One episode to be recorded. Its identity is `plan_seed`, which the manifest carries.

    Attributes:
        index: Its number on its host, in the plan's order.
        settle_s: From boot to the first label.
        phases: ``(phase, planned seconds)``; they sum to `duration_s`.
        knobs: The sample's intensities, in the registry's order.
        background: The benign sample that runs beside a malicious one the whole time, or empty.
        background_knobs: Its intensities (`knobs` are the sample's own).
        chatter_s: Mean seconds between signs of everyday life.
    """

    index: int
    host_id: str
    role: EpisodeRole
    profile: str
    sample_name: str
    sample_kind: SampleKind
    plan_seed: int
    agent: bool
    settle_s: float
    duration_s: float
    phases: PhaseWalk
    knobs: tuple[tuple[str, float], ...]
    background: str
    background_knobs: tuple[tuple[str, float], ...]
    chatter_s: float

    @property
    def group(self) -> int:
        """The sample group, 0 to 3."""
        return find_sample_group(self.profile, self.sample_name)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingSession:
    """One or two slots of one host that run side by side; all samples in them are of one group."""

    session: str
    host_id: str
    slots: tuple[RecordingSlot, ...]


def compute_slot_seed(name: str, seed: int, host_id: str, index: int) -> int:
    """Hash (plan, host, index) to a seed below 2^63, so that no timeline repeats on another host."""
    text = f"{name}\0{seed}\0{host_id}\0{index}".encode()
    return int.from_bytes(blake2b(text, digest_size=8, person=b"plan_seed").digest(), "big") >> 1


def build_rng(seed: int, purpose: str) -> np.random.Generator:
    """Give the generator of one purpose, so that a new draw shifts no old one."""
    return np.random.default_rng([seed, int.from_bytes(blake2b(purpose.encode(), digest_size=8).digest(), "big")])


def select_sessions(
    sessions: Sequence[RecordingSession], *, plan: str, hosts: Sequence[str] = (), role: str = "", limit: int = 0
) -> tuple[RecordingSession, ...]:
    """Return the sessions of some hosts and of one role, in the order of recording.

    Args:
        sessions: All sessions of a plan.
        plan: The plan's name, for messages.
        hosts: Host ids; empty selects all.
        role: Role that every slot of a session must have; empty selects all.
        limit: Maximum number of sessions; 0 returns all.

    Raises:
        UsageError: If the plan has no such host, or no session is left.
    """
    known = {session.host_id for session in sessions}
    for host in hosts:
        if host not in known:
            raise UsageError(f"--hosts: plan {plan} has no host {host!r}; {suggest_names(host, known)}")
    chosen = [
        session
        for session in sessions
        if (not hosts or session.host_id in hosts) and (not role or all(slot.role == role for slot in session.slots))
    ]
    if not chosen:
        wanted = " ".join([f"--role {role}"] * bool(role) + [f"--hosts {','.join(hosts)}"] * bool(hosts))
        raise UsageError(f"{wanted or plan}: plan {plan} has no such session")
    return tuple(chosen[: limit or None])


def build_sessions(spec: PlanSpec) -> tuple[RecordingSession, ...]:
    """Lay out the whole campaign in the order of recording: commissioning, then lab with soak strewn in."""
    rooms = [(host.host_id, find_host_shape(host.host_id).is_alone) for host in spec.hosts]
    needs = [
        HostDemand(
            host_id=host.host_id,
            episodes=spec.lab_per_host,
            profiles=host.profiles or MALICIOUS_PROFILES,
            is_alone=find_host_shape(host.host_id).is_alone,
        )
        for host in spec.hosts
    ]
    writer = _SessionBuilder(spec)
    for first in range(0, spec.commission_per_host, 2):
        many = min(2, spec.commission_per_host - first)
        for host_id, is_alone in rooms:
            for chunk in [1] * many if is_alone else [many]:
                writer.add(host_id, EpisodeRole.COMMISSION, [(BENIGN_PROFILE, IDLE_SAMPLE)] * chunk)
    lab = build_schedule(needs, benign_share=spec.benign_share)
    soak = [(host_id, place, turn) for turn in range(spec.soak_per_host) for place, (host_id, _) in enumerate(rooms)]
    placed = 0
    for at, one in enumerate(lab):
        writer.add_lab(one)
        while placed < len(soak) * (at + 1) // len(lab):
            writer.add_soak(*soak[placed])
            placed += 1
    for rest in soak[placed:]:
        writer.add_soak(*rest)
    return tuple(writer.sessions)


def estimate_elapsed_time_f1(spec: PlanSpec, seed: int = 0) -> float:
    """Simulate 1500 + 1500 episodes of the plan; give the macro-F1 of the best guess from elapsed time alone."""
    return compute_elapsed_time_f1(partial(_draw_episode_phases, spec), build_rng(seed, "elapsed time"))


def check_elapsed_time(spec: PlanSpec, seed: int = 0, *, force: bool = False) -> float:
    """Refuse a plan whose clock tells the phase.

    Raises:
        PlanError: If elapsed time alone scores above `MAX_ELAPSED_TIME_F1`, unless forced.
    """
    score = estimate_elapsed_time_f1(spec, seed)
    if score > MAX_ELAPSED_TIME_F1 and not force:
        raise PlanError(
            f"plan {spec.name}: elapsed time alone tells the phase with macro-F1 {score:.2f}, at most "
            f"{MAX_ELAPSED_TIME_F1:.2f} is accepted; leave out `order`, vary phase_s, or record it with --force"
        )
    return score


def _draw_episode_phases(spec: PlanSpec, rng: np.random.Generator) -> PhaseWalk:
    """Draw the phases of an episode of the campaign, benign ones in their share."""
    length_s = draw_episode_length(rng, between_s=spec.episode_s)
    return ((Phase.CLEAN, length_s),) if rng.random() < spec.benign_share else draw_phases(spec, rng, length_s)


def draw_phases(spec: PlanSpec, rng: np.random.Generator, length_s: float) -> PhaseWalk:
    """Draw the phases of an episode that is not benign: the walk, or the plan's fixed order."""
    if not spec.order:
        return draw_phase_walk(rng, length_s=length_s, between_s=spec.phase_s)
    walk: list[tuple[Phase, float]] = []
    left_s = length_s
    for at, phase in enumerate(spec.order):
        stay_s = left_s if at == len(spec.order) - 1 else min(left_s, round(float(rng.uniform(*spec.phase_s)), 3))
        left_s = round(left_s - stay_s, 3)
        if stay_s > 0:
            walk.append((phase, stay_s))
    return tuple(walk)


def draw_log_uniform(rng: np.random.Generator, between: tuple[float, float]) -> float:
    """Draw a number whose logarithm is uniform between those of two."""
    return exp(rng.uniform(log(between[0]), log(between[1])))


class _SessionBuilder:
    """Turns cells into slots, and remembers which samples and loads were used least."""

    def __init__(self, spec: PlanSpec) -> None:
        self.sessions: list[RecordingSession] = []
        self._spec = spec
        self._index: Counter[str] = Counter()
        self._malicious: Counter[str] = Counter()
        self._used: Counter[tuple[str, ...]] = Counter()

    def add(self, host_id: str, role: EpisodeRole, names: Sequence[tuple[str, str]]) -> None:
        """Add a session of these (profile, sample)s."""
        number = len(self.sessions)
        slots = tuple(self._build_slot(host_id, role, *pair) for pair in names)
        self.sessions.append(RecordingSession(session=f"{self._spec.name}-{number:04d}", host_id=host_id, slots=slots))

    def add_lab(self, one: ScheduledSession) -> None:
        """Add a session of the deal, with the samples of its groups that were used least."""
        self.add(
            one.host_id,
            EpisodeRole.LAB,
            [(cell.profile, self._choose_sample(one.host_id, cell)) for cell in one.profile_groups],
        )

    def add_soak(self, host_id: str, place: int, turn: int) -> None:
        """Add a long benign episode, alone: its neighbour would have to be of its own group, and as long."""
        cell = ProfileGroup(BENIGN_PROFILE, (turn + place) % N_SAMPLE_GROUPS)
        self.add(host_id, EpisodeRole.SOAK, [(BENIGN_PROFILE, self._choose_sample(host_id, cell, use="soak"))])

    def _choose_sample(self, host_id: str, cell: ProfileGroup, *, use: str = "lab", is_busy: bool = False) -> str:
        """Choose among the samples of a group, least used first, here before elsewhere."""
        names = [one.name for one in find_profile(cell.profile).samples[cell.group :: N_SAMPLE_GROUPS]]
        if is_busy:
            names = [name for name in names if name != IDLE_SAMPLE]
        chosen = min(names, key=lambda name: (self._used[use, host_id, cell.profile, name], self._used[use, name]))
        self._used[use, host_id, cell.profile, chosen] += 1
        self._used[use, chosen] += 1
        return chosen

    def _is_busy(self, host_id: str) -> bool:
        """Decide whether the host's next malicious episode runs over a load: so many of each block, at random places."""
        block, place = divmod(self._malicious[host_id], _LOAD_BLOCK_EPISODES)
        self._malicious[host_id] += 1
        rng = build_rng(compute_slot_seed(self._spec.name, self._spec.seed, host_id, block), "busy block")
        ranks = rng.permutation(_LOAD_BLOCK_EPISODES)
        return bool((ranks[place] + rng.random()) / _LOAD_BLOCK_EPISODES < self._spec.busy_share)

    def _build_slot(self, host_id: str, role: EpisodeRole, profile_name: str, sample_name: str) -> RecordingSlot:
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
        background = ""
        if is_malicious and self._is_busy(host_id):
            cell = ProfileGroup(BENIGN_PROFILE, find_sample_group(profile_name, sample_name))
            background = self._choose_sample(host_id, cell, use="background", is_busy=True)
        beside = draw_intensities(find_sample(BENIGN_PROFILE, background), rng("background")) if background else {}
        return RecordingSlot(
            index=index,
            host_id=host_id,
            role=role,
            profile=profile_name,
            sample_name=sample_name,
            sample_kind=find_profile(profile_name).kind,
            plan_seed=seed,
            agent=bool(lab and rng("agent").random() < spec.agent_share),
            settle_s=round(float(rng("settle").uniform(*spec.settle_s)), 3),
            duration_s=duration_s,
            phases=phases,
            knobs=tuple(draw_intensities(find_sample(profile_name, sample_name), rng("knobs")).items()),
            background=background,
            background_knobs=tuple(beside.items()),
            chatter_s=round(draw_log_uniform(rng("chatter"), spec.chatter_s), 3),
        )
