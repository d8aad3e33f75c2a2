"""Copies of telemetry: who was accepted first stays, and a claim on another's recording is said, whatever its path."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from tests.factories.bundles import episode, marks, replace_manifest
from tests.factories.progress import Killed, RecordedProgress
from tests.factories.stores import put

from phasewatch.artifacts import VALIDATION_FILE
from phasewatch.binning.storage import open_bins
from phasewatch.bundle.model import Episode
from phasewatch.store.local import RECEIPT_SUFFIX, DiskStore
from phasewatch.types import BundleStatus, SampleKind
from phasewatch.validate.index import read_index
from phasewatch.validate.sweep import sweep
from phasewatch.validate.verdict import BundleVerdict

PHASES = (("clean", 10.0), ("infecting", 10.0), ("active", 10.0))
CALM = (("clean", 30.0),)
HONEST = episode(PHASES, number=5, host_id="pc")
OTHER = episode(PHASES, number=6, host_id="pc")


def stolen(original: Episode, *, number: int, host_id: str, phases: tuple[tuple[str, float], ...] = CALM) -> Episode:
    """Return the telemetry of an episode under another id, host and labels: all is clean, and the profile benign."""
    made = episode(phases, number=number, host_id=host_id).manifest
    if phases == CALM:
        import msgspec

        made = msgspec.structs.replace(made, profile="benign", sample_kind=SampleKind.BENIGN)
    kept = replace(original, manifest=made, marks=marks(phases))
    return replace_manifest(kept, rows_emitted=original.manifest.rows_emitted)


def said(store: Path, run: Path, **how: object) -> dict[str, BundleVerdict]:
    """Sweep; give the verdicts by host and number of the episode."""
    summary = sweep(store, run, workers=1, **how)  # type: ignore[arg-type]
    assert [v.path for v in read_index(run / VALIDATION_FILE)] == [v.path for v in summary.verdicts]
    usable = [
        (v.host_id, v.episode_id)
        for v in summary.verdicts
        if v.status in (BundleStatus.ACCEPTED, BundleStatus.DEGRADED)
    ]
    assert [(row.host_id, row.episode_id) for row in open_bins(run / "grids").rows] == usable
    return {v.path: v for v in summary.verdicts}


def of(verdicts: dict[str, BundleVerdict], whole: Episode) -> BundleVerdict:
    return next(v for v in verdicts.values() if v.episode_id == whole.manifest.episode_id)


def remove(path: Path) -> None:
    path.unlink()
    path.with_name(path.name + RECEIPT_SUFFIX).unlink()


THIEVES = {
    "a host whose name sorts first": stolen(HONEST, number=1, host_id="a-evil"),
    "a host whose name sorts last": stolen(HONEST, number=1, host_id="z-evil"),
    "the host itself, with an earlier id": stolen(HONEST, number=1, host_id="pc"),
    "the host itself, with a later id": stolen(HONEST, number=9, host_id="pc"),
    "another host with the same labels": stolen(HONEST, number=1, host_id="a-evil", phases=PHASES),
    "the same phases in other seconds": stolen(
        HONEST, number=1, host_id="pc", phases=(("clean", 8.0), ("infecting", 12.0), ("active", 10.0))
    ),
}


@pytest.mark.parametrize("thief", THIEVES.values(), ids=THIEVES)
def test_without_evidence_both_claims_are_set_aside(thief: Episode, tmp_path: Path) -> None:
    for whole in (HONEST, OTHER, thief):
        put(tmp_path / "store", whole)

    verdicts = said(tmp_path / "store", tmp_path / "run")

    assert of(verdicts, OTHER).status is BundleStatus.ACCEPTED
    for one, another in ((HONEST, thief), (thief, HONEST)):
        verdict = of(verdicts, one)
        assert (verdict.status, verdict.reasons[0]) == (BundleStatus.REJECTED, "contested")
        assert verdict.duplicate_of == f"{another.manifest.host.host_id}/{another.manifest.episode_id}"
        assert verdict.duplicate_of in verdict.detail


@pytest.mark.parametrize("thief", THIEVES.values(), ids=THIEVES)
@pytest.mark.parametrize("how", [{}, {"full": True}], ids=["again", "full"])
def test_what_an_earlier_sweep_accepted_stays(thief: Episode, how: dict[str, object], tmp_path: Path) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    for whole in (HONEST, OTHER):
        put(store, whole)
    said(store, run)
    put(store, thief)

    for _ in range(3):
        verdicts = said(store, run, **how)

        assert [of(verdicts, whole).status for whole in (HONEST, OTHER)] == [BundleStatus.ACCEPTED] * 2
        assert of(verdicts, thief).status is BundleStatus.REJECTED
        assert "contested" in of(verdicts, thief).reasons


def test_what_was_accepted_stays_when_the_validator_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phasewatch.validate import sweep as module

    store, run = tmp_path / "store", tmp_path / "run"
    put(store, HONEST)
    said(store, run)
    put(store, THIEVES["a host whose name sorts first"])
    monkeypatch.setattr(module, "SWEEP_VERSION", "later")

    assert of(said(store, run), HONEST).status is BundleStatus.ACCEPTED


def test_an_old_sweep_that_went_by_the_path_is_no_evidence(tmp_path: Path) -> None:
    from phasewatch.validate.index import write_index

    store, run, thief = tmp_path / "store", tmp_path / "run", THIEVES["a host whose name sorts first"]
    for whole in (HONEST, thief):
        put(store, whole)
    verdicts = said(store, run)
    true, false = of(verdicts, HONEST), of(verdicts, thief)
    old = [
        replace(false, status=BundleStatus.ACCEPTED, reasons=(), duplicate_of=""),
        replace(true, reasons=("duplicate",)),
    ]
    write_index(run / VALIDATION_FILE, old)

    assert {v.status for v in said(store, run, full=True).values()} == {BundleStatus.REJECTED}


@pytest.mark.parametrize("thief", [THIEVES["a host whose name sorts first"], THIEVES["a host whose name sorts last"]])
def test_a_sweep_that_was_killed_in_between_gives_nobody_a_start(thief: Episode, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for whole in (HONEST, OTHER, thief):
        put(store, whole)
    said(store, tmp_path / "whole")
    with pytest.raises(Killed):
        sweep(store, tmp_path / "run", workers=1, part=1, progress=RecordedProgress(killed_at=2))

    said(store, tmp_path / "run")

    for name in (VALIDATION_FILE, "ledger.json", "grids/grids.npy", "grids/levels.npy", "grids/index.parquet"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_any_number_of_workers_rules_alike(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for whole in (HONEST, OTHER, *THIEVES.values()):
        if whole.manifest.episode_id not in {p.name.partition(".")[0] for p in store.glob("*/*.zst")}:
            put(store, whole)
    for workers in (1, 2):
        sweep(store, tmp_path / str(workers), workers=workers)

    for name in (VALIDATION_FILE, "grids/grids.npy", "grids/index.parquet"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_a_claim_that_is_gone_leaves_no_doubt(tmp_path: Path) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    put(store, HONEST)
    false = put(store, THIEVES["a host whose name sorts first"])
    assert of(said(store, run), HONEST).status is BundleStatus.REJECTED

    remove(false)

    assert of(said(store, run), HONEST).status is BundleStatus.ACCEPTED


def test_of_true_copies_one_is_kept_and_the_one_that_was_accepted_before(tmp_path: Path) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    copy = replace(HONEST, manifest=episode(PHASES, number=1, host_id="pc").manifest)
    put(store, HONEST)
    said(store, run)
    put(store, copy)

    verdicts = said(store, run)
    afresh = said(store, tmp_path / "afresh")

    assert of(verdicts, HONEST).status is BundleStatus.ACCEPTED
    assert (of(verdicts, copy).status, of(verdicts, copy).reasons) == (BundleStatus.REJECTED, ("duplicate",))
    assert (of(afresh, copy).status, of(afresh, HONEST).reasons) == (BundleStatus.ACCEPTED, ("duplicate",))


def admit(store: Path, whole: Episode, status: str, *reasons: str) -> None:
    """Write the receiver's word beside a bundle."""
    from phasewatch.transfer.admission import AdmissionVerdict

    host_id, episode_id = whole.manifest.host.host_id, whole.manifest.episode_id
    path = store / host_id / f"{episode_id}.tar.zst"
    judgement = AdmissionVerdict(status=status, reasons=reasons, detail="")
    with DiskStore(store).receiving():
        pass  # makes the folder
    DiskStore(store).write_status(host_id, episode_id, judgement.render(digest=sha256(path.read_bytes()).hexdigest()))


def test_the_receivers_word_tells_who_came_first(tmp_path: Path) -> None:
    store, thief = tmp_path / "store", THIEVES["a host whose name sorts first"]
    for whole in (HONEST, thief):
        put(store, whole)
    admit(store, HONEST, "accepted")
    assert (
        of(said(store, tmp_path / "half"), HONEST).status is BundleStatus.REJECTED
    )  # nobody says that the other came later

    admit(store, thief, "rejected", "contested", "duplicate")
    verdicts = said(store, tmp_path / "run")

    assert of(verdicts, HONEST).status is BundleStatus.ACCEPTED
    assert of(verdicts, thief).status is BundleStatus.REJECTED
