"""The files that read what a stranger wrote: every branch of them is taken by their own tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What each file's own tests are; to hold another file to it, add a line.
BOUNDARY = {
    "bundle/archive.py": ["tests/bundle"],
    "bundle/rows.py": ["tests/bundle"],
    "transfer/receiver.py": ["tests/transfer/test_receiver.py"],
    "models/checkpoint.py": ["tests/models/test_checkpoint.py"],
}


@pytest.mark.parametrize("tests", sorted({tuple(tests) for tests in BOUNDARY.values()}), ids=lambda t: t[0])
def test_every_branch_of_what_reads_a_strangers_bytes_is_taken(tests: tuple[str, ...], tmp_path: Path) -> None:
    files = [f"src/phasewatch/{name}" for name, own in BOUNDARY.items() if tuple(own) == tests]
    environment = {**os.environ, "COVERAGE_FILE": str(tmp_path / "data")}
    coverage = [sys.executable, "-m", "coverage"]

    run = subprocess.run(
        [*coverage, "run", "--branch", f"--include={','.join(files)}", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=few",
         "-m", "not soak and not slow", "-k", "not s3", *tests],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
    subprocess.run(
        [*coverage, "json", "-q", "-o", tmp_path / "said.json"],
        cwd=ROOT, env=environment, check=True, timeout=120,
    )  # fmt: skip

    said = json.loads((tmp_path / "said.json").read_text())["files"]
    missed = {name: (said[name]["missing_lines"], said[name]["missing_branches"]) for name in files}
    assert missed == {name: ([], []) for name in files}


def test_the_files_of_the_boundary_are_there() -> None:
    assert all((ROOT / "src" / "phasewatch" / name).is_file() for name in BOUNDARY)
