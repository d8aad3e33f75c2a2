"""A folder that is no store, or no run, is told as such, and nothing is written there or made for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.factories.bundles import episode
from tests.factories.stores import put
from typer.testing import CliRunner, Result

from phasewatch.artifacts import VALIDATION_FILE
from phasewatch.cli import app


def phasewatch(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


@pytest.fixture(params=["documents", "nothing", "a store", "an indexed store", "code"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that is no run; two of them are stores."""
    made = tmp_path / "folder"
    made.mkdir()
    if request.param == "documents":
        (made / "how-to").mkdir()
        for name in ("a.md", "how-to/b.md", "how-to/c.tar", "how-to/d.sha256"):
            (made / name).write_text("words")
    elif request.param == "a store":
        put(made, episode())
    elif request.param == "an indexed store":
        put(made, episode())
        (made / VALIDATION_FILE).write_bytes(b"")
    elif request.param == "code":  # folders that a run has, too
        for name in ("models/gradient_boosting.py", "splits/a.py"):
            (made / name).parent.mkdir()
            (made / name).write_text("")
    return made


ON_A_RUN = [
    ["features", "FOLDER"],
    ["split", "FOLDER"],
    ["train", "FOLDER"],
    ["evaluate", "FOLDER"],
    ["explain", "FOLDER", "x", "--at", "1"],
    ["audit", "FOLDER"],
    ["report", "FOLDER"],
    ["report", "FOLDER", "--format", "md", "--out", "OUT"],
    ["compare", "FOLDER", "FOLDER"],
    ["export", "FOLDER", "--out", "OUT.zip"],
    ["publish", "metrics", "FOLDER"],
    ["dashboard", "FOLDER", "--port", "0"],
]


@pytest.mark.parametrize("command", ON_A_RUN, ids=lambda command: " ".join(command[:3]))
def test_a_folder_that_is_not_a_run_is_refused_and_not_changed(
    command: list[str], folder: Path, tmp_path: Path
) -> None:
    before = contents(tmp_path)

    done = phasewatch(*(a.replace("FOLDER", str(folder)).replace("OUT", str(tmp_path / "out")) for a in command))

    assert done.exit_code == 3, done.output
    assert str(folder) in done.stderr
    assert contents(tmp_path) == before


ON_A_STORE = [
    ["validate", "FOLDER", "--out", "OUT"],
    ["run", "FOLDER", "--out", "OUT"],
    ["predict", "FOLDER", "--out", "OUT.parquet", "--model", "MODEL"],
    ["channels", "--corpus", "--store", "FOLDER"],
    ["features", "--store", "FOLDER", "--validation", "index.parquet", "--out-dir", "OUT"],
]


@pytest.mark.parametrize("folder", ["documents", "nothing", "code"], indirect=True)
@pytest.mark.parametrize("command", ON_A_STORE, ids=lambda command: command[0])
def test_a_folder_without_bundles_is_refused_as_a_store(command: list[str], folder: Path, tmp_path: Path) -> None:
    from phasewatch.cli.folders import find_bundled_model

    before = contents(tmp_path)
    places = {"FOLDER": str(folder), "OUT": str(tmp_path / "out"), "MODEL": str(find_bundled_model())}
    filled = [next((a.replace(name, place) for name, place in places.items() if name in a), a) for a in command]

    done = phasewatch(*filled)

    assert done.exit_code == 3, done.output
    assert str(folder) in done.stderr
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["validate", "run"])
@pytest.mark.parametrize("out", [".", "runs/mine", "../other"], ids=["the store", "inside it", "another store"])
def test_a_run_is_never_written_into_a_store(command: str, out: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    put(store, episode())
    put(tmp_path / "other", episode(number=2))
    before = contents(tmp_path)

    done = phasewatch(command, store, "--out", store / out)

    assert done.exit_code == 2, done.output
    assert contents(tmp_path) == before
