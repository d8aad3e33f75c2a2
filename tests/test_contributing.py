"""The walk-throughs of CONTRIBUTING are true: each patch applies to this tree, touches at most three files, and works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATCHES = ROOT / "docs" / "contributing"
NO_PYCACHE = shutil.ignore_patterns("__pycache__", ".*_cache")

# Patch → the tests that prove it, in the patched copy.
PROOFS: dict[str, tuple[str, ...]] = {
    "new-channel": ("tests/test_channels.py", "tests/features/test_schema.py", "tests/binning/test_bins.py", "tests/oracle/test_bins.py"),
    "new-gate": ("tests/validate/test_gates.py",),
    "new-model": ("tests/models/test_models.py", "-k", "centroid and not damaged"),
    "new-event": ("tests/formats/test_golden_events.py", "tests/live/test_events.py", "-k", "silence or golden or every"),
}  # fmt: skip


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": f"{folder / 'src'}", "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of everything that a contributor edits."""
    for name in ("src", "tests", "docs", "tools"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=NO_PYCACHE)
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "tree")
    return tmp_path / "tree"


def test_every_patch_is_walked_through_in_contributing() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()

    assert {path.stem for path in PATCHES.glob("*.patch")} == set(PROOFS)
    for name in PROOFS:
        assert f"(docs/contributing/{name}.patch)" in text


@pytest.mark.parametrize("name", PROOFS)
def test_the_patch_applies_touches_three_files_at_most_and_works(name: str, copy: Path) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    applied = run(["git", "apply", "--recount", str(PATCHES / f"{name}.patch")], copy)
    assert applied.returncode == 0, f"{name}.patch is stale: {applied.stderr}"

    generated = run([sys.executable, "-m", "tools.generate"], copy)
    assert generated.returncode == 0, generated.stderr
    changed = {
        path.relative_to(copy).as_posix()
        for path in copy.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and before.get(path) != path.read_bytes()
    }
    proved = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PROOFS[name]], copy)

    assert 1 <= len(changed) <= 3, changed
    assert proved.returncode == 0, proved.stdout[-3000:]
    assert re.search(r"\d+ passed", proved.stdout) or "[100%]" in proved.stdout
    linted = run([sys.executable, "-m", "ruff", "check", *sorted(c for c in changed if c.endswith(".py"))], copy)
    assert linted.returncode == 0, linted.stdout
