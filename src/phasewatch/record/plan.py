"""What is recorded, when, on which host: a plan's slots and sessions, all drawn from its seed (pure)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from math import exp, log

import numpy as np

from phasewatch.errors import PlanError
from phasewatch.profiles import SAMPLE_GROUPS, draw_knobs, profile, sample, sample_group
from phasewatch.record.deal import BENIGN, Cell, Deal, Need, deal
from phasewatch.record.elapsed import Walk, elapsed_time_f1
from phasewatch.record.hosts import host_shape
from phasewatch.record.spec import MALICIOUS, PlanSpec
from phasewatch.vocab import Phase, Role, SampleKind
from phasewatch.walk import draw_length, draw_walk

MAX_ELAPSED_TIME_F1 = 0.25  # DESIGN section 2: above it a plan tells the phase by the clock
IDLE = "idle"
_BLOCK = 3  # of each three malicious episodes of a host, busy_share × 3 have a load beside them


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
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
    role: Role
    profile: str
    sample_name: str
    sample_kind: SampleKind
    plan_seed: int
    agent: bool
    settle_s: float
    duration_s: float
    phases: Walk
    knobs: tuple[tuple[str, float], ...]
    background: str
    background_knobs: tuple[tuple[str, float], ...]
    chatter_s: float

    @property
    def group(self) -> int:
        """The sample group, 0 to 3."""
        return sample_group(self.profile, self.sample_name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One or two slots of one host that run side by side; all samples in them are of one group."""

    session: str
    host_id: str
    slots: tuple[Slot, ...]


def slot_seed(name: str, seed: int, host_id: str, index: int) -> int:
    """Hash (plan, host, index) to a seed below 2^63, so that no timeline repeats on another host."""
    text = f"{name}\0{seed}\0{host_id}\0{index}".encode()
    return int.from_bytes(blake2b(text, digest_size=8, person=b"plan_seed").digest(), "big") >> 1


def purpose_rng(seed: int, purpose: str) -> np.random.Generator:
    """Give the generator of one purpose, so that a new draw shifts no old one."""
    return np.random.default_rng([seed, int.from_bytes(blake2b(purpose.encode(), digest_size=8).digest(), "big")])


def build_sessions(spec: PlanSpec) -> tuple[Session, ...]:
    """Lay out the whole campaign in the order of recording: commissioning, then lab with soak strewn in."""
    rooms = [(host.host_id, host_shape(host.host_id).is_alone) for host in spec.hosts]
    needs = [
        Need(
            host_id=host.host_id,
            episodes=spec.lab_per_host,
            profiles=host.profiles or MALICIOUS,
            is_alone=host_shape(host.host_id).is_alone,
        )
        for host in spec.hosts
    ]
    writer = _Writer(spec)
    for first in range(0, spec.commission_per_host, 2):
        many = min(2, spec.commission_per_host - first)
        for host_id, is_alone in rooms:
            for chunk in [1] * many if is_alone else [many]:
                writer.add(host_id, Role.COMMISSION, [(BENIGN, IDLE)] * chunk)
    lab = deal(needs, benign_share=spec.benign_share)
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


def elapsed_time_baseline(spec: PlanSpec, seed: int = 0) -> float:
    """Simulate 1500 + 1500 episodes of the plan; give the macro-F1 of the best guess from elapsed time alone."""
    return elapsed_time_f1(partial(_draw_any, spec), purpose_rng(seed, "elapsed time"))


def check_elapsed_time(spec: PlanSpec, seed: int = 0, *, force: bool = False) -> float:
    """Refuse a plan whose clock tells the phase.

    Raises:
        PlanError: If elapsed time alone scores above `MAX_ELAPSED_TIME_F1`, unless forced.
    """
    score = elapsed_time_baseline(spec, seed)
    if score > MAX_ELAPSED_TIME_F1 and not force:
        raise PlanError(
            f"plan {spec.name}: elapsed time alone tells the phase with macro-F1 {score:.2f}, at most "
            f"{MAX_ELAPSED_TIME_F1:.2f} is accepted; leave out `order`, vary phase_s, or record it with --force"
        )
    return score


def _draw_any(spec: PlanSpec, rng: np.random.Generator) -> Walk:
    """Draw the phases of an episode of the campaign, benign ones in their share."""
    length_s = draw_length(rng, between_s=spec.episode_s)
    return ((Phase.CLEAN, length_s),) if rng.random() < spec.benign_share else draw_phases(spec, rng, length_s)


def draw_phases(spec: PlanSpec, rng: np.random.Generator, length_s: float) -> Walk:
    """Draw the phases of an episode that is not benign: the walk, or the plan's fixed order."""
    if not spec.order:
        return draw_walk(rng, length_s=length_s, between_s=spec.phase_s)
    walk: list[tuple[Phase, float]] = []
    left_s = length_s
    for at, phase in enumerate(spec.order):
        stay_s = left_s if at == len(spec.order) - 1 else min(left_s, round(float(rng.uniform(*spec.phase_s)), 3))
        left_s = round(left_s - stay_s, 3)
        if stay_s > 0:
            walk.append((phase, stay_s))
    return tuple(walk)


def log_uniform(rng: np.random.Generator, between: tuple[float, float]) -> float:
    """Draw a number whose logarithm is uniform between those of two."""
    return exp(rng.uniform(log(between[0]), log(between[1])))


class _Writer:
    """Turns cells into slots, and remembers which samples and loads were used least."""

    def __init__(self, spec: PlanSpec) -> None:
        self.sessions: list[Session] = []
        self._spec = spec
        self._index: Counter[str] = Counter()
        self._malicious: Counter[str] = Counter()
        self._used: Counter[tuple[str, ...]] = Counter()

    def add(self, host_id: str, role: Role, names: Sequence[tuple[str, str]]) -> None:
        """Add a session of these (profile, sample)s."""
        number = len(self.sessions)
        slots = tuple(self._slot(host_id, role, *pair) for pair in names)
        self.sessions.append(Session(session=f"{self._spec.name}-{number:04d}", host_id=host_id, slots=slots))

    def add_lab(self, one: Deal) -> None:
        """Add a session of the deal, with the samples of its groups that were used least."""
        self.add(one.host_id, Role.LAB, [(cell.profile, self._least_used(one.host_id, cell)) for cell in one.cells])

    def add_soak(self, host_id: str, place: int, turn: int) -> None:
        """Add a long benign episode, alone: its neighbour would have to be of its own group, and as long."""
        cell = Cell(BENIGN, (turn + place) % SAMPLE_GROUPS)
        self.add(host_id, Role.SOAK, [(BENIGN, self._least_used(host_id, cell, use="soak"))])

    def _least_used(self, host_id: str, cell: Cell, *, use: str = "lab", is_busy: bool = False) -> str:
        """Choose among the samples of a group, least used first, here before elsewhere."""
        names = [one.name for one in profile(cell.profile).samples[cell.group :: SAMPLE_GROUPS]]
        if is_busy:
            names = [name for name in names if name != IDLE]
        chosen = min(names, key=lambda name: (self._used[use, host_id, cell.profile, name], self._used[use, name]))
        self._used[use, host_id, cell.profile, chosen] += 1
        self._used[use, chosen] += 1
        return chosen

    def _is_busy(self, host_id: str) -> bool:
        """Decide whether the host's next malicious episode runs over a load: so many of each block, at random places."""
        block, place = divmod(self._malicious[host_id], _BLOCK)
        self._malicious[host_id] += 1
        rng = purpose_rng(slot_seed(self._spec.name, self._spec.seed, host_id, block), "busy block")
        ranks = rng.permutation(_BLOCK)
        return bool((ranks[place] + rng.random()) / _BLOCK < self._spec.busy_share)

    def _slot(self, host_id: str, role: Role, profile_name: str, sample_name: str) -> Slot:
        spec, index = self._spec, self._index[host_id]
        self._index[host_id] += 1
        seed = slot_seed(spec.name, spec.seed, host_id, index)
        rng = partial(purpose_rng, seed)
        lab = role is Role.LAB
        if lab:
            duration_s = draw_length(rng("length"), between_s=spec.episode_s)
        else:
            duration_s = spec.soak_s if role is Role.SOAK else spec.commission_s
        is_malicious = profile_name != BENIGN
        phases = draw_phases(spec, rng("walk"), duration_s) if is_malicious else ((Phase.CLEAN, duration_s),)
        background = ""
        if is_malicious and self._is_busy(host_id):
            cell = Cell(BENIGN, sample_group(profile_name, sample_name))
            background = self._least_used(host_id, cell, use="background", is_busy=True)
        beside = draw_knobs(sample(BENIGN, background), rng("background")) if background else {}
        return Slot(
            index=index,
            host_id=host_id,
            role=role,
            profile=profile_name,
            sample_name=sample_name,
            sample_kind=profile(profile_name).kind,
            plan_seed=seed,
            agent=bool(lab and rng("agent").random() < spec.agent_share),
            settle_s=round(float(rng("settle").uniform(*spec.settle_s)), 3),
            duration_s=duration_s,
            phases=phases,
            knobs=tuple(draw_knobs(sample(profile_name, sample_name), rng("knobs")).items()),
            background=background,
            background_knobs=tuple(beside.items()),
            chatter_s=round(log_uniform(rng("chatter"), spec.chatter_s), 3),
        )
