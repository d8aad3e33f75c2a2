"""Every promise in SECURITY.md is linked to a test that exists, and every dependency is pinned."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
# A line that says what an attacker **can** do is no promise, and needs no test.
ADMISSION = "**can**"


def test_every_promise_is_linked_to_a_test() -> None:
    claims = [line for line in SECURITY.partition("\n## ")[2].splitlines() if line.startswith("- ")]

    assert len(claims) > 30
    assert [claim for claim in claims if "[test](" not in claim and ADMISSION not in claim] == []


def test_every_link_leads_to_a_test_that_exists() -> None:
    missing = []
    for link in sorted(set(re.findall(r"\[test\]\(([^)]+)\)", SECURITY))):
        file, _, name = link.partition("#")
        path = ROOT / file
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
        tests = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}
        if not tests or (name and name not in tests):
            missing.append(link)

    assert missing == []


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [
        *project["project"]["dependencies"],
        *(d for ds in project["project"]["optional-dependencies"].values() for d in ds),
        *(d for group in project["dependency-groups"].values() for d in group if isinstance(d, str)),
    ]
    names = {re.split(r"[\[<>=!; ]", d)[0].lower().replace("_", "-").replace(".", "-") for d in wanted}
    lines = [line.partition(";")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]

    assert [line for line in lines if line and "==" not in line] == []
    pinned = {line.partition("==")[0].lower().replace("_", "-").replace(".", "-") for line in lines}
    assert names - pinned <= {"aeon", "phasewatch"}, "aeon's compiler follows numpy late: it may not fix a version"
