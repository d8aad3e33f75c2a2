"""The gates: what makes an episode degraded or rejected, each at its edge."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.factories.bundles import T0, S, bare, episode, replace_manifest, rows, with_rows

from phasewatch.bundle.model import Episode, RecordingMetadata, SourceRows
from phasewatch.bundle.problems import FINDING_CODES, BundleFinding
from phasewatch.types import BundleStatus, EpisodeOrigin, SourceKind
from phasewatch.validate import checks

SECONDS = 40.0


def taken(readings: SourceRows, keep: np.ndarray) -> SourceRows:
    return replace(
        readings, t_wall_ns=readings.t_wall_ns[keep], t_mono_ns=readings.t_mono_ns[keep], seq=readings.seq[keep],
        columns=tuple(column[keep] for column in readings.columns), present=readings.present[keep],
    )  # fmt: skip


def without_rows(whole: Episode, source: SourceKind, *, between_s: tuple[float, float]) -> Episode:
    """Lose the rows of a stretch, as if the sampler had never taken them."""
    readings = whole.rows[source]
    at_s = (readings.t_wall_ns - T0) / S
    cut = taken(readings, (at_s < between_s[0]) | (at_s >= between_s[1]))
    emitted = {**whole.manifest.rows_emitted, source: len(cut)}
    return with_rows(replace_manifest(whole, rows_emitted=emitted), cut)


def every(whole: Episode, source: SourceKind, keep: int, of: int) -> Episode:
    readings = whole.rows[source]
    thin = taken(readings, np.arange(len(readings)) % of < keep)
    return with_rows(replace_manifest(whole, rows_emitted={**whole.manifest.rows_emitted, source: len(thin)}), thin)


def codes(whole: Episode) -> set[str]:
    return {found.code for found in checks.find_episode_problems(listed(whole))}


def listed(whole: Episode) -> Episode:
    """Let the manifest list the rows as `pack` would."""
    from tests.factories.bundles import members_of

    from phasewatch.bundle.archive import pack_bundle, unpack_bundle

    return unpack_bundle(pack_bundle(whole.manifest, members_of(whole), level=1), file="x")


def test_a_faultless_episode_has_no_finding() -> None:
    assert codes(episode((("clean", SECONDS),))) == set()


SILENT = {
    "a silence of 2 s is nothing": (SourceKind.QMP, (10.0, 11.5), set()),
    "one of 3.5 s is told": (SourceKind.QMP, (10.0, 13.0), {"silence:qmp"}),
    "one of 12.5 s makes a source missing": (SourceKind.QMP, (10.0, 22.0), {"missing:qmp"}),
    "one of 12.5 s of proc degrades, for it is there": (SourceKind.PROC, (10.0, 22.0), {"silence:proc", "rate:proc"}),
    "more than half of proc gone rejects": (SourceKind.PROC, (10.0, 36.0), {"rows:proc"}),
    "the end counts too": (SourceKind.NETFLOW, (37.0, 99.0), {"silence:netflow"}),
    "and the beginning": (SourceKind.NETFLOW, (-9.0, 3.0), {"silence:netflow"}),
}


@pytest.mark.parametrize("case", SILENT.values(), ids=SILENT)
def test_silence(case: tuple[SourceKind, tuple[float, float], set[str]]) -> None:
    source, between_s, expected = case

    assert codes(without_rows(episode((("clean", SECONDS),)), source, between_s=between_s)) == expected


SLOW = {
    "nineteen rows of twenty are enough": (SourceKind.QMP, 19, 20, set()),
    "eight of ten degrade": (SourceKind.QMP, 8, 10, {"rate:qmp"}),
    "two of five are a missing source": (SourceKind.QMP, 2, 5, {"missing:qmp"}),
    "two of five of proc reject": (SourceKind.PROC, 2, 5, {"rows:proc"}),
}


@pytest.mark.parametrize("case", SLOW.values(), ids=SLOW)
def test_a_sampler_that_runs_slow(case: tuple[SourceKind, int, int, set[str]]) -> None:
    source, keep, of, expected = case

    assert codes(every(episode((("clean", SECONDS),)), source, keep, of)) == expected


def test_a_lost_row_is_told_however_few() -> None:
    whole = episode((("clean", SECONDS),))
    emitted = {**whole.manifest.rows_emitted, SourceKind.NETFLOW: whole.manifest.rows_emitted[SourceKind.NETFLOW] + 1}

    assert codes(replace_manifest(whole, rows_emitted=emitted)) == {"loss:netflow"}


def test_a_source_that_is_off_by_plan_is_no_fault() -> None:
    assert codes(episode((("clean", SECONDS),), agent=False)) == set()


def test_a_guest_that_should_have_reported_and_did_not_is_missing() -> None:
    assert "missing:guest" in codes(with_rows(episode((("clean", SECONDS),)), without=[SourceKind.GUEST]))


@pytest.mark.parametrize(("cores", "expected"), [(0.09, set()), (0.12, {"contention"})])
def test_vcpus_that_wait_for_more_than_a_tenth_of_a_core_degrade(cores: float, expected: set[str]) -> None:
    whole = episode((("clean", SECONDS),), rates={"vcpu_wait_ns": cores * 1e9}, noise=0.0)

    assert codes(whole) == expected


@pytest.mark.parametrize(("throttled_cores", "expected"), [(0.0, {"contention"}), (0.45, set()), (0.9, set())])
def test_waiting_for_the_own_cpu_quota_is_no_contention(throttled_cores: float, expected: set[str]) -> None:
    whole = episode((("clean", SECONDS),), rates={"vcpu_wait_ns": 0.5e9}, noise=0.0)
    recording = RecordingMetadata(
        boot_s=1.0,
        settle_s=1.0,
        pinning=(),
        knobs={},
        background="",
        absent={},
        shape={"quota_cores": 0.9},
        throttled_s=throttled_cores * SECONDS,
    )

    assert codes(replace_manifest(whole, recording=recording, origin=EpisodeOrigin.RECORDED)) == expected


def test_a_wait_that_no_64_bits_hold_is_contention_and_not_a_number_that_wrapped() -> None:
    whole = episode((("clean", SECONDS),), rates={"vcpu_wait_ns": 0.0}, noise=0.0)
    proc = whole.rows[SourceKind.PROC]
    place = proc.fields.index("vcpu_wait_ns")
    waited = np.where(proc.t_wall_ns < T0 + 20 * S, -(2**63), 2**63 - 1)
    columns = (*proc.columns[:place], waited, *proc.columns[place + 1 :])

    assert checks.compute_vcpu_wait_cores(with_rows(whole, replace(proc, columns=columns))) > 1e8


def test_an_idle_card_is_a_note_and_a_frozen_proc_a_fault() -> None:
    whole = episode((("clean", SECONDS),))
    frozen = {
        source: replace(r, columns=tuple(np.full_like(c, c[0]) for c in r.columns)) for source, r in whole.rows.items()
    }

    card = checks.find_episode_problems(listed(with_rows(whole, frozen[SourceKind.NETFLOW])))
    proc = checks.find_episode_problems(listed(with_rows(whole, frozen[SourceKind.PROC])))

    assert [(f.code, f.severity) for f in card] == [("constant:netflow", "note")]
    assert checks.compute_status(card) is BundleStatus.ACCEPTED
    assert [(f.code, f.severity) for f in proc] == [("constant-proc:proc", BundleStatus.DEGRADED)]


def test_the_worst_finding_decides() -> None:
    def found(severity: BundleStatus | str) -> BundleFinding:
        return BundleFinding(code="x", severity=severity, place="", words="")  # type: ignore[arg-type]

    assert checks.compute_status([]) is BundleStatus.ACCEPTED
    assert checks.compute_status([found("note")]) is BundleStatus.ACCEPTED
    assert checks.compute_status([found(BundleStatus.DEGRADED), found("note")]) is BundleStatus.DEGRADED
    assert checks.compute_status([found(BundleStatus.ERRORED), found(BundleStatus.REJECTED)]) is BundleStatus.ERRORED


def test_the_manifest_must_name_the_place_in_which_it_lies() -> None:
    whole = bare(rows(SourceKind.PROC, [0.5, 1.0]))
    told = whole.manifest

    assert checks.find_identity_mismatch(whole, host_id=told.host.host_id, episode_id=told.episode_id) == ()
    for host_id, episode_id in ((told.host.host_id, None), (None, told.episode_id), ("h2", told.episode_id)):
        (found,) = checks.find_identity_mismatch(whole, host_id=host_id, episode_id=episode_id)
        assert (found.code, found.severity) == ("identity", BundleStatus.REJECTED)


def test_every_code_is_explained_and_none_means_two_things() -> None:
    assert not set(checks.CHECK_CODES) & set(FINDING_CODES)
    for code in checks.list_codes():
        spec = checks.describe_code(code)
        assert spec is not None
        assert spec.about.endswith(".")
    assert checks.describe_code("silence:qmp") == checks.describe_code("silence")
    assert checks.describe_code("nonsense") is None
