"""Labelled bundles: what is written, what is refused, and what undo removes."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest
from tests.factories.bundles import T0, S, episode, replace_manifest
from tests.factories.saved import save, saved
from tests.factories.stores import put, put_members

from phasewatch.bundle.archive import pack_bundle, unpack_bundle
from phasewatch.bundle.model import Episode, LabellingMetadata, OperatorLabel
from phasewatch.errors import BundleError, DataError, StoreError, UsageError
from phasewatch.labelling.requests import LabelRequest, LabelTime
from phasewatch.labelling.runner import (
    BundleSelection,
    LabelSettings,
    LabelSummary,
    list_labelled,
    plan_labels,
    undo_labels,
    write_labels,
)
from phasewatch.types import BundleStatus, EpisodeRole, Phase, SampleKind
from phasewatch.validate.verdict import BundleLocation, validate_bundle

WHEN_NS = 1_800_000_000 * S


def at(seconds: float) -> LabelTime:
    return LabelTime(ns=round(seconds * S), is_relative=True)


def utc(seconds_after_t0: float) -> LabelTime:
    return LabelTime(ns=T0 + round(seconds_after_t0 * S), is_relative=False)


def ask(
    phase: str = "clean", start: LabelTime | None = None, end: LabelTime | None = None, bundle: str = "", line: int = 1
) -> LabelRequest:
    return LabelRequest(
        bundle=bundle,
        start=start,
        end=end,
        phase=Phase(phase),
        by="ann",
        when_ns=WHEN_NS,
        why="w",
        where=f"l.csv:{line}",
    )


def label(tmp_path: Path, *requests: LabelRequest, **settings: object) -> LabelSummary:
    asked = LabelSettings(source=tmp_path / "s", out=tmp_path / "out", requests=requests)
    asked = replace(asked, **settings)  # type: ignore[arg-type]
    return write_labels(asked, plan_labels(asked))


def read(path: str) -> Episode:
    return unpack_bundle(Path(path).read_bytes(), file=path)


def status_of(path: str) -> tuple[BundleStatus, tuple[str, ...]]:
    file = Path(path)
    data = file.read_bytes()
    place = BundleLocation(
        path=path,
        host_id=file.parent.name,
        episode_id=file.name.removesuffix(".tar.zst"),
        receipt=sha256(data).hexdigest(),
    )
    verdict = validate_bundle(data, place).verdict
    return verdict.status, tuple(verdict.reasons)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_labelled_bundle_names_its_original_and_who_when_and_why(tmp_path: Path) -> None:
    (original,) = save(tmp_path / "s", 1)
    before = everything(tmp_path / "s")

    done = label(tmp_path, ask())

    made, old = read(done.paths[0]), read(str(original))
    labelling = made.manifest.labelling
    assert labelling is not None
    assert labelling.ancestor_id == old.manifest.episode_id != made.manifest.episode_id
    assert labelling.ancestor_sha256 == sha256(original.read_bytes()).hexdigest()
    (only,) = labelling.labels
    assert (only.by, only.when_wall_ns, only.why, only.phase) == ("ann", WHEN_NS, "w", Phase.CLEAN)
    assert [mark.phase for mark in made.marks] == [Phase.CLEAN, None]
    assert (made.manifest.profile, made.manifest.sample_kind) == ("benign", SampleKind.BENIGN)
    assert status_of(done.paths[0]) == (BundleStatus.ACCEPTED, ())
    assert everything(tmp_path / "s") == before


def test_unlabelled_time_is_unknown_and_the_bins_stay(tmp_path: Path) -> None:
    (original,) = save(tmp_path / "s", 1)

    done = label(
        tmp_path,
        ask("infecting", at(40.5), at(50), bundle="web01/" + original.name),
        ask("clean", at(10), utc(1020), bundle=original.name.removesuffix(".tar.zst")),
        ask("clean", at(20), at(30), bundle=str(original)),
        profile="worm",
    )

    made, old = read(done.paths[0]), read(str(original))
    starts = [((mark.t_wall_ns - made.t0_ns) / S, mark.phase) for mark in made.marks]
    assert starts == [
        (0, Phase.UNKNOWN),
        (10, Phase.CLEAN),
        (30, Phase.UNKNOWN),
        (40.5, Phase.INFECTING),
        (50, Phase.UNKNOWN),
        (60, None),
    ]
    assert all(mark.t_wall_ns - mark.t_mono_ns == old.t0_ns - old.marks[0].t_mono_ns for mark in made.marks)
    assert (made.t0_ns, made.n_bins) == (old.t0_ns, old.n_bins)
    assert (made.manifest.profile, made.manifest.sample_kind) == ("worm", SampleKind.LIVE)
    assert status_of(done.paths[0]) == (BundleStatus.ACCEPTED, ())


def test_the_same_labels_give_the_same_bytes(tmp_path: Path) -> None:
    save(tmp_path / "s", 1, 2)

    label(tmp_path, ask(), workers=2)
    label(tmp_path, ask(), out=tmp_path / "again")

    assert everything(tmp_path / "out") == everything(tmp_path / "again")


def test_a_range_of_utc_times_covers_many_bundles(tmp_path: Path) -> None:
    save(tmp_path / "s", 1, 2, 3)
    save(tmp_path / "s", 4, host_id="db01")

    done = label(
        tmp_path, ask("clean", utc(1030), utc(2020)), selection=BundleSelection(hosts=("web01",)), role=EpisodeRole.SOAK
    )

    made = [read(path) for path in done.paths]
    spans = [
        (m.labelling.labels[0].end_wall_ns - m.labelling.labels[0].start_wall_ns) / S
        for e in made
        if (m := e.manifest).labelling
    ]
    assert spans == [30, 20]
    assert {e.manifest.role for e in made} == {EpisodeRole.SOAK}


def test_a_second_run_keeps_what_is_labelled_and_completes_a_killed_one(tmp_path: Path) -> None:
    save(tmp_path / "s", 1, 2)
    first = label(tmp_path, ask())
    before = everything(tmp_path / "out")
    Path(first.paths[0] + ".sha256").unlink()  # killed between bundle and receipt
    Path(first.paths[1]).unlink()
    Path(first.paths[1] + ".sha256").unlink()

    second = label(tmp_path, replace(ask(), when_ns=WHEN_NS + S), workers=1)
    third = label(tmp_path, replace(ask(), when_ns=WHEN_NS + 2 * S))

    assert (len(second.paths), second.kept) == (2, 0)
    assert (len(third.paths), third.kept) == (0, 2)
    assert everything(tmp_path / "out")[_relative(first.paths[0])] == before[_relative(first.paths[0])]


def _relative(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


@pytest.mark.parametrize(
    ("requests", "place"),
    [
        ([ask("clean", at(0), at(30), "X"), ask("active", at(29), at(40), "X", 2)], "l.csv:2: start: "),
        ([ask("clean", at(0), at(61), "X")], "l.csv:1: end: "),
        ([ask("clean", utc(999), None, "X")], "l.csv:1: start: "),
        ([ask("clean", at(1_790_000_000), None, "X")], "l.csv:1: start: "),
        ([ask("clean", at(30), at(30), "X")], "l.csv:1: end: "),
        ([ask("clean", at(59.5), None, "X")], "l.csv:1: end: "),
        ([ask("clean", bundle="X"), ask("clean", bundle="web02/nothing", line=2)], "l.csv:2: bundle: "),
        ([ask("clean", utc(1), utc(2))], "l.csv:1: "),
        ([ask("clean" if i % 2 else "active", at(i), at(i + 1), "X", i) for i in range(64)], "l.csv:60: end"),
    ],
)
def test_wrong_labels_are_named_by_row_and_key_and_nothing_is_written(
    tmp_path: Path, requests: list[LabelRequest], place: str
) -> None:
    first, _ = save(tmp_path / "s", 1, 2)
    name = first.name.removesuffix(".tar.zst")

    with pytest.raises(DataError) as refused:
        label(tmp_path, *(replace(r, bundle=r.bundle.replace("X", name)) for r in requests))

    assert str(refused.value).startswith(place)
    assert not (tmp_path / "out").exists()


def test_too_many_phases_are_refused(tmp_path: Path) -> None:
    (path,) = save(tmp_path / "s", 1, seconds=70)
    name = path.name.removesuffix(".tar.zst")

    with pytest.raises(DataError, match="64 phases"):
        label(tmp_path, *(ask("clean" if i % 2 else "active", at(i), at(i + 1), name, i) for i in range(63)))


def test_the_printed_duration_is_accepted_as_the_end(tmp_path: Path) -> None:
    (path,) = save(tmp_path / "s", 1, seconds=60.0004)

    done = label(tmp_path, ask("clean", at(0), at(60.001), path.name))

    assert [mark.phase for mark in read(done.paths[0]).marks] == [Phase.CLEAN, None]


def test_a_recording_with_labels_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "s", episode(number=1))

    with pytest.raises(DataError, match="labels of its own"):
        label(tmp_path, ask())


def test_a_labelled_bundle_is_not_labelled_again(tmp_path: Path) -> None:
    save(tmp_path / "s", 1)
    label(tmp_path, ask())

    with pytest.raises(DataError, match="labelled bundle"):
        label(tmp_path, ask(), source=tmp_path / "out", out=tmp_path / "third")


def test_the_store_of_the_originals_is_no_output(tmp_path: Path) -> None:
    save(tmp_path / "s", 1)

    with pytest.raises(UsageError):
        label(tmp_path, ask(), out=tmp_path / "other" / ".." / "s")


def test_a_damaged_original_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    first, second = save(tmp_path / "s", 1, 2)
    second.write_bytes(second.read_bytes()[:-9])

    with pytest.raises(BundleError):
        label(tmp_path, ask())

    assert first.is_file()
    assert not (tmp_path / "out").exists()


def test_an_unknown_host_or_an_empty_store_is_named(tmp_path: Path) -> None:
    save(tmp_path / "s", 1)

    with pytest.raises(StoreError, match="db01"):
        label(tmp_path, ask(), selection=BundleSelection(hosts=("db01",)))
    with pytest.raises(StoreError):
        label(tmp_path, ask(), source=tmp_path / "none")


def test_other_labels_need_an_undo_and_undo_removes_only_labelled_bundles(tmp_path: Path) -> None:
    (original,) = save(tmp_path / "s", 1)
    name = original.name.removesuffix(".tar.zst")
    label(tmp_path, ask())
    save(tmp_path / "out", 2)  # somebody's original in the same folder

    with pytest.raises(DataError, match=f"--undo --bundle {name}"):
        label(tmp_path, ask("clean", at(0), at(30)), selection=BundleSelection(bundles=(name,)))
    with pytest.raises(DataError):
        undo_labels(tmp_path / "out", BundleSelection(bundles=(saved(2).manifest.episode_id,)))
    assert len(undo_labels(tmp_path / "out", BundleSelection(hosts=("web01",)), is_dry=True)) == 1
    assert len(list(list_labelled(tmp_path / "out"))) == 1

    (gone,) = undo_labels(tmp_path / "out", BundleSelection(bundles=(name,)))

    assert gone.labelling.ancestor_id == name
    assert [p.name for p in (tmp_path / "out" / "web01").glob("*.tar.zst")] == [
        f"{saved(2).manifest.episode_id}.tar.zst"
    ]
    again = label(tmp_path, ask("clean", at(0), at(30)), selection=BundleSelection(bundles=(name,)))
    assert len(again.paths) == 1


def labelling(**changes: object) -> LabellingMetadata:
    base = LabellingMetadata(
        ancestor_id=saved(9).manifest.episode_id,
        ancestor_sha256="0" * 64,
        labels=(
            OperatorLabel(
                start_wall_ns=T0 + 1000 * S,
                end_wall_ns=T0 + 1030 * S,
                phase=Phase.CLEAN,
                by="a",
                when_wall_ns=WHEN_NS,
                why="w",
            ),
        ),
    )
    return msgspec.structs.replace(base, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"ancestor_sha256": "zz"},
        {"ancestor_id": "x"},
        {"ancestor_id": saved(1).manifest.episode_id},
        {"labels": ()},
        {"labels": labelling().labels * 2},
        {"labels": (msgspec.structs.replace(labelling().labels[0], phase=Phase.UNKNOWN),)},
        {"labels": (msgspec.structs.replace(labelling().labels[0], end_wall_ns=T0),)},
        {"labels": (msgspec.structs.replace(labelling().labels[0], when_wall_ns=0),)},
        {"labels": (msgspec.structs.replace(labelling().labels[0], why=""),)},
    ],
)
def test_a_manifest_with_an_impossible_labelling_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(BundleError):
        pack_bundle(msgspec.structs.replace(saved(1).manifest, labelling=labelling(**changes)), {"labels.jsonl": b""})


def test_format_version_1_has_no_labelling() -> None:
    manifest = msgspec.structs.replace(saved(1).manifest, labelling=labelling(), format="phasewatch-episode/1")

    with pytest.raises(BundleError):
        pack_bundle(manifest, {"labels.jsonl": b""})


def test_labels_that_differ_from_the_manifest_are_rejected(tmp_path: Path) -> None:
    whole = replace_manifest(saved(1), labelling=labelling())
    path = put_members(tmp_path / "s", whole, lambda members: members)

    assert status_of(str(path)) == (BundleStatus.REJECTED, ("labelling",))
