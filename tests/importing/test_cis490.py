"""`import cis490`: clocks, labels and traps of that layout. All episodes here are made up."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest
from backports.zstd import compress
from tests.factories.imports import START_NS, ULID, build_cis490, write_archive, write_cis490

from phasewatch.bundle.archive import unpack_bundle
from phasewatch.bundle.model import Episode
from phasewatch.importing.inspection import inspect_cis490
from phasewatch.importing.labels import LabelMode
from phasewatch.importing.mapping import parse_map, read_map
from phasewatch.importing.problems import ImportRecord
from phasewatch.importing.runner import ImportSettings, ImportSummary, list_source, run_import
from phasewatch.store.local import DiskStore
from phasewatch.types import Phase
from phasewatch.validate.verdict import BundleLocation, validate_bundle

S = 10**9
MAP = read_map("cis490")


def run(source: Path, out: Path, mode: LabelMode = LabelMode.PROVEN, text: bytes = MAP) -> ImportSummary:
    settings = ImportSettings(
        layout="cis490", source=source, out=out, map_text=text, map_name="cis490", mode=mode, workers=1
    )
    return run_import(settings)


def only(summary: ImportSummary) -> ImportRecord:
    assert len(summary.records) == 1
    return summary.records[0]


def read_episode(out: Path) -> Episode:
    store = DiskStore(out)
    (item,) = store.walk()
    return unpack_bundle(store.read(item), file=item.path)


def column(episode: Episode, source: str, field: str) -> list[float]:
    rows = episode.rows[source]  # type: ignore[index]
    return rows.columns[rows.fields.index(field)].tolist()


def phases(episode: Episode) -> list[Phase | None]:
    return [mark.phase for mark in episode.marks[:-1]]


@pytest.mark.parametrize("as_archive", [False, True], ids=["folder", "archive"])
def test_an_episode_becomes_a_bundle(tmp_path: Path, as_archive: bool) -> None:
    write_cis490(tmp_path / "in", build_cis490(), as_archive=as_archive)

    record = only(run(tmp_path / "in", tmp_path / "out"))

    episode = read_episode(tmp_path / "out")
    assert (record.outcome, record.key, record.host_id) == ("imported", ULID, "lab-2")
    assert episode.manifest.host.recorder == "cis490 c42bf0300000 dirty, import, labels proven"
    assert column(episode, "proc", "cpu_user_ns")[:2] == [0, 30_000_000]  # ticks of 10 ms
    assert column(episode, "qmp", "blk_wr_bytes")[:2] == [0, 512]
    assert episode.manifest.host.vcpus == 1


def test_folder_and_archive_give_the_same_bytes(tmp_path: Path) -> None:
    write_cis490(tmp_path / "a", build_cis490())
    write_cis490(tmp_path / "b", build_cis490(), as_archive=True)
    for name in "ab":
        run(tmp_path / name, tmp_path / f"out-{name}")

    first, second = ([p.read_bytes() for p in (tmp_path / f"out-{n}").rglob("*.tar.zst")] for n in "ab")
    assert first == second
    assert len(first) == 1


def test_only_phases_with_an_event_are_kept_unless_told(tmp_path: Path) -> None:
    write_cis490(tmp_path / "in", build_cis490())

    run(tmp_path / "in", tmp_path / "proven", LabelMode.PROVEN)
    run(tmp_path / "in", tmp_path / "told", LabelMode.TOLD)

    # `exploit_fire` came with the label of infecting; no session was opened, so nothing proves that the sample ran.
    assert phases(read_episode(tmp_path / "proven")) == [Phase.CLEAN, Phase.INFECTING, Phase.UNKNOWN]
    assert phases(read_episode(tmp_path / "told")) == [Phase.CLEAN, Phase.INFECTING, Phase.ACTIVE]
    assert "by the clock" in read_episode(tmp_path / "told").manifest.host.recorder


def test_netflow_in_another_clock_is_brought_to_that_of_proc_and_quiet_time_is_zero(tmp_path: Path) -> None:
    write_cis490(tmp_path / "in", build_cis490())
    run(tmp_path / "in", tmp_path / "out")

    episode = read_episode(tmp_path / "out")

    rows = episode.rows["netflow"]  # type: ignore[index]
    ahead = episode.rows["proc"].t_wall_ns[0] - episode.rows["proc"].t_mono_ns[0]  # type: ignore[index]
    assert set((rows.t_wall_ns - rows.t_mono_ns).tolist()) == {ahead}
    assert max(b - a for a, b in zip(rows.t_wall_ns, rows.t_wall_ns[1:], strict=False)) <= S // 2
    assert column(episode, "netflow", "out_pkts")[-1] == 10  # five buckets of two frames


def test_an_imported_episode_is_usable(tmp_path: Path) -> None:
    write_cis490(tmp_path / "in", build_cis490())
    run(tmp_path / "in", tmp_path / "out")
    store = DiskStore(tmp_path / "out")
    (item,) = store.walk()

    check = validate_bundle(
        store.read(item),
        BundleLocation(path=item.path, host_id=item.host_id, episode_id=item.episode_id, receipt=item.receipt),
    )

    assert check.verdict.status == "degraded"
    assert set(check.verdict.reasons) == {"rate:qmp", "contention-unknown"}  # one row a second is too few


def spoil(members: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return members | {name.replace("__", "."): value for name, value in changes.items()}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in build_cis490().items() if name not in names}


def meta(**changes: Any) -> dict[str, Any]:
    members = build_cis490()
    return members | {"meta.json": members["meta.json"] | changes}


def labels(*changes: tuple[int, str, Any]) -> dict[str, Any]:
    members = build_cis490()
    for place, key, value in changes:
        members["labels.jsonl"][place][key] = value
    return members


@pytest.mark.parametrize(
    ("members", "code"),
    [
        (without("done.marker"), "incomplete"),
        (without("meta.json") | {"meta.json": "{}"}, "schema"),
        (meta(schema_version=2), "schema"),
        (meta(episode_id="01HF7YAT00XXXXXXXXXXXXXXXX"), "schema"),
        (without("telemetry-proc.jsonl"), "no-rows"),
        (without("labels.jsonl"), "label"),
        (labels((1, "phase", "exploding")), "label"),
        (labels((1, "t_wall_ns", 5)), "label"),
        (labels((0, "t_mono_ns", 1)), "clock"),
        (build_cis490() | {"telemetry-proc.jsonl": build_cis490()["telemetry-proc.jsonl"][::3]}, "no-rows"),
        (build_cis490(seconds=8) | {"labels.jsonl": build_cis490()["labels.jsonl"][:1]}, "span"),
        (build_cis490() | {"telemetry-proc.jsonl": build_cis490()["telemetry-proc.jsonl"] * 2}, "clock-backwards"),
        (build_cis490() | {"telemetry-qmp.jsonl": '{"t_wall_ns": 1, "t_wall_ns": 2}\n'}, "key-twice"),
        (build_cis490() | {"telemetry-qmp.jsonl": '{"wr_bytes": NaN}\n'}, "non-finite"),
        (build_cis490() | {"telemetry-qmp.jsonl": "x" * 70_000}, "line-size"),
    ],
)  # fmt: skip
def test_a_bad_episode_is_refused_by_its_code_and_the_next_one_imported(
    tmp_path: Path, members: dict[str, Any], code: str
) -> None:
    good = "01HF7YAT01" + ULID[10:]
    folder = write_cis490(tmp_path / "in", members)
    if folder.name != ULID:
        folder.rename(folder.with_name(ULID))
    write_cis490(tmp_path / "in", build_cis490(good))

    records = {r.key or r.input: r for r in run(tmp_path / "in", tmp_path / "out").records}

    assert records[ULID].code == code
    assert records[good].outcome == "imported"


def to_link(info: tarfile.TarInfo) -> None:
    info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0


@pytest.mark.parametrize(
    ("members", "change", "code"),
    [
        ({"../meta.json": b"{}"}, None, "path"),
        ({"/meta.json": b"{}"}, None, "path"),
        ({"a/b/meta.json": b"{}"}, None, "path"),
        ({"meta.json": b"{}"}, to_link, "archive"),
    ],
)
def test_a_hostile_archive_is_refused(tmp_path: Path, members: dict[str, bytes], change: Any, code: str) -> None:
    write_archive(tmp_path / f"in/lab-2/{ULID}.tar.zst", members, change=change)

    assert only(run(tmp_path / "in", tmp_path / "out")).code == code


def test_an_archive_that_is_damaged_or_expands_too_much_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in/lab-2"
    folder.mkdir(parents=True)
    (folder / f"{ULID}.tar.zst").write_bytes(b"no archive")
    other = "01HF7YAT01" + ULID[10:]
    (folder / f"{other}.tar.zst").write_bytes(compress(bytes(300 << 20)))

    records = run(tmp_path / "in", tmp_path / "out").records

    assert [r.code in ("archive", "expanded-size", "schema") for r in records] == [True, True]


def test_a_map_adds_spellings_of_keys(tmp_path: Path) -> None:
    members = build_cis490()
    for row in members["telemetry-qmp.jsonl"]:
        row["disk"] = {"rd": row.pop("rd_bytes") + 7}
    write_cis490(tmp_path / "in", members)
    extra = (
        'format = "phasewatch-import/1"\nname = "mine"\n[episode]\nhost = { text = "unused" }\n'
        '[[table]]\nfiles = "telemetry-qmp.jsonl"\nformat = "jsonl"\nsource = "qmp"\n'
        'clock = { kind = "unix", column = "t_wall_ns", unit = "ns" }\n'
        'field = [{ column = "disk.rd", to = "blk_rd_bytes", kind = "counter", unit = "KiB" }]\n'
    )

    run(tmp_path / "in", tmp_path / "out", text=extra.encode())

    episode = read_episode(tmp_path / "out")
    assert column(episode, "qmp", "blk_rd_bytes")[0] == 7 * 1024
    assert column(episode, "qmp", "blk_wr_bytes")[1] == 512  # the shipped spellings still count


def test_episodes_of_a_host_that_overlap_are_one_session(tmp_path: Path) -> None:
    other = "01HF7YAT01" + ULID[10:]
    write_cis490(tmp_path / "in", build_cis490())
    write_cis490(tmp_path / "in", build_cis490(other, start_ns=START_NS + 5 * S))

    run(tmp_path / "in", tmp_path / "out")

    store = DiskStore(tmp_path / "out")
    manifests = [unpack_bundle(store.read(i), file=i.path).manifest for i in store.walk()]
    assert len({m.session for m in manifests}) == 1
    assert [m.neighbours for m in manifests] == [(manifests[1].episode_id,), (manifests[0].episode_id,)]


def test_inspect_says_what_would_become_of_each_key(tmp_path: Path) -> None:
    write_cis490(tmp_path / "in", build_cis490())

    report = inspect_cis490(list_source(tmp_path / "in")[0], parse_map(MAP, where="cis490"))

    proc = next(kind for kind in report.kinds if kind.name == "telemetry-proc.jsonl")
    assert proc.columns["utime"].becomes == "proc.cpu_user_ns (counter)"
    assert proc.columns["nice"].becomes == ""
    assert (proc.columns["utime"].minimum, proc.columns["utime"].maximum, proc.columns["utime"].falls) == (0, 900, 0)
    assert proc.hz == 10
    assert "qmp.blk_wr_bytes" in report.channels
