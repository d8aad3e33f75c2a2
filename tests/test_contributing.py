"""The patches of CONTRIBUTING.md apply to this tree, touch at most three files, and pass their tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATCHES = ROOT / "docs" / "contributing"

# Patch → tests that it must pass, run in the patched copy.
PATCH_TESTS: dict[str, tuple[str, ...]] = {
    "new-channel": ("tests/test_channels.py", "tests/oracle/test_bins.py"),
    "new-gate": ("tests/validate/test_brief.py",),
    "new-model": ("tests/models/test_models.py", "-k", "centroid and not damaged"),
    "new-event": ("tests/formats/test_golden_events.py",),
}


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": f"{folder / 'src'}", "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of everything that a contributor edits."""
    for name in ("src", "tests", "docs", "tools"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "tree")
    run([sys.executable, "-m", "tools.generate"], tmp_path / "tree")
    return tmp_path / "tree"


def read_files(tree: Path) -> dict[str, bytes]:
    files = (path for path in tree.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(tree).as_posix(): path.read_bytes() for path in files}


def test_every_patch_has_a_walk_through_and_tests() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

    assert {path.stem for path in PATCHES.glob("*.patch")} == set(PATCH_TESTS)
    assert [name for name in PATCH_TESTS if f"(docs/contributing/{name}.patch)" not in page] == []


@pytest.mark.parametrize("name", PATCH_TESTS)
def test_patch_applies_and_passes_its_tests(name: str, tree: Path) -> None:
    before = read_files(tree)
    applied = run(["git", "apply", "--recount", str(PATCHES / f"{name}.patch")], tree)
    assert applied.returncode == 0, f"{name}.patch is stale: {applied.stderr}"

    generated = run([sys.executable, "-m", "tools.generate"], tree)
    after = read_files(tree)
    changed = sorted(path for path in after if before.get(path) != after[path])
    tested = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PATCH_TESTS[name]], tree)
    linted = run([sys.executable, "-m", "ruff", "check", *(path for path in changed if path.endswith(".py"))], tree)

    assert generated.returncode == 0, generated.stderr
    assert 1 <= len(changed) <= 3, changed
    assert tested.returncode == 0, tested.stdout[-3000:]
    assert linted.returncode == 0, linted.stdout
