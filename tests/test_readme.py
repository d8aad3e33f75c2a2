"""README.md shows the kept numbers, and the commands that it shows work, from a fresh clone too."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.requirements import need_qemu
from typer.testing import CliRunner

from phasewatch.artifacts import ACCOUNTING_FILE, METRICS_FILE
from phasewatch.cli import app

ROOT = Path(__file__).parents[1]
LINES = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    for line in block.splitlines()
]
CHEAP_COMMANDS = ("phasewatch doctor", "phasewatch watch --list")


def run_headline(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.headline", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("line", CHEAP_COMMANDS)
def test_cheap_command_works(line: str) -> None:
    done = CliRunner().invoke(app, shlex.split(line)[1:])

    assert line in LINES
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip()


def test_tables_show_the_kept_numbers() -> None:
    done = run_headline("--check")

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("missing", "origin"),
    [pytest.param(1, "recorded", id="missing bundle"), pytest.param(0, "simulated", id="simulated episodes")],
)
def test_run_of_other_episodes_gives_no_table(missing: int, origin: str, tmp_path: Path) -> None:
    bundles = len(list((ROOT / "corpus" / "lab-v1").glob("*/*.tar.zst"))) - missing
    stages = {"validate": {"in": bundles}, "features": {"used": bundles}}
    (tmp_path / ACCOUNTING_FILE).write_text(json.dumps({"stages": stages}))
    (tmp_path / METRICS_FILE).write_text(json.dumps({"inputs": {}, "metrics": [{"metric": "origin", "note": origin}]}))
    before = (ROOT / "README.md").read_bytes()

    done = run_headline(str(tmp_path))

    assert done.returncode == 1
    assert ("simulated" if origin == "simulated" else str(bundles)) in done.stderr
    assert (ROOT / "README.md").read_bytes() == before


@dataclass(frozen=True, kw_only=True)
class FreshClone:
    """A copy of the committed files, with an empty home and no package cache."""

    path: Path
    env: dict[str, str]
    soak_row: Callable[..., None]

    def run(self, line: str) -> str:
        """Run a shell line, record how long it took, and return its output."""
        began = time.monotonic()
        done = subprocess.run(
            ["sh", "-c", line], cwd=self.path, env=self.env, capture_output=True, text=True, timeout=3000
        )
        self.soak_row("README commands in a fresh clone", command=line, seconds=round(time.monotonic() - began))
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("fresh")
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    path = folder / "phasewatch"
    path.mkdir()
    subprocess.run(["tar", "-x", "-C", str(path)], input=archive, check=True)
    (folder / "home").mkdir()
    keep = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "UV_", "SSL_")) or k.endswith("_proxy")}
    env = {
        **keep,
        "HOME": str(folder / "home"),
        "UV_CACHE_DIR": str(folder / "cache"),
        "TERM": "dumb",
        "PATH": f"{path / '.venv' / 'bin'}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    }
    return path, env


@pytest.fixture
def fresh_clone(clone: tuple[Path, dict[str, str]], soak_row: Callable[..., None]) -> FreshClone:
    return FreshClone(path=clone[0], env=clone[1], soak_row=soak_row)


@pytest.mark.soak
def test_commands_work_in_a_fresh_clone(fresh_clone: FreshClone) -> None:
    headline, report = fresh_clone.run("make demo").strip().splitlines()[-2:]
    for line in LINES:
        if line.startswith("phasewatch watch") or "train runs/demo" in line or line == "phasewatch doctor":
            fresh_clone.run(line)

    assert headline.startswith("infections alarmed within 30 s, unseen host and sample: ")
    assert (fresh_clone.path / report).is_file()


@pytest.mark.soak
@pytest.mark.vm
def test_recording_works_in_a_fresh_clone(fresh_clone: FreshClone) -> None:
    need_qemu()
    if not (fresh_clone.path / ".venv").exists():
        fresh_clone.run("make demo")
    fresh_clone.run("phasewatch record --plan smoke --out my-store")
    headline, report = fresh_clone.run("phasewatch run my-store --out runs/mine").strip().splitlines()[-2:]

    assert headline.startswith("infections alarmed within 30 s, unseen host")
    assert (fresh_clone.path / report).is_file()
