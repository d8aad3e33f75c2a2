"""What is built from the tree: complete, typed, of one version, and working where no checkout is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import phasewatch

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a wheel and a source distribution of this tree."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def unpacked(built: Path) -> Path:
    """The wheel's content, as an installer lays it down."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(built / "site")
    return built / "site"


def call(site: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the unpacked package from a folder where nothing of the checkout can be seen."""
    env = {"PATH": os.environ["PATH"], "HOME": str(site.parent), "PYTHONPATH": str(site), **environment}
    command = [sys.executable, "-m", "phasewatch", *arguments]
    return subprocess.run(command, cwd=site.parent, env=env, capture_output=True, text=True, timeout=120)


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(unpacked: Path) -> None:
    ours = {p.relative_to(SRC) for p in SRC.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    theirs = {p.relative_to(unpacked) for p in unpacked.rglob("*") if p.is_file() and ".dist-info" not in str(p)}

    assert theirs == ours
    assert Path("phasewatch/py.typed") in theirs


def test_the_source_distribution_brings_recordings_licences_and_tests(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as file:
        names = {name.partition("/")[2] for name in file.getnames()}

    assert {"LICENSE", "CITATION.cff", "README.md", "constraints.txt", "Makefile", "corpus/lab-v1/README.md"} <= names
    assert any(re.fullmatch(r"corpus/lab-v1/[^/]+/[^/]+\.tar\.zst", name) for name in names)
    assert "tests/package/test_wheel.py" in names
    assert not [name for name in names if name.startswith((".venv", "runs/", "bench/.venv"))]


def test_one_version_stands_everywhere(built: Path) -> None:
    cited = (ROOT / "CITATION.cff").read_text()

    assert len(list(built.glob(f"phasewatch-{phasewatch.__version__}*"))) == 2
    assert f"\nversion: {phasewatch.__version__}\n" in cited


def test_the_unpacked_wheel_runs_as_a_module_and_says_its_version(unpacked: Path) -> None:
    done = call(unpacked, "--version")

    assert (done.returncode, done.stdout) == (0, f"phasewatch {phasewatch.__version__}\n")


def test_a_wheel_has_no_recordings_and_says_where_they_are(unpacked: Path) -> None:
    done = call(unpacked, "demo")

    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    for words in ("an installed phasewatch has none", "name a store", "source distribution", "PHASEWATCH_CORPUS"):
        assert words in done.stderr


def test_the_recordings_are_found_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phasewatch.cli.folders import find_bundled_corpus
    from phasewatch.errors import StoreError

    monkeypatch.setenv("PHASEWATCH_CORPUS", str(ROOT / "corpus" / "lab-v1"))
    assert find_bundled_corpus() == ROOT / "corpus" / "lab-v1"
    monkeypatch.setenv("PHASEWATCH_CORPUS", str(tmp_path / "none"))
    with pytest.raises(StoreError, match="PHASEWATCH_CORPUS names this folder, and it does not exist"):
        find_bundled_corpus()


def test_a_shell_completes_commands_and_options(unpacked: Path) -> None:
    asked = {"COMP_WORDS": "phasewatch val", "COMP_CWORD": "1", "_PHASEWATCH_COMPLETE": "complete_bash"}

    assert call(unpacked, **asked).stdout.split() == ["validate"]


def test_uv_runs_it_in_the_environment_that_is_there() -> None:
    uv = Path(sys.executable).with_name("uv")
    if not uv.is_file():
        pytest.skip("uv is not in this environment; `make setup` puts it there")
    done = subprocess.run(
        [str(uv), "run", "--no-sync", "phasewatch", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, done.stdout) == (0, f"phasewatch {phasewatch.__version__}\n")
    assert not (ROOT / "uv.lock").exists()
