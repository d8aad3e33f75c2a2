"""`phasewatch label` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Said
from tests.factories.saved import save

Call = Callable[..., Said]
CLEAN = ("--phase", "clean", "--why", "new machine", "--who", "ann", "--when", "2026-12-01T10:00:00Z")


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return [path.name.removesuffix(".tar.zst") for path in save(Path("s"), 1, 2)]


def test_label_list_validate_and_undo(phasewatch: Call, names: list[str]) -> None:
    done = phasewatch("label", "s", "--out", "out", *CLEAN, "--json")
    listed = phasewatch("label", "out", "--list", "--json")
    validated = phasewatch("validate", "out", "--out", "r", "--json")
    undone = phasewatch("label", "out", "--undo", "--bundle", names[0], "--json")

    assert (done.code, listed.code, validated.code, undone.code) == (0, 0, 0, 0)
    assert json.loads(done.out)["result"]["written"] == 2
    first, _ = json.loads(listed.out)["result"]["labelled"]
    (only,) = first["labels"]
    assert (first["ancestor"], first["profile"]) == (names[0], "benign")
    assert (only["who"], only["when"], only["why"], only["seconds"]) == (
        "ann",
        "2026-12-01T10:00:00.000Z",
        "new machine",
        60,
    )
    assert json.loads(validated.out)["result"]["accepted"] == 2
    assert len(json.loads(undone.out)["result"]["removed"]) == 1
    assert len(list(Path("out").rglob("*.tar.zst"))) == 1
    assert len(list(Path("s").rglob("*.tar.zst"))) == 2


def test_a_file_of_labels(phasewatch: Call, names: list[str]) -> None:
    Path("labels.csv").write_text(f"bundle,start,end,phase,why\n{names[1]},5,25.5,active,saw it\n")

    done = phasewatch("label", "s", "--out", "out", "--csv", "labels.csv", "--who", "bob", "--json")

    (only,) = json.loads(done.out)["result"]["bundles"]
    assert (only["labels"][0]["who"], only["labels"][0]["seconds"]) == ("bob", 20.5)


def test_a_dry_run_writes_nothing(phasewatch: Call, names: list[str]) -> None:
    done = phasewatch("label", "s", "--out", "out", *CLEAN, "--dry-run")
    shown = phasewatch("label", "s", "--out", "out", *CLEAN, "--dry-run", "--json")

    assert done.code == 0
    assert names[0] in done.out
    assert len(json.loads(shown.out)["result"]["bundles"]) == 2
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("s", *CLEAN), 2),
        (("s", "--out", "out", "--phase", "clean"), 2),
        (("s", "--out", "out", "--why", "x"), 2),
        (("s", "--out", "s", *CLEAN), 2),
        (("s", "--out", "out", "--phase", "unknown", "--why", "x"), 2),
        (("s", "--out", "out", *CLEAN, "--start", "5"), 2),
        (("s", "--out", "out", *CLEAN, "--csv", "x.csv"), 2),
        (("s", "--out", "out", "--csv", "x.csv"), 3),
        (("s", "--out", "out", *CLEAN, "--bundle", "x"), 3),
        (("s", "--out", "out", *CLEAN, "--start", "noon"), 3),
        (("none", "--out", "out", *CLEAN), 3),
        (("s", "--undo"), 2),
        (("s", "--undo", "--list"), 2),
        (("s", "--undo", "--host", "web01"), 3),
        (("s", "--list", "--out", "out"), 2),
    ],
)
def test_wrong_use_is_one_line_and_changes_nothing(
    phasewatch: Call, names: list[str], words: tuple[str, ...], code: int
) -> None:
    before = sorted(Path().rglob("*"))

    done = phasewatch("label", *words)

    assert done.code == code
    assert len(done.err.splitlines()) == 1 or "Usage" in done.err
    assert sorted(Path().rglob("*")) == before
