"""Labels from a CSV file: times, phases, who and why, and what is refused by file, line and column."""

from __future__ import annotations

from pathlib import Path

import pytest

from phasewatch.errors import DataError
from phasewatch.labelling.requests import LabelDefaults, LabelTime, parse_label_time, read_label_file
from phasewatch.types import Phase

DEFAULTS = LabelDefaults(by="ann", when_ns=1_790_000_000 * 10**9)
HEAD = "bundle,start,end,phase,who,why,when\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("", None),
        ("0", LabelTime(ns=0, is_relative=True)),
        ("90.5", LabelTime(ns=90_500_000_000, is_relative=True)),
        ("2026-09-21T14:13:20Z", LabelTime(ns=1_790_000_000 * 10**9, is_relative=False)),
        ("2026-09-21T16:13:20.25+02:00", LabelTime(ns=1_790_000_000_250_000_000, is_relative=False)),
        ("2026-09-21 14:13:20", LabelTime(ns=1_790_000_000 * 10**9, is_relative=False)),
    ],
)
def test_times_are_seconds_or_utc(text: str, time: LabelTime | None) -> None:
    assert parse_label_time(text, "start", where="x") == time


def test_a_row_may_leave_out_who_and_when_and_its_ends(tmp_path: Path) -> None:
    first, second = read_label_file(
        write(tmp_path, HEAD + 'a,,,clean,,"new, nothing ran",\nb,1,2,active,bob,saw it,2026-09-21T14:13:21Z\n'),
        DEFAULTS,
    )

    assert (first.bundle, first.start, first.end, first.phase) == ("a", None, None, Phase.CLEAN)
    assert (first.by, first.when_ns, first.why) == ("ann", DEFAULTS.when_ns, "new, nothing ran")
    assert (second.by, second.when_ns, second.where) == ("bob", 1_790_000_001 * 10**9, f"{tmp_path}/labels.csv:3")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (HEAD + "a,0,1,clen,,x,\n", ":2: phase: "),
        (HEAD + "a,0,1,unknown,,x,\n", ":2: phase: "),
        (HEAD + "a,soon,1,clean,,x,\n", ":2: start: "),
        (HEAD + "a,0,-1,clean,,x,\n", ":2: end: "),
        (HEAD + "a,0,1e9999,clean,,x,\n", ":2: end: "),
        (HEAD + "a,0,1,clean,,x,yesterday\n", ":2: when: "),
        (HEAD + "a,0,1,clean,,x,\n,0,1,clean,,x,\n", ":3: bundle: "),
        (HEAD + "a,0,1,clean,,,\n", ":2: why: "),
        (HEAD + "a,0,1,clean,\x1b[31m,x,\n", ":2: who: "),
        (HEAD + f"a,0,1,clean,,{'x' * 201},\n", ":2: why: "),
        (HEAD + "a,0,1\n", ":2: "),
        ("bundle,start,end,phase\na,0,1,clean\n", ":1: no column 'why'"),
        ("bundle,start,end,phase,why,whom\na,0,1,clean,x,me\n", ":1: unknown column 'whom'"),
        (HEAD, "labels.csv: "),
        ("", "labels.csv: "),
        (HEAD + "a,0,1,clean,,\0,\n", ":2: "),
        (HEAD + 'a,0,1,clean,,"open,\n', ":2: "),
    ],
)
def test_a_wrong_row_is_named_by_file_line_and_column(tmp_path: Path, text: str, place: str) -> None:
    with pytest.raises(DataError) as refused:
        read_label_file(write(tmp_path, text), DEFAULTS)

    assert str(refused.value).startswith(f"{tmp_path}/")
    assert place in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none\\.csv"):
        read_label_file(tmp_path / "none.csv", DEFAULTS)
