"""The README is true: its table is the run's, and every command in it is run, the cheap ones here, the others in the soak."""

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
    "PYTHONPATH=examples phasewatch train runs/demo --add-model forest:Forest",
)
ITSELF = ("make test",)  # what is running
KEYS = ("recipe", "model", "channel_set", "input", "smoothing", "agent", "fold", "seed", "class", "profile", "host_id")


def test_every_command_of_the_page_is_run_somewhere() -> None:
    assert sorted(LINES) == sorted((*CHEAP, *WALKED, *ITSELF))


@pytest.mark.parametrize("line", CHEAP)
def test_a_cheap_command_does_what_the_page_says(line: str) -> None:
    done = CliRunner().invoke(app, shlex.split(line)[1:])

    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip()


def test_the_table_is_the_one_of_the_numbers_that_are_kept() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.headline", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("fewer", "origin", "says"),
    [
        pytest.param(1, "recorded", "the bundled corpus has", id="fewer bundles than there are"),
        pytest.param(0, "simulated", "holds simulated episodes", id="as many, of a generator"),
    ],
)
def test_a_run_of_other_episodes_gives_no_table(fewer: int, origin: str, says: str, tmp_path: Path) -> None:
    bundles = len(list((ROOT / "corpus" / "lab-v1").glob("*/*.tar.zst"))) - fewer
    stages = {"validate": {"in": bundles}, "features": {"used": bundles}}
    (tmp_path / "ledger.json").write_text(json.dumps({"stages": stages}))
    (tmp_path / "metrics_v2.json").write_text(
        json.dumps({"inputs": {}, "metrics": [dict.fromkeys(KEYS) | {"metric": "origin", "code": origin}]})
    )

    done = subprocess.run(
        [sys.executable, "-m", "tools.headline", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 1
    assert says in done.stderr


def test_the_page_is_short_and_says_the_limits_before_what_is_next() -> None:
    titles = re.findall(r"^## (.+)$", README, re.MULTILINE)

    assert titles == ["Two commands", "What you will see", "Where it does not work", "Next", "More"]
    assert len(README.splitlines()) <= 90


@dataclass(frozen=True, kw_only=True)
class Place:
    """A copy of what git holds, an empty home, no cache."""

    clone: Path
    env: dict[str, str]
    soak_row: Callable[..., None]

    def type(self, line: str) -> str:
        """Type a line of the page as it stands; give what it printed, and hand over what it took."""
        began = time.monotonic()
        done = subprocess.run(
            ["sh", "-c", line], cwd=self.clone, env=self.env, capture_output=True, text=True, timeout=3000
        )
        self.soak_row("A newcomer's walk", command=line, seconds=round(time.monotonic() - began))
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The clone and its environment."""
    folder = tmp_path_factory.mktemp("newcomer")
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    clone = folder / "phasewatch"
    clone.mkdir()
    subprocess.run(["tar", "-x", "-C", str(clone)], input=archive, check=True)
    (folder / "home").mkdir()
    keep = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "UV_", "SSL_")) or k.endswith("_proxy")}
    env = {
        **keep, "HOME": str(folder / "home"), "UV_CACHE_DIR": str(folder / "cache"), "TERM": "dumb",
        "PATH": f"{clone / '.venv' / 'bin'}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    }  # fmt: skip
    return clone, env


@pytest.fixture
def place(clean: tuple[Path, dict[str, str]], soak_row: Callable[..., None]) -> Place:
    return Place(clone=clean[0], env=clean[1], soak_row=soak_row)


@pytest.mark.soak
def test_the_page_word_by_word_in_a_clean_place(place: Place) -> None:
    headline, report = place.type(WALKED[0]).strip().splitlines()[-2:]
    listed = place.type("phasewatch watch --list")
    place.type("phasewatch doctor")
    place.type(WALKED[3])

    assert headline.startswith("macro-F1 of phase, unseen host, realistic, gbt: 0.")
    assert (place.clone / report).is_file()
    assert listed.strip()


@pytest.mark.soak
@pytest.mark.vm
def test_the_pages_own_recording_in_a_clean_place(place: Place) -> None:
    need_qemu()
    if not (place.clone / ".venv").exists():
        place.type(WALKED[0])
    place.type(WALKED[1])
    headline, report = place.type(WALKED[2]).strip().splitlines()[-2:]

    assert headline.startswith("macro-F1 of phase, unseen host, realistic, gbt: ")
    assert (place.clone / report).is_file()
