"""Recording plans: parse a plan, draw its sessions from its seed, and check that elapsed time does not reveal labels.

Nothing here does input or output.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from math import exp, log

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.errors import PlanError, UsageError, suggest_names
from phasewatch.lab.host_distribution import draw_host_shapes, load_host_distribution
from phasewatch.lab.qemu_command import HostShape, find_host_shape
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

__all__ = [
    "MALICIOUS_PROFILES",
    "MAX_ELAPSED_TIME_F1",
    "MAX_PARALLEL_VMS",
    "DrawnHosts",
    "PhaseWalk",
    "PlanHost",
    "PlanSpec",
    "RecordingSession",
    "RecordingSlot",
    "build_rng",
    "build_sessions",
    "check_elapsed_time",
    "check_plan_spec",
    "compute_elapsed_time_f1",
    "compute_slot_seed",
    "compute_window_phases",
    "draw_log_uniform",
    "draw_phases",
    "estimate_elapsed_time_f1",
    "list_plan_hosts",
    "parse_plan",
]

MAX_ELAPSED_TIME_F1 = 0.25  # above it, elapsed time alone predicts the phase too well
MALICIOUS_PROFILES = tuple(row.name for row in PROFILES if row.name != BENIGN_PROFILE)
_PLAN_NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
_MAX_DURATION_S = 3600.0  # of an episode
_MIN_PHASE_S = 2.0
MAX_PARALLEL_VMS = 6  # more was not measured
_WINDOW_S, _STRIDE_S = 10.0, 5.0
_N_SIMULATED_EPISODES = 1500  # for learning, and as many for scoring
_SMOOTHING_WINDOWS = 1  # neighbouring windows on either side that are averaged
_LOAD_BLOCK_EPISODES = 3  # of each three malicious episodes of a host, busy_share × 3 run beside a load

PhaseWalk = tuple[tuple[Phase, float], ...]  # (phase, seconds), in order


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
        busy_share: Share of the malicious ones that run beside a benign load.
        agent_share: Probability that the guest agent is on.
        commission_per_host, commission_s: Number and length of the known-clean episodes: benign idle, agent off.
        soak_per_host, soak_s: Number and length of the long benign episodes: agent off, a different sample group each.
        settle_s: Shortest and longest time from boot to the first label, in seconds.
        episode_s, phase_s: Shortest and longest lab episode and phase, in seconds.
        chatter_s: Smallest and largest mean time between background events, in seconds.
        order: Phases in a fixed order instead of the random walk. This leaks the phase through elapsed time;
            `check_elapsed_time` measures how much.
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
    order: tuple[Phase, ...] = ()


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


def compute_window_phases(walk: PhaseWalk) -> NDArray[np.int64]:
    """Compute the phase of each 10 s window with a stride of 5 s.

    Returns:
        ``(n,)`` int64 phase codes: the phase with the largest share of the window; ties go to the later phase.
    """
    ends = np.cumsum([seconds for _, seconds in walk])
    starts = ends - [seconds for _, seconds in walk]
    count = int((ends[-1] - _WINDOW_S) // _STRIDE_S) + 1 if ends[-1] >= _WINDOW_S else 0
    begins = np.arange(count)[:, None] * _STRIDE_S
    inside = np.clip(np.minimum(ends, begins + _WINDOW_S) - np.maximum(starts, begins), 0, None)
    codes = np.array([phase.code for phase, _ in walk])
    share = np.stack([inside[:, codes == code].sum(axis=1) for code in range(len(PHASES))], axis=1).round(6)
    last = np.stack(
        [np.where((inside > 0) & (codes == code), starts, -1.0).max(axis=1) for code in range(len(PHASES))], axis=1
    )
    return np.lexsort((last, share), axis=1)[:, -1]


def compute_elapsed_time_f1(draw: Callable[[np.random.Generator], PhaseWalk], rng: np.random.Generator) -> float:
    """Score a classifier that knows only the time since the first label.

    Args:
        draw: Draws the phases of one episode.
        rng: Random numbers for all draws.

    Returns:
        Macro-F1 over the five phases on unseen walks, the higher of plain and class-balanced voting.
    """
    train = [compute_window_phases(draw(rng)) for _ in range(_N_SIMULATED_EPISODES)]
    test = [compute_window_phases(draw(rng)) for _ in range(_N_SIMULATED_EPISODES)]
    length = max(len(codes) for codes in train + test)
    votes = np.zeros((length + 2 * _SMOOTHING_WINDOWS, len(PHASES)))
    for codes in train:
        votes[_SMOOTHING_WINDOWS + np.arange(len(codes)), codes] += 1
    smooth = np.stack([votes[shift : shift + length] for shift in range(2 * _SMOOTHING_WINDOWS + 1)]).sum(axis=0)
    truth = np.concatenate(test)
    window = np.concatenate([np.arange(len(codes)) for codes in test])
    balanced = smooth / np.maximum(smooth.sum(axis=0), 1)
    return max(_compute_macro_f1(truth, table.argmax(axis=1)[window]) for table in (smooth, balanced))


def _compute_macro_f1(truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    scores = []
    for code in range(len(PHASES)):
        n_correct = int(((truth == code) & (predicted == code)).sum())
        n_both = int((truth == code).sum() + (predicted == code).sum())
        scores.append(2 * n_correct / n_both if n_both else 0.0)
    return float(np.mean(scores))


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingSlot:
    """One planned episode. Its identity is `plan_seed`, which is stored in the manifest.

    Attributes:
        index: Its number on its host, in the order of the plan.
        settle_s: Seconds from boot to the first label.
        phases: ``(phase, planned seconds)``; the seconds sum to `duration_s`.
        knobs: ``(name, value)`` of the sample's intensities, in the order of the profile table.
        background: The benign load that runs beside a malicious sample for the whole episode; empty for none.
        background_knobs: Intensities of that load.
        chatter_s: Mean seconds between background events.
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
    """Up to six slots of one host that are recorded at the same time; their samples belong to one group."""

    session: str
    host_id: str
    slots: tuple[RecordingSlot, ...]


def compute_slot_seed(name: str, seed: int, host_id: str, index: int) -> int:
    """Compute a seed below 2^63 from plan, host and index, so that no timeline repeats on another host."""
    text = f"{name}\0{seed}\0{host_id}\0{index}".encode()
    return int.from_bytes(blake2b(text, digest_size=8, person=b"plan_seed").digest(), "big") >> 1


def build_rng(seed: int, purpose: str) -> np.random.Generator:
    """Build the random generator of one purpose. Each purpose has its own, so a new draw does not change others."""
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
    return tuple(builder.sessions)


def estimate_elapsed_time_f1(spec: PlanSpec, seed: int = 0) -> float:
    """Estimate the macro-F1 of a classifier that knows only elapsed time, from 1500 + 1500 simulated episodes."""
    return compute_elapsed_time_f1(partial(_draw_episode_phases, spec), build_rng(seed, "elapsed time"))


def check_elapsed_time(spec: PlanSpec, seed: int = 0, *, force: bool = False) -> float:
    """Return the macro-F1 of elapsed time alone, and refuse a plan where it is too high.

    Raises:
        PlanError: If the score is above `MAX_ELAPSED_TIME_F1`, unless forced.
    """
    score = estimate_elapsed_time_f1(spec, seed)
    if score > MAX_ELAPSED_TIME_F1 and not force:
        raise PlanError(
            f"plan {spec.name}: elapsed time alone predicts the phase with macro-F1 {score:.2f}; at most "
            f"{MAX_ELAPSED_TIME_F1:.2f} is accepted. Leave out `order`, vary phase_s, or record it with --force"
        )
    return score


def _draw_episode_phases(spec: PlanSpec, rng: np.random.Generator) -> PhaseWalk:
    """Draw the phases of a lab episode, benign with the plan's benign share."""
    length_s = draw_episode_length(rng, between_s=spec.episode_s)
    return ((Phase.CLEAN, length_s),) if rng.random() < spec.benign_share else draw_phases(spec, rng, length_s)


def draw_phases(spec: PlanSpec, rng: np.random.Generator, length_s: float) -> PhaseWalk:
    """Draw the phases of a malicious episode: a random walk, or the plan's fixed order."""
    if not spec.order:
        return draw_phase_walk(rng, length_s=length_s, between_s=spec.phase_s)
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
    """Turns profile groups into sessions of slots, and balances the use of samples and loads."""

    def __init__(self, spec: PlanSpec, images: Mapping[str, str] | None = None) -> None:
        self.sessions: list[RecordingSession] = []
        self._spec = spec
        self._images = images or {}
        self._index: Counter[str] = Counter()
        self._malicious: Counter[str] = Counter()
        self._used: Counter[tuple[str, ...]] = Counter()

    def add(self, host_id: str, role: EpisodeRole, names: Sequence[tuple[str, str]]) -> None:
        """Add a session of (profile, sample) pairs."""
        number = len(self.sessions)
        slots = tuple(self._build_slot(host_id, role, *pair) for pair in names)
        self.sessions.append(RecordingSession(session=f"{self._spec.name}-{number:04d}", host_id=host_id, slots=slots))

    def add_lab(self, session: ScheduledSession) -> None:
        """Add a scheduled lab session, with the least used samples of its groups."""
        self.add(
            session.host_id,
            EpisodeRole.LAB,
            [(each.profile, self._choose_sample(session.host_id, each)) for each in session.profile_groups],
        )

    def add_soak(self, host_id: str, place: int, turn: int) -> None:
        """Add a soak episode as a session of its own: a second one would need the same group and length."""
        profile_group = ProfileGroup(BENIGN_PROFILE, (turn + place) % N_SAMPLE_GROUPS)
        self.add(host_id, EpisodeRole.SOAK, [(BENIGN_PROFILE, self._choose_sample(host_id, profile_group, use="soak"))])

    def _choose_sample(
        self, host_id: str, profile_group: ProfileGroup, *, use: str = "lab", is_busy: bool = False
    ) -> str:
        """Return the least used sample of a group; uses on this host count first."""
        profile, group = profile_group
        names = [sample.name for sample in find_profile(profile).samples[group::N_SAMPLE_GROUPS]]
        if is_busy:
            names = [name for name in names if name != IDLE_SAMPLE]
        chosen = min(names, key=lambda name: (self._used[use, host_id, profile, name], self._used[use, name]))
        self._used[use, host_id, profile, chosen] += 1
        self._used[use, chosen] += 1
        return chosen

    def _is_busy(self, host_id: str) -> bool:
        """Return whether the host's next malicious episode runs beside a load.

        Each block of episodes has a fixed number of them, at random places.
        """
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
            profile_group = ProfileGroup(BENIGN_PROFILE, find_sample_group(profile_name, sample_name))
            background = self._choose_sample(host_id, profile_group, use="background", is_busy=True)
        load_knobs = draw_intensities(find_sample(BENIGN_PROFILE, background), rng("background")) if background else {}
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
            background_knobs=tuple(load_knobs.items()),
            chatter_s=round(draw_log_uniform(rng("chatter"), spec.chatter_s), 3),
        )
