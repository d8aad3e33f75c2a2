"""`phasewatch import` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Said
from tests.factories.imports import START_NS, build_map, field_text, table_text, write_csv

Call = Callable[..., Said]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_csv(tmp_path / "in/a.csv", "t,cpu,other", ((START_NS + i * 5 * 10**8, i, "x") for i in range(41)))
    fields = field_text("cpu", "cpu_user_ns", "counter", "ns")
    (tmp_path / "map.toml").write_text(build_map(table_text("*.csv", fields)))
    return tmp_path / "in"


def test_import_and_validate(phasewatch: Call, tmp_path: Path, source: Path) -> None:
    done = phasewatch("import", "table", source, "--map", tmp_path / "map.toml", "--out", tmp_path / "s", "--json")
    validated = phasewatch("validate", tmp_path / "s", "--out", tmp_path / "r", "--json")

    assert done.code == 0
    assert json.loads(done.out)["result"]["counts"] == {"imported": 1}
    assert json.loads(validated.out)["result"]["accepted"] == 1


def test_inspect_shows_columns_and_writes_nothing(phasewatch: Call, tmp_path: Path, source: Path) -> None:
    before = sorted(tmp_path.rglob("*"))

    mapped = phasewatch("import", "table", source, "--map", tmp_path / "map.toml", "--inspect", "--json")
    plain = phasewatch("import", "table", source, "--inspect")

    (kind,) = json.loads(mapped.out)["result"]["kinds"]
    assert kind["columns"]["cpu"]["becomes"] == "proc.cpu_user_ns (counter)"
    assert kind["columns"]["other"]["becomes"] == ""
    assert kind["hz"] == 2
    assert plain.code == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_refused_recording_gives_exit_code_1(phasewatch: Call, tmp_path: Path, source: Path) -> None:
    (source / "a.csv").write_text("t,gpu\n1,2\n")

    done = phasewatch("import", "table", source, "--map", tmp_path / "map.toml", "--out", tmp_path / "s")

    assert done.code == 1


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("import", "table", "in", "--out", "s"), 2),
        (("import", "table", "in", "--map", "ransap"), 2),
        (("import", "table", "in", "--map", "none.toml", "--out", "s"), 2),
        (("import", "table", "nowhere", "--map", "ransap", "--out", "s"), 3),
        (("import", "tables", "in"), 2),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(
    phasewatch: Call, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int
) -> None:
    monkeypatch.chdir(tmp_path)

    assert phasewatch(*words).code == code
    assert not (tmp_path / "s").exists()
