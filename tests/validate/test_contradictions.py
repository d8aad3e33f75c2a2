"""Bundles that contradict themselves: each is found, and rejected where a model could be taught something false."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from tests.factories.bundles import MONO0, T0, S, episode, replace_manifest, with_clocks, with_rows
from tests.validate.packed import codes, findings, the

from phasewatch.bundle.model import Episode, RecordingMetadata, SourceRows
from phasewatch.channels import CHANNELS
from phasewatch.types import (
    BundleStatus,
    ClockBase,
    EpisodeOrigin,
    EpisodeRole,
    Phase,
    SampleKind,
    SourceKind,
    build_uuid7,
)
from phasewatch.validate import checks

PHASES = (("clean", 20.0), ("infecting", 10.0), ("active", 10.0))
WHOLE = episode(PHASES)
CALM = episode((("clean", 40.0),))
RECORDING = RecordingMetadata(boot_s=3.0, settle_s=5.0, pinning=(), knobs={}, background="", absent={})


def with_manifest(**changes: object) -> Episode:
    return replace_manifest(WHOLE, **changes)


def with_host(**changes: object) -> Episode:
    return with_manifest(host=msgspec.structs.replace(WHOLE.manifest.host, **changes))


def each_source(change: Callable[[SourceRows], SourceRows], whole: Episode = WHOLE) -> Episode:
    return with_rows(whole, *(change(readings) for readings in whole.rows.values()))


def of_source(source: SourceKind, change: Callable[[SourceRows], SourceRows], whole: Episode = WHOLE) -> Episode:
    return with_rows(whole, change(whole.rows[source]))


def field(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[SourceRows], SourceRows]:
    def changed(readings: SourceRows) -> SourceRows:
        i = readings.fields.index(name)
        return replace(
            readings, columns=(*readings.columns[:i], change(readings.columns[i]), *readings.columns[i + 1 :])
        )

    return changed


def with_mono(*at_ns: int) -> Episode:
    marks = tuple(replace(mark, t_mono_ns=t) for mark, t in zip(WHOLE.marks, at_ns, strict=True))
    return replace(WHOLE, marks=marks)


def thin(readings: SourceRows, keep: int) -> SourceRows:
    some = slice(None, None, keep)
    return replace(
        readings,
        t_wall_ns=readings.t_wall_ns[some],
        t_mono_ns=readings.t_mono_ns[some],
        seq=readings.seq[some],
        columns=tuple(column[some] for column in readings.columns),
        present=readings.present[some],
    )


def test_an_episode_without_contradictions_has_none() -> None:
    assert codes(WHOLE) == codes(CALM) == set()
    assert codes(with_manifest(origin=EpisodeOrigin.RECORDED, recording=RECORDING)) == set()


FALSE = {
    "a benign profile with malicious phases": (
        with_manifest(profile="benign", sample_kind=SampleKind.BENIGN),
        "kind-phases",
    ),
    "a benign kind with malicious phases": (with_manifest(sample_kind=SampleKind.BENIGN), "kind-phases"),
    "a clean day with malicious phases": (with_manifest(role=EpisodeRole.COMMISSION), "role-phases"),
    "a soak with malicious phases": (with_manifest(role=EpisodeRole.SOAK), "role-phases"),
    "a simulated recording": (with_manifest(recording=RECORDING), "origin"),
    "a recording that nobody recorded": (with_manifest(origin=EpisodeOrigin.RECORDED), "origin"),
    "a live sample in a simulator": (with_manifest(sample_kind=SampleKind.LIVE), "origin"),
    "a start a century after the labels": (with_manifest(started_wall_ns=2**62 - 1), "started"),
    "a start a day after the labels": (with_manifest(started_wall_ns=T0 + 86_400 * S), "started"),
    "a start a day before the labels": (with_manifest(started_wall_ns=T0 - 86_400 * S), "started"),
    "an id of years before the labels": (with_manifest(episode_id=build_uuid7(10**12, bytes(10))), "started"),
    "labels of 0, 1, 2 and 3 ns beside 40 s": (with_mono(0, 1, 2, 3), "label-clock"),
    "one label of another time": (with_mono(MONO0, MONO0 + 20 * S, MONO0 + 25 * S, MONO0 + 40 * S), "label-clock"),
    "labels of another boot": (with_mono(*(mark.t_mono_ns + 3600 * S for mark in WHOLE.marks)), "label-clock"),
    "a source half a minute late": (
        of_source(SourceKind.NETFLOW, lambda r: replace(r, t_wall_ns=r.t_wall_ns + 30 * S)),
        "row-clock:netflow",
    ),
    "rows whose seconds are shorter": (
        of_source(SourceKind.QMP, lambda r: replace(r, t_mono_ns=MONO0 + (r.t_mono_ns - MONO0) * 6 // 10)),
        "row-clock:qmp",
    ),
    "more rows than could be emitted": (
        with_manifest(rows_emitted={**WHOLE.manifest.rows_emitted, SourceKind.PROC: 10**6}),
        "emitted:proc",
    ),
}


@pytest.mark.parametrize("case", FALSE.values(), ids=FALSE)
def test_what_could_teach_something_false_is_rejected(case: tuple[Episode, str]) -> None:
    whole, code = case

    assert the(code, whole).severity is BundleStatus.REJECTED
    assert checks.compute_status(findings(whole)) is BundleStatus.REJECTED


def lagging(clock: ClockBase) -> Episode:
    """Stamp netflow in another clock, and shift that clock's pairs by 20 s."""
    pairs = dict(WHOLE.manifest.clocks.pairs)
    (c0, u0), (c1, u1) = pairs[clock]
    moved = of_source(SourceKind.NETFLOW, lambda r: replace(r, t_wall_ns=r.t_wall_ns - u0 + c0))
    return with_clocks(
        moved, base={SourceKind.NETFLOW: clock}, pairs={**pairs, clock: ((c0, u0 + 20 * S), (c1, u1 + 20 * S))}
    )


def test_a_source_that_false_clock_pairs_move_away_from_its_labels_is_rejected() -> None:
    from phasewatch.binning.clocks import rebase_episode

    rebased, _ = rebase_episode(lagging(ClockBase.BOOTTIME))

    assert "row-clock:netflow" in {f.code for f in checks.find_episode_problems(rebased)}


LACKING = {
    "three of four rows dropped, and a rate that hides it": (
        replace_manifest(
            of_source(SourceKind.QMP, lambda r: thin(r, 4)),
            nominal_hz={**WHOLE.manifest.nominal_hz, SourceKind.QMP: 1e-9},
            rows_emitted={**WHOLE.manifest.rows_emitted, SourceKind.QMP: -(-len(WHOLE.rows[SourceKind.QMP]) // 4)},
        ),
        {"nominal-hz:qmp", "missing:qmp"},
    ),
    "a promise of next to nothing": (
        with_manifest(nominal_hz=dict.fromkeys(SourceKind, 1e-9)),
        {f"nominal-hz:{s}" for s in SourceKind},
    ),
    "an honest source of one row a second": (
        replace_manifest(
            of_source(SourceKind.QMP, lambda r: thin(r, 2)),
            nominal_hz={**WHOLE.manifest.nominal_hz, SourceKind.QMP: 1.0},
            rows_emitted={**WHOLE.manifest.rows_emitted, SourceKind.QMP: -(-len(WHOLE.rows[SourceKind.QMP]) // 2)},
        ),
        {"rate:qmp"},
    ),
    "one number for every row": (
        each_source(lambda r: replace(r, seq=np.full_like(r.seq, -5))),
        {f"sequence:{s}" for s in SourceKind},
    ),
    "numbers that run backwards": (
        of_source(SourceKind.PROC, lambda r: replace(r, seq=r.seq[::-1].copy())),
        {"sequence:proc"},
    ),
    "one number twice": (
        of_source(SourceKind.PROC, lambda r: replace(r, seq=np.maximum(r.seq - 1, 0))),
        {"sequence:proc"},
    ),
    "a clock that stands still": (
        of_source(
            SourceKind.QMP,
            lambda r: replace(r, t_mono_ns=np.where(np.arange(len(r)) == 9, r.t_mono_ns[8], r.t_mono_ns)),
        ),
        {"sequence:qmp"},
    ),
    "made-up channels": (
        with_manifest(channels_available=(*WHOLE.manifest.channels_available, "proc.telepathy")),
        {"channels"},
    ),
    "made-up channels alone": (
        with_manifest(channels_available=("proc.telepathy",)),
        {"channels", *(f"channels:{s}" for s in SourceKind)},
    ),
    "no channels, and all of them read": (with_manifest(channels_available=()), {f"channels:{s}" for s in SourceKind}),
    "the guest's channels of an agent that was off": (
        replace_manifest(episode(PHASES, agent=False), channels_available=tuple(c.full_name for c in CHANNELS)),
        {"channels:guest"},
    ),
    "a channel that is there and absent": (
        with_manifest(
            origin=EpisodeOrigin.RECORDED, recording=msgspec.structs.replace(RECORDING, absent={"proc.cpu_user": "x"})
        ),
        {"channels"},
    ),
    "a benign profile that is an emulation": (
        replace_manifest(CALM, profile="benign", sample_kind=SampleKind.EMULATED),
        {"kind"},
    ),
    "a malicious profile that is benign": (replace_manifest(CALM, sample_kind=SampleKind.BENIGN), {"kind"}),
    "phases that nobody planned": (with_manifest(plan=((Phase.CLEAN, 40.0),)), {"plan"}),
    "phases in another order": (
        with_manifest(plan=((Phase.ACTIVE, 20.0), (Phase.INFECTING, 10.0), (Phase.CLEAN, 10.0))),
        {"plan"},
    ),
    "a row of last week": (
        of_source(
            SourceKind.PROC,
            lambda r: replace(r, t_wall_ns=r.t_wall_ns - (np.arange(len(r)) == 0) * 604_800 * S, t_mono_ns=r.t_mono_ns),
        ),
        {"stray:proc", "clock-step"},
    ),
    "a counter that falls": (
        of_source(SourceKind.PROC, field("io_rchar_bytes", lambda c: np.where(np.arange(len(c)) > 40, c - c[40], c))),
        {"reset:proc"},
    ),
    "a counter that leaps": (
        of_source(SourceKind.PROC, field("io_rchar_bytes", lambda c: np.where(np.arange(len(c)) > 40, c + 2**61, c))),
        {"range:proc"},
    ),
    "a share above 1": (of_source(SourceKind.QMP, field("vcpu_busy", lambda c: c + 1.0)), {"range:qmp"}),
    "a share below 0": (
        of_source(SourceKind.QMP, field("vcpu_user", lambda c: np.where(np.arange(len(c)) == 40, -0.1, c))),
        {"range:qmp"},
    ),
    "more cores than the machine has": (
        of_source(SourceKind.PROC, field("vcpu_run_ns", lambda c: c * 8)),
        {"host-facts"},
    ),
    "more memory than the machine has": (
        of_source(SourceKind.QMP, field("bal_free_bytes", lambda c: c + 2**30)),
        {"host-facts"},
    ),
    "what only TCG counts, under KVM": (with_host(accel="kvm"), {"host-facts"}),
    "what only x86 shows, on an arm": (with_host(arch="aarch64"), {"host-facts"}),
    "pins for other vCPUs": (
        with_manifest(origin=EpisodeOrigin.RECORDED, recording=msgspec.structs.replace(RECORDING, pinning=(1, 2, 3))),
        {"host-facts"},
    ),
}


@pytest.mark.parametrize("case", LACKING.values(), ids=LACKING)
def test_what_contradicts_a_fact_or_hides_a_lack_degrades(case: tuple[Episode, set[str]]) -> None:
    whole, expected = case
    found = {f.code for f in findings(whole) if f.severity != "note"}

    assert found - {code for code in found if code.startswith("nulls:")} >= expected - {"missing:qmp", "clock-step"}
    assert checks.compute_status(findings(whole)) is BundleStatus.DEGRADED


def test_a_rate_that_hides_lost_rows_of_proc_does_not_save_it() -> None:
    thinned = of_source(SourceKind.PROC, lambda r: thin(r, 4))
    emitted = {**WHOLE.manifest.rows_emitted, SourceKind.PROC: len(thinned.rows[SourceKind.PROC])}
    hidden = replace_manifest(
        thinned, nominal_hz={**WHOLE.manifest.nominal_hz, SourceKind.PROC: 1e-9}, rows_emitted=emitted
    )

    assert the("rows:proc", hidden).severity is BundleStatus.REJECTED


INNOCENT = {
    "a plan cut short": with_manifest(plan=tuple((Phase(p), s) for p, s in (*PHASES, ("dormant", 20.0)))),
    "an end in dormancy that was not planned": replace_manifest(
        episode((*PHASES, ("dormant", 5.0))), plan=tuple((Phase(p), s) for p, s in PHASES)
    ),
    "an episode of unknown phase": replace_manifest(
        episode((("unknown", 40.0),)),
        profile="unknown",
        sample_kind=SampleKind.LIVE,
        origin=EpisodeOrigin.RECORDED,
        recording=RECORDING,
    ),
    "a start while the machine booted": with_manifest(started_wall_ns=T0 - 300 * S),
    "an id made long after the recording": with_manifest(episode_id=build_uuid7(T0 // 10**6 + 10**10, bytes(10))),
}


@pytest.mark.parametrize("whole", INNOCENT.values(), ids=INNOCENT)
def test_what_happens_without_malice_is_no_contradiction(whole: Episode) -> None:
    assert codes(whole) == set()


def test_a_step_of_the_clock_that_labels_and_rows_both_saw_contradicts_nothing() -> None:
    from phasewatch.simulate.episodes import EpisodeDraft
    from phasewatch.simulate.faults import step_clock

    stepped = step_clock(
        np.random.default_rng(1), EpisodeDraft(manifest=WHOLE.manifest, marks=WHOLE.marks, rows=WHOLE.rows)
    )
    whole = Episode(manifest=stepped.manifest, marks=stepped.marks, rows=stepped.rows)

    assert codes(whole) == set()


def test_rows_in_another_order_than_they_were_taken_are_put_right() -> None:
    turned = each_source(
        lambda r: replace(
            r,
            t_wall_ns=r.t_wall_ns[::-1].copy(),
            t_mono_ns=r.t_mono_ns[::-1].copy(),
            seq=r.seq[::-1].copy(),
            columns=tuple(c[::-1].copy() for c in r.columns),
            present=r.present[::-1].copy(),
        )
    )

    assert codes(turned) == set()


def test_a_number_of_emitted_rows_without_measure_is_refused_by_the_format() -> None:
    from phasewatch.errors import BundleError

    with pytest.raises(BundleError) as refused:
        findings(with_manifest(rows_emitted={**WHOLE.manifest.rows_emitted, SourceKind.GUEST: 2**63 - 1}))

    assert refused.value.code == "manifest-range"
