"""Small episodes in memory for tests: a valid manifest, phase marks and rows, with small numbers.

`episode(...)` builds a whole, plausible one at given rates; `rows(...)` builds a few readings; `with_rows`,
`with_clocks` and `replace_manifest` change one part of an episode; `members_of` encodes it for `pack_bundle`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from phasewatch.bundle.model import BUNDLE_FORMAT, ClockMetadata, Episode, HostMetadata, LabelMark, Manifest, SourceRows
from phasewatch.channels import CHANNELS, list_raw_fields
from phasewatch.types import ClockBase, EpisodeOrigin, EpisodeRole, Phase, SampleKind, SourceKind, build_uuid7

S = 1_000_000_000  # nanoseconds of a second
T0 = 1_790_000_000 * S  # wall clock at the first label, a whole second
MONO0 = 5_000 * S  # monotonic clock at that moment
BOOT0 = 9_000 * S  # boot-time clock at that moment

HZ: Mapping[SourceKind, float] = {
    SourceKind.PROC: 2.0,
    SourceKind.QMP: 2.0,
    SourceKind.NETFLOW: 2.0,
    SourceKind.GUEST: 1.0,
}

# What one second adds to a counter, or what a gauge reads; anything unnamed counts 100 a second, or reads 10.
RATES: Mapping[str, float] = {
    "cpu_user_ns": 3e8,
    "cpu_sys_ns": 1e8,
    "vcpu_run_ns": 3.5e8,
    "vcpu_wait_ns": 1e6,
    "main_run_ns": 2e7,
    "aux_run_ns": 1e7,
    "io_rchar_bytes": 5e4,
    "io_wchar_net_bytes": 4e4,
    "io_write_bytes": 8192.0,
    "blk_wr_ns": 2e6,
    "blk_wr_bytes": 65536.0,
    "blk_wr_ops": 4.0,
    "out_bytes": 2e3,
    "in_bytes": 4e3,
    "up_ns": 1e9,
    "cpu_total_jiffies": 100.0,
    "cpu_user_jiffies": 30.0,
    "cpu_sys_jiffies": 10.0,
    "vcpu_busy": 0.5,
    "vcpu_user": 0.25,
}


def episode_id(number: int = 1) -> str:
    """Return the id of the numbered test episode; ids sort as their numbers do."""
    return build_uuid7(1_790_000_000_000 + number, number.to_bytes(10, "big"))


def host(host_id: str = "h1", *, accel: str = "tcg", arch: str = "x86_64", vcpus: int = 1) -> HostMetadata:
    """Return a host with plausible facts."""
    return HostMetadata(
        host_id=host_id,
        arch=arch,
        accel=accel,
        machine="q35",
        cpu="max",
        vcpus=vcpus,
        mem_mib=256,
        disk="virtio-blk",
        nic="virtio-net",
        hypervisor="QEMU 7.2",
        guest_kernel="6.1",
        recorder="phasewatch 0",
    )


def manifest(
    *,
    number: int = 1,
    host_id: str = "h1",
    profile: str = "cryptomine",
    sample_name: str = "sample",
    role: EpisodeRole = EpisodeRole.LAB,
    origin: EpisodeOrigin = EpisodeOrigin.SIMULATED,
    duration_s: float = 20.0,
    plan: Sequence[tuple[str, float]] = (("clean", 20.0),),
    session: str = "",
    plan_seed: int | None = None,
    agent: bool = True,
    t0_ns: int = T0,
    rows_emitted: Mapping[SourceKind, int] | None = None,
    accel: str = "tcg",
    **changes: Any,
) -> Manifest:
    """Build a valid manifest; `changes` replaces any key of it.

    A benign profile gets the sample kind `benign`. Session and plan seed default to values of the episode's own.
    """
    pairs = {
        ClockBase.MONOTONIC: ((MONO0, t0_ns), (MONO0 + 3600 * S, t0_ns + 3600 * S)),
        ClockBase.BOOTTIME: ((BOOT0, t0_ns), (BOOT0 + 3600 * S, t0_ns + 3600 * S)),
    }
    sources = tuple(SourceKind) if agent else tuple(s for s in SourceKind if s is not SourceKind.GUEST)
    made = Manifest(
        format=BUNDLE_FORMAT,
        episode_id=episode_id(number),
        host=host(host_id, accel=accel),
        profile=profile,
        sample_name=sample_name,
        sample_kind=SampleKind.BENIGN if profile == "benign" else SampleKind.EMULATED,
        origin=origin,
        role=role,
        started_wall_ns=t0_ns - 60 * S,
        duration_s=duration_s,
        session=session or f"session-{number}",
        neighbours=(),
        plan_seed=number if plan_seed is None else plan_seed,
        plan=tuple((Phase(p), s) for p, s in plan),
        agent=agent,
        nominal_hz={s: HZ[s] for s in sources},
        rows_emitted=dict(rows_emitted) if rows_emitted is not None else dict.fromkeys(sources, 0),
        channels_available=tuple(c.full_name for c in CHANNELS if c.source in sources and c.accel != "kvm"),
        fields={s: tuple(spec.field for spec in list_raw_fields(s)) for s in sources},
        clocks=ClockMetadata(base=dict.fromkeys(sources, ClockBase.UNIX), pairs=pairs),
        recording=None,
        members={},
    )
    return msgspec.structs.replace(made, **changes)


def marks(phases: Sequence[tuple[str, float]], *, t0_ns: int = T0, mono0_ns: int = MONO0) -> tuple[LabelMark, ...]:
    """Build phase marks from (phase, seconds), and the end mark."""
    made, at_ns = [], 0
    for phase, seconds in phases:
        made.append(LabelMark(t_wall_ns=t0_ns + at_ns, t_mono_ns=mono0_ns + at_ns, phase=Phase(phase)))
        at_ns += round(seconds * S)
    made.append(LabelMark(t_wall_ns=t0_ns + at_ns, t_mono_ns=mono0_ns + at_ns, phase=None))
    return tuple(made)


def rows(
    source: SourceKind,
    at_s: Sequence[float],
    *,
    mono_s: Sequence[float] | None = None,
    seq: Sequence[int] | None = None,
    t0_ns: int = T0,
    **values: Sequence[int | float | None],
) -> SourceRows:
    """Build readings of one source at times relative to the first label.

    Args:
        source: The source.
        at_s: Wall time of each reading, in seconds after the first label.
        mono_s: Monotonic time of each reading, likewise; equal to the wall time if None.
        seq: Sequence numbers; 0, 1, 2 … if None.
        t0_ns: Wall stamp of the first label.
        values: Field → one value per reading, None for null. A field that is not given is null in all readings.
    """
    n, specs = len(at_s), list_raw_fields(source)
    if unknown := set(values) - {spec.field for spec in specs}:
        raise ValueError(f"{source} has no field {sorted(unknown)}")
    columns, present = [], np.zeros((n, len(specs)), np.bool_)
    for i, spec in enumerate(specs):
        given = values.get(spec.field, [None] * n)
        if len(given) != n:
            raise ValueError(f"{spec.field} has {len(given)} values for {n} readings")
        present[:, i] = [v is not None for v in given]
        columns.append(np.array([0 if v is None else v for v in given], np.int64 if spec.type == "int" else np.float64))
    return SourceRows(
        source=source,
        fields=tuple(spec.field for spec in specs),
        t_wall_ns=np.array([t0_ns + round(s * S) for s in at_s], np.int64),
        t_mono_ns=np.array([MONO0 + round(s * S) for s in (mono_s if mono_s is not None else at_s)], np.int64),
        seq=np.array(seq if seq is not None else range(n), np.int64),
        columns=tuple(columns),
        present=present,
    )


def bare(
    *sources: SourceRows, seconds: float = 10.0, phases: Sequence[tuple[str, float]] | None = None, **changes: Any
) -> Episode:
    """Build an episode with exactly these readings; it has one phase unless `phases` is given."""
    plan = tuple(phases) if phases is not None else (("clean", seconds),)
    made = manifest(
        duration_s=round(sum(s for _, s in plan), 3),
        plan=plan,
        rows_emitted={r.source: len(r) for r in sources},
        **changes,
    )
    return Episode(manifest=made, marks=marks(plan), rows={r.source: r for r in sources})


def episode(
    phases: Sequence[tuple[str, float]] = (("clean", 20.0), ("active", 20.0)),
    *,
    number: int = 1,
    host_id: str = "h1",
    agent: bool = True,
    rates: Mapping[str, float] | None = None,
    rates_of: Mapping[str, Mapping[str, float]] | None = None,
    noise: float = 0.1,
    jitter_s: float = 0.02,
    lead_s: float = 2.0,
    seed: int | None = None,
    t0_ns: int = T0,
    **changes: Any,
) -> Episode:
    """Build a whole, valid episode: every source ticks from `lead_s` before the first label to after the end.

    Args:
        phases: (phase, seconds), in order.
        number: Determines id, session and plan seed, so two numbers give two unrelated episodes.
        host_id: Name of the host.
        agent: Whether the guest agent reports.
        rates: Field → increment per second of a counter, or value of a gauge; overrides `RATES`.
        rates_of: Phase → the same during that phase, so that phases can be distinguished.
        noise: Relative spread of each tick's increment.
        jitter_s: Spread of the ticks around their times.
        lead_s: Seconds from the first tick to the first label.
        seed: Seed of noise and jitter; the number if None.
        t0_ns: Wall stamp of the first label.
        changes: Keys of the manifest, such as profile, sample_name, role, session, plan_seed.
    """
    seconds = sum(s for _, s in phases)
    made: dict[SourceKind, SourceRows] = {}
    for source in SourceKind:
        if source is SourceKind.GUEST and not agent:
            continue
        rng = np.random.default_rng([number if seed is None else seed, list(SourceKind).index(source)])
        n = int((seconds + lead_s + 1.0) * HZ[source])
        at = -lead_s + (np.arange(n) + 0.25) / HZ[source] + rng.uniform(-jitter_s, jitter_s, n)
        starts = np.cumsum([0.0] + [s for _, s in phases[:-1]])
        phase_of = [phases[max(0, int(np.searchsorted(starts, t, "right")) - 1)][0] for t in at]
        values: dict[str, list[int | float | None]] = {}
        for spec in list_raw_fields(source):
            rate = np.array([_rate(spec.field, phase, rates, rates_of, spec.nature) for phase in phase_of])
            rate = rate * (1.0 + noise * rng.standard_normal(n)).clip(0.0)
            if spec.nature == "counter":
                rate = 1_000_000 + np.cumsum(rate / HZ[source])
            if spec.field.startswith("kvm_"):  # the host runs on TCG
                values[spec.field] = [None] * n
                continue
            values[spec.field] = [int(v) for v in rate] if spec.type == "int" else [float(min(v, 1.0)) for v in rate]
        made[source] = rows(source, [float(t) for t in at], t0_ns=t0_ns, **values)
    whole = manifest(
        number=number,
        host_id=host_id,
        agent=agent,
        duration_s=round(seconds, 3),
        plan=phases,
        t0_ns=t0_ns,
        rows_emitted={source: len(r) for source, r in made.items()},
        **changes,
    )
    return Episode(manifest=whole, marks=marks(phases, t0_ns=t0_ns), rows=made)


def _rate(
    field: str,
    phase: str,
    rates: Mapping[str, float] | None,
    rates_of: Mapping[str, Mapping[str, float]] | None,
    nature: str,
) -> float:
    """Return the most specific rate of a field."""
    for table in ((rates_of or {}).get(phase, {}), rates or {}, RATES):
        if field in table:
            return table[field]
    return 100.0 if nature == "counter" else 10.0


def with_rows(whole: Episode, *sources: SourceRows, without: Iterable[SourceKind] = ()) -> Episode:
    """Return the episode with some sources' rows replaced, and some gone."""
    kept = {s: r for s, r in whole.rows.items() if s not in set(without)}
    return replace(whole, rows={**kept, **{r.source: r for r in sources}})


def replace_manifest(whole: Episode, **changes: Any) -> Episode:
    """Return the episode with some keys of its manifest changed."""
    return replace(whole, manifest=msgspec.structs.replace(whole.manifest, **changes))


def with_clocks(
    whole: Episode,
    *,
    base: Mapping[SourceKind, ClockBase] | None = None,
    pairs: Mapping[ClockBase, tuple[tuple[int, int], tuple[int, int]]] | None = None,
) -> Episode:
    """Return the episode with other declared clock bases or pairs."""
    clocks = whole.manifest.clocks
    return replace_manifest(
        whole,
        clocks=ClockMetadata(
            base={**clocks.base, **(base or {})}, pairs=dict(pairs) if pairs is not None else clocks.pairs
        ),
    )


def shifted(source_rows: SourceRows, by_ns: int) -> SourceRows:
    """Return the rows with every wall stamp moved, as if taken in another clock."""
    return replace(source_rows, t_wall_ns=source_rows.t_wall_ns + by_ns)


def members_of(whole: Episode) -> dict[str, bytes]:
    """Encode the episode's labels and rows as the members that `pack_bundle` takes."""
    from phasewatch.bundle.labels import encode_labels
    from phasewatch.bundle.rows import encode_rows

    members = {"labels.jsonl": encode_labels(whole.marks)}
    for source, r in whole.rows.items():
        columns = [
            [v if here else None for v, here in zip(column.tolist(), r.present[:, i].tolist(), strict=True)]
            for i, column in enumerate(r.columns)
        ]
        stamps = (r.t_wall_ns.tolist(), r.t_mono_ns.tolist(), r.seq.tolist())
        members[f"{source}.jsonl"] = encode_rows(source, zip(*stamps, *columns, strict=True))
    return members
