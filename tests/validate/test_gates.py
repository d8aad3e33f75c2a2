"""The gates: what makes an episode degraded or rejected, each at its edge."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.builders import T0, S, bare, episode, replace_manifest, rows, with_rows

from phasewatch.episode.findings import CODES, Finding
from phasewatch.episode.model import Episode, SourceRows
from phasewatch.validate import gates
from phasewatch.vocab import Source, Status

SECONDS = 40.0


def taken(readings: SourceRows, keep: np.ndarray) -> SourceRows:
    return replace(
        readings, t_wall_ns=readings.t_wall_ns[keep], t_mono_ns=readings.t_mono_ns[keep], seq=readings.seq[keep],
        columns=tuple(column[keep] for column in readings.columns), present=readings.present[keep],
    )  # fmt: skip


def without_rows(whole: Episode, source: Source, *, between_s: tuple[float, float]) -> Episode:
    """Lose the rows of a stretch, as if the sampler had never taken them."""
    readings = whole.rows[source]
    at_s = (readings.t_wall_ns - T0) / S
    cut = taken(readings, (at_s < between_s[0]) | (at_s >= between_s[1]))
    emitted = {**whole.manifest.rows_emitted, source: len(cut)}
    return with_rows(replace_manifest(whole, rows_emitted=emitted), cut)


def every(whole: Episode, source: Source, keep: int, of: int) -> Episode:
    readings = whole.rows[source]
    thin = taken(readings, np.arange(len(readings)) % of < keep)
    return with_rows(replace_manifest(whole, rows_emitted={**whole.manifest.rows_emitted, source: len(thin)}), thin)


def codes(whole: Episode) -> set[str]:
    return {found.code for found in gates.check(listed(whole))}


def listed(whole: Episode) -> Episode:
    """Let the manifest list the rows as `pack` would."""
    from tests.builders import members_of

    from phasewatch.episode.bundle import pack, unpack

    return unpack(pack(whole.manifest, members_of(whole), level=1), file="x")


def test_a_faultless_episode_has_no_finding() -> None:
    assert codes(episode((("clean", SECONDS),))) == set()


SILENT = {
    "a silence of 2 s is nothing": (Source.QMP, (10.0, 11.5), set()),
    "one of 3.5 s is told": (Source.QMP, (10.0, 13.0), {"silence:qmp"}),
    "one of 12.5 s makes a source missing": (Source.QMP, (10.0, 22.0), {"missing:qmp"}),
    "one of 12.5 s of proc degrades, for it is there": (Source.PROC, (10.0, 22.0), {"silence:proc", "rate:proc"}),
    "more than half of proc gone rejects": (Source.PROC, (10.0, 36.0), {"rows:proc"}),
    "the end counts too": (Source.NETFLOW, (37.0, 99.0), {"silence:netflow"}),
    "and the beginning": (Source.NETFLOW, (-9.0, 3.0), {"silence:netflow"}),
}


@pytest.mark.parametrize("case", SILENT.values(), ids=SILENT)
def test_silence(case: tuple[Source, tuple[float, float], set[str]]) -> None:
    source, between_s, expected = case

    assert codes(without_rows(episode((("clean", SECONDS),)), source, between_s=between_s)) == expected


SLOW = {
    "nineteen rows of twenty are enough": (Source.QMP, 19, 20, set()),
    "eight of ten degrade": (Source.QMP, 8, 10, {"rate:qmp"}),
    "two of five are a missing source": (Source.QMP, 2, 5, {"missing:qmp"}),
    "two of five of proc reject": (Source.PROC, 2, 5, {"rows:proc"}),
}


@pytest.mark.parametrize("case", SLOW.values(), ids=SLOW)
def test_a_sampler_that_runs_slow(case: tuple[Source, int, int, set[str]]) -> None:
    source, keep, of, expected = case

    assert codes(every(episode((("clean", SECONDS),)), source, keep, of)) == expected


def test_a_lost_row_is_told_however_few() -> None:
    whole = episode((("clean", SECONDS),))
    emitted = {**whole.manifest.rows_emitted, Source.NETFLOW: whole.manifest.rows_emitted[Source.NETFLOW] + 1}

    assert codes(replace_manifest(whole, rows_emitted=emitted)) == {"loss:netflow"}


def test_a_source_that_is_off_by_plan_is_no_fault() -> None:
    assert codes(episode((("clean", SECONDS),), agent=False)) == set()


def test_a_guest_that_should_have_reported_and_did_not_is_missing() -> None:
    assert "missing:guest" in codes(with_rows(episode((("clean", SECONDS),)), without=[Source.GUEST]))


@pytest.mark.parametrize(("cores", "expected"), [(0.09, set()), (0.12, {"contention"})])
def test_vcpus_that_wait_for_more_than_a_tenth_of_a_core_degrade(cores: float, expected: set[str]) -> None:
    whole = episode((("clean", SECONDS),), rates={"vcpu_wait_ns": cores * 1e9}, noise=0.0)

    assert codes(whole) == expected


def test_a_wait_that_no_64_bits_hold_is_contention_and_not_a_number_that_wrapped() -> None:
    whole = episode((("clean", SECONDS),), rates={"vcpu_wait_ns": 0.0}, noise=0.0)
    proc = whole.rows[Source.PROC]
    place = proc.fields.index("vcpu_wait_ns")
    waited = np.where(proc.t_wall_ns < T0 + 20 * S, -(2**63), 2**63 - 1)
    columns = (*proc.columns[:place], waited, *proc.columns[place + 1 :])

    assert gates.vcpu_wait_cores(with_rows(whole, replace(proc, columns=columns))) > 1e8


def test_an_idle_card_is_a_note_and_a_frozen_proc_a_fault() -> None:
    whole = episode((("clean", SECONDS),))
    frozen = {
        source: replace(r, columns=tuple(np.full_like(c, c[0]) for c in r.columns)) for source, r in whole.rows.items()
    }

    card = gates.check(listed(with_rows(whole, frozen[Source.NETFLOW])))
    proc = gates.check(listed(with_rows(whole, frozen[Source.PROC])))

    assert [(f.code, f.severity) for f in card] == [("constant:netflow", "note")]
    assert gates.worst(card) is Status.ACCEPTED
    assert [(f.code, f.severity) for f in proc] == [("constant-proc:proc", Status.DEGRADED)]


def test_the_worst_finding_decides() -> None:
    def found(severity: Status | str) -> Finding:
        return Finding(code="x", severity=severity, place="", words="")  # type: ignore[arg-type]

    assert gates.worst([]) is Status.ACCEPTED
    assert gates.worst([found("note")]) is Status.ACCEPTED
    assert gates.worst([found(Status.DEGRADED), found("note")]) is Status.DEGRADED
    assert gates.worst([found(Status.ERRORED), found(Status.REJECTED)]) is Status.ERRORED


def test_the_manifest_must_name_the_place_in_which_it_lies() -> None:
    whole = bare(rows(Source.PROC, [0.5, 1.0]))
    told = whole.manifest

    assert gates.check_place(whole, host_id=told.host.host_id, episode_id=told.episode_id) == ()
    for host_id, episode_id in ((told.host.host_id, None), (None, told.episode_id), ("h2", told.episode_id)):
        (found,) = gates.check_place(whole, host_id=host_id, episode_id=episode_id)
        assert (found.code, found.severity) == ("identity", Status.REJECTED)


def test_every_code_is_explained_and_none_means_two_things() -> None:
    assert not set(gates.GATES) & set(CODES)
    for code in gates.known_codes():
        spec = gates.explain(code)
        assert spec is not None
        assert spec.about.endswith(".")
    assert gates.explain("silence:qmp") == gates.explain("silence")
    assert gates.explain("nonsense") is None
