"""Draw simulated campaigns, sessions and episodes: phases, activity, counters, time stamps and manifests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.bundle.archive import encode_labels
from phasewatch.bundle.model import BUNDLE_FORMAT, ClockMetadata, HostMetadata, LabelMark, Manifest, SourceRows
from phasewatch.channels import CHANNELS, list_raw_fields
from phasewatch.profiles import (
    EPISODE_RANGE_S,
    IDLE_SAMPLE,
    N_SAMPLE_GROUPS,
    PROFILES,
    draw_episode_length,
    draw_phase_walk,
    list_samples,
)
from phasewatch.simulate.counters import (
    SIMULATED_MEMORY_MIB,
    SIMULATED_VCPUS,
    CounterColumns,
    SimulatedHost,
    draw_host,
    simulate_counters,
)
from phasewatch.simulate.generator import BUSY_LOADS, TICK_S, SimulationSettings, build_named_rng, draw_activity
from phasewatch.types import (
    BENIGN_PROFILE,
    ClockBase,
    EpisodeId,
    EpisodeOrigin,
    EpisodeRole,
    Phase,
    SampleKind,
    SourceKind,
    build_uuid7,
)

__all__ = [
    "EpisodeDraft",
    "SimulatedCampaign",
    "SimulatedEpisodeSpec",
    "SimulatedSession",
    "draw_episode",
    "draw_session_specs",
    "iter_sessions",
]

_LEAD_TICKS = 4  # the samplers run before the first label and after the end
_TAIL_TICKS = 2
_WEEK_NS = 7 * 86_400_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedEpisodeSpec:
    """The plan of one simulated episode; together with a random generator it determines the episode."""

    episode_id: EpisodeId
    machine: SimulatedHost
    profile: str
    sample_name: str
    busy: str
    role: EpisodeRole
    agent: bool
    phases: tuple[tuple[Phase, float], ...]
    started_wall_ns: int
    since_campaign_ns: int
    session: str
    neighbours: tuple[str, ...]
    plan_seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeDraft:
    """An episode before it is packed; faults are injected here."""

    manifest: Manifest
    marks: tuple[LabelMark, ...]
    rows: Mapping[SourceKind, SourceRows]

    def encoded_labels(self) -> bytes:
        """Return the labels as the bytes of ``labels.jsonl``."""
        return encode_labels(self.marks)


def draw_episode(rng: np.random.Generator, spec: SimulatedEpisodeSpec, settings: SimulationSettings) -> EpisodeDraft:
    """Draw the telemetry of one episode.

    Args:
        rng: Random generator of this episode alone.
        spec: The plan of the episode.
        settings: Spread of hosts, episodes and ticks.
    """
    length_s = sum(seconds for _, seconds in spec.phases)
    ticks = _LEAD_TICKS + int(length_s / TICK_S) + 1 + _TAIL_TICKS
    ticks += ticks % 2  # the guest's agent reads every second tick
    at_s = np.arange(-_LEAD_TICKS, ticks - _LEAD_TICKS, dtype=np.float64) * TICK_S
    activity = draw_activity(
        rng,
        at_s=at_s,
        profile=spec.profile,
        sample_name=spec.sample_name,
        busy=spec.busy,
        phases=spec.phases,
        settings=settings,
    )
    columns = simulate_counters(rng, activity, spec.machine, weeks=spec.since_campaign_ns / _WEEK_NS, settings=settings)
    booted_ns = int(rng.integers(10**12, 10**15))  # Unix time minus monotonic time
    t0_ns = spec.started_wall_ns
    rows = {
        source: _stamp_readings(rng, source, columns[source], at_s=at_s, t0_ns=t0_ns, booted_ns=t0_ns - booted_ns)
        for source in SourceKind
        if source is not SourceKind.GUEST or spec.agent
    }
    marks = _build_marks(spec, t0_ns, t0_ns - booted_ns)
    return EpisodeDraft(manifest=_build_manifest(spec, marks, rows, booted_ns), marks=marks, rows=rows)


def _stamp_readings(
    rng: np.random.Generator,
    source: SourceKind,
    columns: CounterColumns,
    *,
    at_s: NDArray[np.float64],
    t0_ns: int,
    booted_ns: int,
) -> SourceRows:
    """Add time stamps to a source's readings: every half second, slightly late, with a phase of its own."""
    if source is SourceKind.GUEST:
        at_s = at_s[1::2]
    n = len(at_s)
    late_ns = rng.integers(0, int(TICK_S * 0.9e9)) + rng.integers(0, 4_000_000, n)
    t_wall_ns = t0_ns + (at_s * 1e9).astype(np.int64) + late_ns
    present = np.ones((n, len(columns)), np.bool_)
    values: list[NDArray[Any]] = []
    for i, column in enumerate(columns.values()):
        is_known = np.isfinite(column) if column.dtype == np.float64 else column >= 0
        present[:, i] = is_known
        values.append(column if is_known.all() else np.where(is_known, column, 0).astype(column.dtype))
    return SourceRows(
        source=source,
        fields=tuple(columns),
        t_wall_ns=t_wall_ns,
        t_mono_ns=t_wall_ns - booted_ns,
        seq=np.arange(n, dtype=np.int64),
        columns=tuple(values),
        present=present,
    )


def _build_marks(spec: SimulatedEpisodeSpec, t0_ns: int, booted_ns: int) -> tuple[LabelMark, ...]:
    marks, at_ns = [], t0_ns
    for phase, seconds in spec.phases:
        marks.append(LabelMark(t_wall_ns=at_ns, t_mono_ns=at_ns - booted_ns, phase=phase))
        at_ns += round(seconds * 1e9)
    return (*marks, LabelMark(t_wall_ns=at_ns, t_mono_ns=at_ns - booted_ns, phase=None))


def _build_manifest(
    spec: SimulatedEpisodeSpec, marks: tuple[LabelMark, ...], rows: Mapping[SourceKind, SourceRows], booted_ns: int
) -> Manifest:
    host = spec.machine
    t0_ns, t_end_ns = marks[0].t_wall_ns, marks[-1].t_wall_ns
    lacks_samples = host.busy_samples == 0
    available = tuple(
        c.full_name
        for c in CHANNELS
        if c.source in rows and c.accel != "kvm" and not (lacks_samples and c.name in ("vcpu_busy", "vcpu_user"))
    )
    # The clocks are far apart, so that a stamp of one cannot be mistaken for a stamp of another.
    ahead_ns = {ClockBase.MONOTONIC: 0, ClockBase.BOOTTIME: 7_200_000_000_000, ClockBase.GUEST: 40_000_000_000_000}
    pairs = {
        clock: tuple((u - t0_ns + booted_ns + ahead, u) for u in (t0_ns - 2_000_000_000, t_end_ns + 1_000_000_000))
        for clock, ahead in ahead_ns.items()
    }
    return Manifest(
        format=BUNDLE_FORMAT,
        episode_id=spec.episode_id,
        host=HostMetadata(
            host_id=host.host_id,
            arch=host.arch,
            accel="tcg",
            machine="simulated",
            cpu="simulated",
            vcpus=SIMULATED_VCPUS,
            mem_mib=SIMULATED_MEMORY_MIB,
            disk="simulated",
            nic="simulated",
            hypervisor="phasewatch simulate",
            guest_kernel="simulated",
            recorder="phasewatch simulate",
        ),
        profile=spec.profile,
        sample_name=spec.sample_name,
        sample_kind=SampleKind.BENIGN if spec.profile == BENIGN_PROFILE else SampleKind.EMULATED,
        origin=EpisodeOrigin.SIMULATED,
        role=spec.role,
        started_wall_ns=t0_ns,
        duration_s=round((t_end_ns - t0_ns) / 1e9, 3),
        session=spec.session,
        neighbours=spec.neighbours,
        plan_seed=spec.plan_seed,
        plan=spec.phases,
        agent=spec.agent,
        nominal_hz={source: 1.0 if source is SourceKind.GUEST else 2.0 for source in rows},
        rows_emitted={source: len(each) for source, each in rows.items()},
        channels_available=available,
        fields={source: tuple(field.field for field in list_raw_fields(source)) for source in rows},
        clocks=ClockMetadata(base=dict.fromkeys(rows, ClockBase.UNIX), pairs=pairs),  # type: ignore[arg-type]
        recording=None,
        members={},
    )


@cache
def _list_benign_samples(group: int) -> tuple[str, ...]:
    """Return the benign samples of a group."""
    return tuple(sample.name for sample in list_samples(BENIGN_PROFILE, group))


@cache
def _list_malicious_samples(group: int) -> tuple[tuple[str, str], ...]:
    """Return the (profile, sample) pairs of a group."""
    return tuple(
        (profile.name, sample.name)
        for profile in PROFILES
        if profile.kind is SampleKind.EMULATED
        for sample in list_samples(profile.name, group)
    )


_EPOCH_NS = (
    1_767_571_200_000_000_000  # 5 January 2026, 00:00 UTC; a simulated store must not depend on the current date
)
_SLOT_NS = 720_000_000_000  # boot, settle and the longest episode
_SOAK_LENGTH_S = 600.0
_BASELINE_LENGTH_S = 120.0
_BENIGN_SHARE = 0.3
_BUSY_SHARE = 1 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedCampaign:
    """A simulated campaign. Equal campaigns give equal stores.

    Attributes:
        hosts: Number of hosts.
        episodes: Number of episodes of all roles, distributed over the hosts.
        seed: Seed of all draws.
        days: Smallest number of days that the sessions span.
        between_s: Shortest and longest lab episode, in seconds.
        settings: Spread of hosts, episodes and ticks.
    """

    hosts: int
    episodes: int
    seed: int
    days: float = 10.0
    between_s: tuple[float, float] = EPISODE_RANGE_S
    settings: SimulationSettings = SimulationSettings()  # noqa: RUF009  frozen


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedSession:
    """One or two episodes that run at the same time on one host.

    Attributes:
        host: Number of the host.
        number: Number of the session on this host.
        size: Number of its episodes.
        first: Number of its first episode on this host.
    """

    host: int
    number: int
    size: int
    first: int


def iter_sessions(campaign: SimulatedCampaign) -> Iterator[SimulatedSession]:
    """Yield all sessions, with hosts interleaved as in time."""
    share = [
        campaign.episodes // campaign.hosts + (h < campaign.episodes % campaign.hosts) for h in range(campaign.hosts)
    ]
    for number in range((max(share) + 1) // 2):
        for host, episodes in enumerate(share):
            if (size := min(2, episodes - 2 * number)) > 0:
                yield SimulatedSession(host=host, number=number, size=size, first=2 * number)


def draw_session_specs(campaign: SimulatedCampaign, session: SimulatedSession) -> tuple[SimulatedEpisodeSpec, ...]:
    """Draw the plans of the episodes of a session.

    Both have samples of one sample group; otherwise no sample could be held out.
    """
    rng = build_named_rng(campaign.seed, "session", session.host, session.number)
    machine = draw_host(campaign.seed, session.host, campaign.settings)
    on_host = campaign.episodes // campaign.hosts
    gap_ns = max(_SLOT_NS, int(campaign.days * 86_400e9) // max(1, (on_host + 1) // 2))
    since_ns = session.number * gap_ns + int(rng.integers(0, gap_ns - _SLOT_NS + 1))
    started_ns = _EPOCH_NS + since_ns + session.host * 7_000_000 + int(rng.integers(0, 1_000_000_000))
    group = int(rng.integers(0, N_SAMPLE_GROUPS))
    ids = sorted(_draw_episode_id(rng, started_ns) for _ in range(session.size))
    specs = []
    for place, episode_id in enumerate(ids):
        role = _pick_role(session.first + place, on_host)
        profile, sample, busy = _draw_workload(rng, role, group, session.first + place)
        specs.append(
            SimulatedEpisodeSpec(
                episode_id=episode_id,
                machine=machine,
                profile=profile,
                sample_name=sample,
                busy=busy,
                role=role,
                agent=bool(rng.integers(0, 2)) and role is EpisodeRole.LAB,
                phases=_draw_phases(rng, role, profile, campaign.between_s),
                started_wall_ns=started_ns + place * int(rng.integers(1, 2_000_000_000)),
                since_campaign_ns=since_ns,
                session=f"{machine.host_id}-{session.number:05d}",
                neighbours=tuple(other for other in ids if other != episode_id),
                plan_seed=int(rng.integers(0, 2**63)),
            )
        )
    return tuple(specs)


def _draw_episode_id(rng: np.random.Generator, started_ns: int) -> EpisodeId:
    return build_uuid7(started_ns // 1_000_000, rng.bytes(10))


def _pick_role(place: int, on_host: int) -> EpisodeRole:
    """Return the role of an episode: known-clean, then soak, then lab; small stores have fewer of the first two."""
    commission, soak = min(3, on_host // 10), min(4, on_host // 12)
    if place < commission:
        return EpisodeRole.COMMISSION
    return EpisodeRole.SOAK if place < commission + soak else EpisodeRole.LAB


def _draw_workload(rng: np.random.Generator, role: EpisodeRole, group: int, place: int) -> tuple[str, str, str]:
    """Draw profile, sample and benign load of one episode."""
    if role is EpisodeRole.COMMISSION:
        return BENIGN_PROFILE, IDLE_SAMPLE, ""
    if role is EpisodeRole.SOAK:  # one of each sample group, in turn
        kinds = _list_benign_samples(place % N_SAMPLE_GROUPS)
        kind = kinds[int(rng.integers(0, len(kinds)))]
        return BENIGN_PROFILE, kind, _busy_load_name(kind)
    if rng.random() < _BENIGN_SHARE:
        kinds = _list_benign_samples(group)
        kind = kinds[int(rng.integers(0, len(kinds)))]
        return BENIGN_PROFILE, kind, _busy_load_name(kind)
    choices = _list_malicious_samples(group)
    profile, sample = choices[int(rng.integers(0, len(choices)))]
    busy = BUSY_LOADS[int(rng.integers(0, len(BUSY_LOADS)))][0] if rng.random() < _BUSY_SHARE else ""
    return profile, sample, busy


def _busy_load_name(kind: str) -> str:
    """Return the load of a benign sample: its own name, or empty for idle."""
    return "" if kind == IDLE_SAMPLE else kind


def _draw_phases(
    rng: np.random.Generator, role: EpisodeRole, profile: str, between_s: tuple[float, float]
) -> tuple[tuple[Phase, float], ...]:
    if role is EpisodeRole.COMMISSION:
        return ((Phase.CLEAN, _BASELINE_LENGTH_S),)
    if role is EpisodeRole.SOAK:
        return ((Phase.CLEAN, _SOAK_LENGTH_S),)
    length_s = draw_episode_length(rng, between_s=between_s)
    return ((Phase.CLEAN, length_s),) if profile == BENIGN_PROFILE else draw_phase_walk(rng, length_s=length_s)
