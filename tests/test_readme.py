"""The README is true: its table is the run's, and every command in it is run, the cheap ones here, the others in the soak."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.requirements import need_qemu
from typer.testing import CliRunner

from phasewatch.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.S)
    for line in block.splitlines()
]

# Every command of the page, and where it is run.
CHEAP = ("phasewatch doctor", "phasewatch watch --list")
WALKED = (
    "make demo",
    "phasewatch record --plan smoke --out my-store",
    "phasewatch run my-store --out runs/mine",
    "PYTHONPATH=examples phasewatch train runs/demo --model forest:Forest",
)
ITSELF = ("make test",)  # what is running


def test_every_command_of_the_page_is_run_somewhere() -> None:
    assert sorted(LINES) == sorted((*CHEAP, *WALKED, *ITSELF))


@pytest.mark.parametrize("line", CHEAP)
def test_a_cheap_command_does_what_the_page_says(line: str) -> None:
    done = CliRunner().invoke(app, shlex.split(line)[1:])

    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip()


def test_the_table_is_the_one_of_the_numbers_that_are_kept() -> None:
    done = subprocess.run(
        [sys.executable, "docs/headline.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr


def test_the_page_is_short_and_says_the_limits_before_what_is_next() -> None:
    titles = re.findall(r"^## (.+)$", README, re.MULTILINE)

    assert titles == ["Two commands", "What you will see", "Where it does not work", "Next", "More"]
    assert len(README.splitlines()) <= 90


@pytest.mark.soak
def test_the_page_word_by_word_in_a_clean_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy of what git holds, an empty home, no cache; prints what each command took."""
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    clone = tmp_path / "phasewatch"
    clone.mkdir()
    subprocess.run(["tar", "-x", "-C", str(clone)], input=archive, check=True)
    (tmp_path / "home").mkdir()
    keep = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "UV_", "SSL_")) or k.endswith("_proxy")}
    env = {
        **keep, "HOME": str(tmp_path / "home"), "UV_CACHE_DIR": str(tmp_path / "cache"), "TERM": "dumb",
        "PATH": f"{clone / '.venv' / 'bin'}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    }  # fmt: skip
    took = {}
    if shutil.which("qemu-system-x86_64") or os.environ.get("CI") == "true":
        need_qemu()
        lines = WALKED
    else:
        lines = tuple(line for line in WALKED if "my-store" not in line)
    for line in lines:
        began = time.monotonic()
        done = subprocess.run(line, shell=True, cwd=clone, env=env, capture_output=True, text=True, timeout=3000)  # noqa: S602  the page's own words
        took[line] = time.monotonic() - began
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        if line == "make demo":
            headline, report = done.stdout.strip().splitlines()[-2:]
            assert headline.startswith("macro-F1 of phase, unseen host, realistic, gbt: 0.")
            assert (clone / report).is_file()
    with capsys.disabled():
        print("\n" + "\n".join(f"{seconds:7.1f} s  {line}" for line, seconds in took.items()))
