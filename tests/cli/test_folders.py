"""A folder that is no store, or no run, is told as such, and nothing is written there or made for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.factories.bundles import episode
from tests.factories.stores import put
from typer.testing import CliRunner, Result

from phasewatch.artifacts import VALIDATION_FILE
from phasewatch.cli import app


def phasewatch(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def fill(command: list[str], places: Mapping[str, Path]) -> list[str]:
    """Return a command with paths in the place of their names."""
    return [next((w.replace(name, str(at)) for name, at in places.items() if w.startswith(name)), w) for w in command]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


@pytest.fixture(params=["missing", "a file", "documents", "nothing", "a store", "an indexed store", "code"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A path that is no run; two of them are stores."""
    made = tmp_path / "folder"
    if request.param == "missing":
        return made
    if request.param == "a file":
        made.write_text("words")
        return made
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
    elif request.param == "a run":
        (made / VALIDATION_FILE).write_bytes(b"")
    elif request.param == "code":  # folders that a run has, too
        for name in ("models/gradient_boosting.py", "splits/a.py"):
            (made / name).parent.mkdir()
            (made / name).write_text("")
        (made / "setup.py").write_text("")
    return made


def has_remedy(done: Result, place: Path) -> bool:
    """Whether the output is one error that names the place and, after a semicolon, what to do."""
    line = done.stderr.strip()
    return "\n" not in line and str(place) in line and "; " in line


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
    ["compare", "RUN", "FOLDER"],
    ["export", "FOLDER", "--out", "OUT.zip"],
    ["publish", "metrics", "FOLDER"],
    ["dashboard", "FOLDER", "--port", "0"],
]


@pytest.mark.parametrize("command", ON_A_RUN, ids=lambda command: " ".join(command[:3]))
def test_a_folder_that_is_not_a_run_is_refused_and_not_changed(
    command: list[str], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / VALIDATION_FILE).write_bytes(b"")
    before = contents(tmp_path)
    places = {"FOLDER": folder, "OUT": tmp_path / "out", "RUN": tmp_path / "run"}

    done = phasewatch(*fill(command, places))

    assert done.exit_code == 3, done.output
    assert has_remedy(done, folder), done.stderr
    assert contents(tmp_path) == before


ON_A_STORE = [
    ["validate", "FOLDER", "--out", "OUT"],
    ["run", "FOLDER", "--out", "OUT"],
    ["predict", "FOLDER", "--out", "OUT.parquet", "--model", "MODEL"],
    ["channels", "--corpus", "--store", "FOLDER"],
    ["features", "--store", "FOLDER", "--validation", "index.parquet", "--out-dir", "OUT"],
]


@pytest.mark.parametrize("folder", ["missing", "a file", "documents", "nothing", "a run", "code"], indirect=True)
@pytest.mark.parametrize("command", ON_A_STORE, ids=lambda command: command[0])
def test_a_folder_without_bundles_is_refused_as_a_store(command: list[str], folder: Path, tmp_path: Path) -> None:
    from phasewatch.cli.folders import find_bundled_model

    if command[0] == "predict" and folder.is_file():
        pytest.skip("a file is a bundle to predict, here a damaged one")
    before = contents(tmp_path)
    places = {"FOLDER": folder, "OUT": tmp_path / "out", "MODEL": find_bundled_model()}

    done = phasewatch(*fill(command, places))

    assert done.exit_code == 3, done.output
    assert has_remedy(done, folder), done.stderr
    assert contents(tmp_path) == before


@pytest.mark.parametrize("folder", ["nothing", "code", "documents"], indirect=True)
def test_an_empty_store_is_told_from_a_folder_of_other_files(folder: Path, tmp_path: Path) -> None:
    done = phasewatch("run", folder, "--out", tmp_path / "out")

    assert ("not a store" in done.stderr) == bool(list(folder.iterdir()))


ON_OTHER_INPUT = [
    (["predict", "STORE", "--out", "OUT.parquet", "--model", "FOLDER"], {}),
    (["inspect", "FOLDER"], {"a file"}),  # shows what is wrong with it
    (["import", "table", "FOLDER", "--map", "ransap", "--out", "OUT"], {}),
    (["import", "cis490", "FOLDER", "--out", "OUT"], {}),
    (["record", "--profile-file", "FOLDER", "--out", "OUT"], {"a file"}),  # not TOML
    (["record", "--image", "FOLDER", "--out", "OUT"], {}),
    (["alarms", "list", "--state", "FOLDER"], {"nothing"}),  # a watch that has not begun
    (["alarms", "show", "1", "--state", "FOLDER"], {"nothing"}),
    (["alarms", "ack", "1", "--state", "FOLDER"], {}),
    (["alarms", "silence", "--vm", "x", "--for", "1h", "--state", "FOLDER"], {"nothing"}),
    (["alarms", "silence", "--end", "x", "--state", "FOLDER"], {}),
]


@pytest.mark.parametrize(
    "folder", ["missing", "a file", "documents", "nothing", "a run", "a store", "code"], indirect=True
)
@pytest.mark.parametrize(("command", "accepted"), ON_OTHER_INPUT, ids=[" ".join(c[:2]) for c, _ in ON_OTHER_INPUT])
def test_a_path_of_another_kind_is_refused_and_not_changed(
    command: list[str], accepted: set[str], folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if request.node.callspec.params["folder"] in accepted:
        pytest.skip("this command takes it")
    put(tmp_path / "bundles", episode(number=3))
    before = contents(tmp_path)

    done = phasewatch(*fill(command, {"FOLDER": folder, "OUT": tmp_path / "out", "STORE": tmp_path / "bundles"}))

    assert done.exit_code in (2, 3), done.output
    assert has_remedy(done, folder), done.stderr
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
