"""Readings, not rows: what was null, how long, and what that makes of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.factories.bundles import T0, S, episode, members_of, replace_manifest, with_rows
from tests.validate.packed import codes, findings, the

from phasewatch.bundle.archive import pack_bundle, unpack_bundle
from phasewatch.bundle.model import Episode, RecordingMetadata
from phasewatch.channels import CHANNELS, list_raw_fields
from phasewatch.types import BundleStatus, ChannelGroup, EpisodeOrigin, SourceKind
from phasewatch.validate import checks
from phasewatch.validate.readings import count_field_nulls
from phasewatch.validate.verdict import BundleLocation, validate_bundle

WHOLE = episode((("clean", 40.0),))
KVM = tuple(c.full_name for c in CHANNELS if c.accel == "kvm")  # which no host under TCG has
BALLOON = ("bal_minor_faults", "bal_free_bytes", "bal_cache_bytes")


def nulled(
    whole: Episode, source: SourceKind, when: Callable[[np.ndarray], np.ndarray], fields: Collection[str] | None = None
) -> Episode:
    """Turn some fields (all, if none are named) of some rows into null; `when` sees seconds from the first label on."""
    readings = whole.rows[source]
    rows = when((readings.t_wall_ns - T0) / S)
    columns = np.array([fields is None or field in fields for field in readings.fields])
    return with_rows(whole, replace(readings, present=readings.present & ~(rows[:, None] & columns)))


def always(at_s: np.ndarray) -> np.ndarray:
    return np.ones(len(at_s), np.bool_)


def between(begin_s: float, end_s: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda at_s: (at_s >= begin_s) & (at_s < end_s)


def every(number: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda at_s: np.arange(len(at_s)) % number == 0


def some_of(fields: int, source: SourceKind = SourceKind.PROC) -> tuple[str, ...]:
    return WHOLE.rows[source].fields[:fields]


@pytest.mark.parametrize("source", [SourceKind.QMP, SourceKind.NETFLOW, SourceKind.GUEST])
def test_a_source_of_nulls_alone_is_missing_however_many_rows_it_has(source: SourceKind) -> None:
    assert codes(nulled(WHOLE, source, always)) == {f"missing:{source}"}


def test_proc_of_nulls_alone_is_as_good_as_no_proc() -> None:
    assert checks.compute_status(findings(nulled(WHOLE, SourceKind.PROC, always))) is BundleStatus.REJECTED


def test_a_row_without_a_reading_is_silence() -> None:
    assert codes(nulled(WHOLE, SourceKind.QMP, between(10, 13))) >= {"silence:qmp"}
    assert codes(nulled(WHOLE, SourceKind.QMP, between(10, 22))) >= {"missing:qmp"}
    assert codes(nulled(WHOLE, SourceKind.QMP, lambda at_s: ~every(3)(at_s))) >= {"missing:qmp"}


MOSTLY = {
    "all but one field": some_of(14),
    "two thirds of the fields": some_of(10),
}


@pytest.mark.parametrize("fields", MOSTLY.values(), ids=MOSTLY)
def test_proc_that_is_mostly_null_is_rejected(fields: tuple[str, ...]) -> None:
    found = the("nulls-proc:proc", nulled(WHOLE, SourceKind.PROC, always, fields))

    assert found.severity is BundleStatus.REJECTED


def test_proc_with_nearly_all_fields_null_in_most_rows_is_rejected() -> None:
    assert "nulls-proc:proc" in codes(nulled(WHOLE, SourceKind.PROC, between(5, 36), some_of(14)))


PARTLY = {
    "a stretch of three seconds": between(10, 13),
    "the beginning": between(-9, 3),
    "the end": between(37, 99),
    "each fourth row": every(4),
}


@pytest.mark.parametrize("when", PARTLY.values(), ids=PARTLY)
@pytest.mark.parametrize(
    ("source", "field"),
    [(SourceKind.QMP, "blk_wr_ops"), (SourceKind.PROC, "main_vcs"), (SourceKind.NETFLOW, "dst_ips")],
)
def test_a_field_that_is_partly_null_degrades_with_its_numbers(
    source: SourceKind, field: str, when: Callable[[np.ndarray], np.ndarray]
) -> None:
    spoilt = nulled(WHOLE, source, when, (field,))
    found = the(f"nulls:{source}", spoilt)
    counted = next(n for n in count_field_nulls(spoilt, source) if n.field == field)

    assert found.severity is BundleStatus.DEGRADED
    assert found.place == f"{source}.jsonl"
    assert field in found.words
    assert f"{counted.nulls} of {counted.rows}" in found.words


def test_a_null_now_and_then_is_nothing() -> None:
    assert codes(nulled(WHOLE, SourceKind.QMP, every(30), ("vcpu_busy", "blk_wr_ops"))) == set()


def test_the_balloon_answers_every_second_row_by_nature() -> None:
    assert codes(nulled(WHOLE, SourceKind.QMP, every(2), BALLOON)) == set()
    assert codes(nulled(WHOLE, SourceKind.QMP, lambda at_s: ~every(4)(at_s), BALLOON)) == {"nulls:qmp"}
    assert codes(nulled(WHOLE, SourceKind.QMP, between(10, 17), BALLOON)) == {"nulls:qmp"}


def test_nulls_are_counted_between_the_labels_with_their_longest_run() -> None:
    counted = {
        n.field: n
        for n in count_field_nulls(nulled(WHOLE, SourceKind.QMP, between(10, 14), ("vq_blk",)), SourceKind.QMP)
    }

    assert counted["vq_blk"].rows == 80
    assert counted["vq_blk"].nulls == 8
    assert 4.3 < counted["vq_blk"].longest_ns / S < 4.7
    assert 10.0 <= (counted["vq_blk"].longest_start_ns - T0) / S < 10.5
    assert counted["blk_rd_ops"].nulls == 0


def recorded(whole: Episode, absent: Collection[str]) -> Episode:
    """Let a recorder say why it could not give some channels."""
    recording = RecordingMetadata(
        boot_s=3.0, settle_s=5.0, pinning=(), knobs={}, background="", absent=dict.fromkeys(absent, "not here")
    )
    absent = {*absent, *KVM}
    available = tuple(c.full_name for c in CHANNELS if c.full_name not in absent)
    return replace_manifest(whole, origin=EpisodeOrigin.RECORDED, recording=recording, channels_available=available)


def test_a_channel_that_a_host_does_not_give_and_says_so_is_no_fault() -> None:
    fields = ("vcpu_busy", "vcpu_user")
    honest = recorded(nulled(WHOLE, SourceKind.QMP, always, fields), [f"qmp.{field}" for field in fields])

    assert codes(honest) == set()


def test_a_channel_that_is_claimed_and_never_read_degrades() -> None:
    found = the("channels:qmp", nulled(WHOLE, SourceKind.QMP, always, ("vcpu_busy",)))

    assert found.severity is BundleStatus.DEGRADED
    assert "qmp.vcpu_busy" in found.words


@pytest.mark.parametrize("source", [SourceKind.QMP, SourceKind.NETFLOW, SourceKind.GUEST])
@pytest.mark.parametrize("claims", [True, False])
def test_a_source_cut_to_one_field_is_told_whatever_it_claims(source: SourceKind, claims: bool) -> None:
    readings = WHOLE.rows[source]
    cut = nulled(WHOLE, source, always, readings.fields[1:])
    if not claims:
        kept = tuple(c for c in cut.manifest.channels_available if not c.startswith(f"{source}."))
        cut = replace_manifest(cut, channels_available=kept)

    assert codes(cut) & {f"channels:{source}", f"missing:{source}"}
    assert checks.compute_status(findings(cut)) is BundleStatus.DEGRADED


def test_contention_is_unknown_where_nobody_counts_the_waiting() -> None:
    unread = recorded(nulled(WHOLE, SourceKind.PROC, always, ("vcpu_wait_ns",)), ["proc.vcpu_wait"])
    never_moves = episode((("clean", 40.0),), rates={"vcpu_wait_ns": 0.0}, noise=0.0)

    for whole in (unread, never_moves):
        assert [(f.code, f.severity) for f in findings(whole)] == [("contention-unknown", "note")]
        assert checks.compute_status(findings(whole)) is BundleStatus.ACCEPTED
    assert "contention-unknown" not in codes(WHOLE)


def test_an_examined_bundle_tells_all_findings_and_the_nulls_of_each_field() -> None:
    spoilt = nulled(nulled(WHOLE, SourceKind.QMP, every(2), BALLOON), SourceKind.NETFLOW, between(10, 14), ("dst_ips",))
    spoilt = replace_manifest(spoilt, nominal_hz={**spoilt.manifest.nominal_hz, SourceKind.QMP: 0.5})
    m = spoilt.manifest
    place = BundleLocation(path="h1/x", host_id=m.host.host_id, episode_id=m.episode_id, receipt=None)

    found = validate_bundle(pack_bundle(m, members_of(spoilt), level=1), place, counts_nulls=True)

    assert {f.code for f in found.findings} == {"no-receipt", "nulls:netflow", "nominal-hz:qmp"}
    counted = {
        (n.source, n.field): n.nulls
        for fields in found.nulls.values()
        for n in fields
        if n.nulls and not n.field.startswith("kvm_")
    }
    assert counted == {(SourceKind.QMP, f): 40 for f in BALLOON} | {(SourceKind.NETFLOW, "dst_ips"): 8}


def test_an_impossible_reading_is_told_and_reaches_no_bin() -> None:
    readings = WHOLE.rows[SourceKind.QMP]
    busy, ops = readings.fields.index("vcpu_busy"), readings.fields.index("blk_wr_ops")
    columns = list(readings.columns)
    columns[busy] = np.full(len(readings), 1e308)
    columns[ops] = columns[ops] + np.where(np.arange(len(readings)) > 50, 2**62, 0)
    wild = with_rows(WHOLE, replace(readings, columns=tuple(columns)))
    m = wild.manifest
    place = BundleLocation(path="h1/x", host_id=m.host.host_id, episode_id=m.episode_id, receipt=None)

    found = validate_bundle(pack_bundle(m, members_of(wild), level=1), place)

    assert "range:qmp" in found.verdict.reasons
    assert found.verdict.status is BundleStatus.DEGRADED
    assert found.binned is not None
    names = [c.full_name for c in CHANNELS]
    assert not np.isinf(found.binned.bins).any()
    assert np.isnan(found.binned.bins[:, names.index("qmp.vcpu_busy")]).all()
    assert np.nanmax(found.binned.bins[:, names.index("qmp.blk_wr_ops")]) < 100


@pytest.mark.parametrize(("field", "value"), [("rss_bytes", -1), ("cpu_user_ns", -5), ("threads", 2**40)])
def test_a_reading_that_cannot_be_is_none(field: str, value: int) -> None:
    readings = WHOLE.rows[SourceKind.PROC]
    place = readings.fields.index(field)
    column = readings.columns[place].copy()
    column[20:30] = value
    columns = (*readings.columns[:place], column, *readings.columns[place + 1 :])

    assert codes(with_rows(WHOLE, replace(readings, columns=columns))) >= {"range:proc"}


def test_no_recording_of_the_bundled_corpus_lacks_what_it_claims(tmp_path: Path) -> None:
    corpus = Path(__file__).parents[2] / "corpus" / "lab-v1"
    bundles = sorted(corpus.glob("*/*.tar.zst"))[::12]
    for path in bundles:
        place = BundleLocation(
            path=path.name, host_id=path.parent.name, episode_id=path.name.partition(".")[0], receipt=None
        )
        reasons = set(validate_bundle(path.read_bytes(), place).verdict.reasons) - {"no-receipt"}
        assert reasons <= {"silence:guest"}, path.name
    assert len(bundles) > 15


def test_a_bundle_from_before_the_extended_channels_has_no_nulls_of_their_fields() -> None:
    path = next((Path(__file__).parents[2] / "corpus" / "lab-v1").glob("*/*.tar.zst"))
    old = unpack_bundle(path.read_bytes(), file=path.name)

    counted = {n.field for n in count_field_nulls(old, SourceKind.NETFLOW)}

    assert counted == {s.field for s in list_raw_fields(SourceKind.NETFLOW) if s.group is ChannelGroup.BASE}


@pytest.mark.parametrize(("source", "field"), [(SourceKind.NETFLOW, "conn_silent"), (SourceKind.QMP, "mem_dirty_rate")])
def test_an_extended_field_that_is_partly_null_degrades(source: SourceKind, field: str) -> None:
    assert codes(nulled(WHOLE, source, between(10, 20), (field,))) == {f"nulls:{source}"}


def test_an_extended_channel_that_is_claimed_and_never_read_degrades() -> None:
    found = the("channels:netflow", nulled(WHOLE, SourceKind.NETFLOW, always, ("rhythm",)))

    assert "netflow.rhythm" in found.words


def test_readings_of_kvm_on_a_host_without_it_are_a_contradiction() -> None:
    readings = WHOLE.rows[SourceKind.QMP]
    place = readings.fields.index("kvm_exits")
    present = readings.present.copy()
    present[:, place] = True

    assert "host-facts" in codes(with_rows(WHOLE, replace(readings, present=present)))
