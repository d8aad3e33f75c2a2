"""`import table`: what becomes of rows, units, clocks, accesses and labels, and what is refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from backports.zstd import compress
from tests.factories.imports import START_NS, build_map, field_text, table_text, write_csv, write_jsonl

from phasewatch.binning.align import bin_episode
from phasewatch.bundle.archive import unpack_bundle
from phasewatch.bundle.model import Episode
from phasewatch.channels import CHANNEL_NAMES
from phasewatch.errors import DataError
from phasewatch.importing.labels import LabelMode
from phasewatch.importing.mapping import list_shipped_maps, parse_map, read_map
from phasewatch.importing.problems import ImportRecord
from phasewatch.importing.runner import ImportSettings, ImportSummary, run_import
from phasewatch.store.local import DiskStore
from phasewatch.types import EpisodeOrigin, Phase
from phasewatch.validate.verdict import BundleLocation, validate_bundle

S = 10**9
PROC_MAP = build_map(table_text("*.csv", field_text("cpu", "cpu_user_ns", "counter", "ns")))


def run(source: Path, out: Path, text: str, mode: LabelMode = LabelMode.TOLD, workers: int = 1) -> ImportSummary:
    settings = ImportSettings(
        layout="table", source=source, out=out, map_text=text.encode(), map_name="map.toml", mode=mode, workers=workers
    )
    return run_import(settings)


def read_episodes(out: Path) -> list[Episode]:
    store = DiskStore(out)
    return [unpack_bundle(store.read(item), file=item.path) for item in store.walk()]


def read_bytes(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.tar.zst"))}


def column(episode: Episode, source: str, field: str) -> list[float]:
    rows = episode.rows[source]  # type: ignore[index]
    return rows.columns[rows.fields.index(field)].tolist()


def bins(episode: Episode, channel: str) -> np.ndarray:
    return bin_episode(episode).bins[:, CHANNEL_NAMES.index(channel)]


def half_seconds(seconds: int) -> list[int]:
    return [START_NS + i * S // 2 for i in range(2 * seconds + 1)]


def only(summary: ImportSummary) -> ImportRecord:
    assert len(summary.records) == 1
    return summary.records[0]


def test_a_counter_becomes_a_normal_bundle_of_origin_imported(tmp_path: Path) -> None:
    write_csv(tmp_path / "in/a.csv", "t,cpu", ((t, i * S // 4) for i, t in enumerate(half_seconds(20))))

    summary = run(tmp_path / "in", tmp_path / "out", PROC_MAP)

    (episode,) = read_episodes(tmp_path / "out")
    assert only(summary).outcome == "imported"
    assert episode.manifest.origin is EpisodeOrigin.IMPORTED
    assert episode.manifest.fields == {"proc": ("cpu_user_ns",)}
    assert np.allclose(bins(episode, "proc.cpu_user"), 0.5)  # half a core
    assert "qmp.blk_rd_bytes" in episode.manifest.recording.absent


def test_an_imported_bundle_without_proc_is_accepted(tmp_path: Path) -> None:
    text = build_map(table_text("*.csv", field_text("read", "blk_rd_bytes", "counter", "B"), source="qmp"))
    write_csv(tmp_path / "in/a.csv", "t,read", ((t, i) for i, t in enumerate(half_seconds(20))))
    run(tmp_path / "in", tmp_path / "out", text)
    store = DiskStore(tmp_path / "out")
    (item,) = store.walk()

    verdict = validate_bundle(
        store.read(item),
        BundleLocation(path=item.path, host_id=item.host_id, episode_id=item.episode_id, receipt=item.receipt),
    ).verdict

    assert verdict.status == "accepted"
    assert verdict.reasons == ("contention-unknown",)


@pytest.mark.parametrize(
    ("to", "kind", "unit", "facts", "values", "expected"),
    [
        ("rss_bytes", "gauge", "KiB", "", ["1", "2"], [1024, 2048]),
        ("rss_bytes", "gauge", "pages", "page_bytes = 4096", ["1", "2"], [4096, 8192]),
        ("cpu_user_ns", "counter", "ms", "", ["1", "1.5"], [1_000_000, 1_500_000]),
        ("cpu_user_ns", "counter", "ticks", "ticks_per_second = 100", ["1", "2"], [10_000_000, 20_000_000]),
        ("cpu_user_ns", "rate", "cores", "", ["9", "0.5"], [0, 250_000_000]),
        ("cpu_user_ns", "rate", "% of a core", "", ["9", "50"], [0, 250_000_000]),
        ("io_write_bytes", "rate", "KiB/s", "", ["9", "2"], [0, 1024]),
        ("vcpu_vcs", "increment", "1", "", ["9", "7"], [0, 7]),
    ],
)
def test_units_and_kinds_become_those_of_the_raw_field(
    tmp_path: Path, to: str, kind: str, unit: str, facts: str, values: list[str], expected: list[int]
) -> None:
    fields = field_text("x", to, kind, unit) + field_text("cpu", "main_run_ns", "counter", "ns")
    text = build_map(table_text("*.csv", fields), top=facts)
    rest = [values[-1] if kind == "gauge" else ""] * 39
    cells = zip(half_seconds(20), [*values, *rest], range(41), strict=True)
    write_csv(tmp_path / "in/a.csv", "t,x,cpu", cells)
    # A gauge alone is no channel; with the counter beside it the rows are kept.

    run(tmp_path / "in", tmp_path / "out", text)

    (episode,) = read_episodes(tmp_path / "out")
    assert column(episode, "proc", to)[:2] == expected


@pytest.mark.parametrize(
    ("to", "kind", "unit", "part"),
    [
        ("rss_bytes", "gauge", "", "unit is missing"),
        ("rss_bytes", "gauge", "furlongs", "unknown unit"),
        ("rss_bytes", "gauge", "ms", "measures time"),
        ("rss_bytes", "counter", "B", "which is a gauge"),
        ("cpu_user_ns", "counter", "ticks", "ticks_per_second"),
        ("cpu_user_ns", "rate", "ns", "unit per second"),
        ("cpu_usr_ns", "counter", "ns", "cpu_user_ns"),
    ],
)
def test_a_unit_or_kind_that_does_not_fit_is_refused_with_table_and_column(
    to: str, kind: str, unit: str, part: str
) -> None:
    text = build_map(table_text("*.csv", field_text("x", to, kind, unit)))

    with pytest.raises(DataError, match=f"map.toml: table 1: column 'x'.*{part}"):
        parse_map(text.encode(), where="map.toml")


def write_iso8601(t: int) -> str:
    """A time of the hour of 22:00 in UTC, in the zone one hour ahead."""
    second = (t - START_NS) // S + 13 * 60 + 20
    return f"2023-11-14T23:{second // 60:02d}:{second % 60:02d}.{t % S // 10**6:03d}+01:00"


@pytest.mark.parametrize(
    ("clock", "cell"),
    [
        ('{ kind = "unix", column = "t", unit = "s" }', lambda t: f"{t // S}.{t % S:09d}"),
        ('{ kind = "unix", column = "t", unit = "ms" }', lambda t: t // 10**6),
        ('{ kind = "iso8601", column = "t" }', lambda t: write_iso8601(t)),
        ('{ kind = "relative", column = "t", unit = "ms", anchor = { text = "2023-11-14T22:13:20Z" } }',
         lambda t: (t - START_NS) // 10**6),
    ],
    ids=["seconds", "milliseconds", "iso8601", "relative"],
)  # fmt: skip
def test_every_clock_gives_the_same_bundle(tmp_path: Path, clock: str, cell: Callable[[int], object]) -> None:
    fields = field_text("cpu", "cpu_user_ns", "counter", "ns")
    write_csv(tmp_path / "in/a.csv", "t,cpu", ((cell(t), i) for i, t in enumerate(half_seconds(20))))

    run(tmp_path / "in", tmp_path / "out", build_map(table_text("*.csv", fields, clock=clock)))

    (episode,) = read_episodes(tmp_path / "out")
    assert episode.rows["proc"].t_wall_ns.tolist() == half_seconds(20)  # type: ignore[index]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("{t},nan", "non-finite"),
        ("{t},Infinity", "non-finite"),
        ("{t},1e999", "number-range"),
        ("{t},99999999999999999999999", "number-range"),
        ("{t},abc", "value-type"),
        ("{t}", "row-width"),
        ("{t},1,2", "row-width"),
        ('{t},"1', "json"),
        ("12,1", "clock"),
        (f"{START_NS},1", "clock-backwards"),
        ("{t},\x00", "text"),
        ("{t}," + "1" * 70_000, "line-size"),
    ],
)
def test_a_bad_line_refuses_its_episode_by_file_and_line_and_no_other(tmp_path: Path, line: str, code: str) -> None:
    text = PROC_MAP.replace("*.csv", "{run}.csv")
    good = [(t, i) for i, t in enumerate(half_seconds(20))]
    write_csv(tmp_path / "in/good.csv", "t,cpu", good)
    path = write_csv(tmp_path / "in/bad.csv", "t,cpu", good)
    path.write_text(path.read_text() + line.format(t=good[-1][0] + S) + "\n")

    summary = run(tmp_path / "in", tmp_path / "out", text)

    by_input = {r.input: r for r in summary.records}
    assert (by_input["run=bad"].code, by_input["run=bad"].file, by_input["run=bad"].line) == (code, "bad.csv", 43)
    assert by_input["run=good"].outcome == "imported"
    assert len(read_episodes(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ('{"t": 1, "t": 2, "cpu": 3}', "key-twice"),
        ('{"t": %d, "cpu": NaN}', "non-finite"),
        ('{"t": %d, "cpu": true}', "value-type"),
        ('{"t": %d, "cpu": "x"}', "value-type"),
        ('{"t": %d, "cpu": [1]}', "value-type"),
        ("[1]", "json"),
        ('{"t": ', "json"),
        ("[" * 40_000, "json"),
    ],
)
def test_a_bad_json_line_is_refused_by_its_code(tmp_path: Path, line: str, code: str) -> None:
    text = PROC_MAP.replace('format = "csv"', 'format = "jsonl"').replace("*.csv", "*.jsonl")
    path = write_jsonl(tmp_path / "in/a.jsonl", [{"t": t, "cpu": i} for i, t in enumerate(half_seconds(20))])
    path.write_text(path.read_text() + (line % (START_NS + 30 * S) if "%d" in line else line) + "\n")

    assert only(run(tmp_path / "in", tmp_path / "out", text)).code == code


def test_bad_lines_that_the_map_allows_are_left_out_and_counted(tmp_path: Path) -> None:
    text = build_map(table_text("*.csv", field_text("cpu", "cpu_user_ns", "counter", "ns"), more="skip_bad_lines = 1"))
    path = write_csv(tmp_path / "in/a.csv", "t,cpu", ((t, i) for i, t in enumerate(half_seconds(20))))
    path.write_text(path.read_text() + f"{START_NS + 30 * S}")  # the recorder died while it wrote

    record = only(run(tmp_path / "in", tmp_path / "out", text))

    assert (record.outcome, record.skipped_lines) == ("imported", 1)


def test_byte_order_mark_crlf_gzip_and_zstd_change_nothing(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "plain/a.csv", "t,cpu", ((t, i) for i, t in enumerate(half_seconds(20))))
    marked = b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n")
    for name, data in (("mark", marked), ("gz", gzip.compress(marked)), ("zst", compress(marked))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.csv").write_bytes(data)

    for name in ("plain", "mark", "gz", "zst"):
        run(tmp_path / name, tmp_path / f"out-{name}", PROC_MAP)

    stores = [read_bytes(tmp_path / f"out-{name}") for name in ("plain", "mark", "gz", "zst")]
    assert len(stores[0]) == 1
    assert stores[1:] == stores[:1] * 3


def test_a_file_that_expands_too_much_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.csv").write_bytes(compress(b"t,cpu\n" + b"\n" * (80 << 20)))

    assert only(run(tmp_path / "in", tmp_path / "out", PROC_MAP)).code == "expanded-size"


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "in/a.csv", "t,cpu", ((t, i) for i, t in enumerate(half_seconds(20))))
    path.write_bytes(gzip.compress(path.read_bytes())[:-20])

    assert only(run(tmp_path / "in", tmp_path / "out", PROC_MAP)).code == "compressed"


def test_links_are_refused_not_followed(tmp_path: Path) -> None:
    write_csv(tmp_path / "secret.csv", "t,cpu", ((t, i) for i, t in enumerate(half_seconds(20))))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.csv").symlink_to(tmp_path / "secret.csv")

    assert only(run(tmp_path / "in", tmp_path / "out", PROC_MAP)).code == "symlink"
    assert read_episodes(tmp_path / "out") == []


def test_equal_inputs_give_equal_bytes_whatever_the_workers_and_the_order_of_files(tmp_path: Path) -> None:
    text = PROC_MAP.replace("*.csv", "{run}.csv")
    for where, runs in (("one", "abc"), ("two", "cba")):
        for name in runs:
            write_csv(tmp_path / where / f"{name}.csv", "t,cpu", ((t, i) for i, t in enumerate(half_seconds(20))))

    run(tmp_path / "one", tmp_path / "out1", text, workers=1)
    run(tmp_path / "two", tmp_path / "out2", text, workers=2)

    assert len(read_bytes(tmp_path / "out1")) == 3
    assert read_bytes(tmp_path / "out1") == read_bytes(tmp_path / "out2")
    assert (tmp_path / "out1/import_v1.jsonl").read_bytes() == (tmp_path / "out2/import_v1.jsonl").read_bytes()


def test_unchanged_inputs_are_skipped_and_a_lost_bundle_is_imported_again(tmp_path: Path) -> None:
    text = PROC_MAP.replace("*.csv", "{run}.csv")
    for name in "ab":
        write_csv(tmp_path / f"in/{name}.csv", "t,cpu", ((t, i) for i, t in enumerate(half_seconds(20))))
    first = run(tmp_path / "in", tmp_path / "out", text)
    whole = read_bytes(tmp_path / "out")
    lost = tmp_path / "out" / next(iter(whole))

    again = run(tmp_path / "in", tmp_path / "out", text)
    lost.unlink()
    lost.with_name(lost.name + ".sha256").unlink()
    third = run(tmp_path / "in", tmp_path / "out", text)

    assert (first.kept, again.kept, third.kept) == (0, 2, 1)
    assert read_bytes(tmp_path / "out") == whole


def test_the_same_episode_with_other_content_is_not_replaced(tmp_path: Path) -> None:
    write_csv(tmp_path / "in/a.csv", "t,cpu", ((t, i) for i, t in enumerate(half_seconds(20))))
    run(tmp_path / "in", tmp_path / "out", PROC_MAP)
    write_csv(tmp_path / "in/a.csv", "t,cpu", ((t, 2 * i) for i, t in enumerate(half_seconds(20))))

    record = only(run(tmp_path / "in", tmp_path / "out", PROC_MAP))

    assert record.code == "id-conflict"


def test_rows_of_several_hosts_in_one_file_become_an_episode_each(tmp_path: Path) -> None:
    text = build_map(
        table_text("*.csv", field_text("cpu", "cpu_user_ns", "counter", "ns")), episode='host = { column = "vm" }'
    )
    rows = [(t, vm, i) for i, t in enumerate(half_seconds(20)) for vm in ("Web", "db", "../x")]
    write_csv(tmp_path / "in/a.csv", "t,vm,cpu", rows)

    summary = run(tmp_path / "in", tmp_path / "out", text)

    assert sorted(e.manifest.host.host_id for e in read_episodes(tmp_path / "out")) == ["db", "web"]
    assert [(r.key, r.code) for r in summary.records if r.code] == [("../x", "host")]


def test_tables_of_one_source_join_at_equal_times_and_files_join_by_the_names_in_their_paths(tmp_path: Path) -> None:
    text = build_map(
        table_text("{run}/cpu.csv", field_text("cpu", "cpu_user_ns", "counter", "ns"))
        + table_text("{run}/io.csv", field_text("wr", "io_write_bytes", "counter", "B")),
        episode='host = { text = "alpha" }\nkey = { path = "run" }',
    )
    for name in ("one", "two"):
        write_csv(tmp_path / f"in/{name}/cpu.csv", "t,cpu", ((t, i) for i, t in enumerate(half_seconds(20))))
        write_csv(tmp_path / f"in/{name}/io.csv", "t,wr", ((t, 7 * i) for i, t in enumerate(half_seconds(20))))

    run(tmp_path / "in", tmp_path / "out", text)

    episodes = read_episodes(tmp_path / "out")
    assert len(episodes) == 2
    assert episodes[0].rows["proc"].present.all(axis=0).sum() == 2  # type: ignore[index]
    assert column(episodes[0], "proc", "io_write_bytes")[:3] == [0, 7, 14]


def test_a_gap_and_half_an_hour_end_a_part(tmp_path: Path) -> None:
    first = [START_NS + i * S for i in range(2_000)]
    second = [START_NS + 5_000 * S + i * S for i in range(30)]
    write_csv(tmp_path / "in/a.csv", "t,cpu", ((t, i) for i, t in enumerate([*first, *second])))

    run(tmp_path / "in", tmp_path / "out", PROC_MAP)

    lengths = sorted(round(e.manifest.duration_s) for e in read_episodes(tmp_path / "out"))
    assert lengths == [29, 198, 1800]


def test_a_part_that_is_too_short_is_said(tmp_path: Path) -> None:
    write_csv(tmp_path / "in/a.csv", "t,cpu", ((t, i) for i, t in enumerate(half_seconds(3))))

    assert only(run(tmp_path / "in", tmp_path / "out", PROC_MAP)).code == "span"


LABELS = (
    '[labels]\nevidence = "{evidence}"\nphase = {{ column = "state", values = {{ ok = "clean", bad = "active" }} }}\n'
)


@pytest.mark.parametrize(
    ("mode", "evidence", "phases"),
    [
        (LabelMode.TOLD, "", [Phase.CLEAN, Phase.ACTIVE]),
        (LabelMode.PROVEN, "process starts in the sandbox's log", [Phase.CLEAN, Phase.ACTIVE]),
        (LabelMode.PROVEN, "", [Phase.UNKNOWN]),
    ],
)
def test_labels_of_rows_are_kept_as_told_or_by_evidence(
    tmp_path: Path, mode: LabelMode, evidence: str, phases: list[Phase]
) -> None:
    text = build_map(
        table_text("*.csv", field_text("cpu", "cpu_user_ns", "counter", "ns")), tail=LABELS.format(evidence=evidence)
    )
    rows = ((t, i, "ok" if i < 20 else "bad") for i, t in enumerate(half_seconds(20)))
    write_csv(tmp_path / "in/a.csv", "t,cpu,state", rows)

    run(tmp_path / "in", tmp_path / "out", text, mode)

    (episode,) = read_episodes(tmp_path / "out")
    assert [mark.phase for mark in episode.marks[:-1]] == phases


def test_labels_come_from_a_file_of_time_ranges_and_overlaps_are_refused(tmp_path: Path) -> None:
    text = build_map(
        table_text("*.csv", field_text("cpu", "cpu_user_ns", "counter", "ns")),
        episode='host = { text = "alpha" }\nkey = { text = "k" }',
        tail='[labels]\nfile = "labels.csv"\nvalues = { ransom = "active" }\n',
    )
    write_csv(tmp_path / "in/a.csv", "t,cpu", ((t, i) for i, t in enumerate(half_seconds(20))))
    base = START_NS // S
    labels = tmp_path / "in/labels.csv"

    write_csv(labels, "start,end,phase", [(base, base + 5, "clean"), (base + 8, base + 20, "ransom")])
    run(tmp_path / "in", tmp_path / "out", text)
    write_csv(labels, "start,end,phase", [(base, base + 9, "clean"), (base + 8, base + 20, "ransom")])
    overlapping = run(tmp_path / "in", tmp_path / "out2", text)

    (episode,) = read_episodes(tmp_path / "out")
    assert [m.phase for m in episode.marks[:-1]] == [Phase.CLEAN, Phase.UNKNOWN, Phase.ACTIVE]
    assert only(overlapping).code == "label"


ACCESSES = """
[table.accesses]
address = "lba"
address_unit = "sectors"
size = "bytes"
size_unit = "B"
merge_within = "1 ms"
merge_up_to = "16 KiB"
bytes_to = "blk_wr_bytes"
requests_to = "blk_wr_ops"
clusters_to = "blk_clusters"
rewritten_to = "blk_rewritten"
"""


def test_accesses_become_counters_and_neighbouring_pieces_one_request(tmp_path: Path) -> None:
    text = build_map(
        table_text("*.csv", ACCESSES, source="qmp", more='columns = ["t", "lba", "bytes"]'), top="sector_bytes = 512"
    )
    pieces = [
        (START_NS + 1, 0, 4096),
        (START_NS + 2, 8, 4096),  # goes on where the one before ended
        (START_NS + 3, 100, 4096),  # elsewhere
        (START_NS + 3 + 2 * 10**6, 108, 4096),  # goes on, but 2 ms later
        (START_NS + 10 * S, 0, 4096),  # the first cluster again
        (START_NS + 19 * S + 5, 10_000, 512),
    ]
    write_csv(tmp_path / "in/a.csv", "", pieces)

    run(tmp_path / "in", tmp_path / "out", text)

    (episode,) = read_episodes(tmp_path / "out")
    assert column(episode, "qmp", "blk_wr_bytes")[:2] == [0, 16_384]
    assert column(episode, "qmp", "blk_wr_bytes")[-1] == 20_992
    assert column(episode, "qmp", "blk_wr_ops")[1] == 3
    assert column(episode, "qmp", "blk_clusters")[-1] == 3
    assert column(episode, "qmp", "blk_rewritten")[-1] == 1
    assert bins(episode, "qmp.blk_wr_bytes")[0] == 32_768  # 16 KiB in half a second


def test_accesses_out_of_order_are_sorted_within_the_time_that_the_map_states(tmp_path: Path) -> None:
    stamps = [START_NS + i * S // 10 for i in range(1, 200)]
    stamps[50:60] = reversed(stamps[50:60])
    more = 'columns = ["t", "lba", "bytes"]'
    top = "sector_bytes = 512"
    write_csv(tmp_path / "in/a.csv", "", ((t, i * 1000, 512) for i, t in enumerate(stamps)))

    strict = run(
        tmp_path / "in", tmp_path / "a", build_map(table_text("*.csv", ACCESSES, source="qmp", more=more), top=top)
    )
    more += '\nout_of_order_within = "1 s"'
    sorted_ = run(
        tmp_path / "in", tmp_path / "b", build_map(table_text("*.csv", ACCESSES, source="qmp", more=more), top=top)
    )

    assert only(strict).code == "clock-backwards"
    assert only(sorted_).outcome == "imported"


@pytest.mark.parametrize("size", ["-1", "99999999999"])
def test_an_impossible_access_is_refused(tmp_path: Path, size: str) -> None:
    text = build_map(
        table_text("*.csv", ACCESSES, source="qmp", more='columns = ["t", "lba", "bytes"]'), top="sector_bytes = 512"
    )
    write_csv(tmp_path / "in/a.csv", "", [(START_NS, 0, 512), (START_NS + 20 * S, 0, size)])

    assert only(run(tmp_path / "in", tmp_path / "out", text)).code == "number-range"


def test_a_file_that_matches_no_pattern_is_listed(tmp_path: Path) -> None:
    write_csv(tmp_path / "in/a.csv", "t,cpu", ((t, i) for i, t in enumerate(half_seconds(20))))
    (tmp_path / "in/readme.txt").write_text("x")

    assert run(tmp_path / "in", tmp_path / "out", PROC_MAP).unmatched == ("readme.txt",)


def test_a_source_without_any_matching_file_is_an_error(tmp_path: Path) -> None:
    write_csv(tmp_path / "in/a.tsv", "t", [])

    with pytest.raises(DataError, match=r"a\.tsv, matches \*\.csv"):
        run(tmp_path / "in", tmp_path / "out", PROC_MAP)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", list_shipped_maps())
def test_every_shipped_map_is_valid(name: str) -> None:
    assert parse_map(read_map(name), where=name).rules.name == name


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ('"*.csv"', '"../*.csv"', "below the source"),
        ('"*.csv"', '"/etc/*"', "below the source"),
        ('"*.csv"', '"{a}/{a}"', "twice"),
        ('text = "alpha"', 'path = "run"', "no {run}"),
        ('text = "alpha"', 'text = "a", path = "b"', "exactly one"),
        ('unit = "ns" }', 'unit = "fortnights" }', "unknown unit"),
        ("phasewatch-import/1", "phasewatch-import/9", "this version reads"),
        ('kind = "unix", column', 'kind = "relative", column', "anchor"),
        ('column = "cpu"', 'colum = "cpu"', "column"),
    ],
)
def test_a_malformed_map_is_refused_with_the_key(old: str, new: str, part: str) -> None:
    with pytest.raises(DataError, match=part):
        parse_map(PROC_MAP.replace(old, new).encode(), where="map.toml")


def test_the_log_holds_a_line_for_each_episode(tmp_path: Path) -> None:
    text = PROC_MAP.replace("*.csv", "{run}.csv")
    write_csv(tmp_path / "in/a.csv", "t,cpu", ((t, i) for i, t in enumerate(half_seconds(20))))
    write_csv(tmp_path / "in/b.csv", "t,gpu", ((t, i) for i, t in enumerate(half_seconds(20))))

    run(tmp_path / "in", tmp_path / "out", text)

    lines = [json.loads(line) for line in (tmp_path / "out/import_v1.jsonl").read_text().splitlines()]
    assert [(r["input"], r["outcome"], r.get("code")) for r in lines] == [
        ("run=a", "imported", None),
        ("run=b", "refused", "column-missing"),
    ]


def test_the_maps_of_the_how_to_page_are_valid() -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/import.md").read_text(encoding="utf-8")
    first, accesses = (block.split("```")[0] for block in page.split("```toml\n")[1:3])
    head = 'format = "phasewatch-import/1"\nname = "a"\n[episode]\nhost = { path = "run" }\n'

    assert parse_map(first.encode(), where="first").tables[0].fields[0].spec.field == "cpu_user_ns"
    top, table = accesses.split("\n", 1)
    text = head.replace("[episode]", f"{top}\n[episode]") + table
    assert parse_map(text.encode(), where="second").tables[0].accesses is not None
