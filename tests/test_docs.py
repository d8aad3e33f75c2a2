"""The pages are true: what is generated is fresh, what is linked is there, what is typed can be typed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from phasewatch.cli.groups import COMMANDS, load_command

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "corpus").rglob("*.md")])
SECTIONS = ROOT / "tools" / "generate.py"
PARSERS = {name: load_command(name) for name in COMMANDS}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_the_generated_pages_are_fresh() -> None:
    done = subprocess.run([sys.executable, str(SECTIONS), "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), f"{name_of(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_that_is_shown_exists_with_its_options(page: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "phasewatch" not in words:
            continue
        words = words[words.index("phasewatch") + 1 :]
        command = PARSERS.get(words[0])
        assert command is not None or words[0].startswith("-"), f"{name_of(page)} shows {line!r}"
        known = {
            option
            for parameter in getattr(command, "params", [])
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        for word in words[1:]:
            if word.startswith("--") and command is not None:
                assert word.partition("=")[0] in known | {"--help"}, f"{name_of(page)} shows {line!r}"


def test_every_field_of_an_event_says_what_it_is() -> None:
    rows = [
        line
        for line in (ROOT / "docs/reference/events.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]

    assert len(rows) > 70
    assert [row for row in rows if row.endswith("|  |")] == []
