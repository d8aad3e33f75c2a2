"""Standard streams that are closed, full or of another encoding: the work is done, and the exit code says so."""

from __future__ import annotations

import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from tests.environment.commands import PATH, one_bundle

COMMANDS = ("channels", "--help")


def shell(line: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in which `phasewatch` is ours."""
    script = f'phasewatch() {{ "{sys.executable}" -m phasewatch "$@"; }}\n{line}'
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env={"PATH": PATH, **env}, capture_output=True, text=True, errors="replace"
    )


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_closed_stream_changes_nothing(command: str, closed: str, tmp_path: Path) -> None:
    done = shell(f"phasewatch {command} {closed}", tmp_path)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_what_is_printed_to_a_closed_stream_lands_in_no_file(closed: str, tmp_path: Path) -> None:
    """Without care the first file that is opened gets the closed stream's number."""
    shell(f"phasewatch simulate --hosts 1 --episodes 1 --out made {closed}", tmp_path)

    (bundle,) = (tmp_path / "made").glob("*/*.tar.zst")
    assert bundle.with_name(bundle.name + ".sha256").read_text().split()[0] == sha256(bundle.read_bytes()).hexdigest()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_output_is_one_line_and_the_machines_fault(command: str, tmp_path: Path) -> None:
    done = shell(f"phasewatch {command} > /dev/full", tmp_path)

    assert done.returncode == 5
    assert done.stderr.startswith("error: standard output: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("nowhere", ["2> /dev/full", "2>&-"])
def test_a_log_that_cannot_be_written_ends_no_command(nowhere: str, tmp_path: Path) -> None:
    done = shell(f"phasewatch simulate --hosts 1 --episodes 1 --out made {nowhere}", tmp_path)

    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "made"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_reader_that_leaves_early_is_no_error(command: str, tmp_path: Path) -> None:
    done = shell(f"phasewatch {command} | true; exit ${{PIPESTATUS[0]}}", tmp_path)

    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_goes_nowhere_where_nobody_listens_and_the_code_remains(tmp_path: Path) -> None:
    for nowhere in ("2>&-", "2> /dev/full", ">&- 2>&-"):
        assert shell(f"phasewatch inspect nothing.tar.zst {nowhere}", tmp_path).returncode == 3


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"COLUMNS": "1", "TERM": "dumb", "NO_COLOR": "1"},
        {"COLUMNS": "-3", "LINES": "x"},
        {"PYTHONWARNINGS": "error", "PYTHONDEVMODE": "1"},
        {"PYTHONOPTIMIZE": "2", "TZ": "Foo+99"},
        {"TMPDIR": "/nonexistent"},
    ],
    ids=lambda env: " ".join(env),
)
def test_an_odd_environment_ends_no_command(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "übung").mkdir()
    shutil.copy(one_bundle(), tmp_path / "übung")
    line = "phasewatch inspect übung/*.zst; [ $? -le 1 ] && phasewatch validate --explain rate"

    done = shell(line, tmp_path, **env)

    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


@pytest.mark.parametrize(
    "words", [["split", "r\udcff"], ["report", "r\udcff"], ["dashboard", "r\udcff"], ["validate", "r\udcff"]]
)
def test_a_name_that_is_not_utf8_is_one_line(words: list[str], tmp_path: Path) -> None:
    (tmp_path / words[1]).mkdir()

    done = subprocess.run(
        [sys.executable, "-m", "phasewatch", *words], cwd=tmp_path, env={"PATH": PATH, "HOME": str(tmp_path)},
        capture_output=True, check=False,
    )  # fmt: skip

    assert done.returncode in (2, 3)
    assert done.stderr.startswith(b"error: ")
    assert len(done.stderr.splitlines()) == 1
