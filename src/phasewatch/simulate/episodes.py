"""One make-believe episode: walk, activity, counters, stamps and manifest, in the formats of a recorded one."""

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

_LEAD_TICKS = 4  # the samplers run before the first label and after the end
_TAIL_TICKS = 2
_WEEK_NS = 7 * 86_400_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedEpisodeSpec:
    """What one episode shall be; everything else follows from it and the generator handed in."""

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
    """An episode before it is packed: faults are put in here."""

    manifest: Manifest
    marks: tuple[LabelMark, ...]
    rows: Mapping[SourceKind, SourceRows]

    def encoded_labels(self) -> bytes:
        """Spell the labels."""
        return encode_labels(self.marks)


def draw_episode(rng: np.random.Generator, slot: SimulatedEpisodeSpec, knobs: SimulationSettings) -> EpisodeDraft:
    """Draw the telemetry of one slot.

    Args:
        rng: Of this episode alone.
        slot: What it shall be.
        knobs: How noisy the world is.
    """
    length_s = sum(seconds for _, seconds in slot.phases)
    ticks = _LEAD_TICKS + int(length_s / TICK_S) + 1 + _TAIL_TICKS
    ticks += ticks % 2  # the guest's agent reads every second tick
    at_s = np.arange(-_LEAD_TICKS, ticks - _LEAD_TICKS, dtype=np.float64) * TICK_S
    activity = draw_activity(
        rng,
        at_s=at_s,
        profile=slot.profile,
        sample_name=slot.sample_name,
        busy=slot.busy,
        phases=slot.phases,
        knobs=knobs,
    )
    columns = simulate_counters(rng, activity, slot.machine, weeks=slot.since_campaign_ns / _WEEK_NS, knobs=knobs)
    booted_ns = int(rng.integers(10**12, 10**15))  # how much less the monotonic clock reads than Unix time
    t0_ns = slot.started_wall_ns
    rows = {
        source: _stamp_readings(rng, source, columns[source], at_s=at_s, t0_ns=t0_ns, booted_ns=t0_ns - booted_ns)
        for source in SourceKind
        if source is not SourceKind.GUEST or slot.agent
    }
    marks = _build_marks(slot, t0_ns, t0_ns - booted_ns)
    return EpisodeDraft(manifest=_build_manifest(slot, marks, rows, booted_ns), marks=marks, rows=rows)


def _stamp_readings(
    rng: np.random.Generator,
    source: SourceKind,
    columns: CounterColumns,
    *,
    at_s: NDArray[np.float64],
    t0_ns: int,
    booted_ns: int,
) -> SourceRows:
    """Stamp a source's readings as its sampler would: every half second, a little late, at a phase of its own."""
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
        source=source, fields=tuple(columns), t_wall_ns=t_wall_ns, t_mono_ns=t_wall_ns - booted_ns,
        seq=np.arange(n, dtype=np.int64), columns=tuple(values), present=present,
    )  # fmt: skip


def _build_marks(slot: SimulatedEpisodeSpec, t0_ns: int, booted_ns: int) -> tuple[LabelMark, ...]:
    marks, at_ns = [], t0_ns
    for phase, seconds in slot.phases:
        marks.append(LabelMark(t_wall_ns=at_ns, t_mono_ns=at_ns - booted_ns, phase=phase))
        at_ns += round(seconds * 1e9)
    return (*marks, LabelMark(t_wall_ns=at_ns, t_mono_ns=at_ns - booted_ns, phase=None))


def _build_manifest(
    slot: SimulatedEpisodeSpec, marks: tuple[LabelMark, ...], rows: Mapping[SourceKind, SourceRows], booted_ns: int
) -> Manifest:
    machine = slot.machine
    t0_ns, t_end_ns = marks[0].t_wall_ns, marks[-1].t_wall_ns
    lacks_samples = machine.busy_samples == 0
    available = tuple(
        c.full_name
        for c in CHANNELS
        if c.source in rows and not (lacks_samples and c.name in ("vcpu_busy", "vcpu_user"))
    )
    # Clocks far apart, so that a stamp in one is never taken for a stamp in another.
    ahead_ns = {ClockBase.MONOTONIC: 0, ClockBase.BOOTTIME: 7_200_000_000_000, ClockBase.GUEST: 40_000_000_000_000}
    pairs = {
        clock: tuple((u - t0_ns + booted_ns + ahead, u) for u in (t0_ns - 2_000_000_000, t_end_ns + 1_000_000_000))
        for clock, ahead in ahead_ns.items()
    }
    return Manifest(
        format=BUNDLE_FORMAT,
        episode_id=slot.episode_id,
        host=HostMetadata(
            host_id=machine.host_id, arch=machine.arch, accel="tcg", machine="simulated", cpu="simulated", vcpus=SIMULATED_VCPUS,
            mem_mib=SIMULATED_MEMORY_MIB, disk="simulated", nic="simulated", hypervisor="phasewatch simulate", guest_kernel="simulated",
            recorder="phasewatch simulate",
        ),
        profile=slot.profile, sample_name=slot.sample_name,
        sample_kind=SampleKind.BENIGN if slot.profile == "benign" else SampleKind.EMULATED,
        origin=EpisodeOrigin.SIMULATED, role=slot.role, started_wall_ns=t0_ns, duration_s=round((t_end_ns - t0_ns) / 1e9, 3),
        session=slot.session, neighbours=slot.neighbours, plan_seed=slot.plan_seed, plan=slot.phases, agent=slot.agent,
        nominal_hz={source: 1.0 if source is SourceKind.GUEST else 2.0 for source in rows},
        rows_emitted={source: len(each) for source, each in rows.items()},
        channels_available=available,
        fields={source: tuple(spec.field for spec in list_raw_fields(source)) for source in rows},
        clocks=ClockMetadata(base=dict.fromkeys(rows, ClockBase.UNIX), pairs=pairs),  # type: ignore[arg-type]
        recording=None,
        members={},
    )  # fmt: skip


N_SAMPLE_GROUPS = N_SAMPLE_GROUPS


@cache
def list_benign_samples(group: int) -> tuple[str, ...]:
    """Give the benign kinds of a group."""
    (benign,) = (profile for profile in PROFILES if profile.kind is SampleKind.BENIGN)
    return tuple(sample.name for sample in benign.samples[group::N_SAMPLE_GROUPS])


@cache
def list_malicious_samples(group: int) -> tuple[tuple[str, str], ...]:
    """Give (profile, sample) of a group."""
    return tuple(
        (profile.name, sample.name)
        for profile in PROFILES
        if profile.kind is SampleKind.EMULATED
        for sample in profile.samples[group::N_SAMPLE_GROUPS]
    )


_EPOCH_NS = 1_767_571_200_000_000_000  # 5 January 2026, 00:00 UTC: simulated stores must not depend on today
_SLOT_NS = 720_000_000_000  # boot, settle and the longest episode
_SOAK_LENGTH_S = 600.0
_BASELINE_LENGTH_S = 120.0
_BENIGN_SHARE = 0.3
_BUSY_SHARE = 1 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedCampaign:
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
    between_s: tuple[float, float] = EPISODE_RANGE_S
    knobs: SimulationSettings = SimulationSettings()  # noqa: RUF009  frozen


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedSession:
    """One or two episodes that ran side by side on one host."""

    host: int
    number: int  # on this host
    size: int
    first: int  # the running number of its first episode on this host


def iter_sessions(campaign: SimulatedCampaign) -> Iterator[SimulatedSession]:
    """Give every session, hosts interleaved as they would be in time."""
    share = [
        campaign.episodes // campaign.hosts + (h < campaign.episodes % campaign.hosts) for h in range(campaign.hosts)
    ]
    for number in range((max(share) + 1) // 2):
        for host, episodes in enumerate(share):
            if (size := min(2, episodes - 2 * number)) > 0:
                yield SimulatedSession(host=host, number=number, size=size, first=2 * number)


def draw_session_specs(campaign: SimulatedCampaign, session: SimulatedSession) -> tuple[SimulatedEpisodeSpec, ...]:
    """Draw what runs in a session.

    The two machines carry samples of one sample group, or no sample could be held out.
    """
    rng = build_named_rng(campaign.seed, "session", session.host, session.number)
    machine = draw_host(campaign.seed, session.host, campaign.knobs)
    on_host = campaign.episodes // campaign.hosts
    gap_ns = max(_SLOT_NS, int(campaign.days * 86_400e9) // max(1, (on_host + 1) // 2))
    since_ns = session.number * gap_ns + int(rng.integers(0, gap_ns - _SLOT_NS + 1))
    started_ns = _EPOCH_NS + since_ns + session.host * 7_000_000 + int(rng.integers(0, 1_000_000_000))
    group = int(rng.integers(0, N_SAMPLE_GROUPS))
    ids = sorted(_draw_episode_id(rng, started_ns) for _ in range(session.size))
    slots = []
    for place, episode_id in enumerate(ids):
        role = _pick_role(session.first + place, on_host)
        profile, sample, busy = _draw_workload(rng, role, group, session.first + place)
        slots.append(
            SimulatedEpisodeSpec(
                episode_id=episode_id, machine=machine, profile=profile, sample_name=sample, busy=busy, role=role,
                agent=bool(rng.integers(0, 2)) and role is EpisodeRole.LAB,
                phases=_draw_phases(rng, role, profile, campaign.between_s),
                started_wall_ns=started_ns + place * int(rng.integers(1, 2_000_000_000)), since_campaign_ns=since_ns,
                session=f"{machine.host_id}-{session.number:05d}",
                neighbours=tuple(other for other in ids if other != episode_id),
                plan_seed=int(rng.integers(0, 2**63)),
            )
        )  # fmt: skip
    return tuple(slots)


def _draw_episode_id(rng: np.random.Generator, started_ns: int) -> EpisodeId:
    return build_uuid7(started_ns // 1_000_000, rng.bytes(10))


def _pick_role(place: int, on_host: int) -> EpisodeRole:
    """First the days known clean, then the long benign hours, then the lab; fewer of each in a small store."""
    commission, soak = min(3, on_host // 10), min(4, on_host // 12)
    if place < commission:
        return EpisodeRole.COMMISSION
    return EpisodeRole.SOAK if place < commission + soak else EpisodeRole.LAB


def _draw_workload(rng: np.random.Generator, role: EpisodeRole, group: int, place: int) -> tuple[str, str, str]:
    """Draw profile, sample and benign load of one machine."""
    if role is EpisodeRole.COMMISSION:
        return BENIGN_PROFILE, IDLE_SAMPLE, ""
    if role is EpisodeRole.SOAK:  # one of each sample group, in turn
        kinds = list_benign_samples(place % N_SAMPLE_GROUPS)
        kind = kinds[int(rng.integers(0, len(kinds)))]
        return BENIGN_PROFILE, kind, _busy_load_name(kind)
    if rng.random() < _BENIGN_SHARE:
        kinds = list_benign_samples(group)
        kind = kinds[int(rng.integers(0, len(kinds)))]
        return BENIGN_PROFILE, kind, _busy_load_name(kind)
    choices = list_malicious_samples(group)
    profile, sample = choices[int(rng.integers(0, len(choices)))]
    busy = BUSY_LOADS[int(rng.integers(0, len(BUSY_LOADS)))][0] if rng.random() < _BUSY_SHARE else ""
    return profile, sample, busy


def _busy_load_name(kind: str) -> str:
    """Give the benign load of a benign kind: the one of its name, but idle is none."""
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
