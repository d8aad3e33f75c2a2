"""One make-believe episode: walk, activity, counters, stamps and manifest, in the formats of a recorded one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import CHANNELS, raw_fields
from phasewatch.episode.bundle import encode_labels
from phasewatch.episode.model import FORMAT, Clocks, Host, LabelMark, Manifest, SourceRows
from phasewatch.simulate.activity import TICK_S, Knobs, draw_activity
from phasewatch.simulate.counters import MEMORY_MIB, VCPUS, Columns, Machine, count
from phasewatch.vocab import ClockBase, EpisodeId, Origin, Phase, Role, SampleKind, Source

_LEAD_TICKS = 4  # the samplers run before the first label and after the end
_TAIL_TICKS = 2
_WEEK_NS = 7 * 86_400_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """What one episode shall be; everything else follows from it and the generator handed in."""

    episode_id: EpisodeId
    machine: Machine
    profile: str
    sample_name: str
    busy: str
    role: Role
    agent: bool
    phases: tuple[tuple[Phase, float], ...]
    started_wall_ns: int
    since_campaign_ns: int
    session: str
    neighbours: tuple[str, ...]
    plan_seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """An episode before it is packed: faults are put in here."""

    manifest: Manifest
    marks: tuple[LabelMark, ...]
    rows: Mapping[Source, SourceRows]

    def labels(self) -> bytes:
        """Spell the labels."""
        return encode_labels(self.marks)


def draw_episode(rng: np.random.Generator, slot: Slot, knobs: Knobs) -> Draft:
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
    columns = count(rng, activity, slot.machine, weeks=slot.since_campaign_ns / _WEEK_NS, knobs=knobs)
    booted_ns = int(rng.integers(10**12, 10**15))  # how much less the monotonic clock reads than Unix time
    t0_ns = slot.started_wall_ns
    rows = {
        source: _stamp(rng, source, columns[source], at_s=at_s, t0_ns=t0_ns, booted_ns=t0_ns - booted_ns)
        for source in Source
        if source is not Source.GUEST or slot.agent
    }
    marks = _marks(slot, t0_ns, t0_ns - booted_ns)
    return Draft(manifest=_manifest(slot, marks, rows, booted_ns), marks=marks, rows=rows)


def _stamp(
    rng: np.random.Generator, source: Source, columns: Columns, *, at_s: NDArray[np.float64], t0_ns: int, booted_ns: int
) -> SourceRows:
    """Stamp a source's readings as its sampler would: every half second, a little late, at a phase of its own."""
    if source is Source.GUEST:
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


def _marks(slot: Slot, t0_ns: int, booted_ns: int) -> tuple[LabelMark, ...]:
    marks, at_ns = [], t0_ns
    for phase, seconds in slot.phases:
        marks.append(LabelMark(t_wall_ns=at_ns, t_mono_ns=at_ns - booted_ns, phase=phase))
        at_ns += round(seconds * 1e9)
    return (*marks, LabelMark(t_wall_ns=at_ns, t_mono_ns=at_ns - booted_ns, phase=None))


def _manifest(slot: Slot, marks: tuple[LabelMark, ...], rows: Mapping[Source, SourceRows], booted_ns: int) -> Manifest:
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
        format=FORMAT,
        episode_id=slot.episode_id,
        host=Host(
            host_id=machine.host_id, arch=machine.arch, accel="tcg", machine="simulated", cpu="simulated", vcpus=VCPUS,
            mem_mib=MEMORY_MIB, disk="simulated", nic="simulated", hypervisor="phasewatch simulate", guest_kernel="simulated",
            recorder="phasewatch simulate",
        ),
        profile=slot.profile, sample_name=slot.sample_name,
        sample_kind=SampleKind.BENIGN if slot.profile == "benign" else SampleKind.EMULATED,
        origin=Origin.SIMULATED, role=slot.role, started_wall_ns=t0_ns, duration_s=round((t_end_ns - t0_ns) / 1e9, 3),
        session=slot.session, neighbours=slot.neighbours, plan_seed=slot.plan_seed, plan=slot.phases, agent=slot.agent,
        nominal_hz={source: 1.0 if source is Source.GUEST else 2.0 for source in rows},
        rows_emitted={source: len(each) for source, each in rows.items()},
        channels_available=available,
        fields={source: tuple(spec.field for spec in raw_fields(source)) for source in rows},
        clocks=Clocks(base=dict.fromkeys(rows, ClockBase.UNIX), pairs=pairs),  # type: ignore[arg-type]
        recording=None,
        members={},
    )  # fmt: skip
