"""Planned episodes: the slot of one episode, sessions of slots that run at once, and selections of sessions. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import msgspec
import numpy as np

from phasewatch.errors import UsageError, suggest_names
from phasewatch.lab.network.world import NO_WORLD, EpisodeWorld
from phasewatch.lab.walks import LoadSpan, list_load_kinds
from phasewatch.profiles import find_sample_group
from phasewatch.types import BENIGN_PROFILE, EpisodeRole, Phase, SampleKind

__all__ = [
    "PhaseWalk",
    "PlanPart",
    "RecordingSession",
    "RecordingSlot",
    "build_rng",
    "compute_slot_seed",
    "select_part",
    "select_sessions",
]

PhaseWalk = tuple[tuple[Phase, float], ...]  # (phase, seconds), in order


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingSlot:
    """One planned episode. Its identity is `plan_seed`, which is stored in the manifest.

    Attributes:
        index: Its number on its host, in the order of the plan.
        settle_s: Seconds from boot to the first label.
        phases: ``(phase, planned seconds)``; the seconds sum to `duration_s`.
        knobs: ``(name, value)`` of the sample's intensities, in the order of the profile table.
        chatter_s: Mean seconds between background events.
        loads: Benign loads and idle times beside the phases, by seconds since the first label. A benign episode of
            laboratory version 1 has none: there the sample itself is the load.
        routine: Infection routine; empty for a benign episode and for the built-in routine of version 1.
        armed_form, dormant_form: How waiting malware keeps in touch; empty lets the guest choose by the seed.
        world: The servers of the episode; without servers the fixed network of version 1.
        cold: Share of reads that reach the disk; 0 leaves it to the guest's page cache.
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
    chatter_s: float
    loads: tuple[LoadSpan, ...] = ()
    routine: str = ""
    armed_form: str = ""
    dormant_form: str = ""
    world: EpisodeWorld = NO_WORLD
    cold: float = 0.0

    @property
    def group(self) -> int:
        """The sample group, 0 to 3."""
        return find_sample_group(self.profile, self.sample_name)

    @property
    def addresses(self) -> tuple[tuple[str, str], ...]:
        """``(role, "address:port")`` of the servers of the episode."""
        return self.world.addresses

    @property
    def background(self) -> str:
        """The first benign load beside a malicious sample; empty for none and for a benign episode."""
        kinds = list_load_kinds(self.loads) if self.profile != BENIGN_PROFILE else ()
        return kinds[0] if kinds else ""

    @property
    def background_knobs(self) -> tuple[tuple[str, float], ...]:
        """Intensities of `background`."""
        return next((span.knobs for span in self.loads if span.kind == self.background), ())


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


class PlanPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of another plan: the first sessions of some of its hosts. Its episodes count for the whole plan too.

    Attributes:
        part_of: Name of the built-in plan.
        hosts: Host ids of that plan.
        lab_per_host, commission_per_host, soak_per_host: At least this many episodes of each role per host; a session
            is never divided.
    """

    part_of: str
    hosts: tuple[str, ...]
    lab_per_host: int = 0
    commission_per_host: int = 0
    soak_per_host: int = 0


def select_part(sessions: Sequence[RecordingSession], part: PlanPart) -> tuple[RecordingSession, ...]:
    """Return the sessions of a part of a plan, in the order of recording.

    Raises:
        UsageError: If the plan has no such host.
    """
    known = {session.host_id for session in sessions}
    for host_id in part.hosts:
        if host_id not in known:
            raise UsageError(f"hosts: plan {part.part_of} has no host {host_id!r}; {suggest_names(host_id, known)}")
    wanted = {
        EpisodeRole.LAB: part.lab_per_host,
        EpisodeRole.COMMISSION: part.commission_per_host,
        EpisodeRole.SOAK: part.soak_per_host,
    }
    taken: Counter[tuple[str, EpisodeRole]] = Counter()
    chosen = []
    for session in sessions:
        key = session.host_id, session.slots[0].role
        if session.host_id in part.hosts and taken[key] < wanted[key[1]]:
            taken[key] += len(session.slots)
            chosen.append(session)
    return tuple(chosen)
