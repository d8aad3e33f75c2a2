"""SECURITY.md says nothing that no test holds."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
CLAIMS = [line for line in TEXT.split("\n## Who may lie")[1].splitlines() if line.startswith("- ")]
LINKS = sorted(set(re.findall(r"\[test\]\(([^)]+)\)", TEXT)))
# What an attacker can do is no promise, and has no test.
ADMISSIONS = ("It **can** send", "It **can** give wrong answers", "A stranger without a token can")


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim[2:50])
def test_every_claim_is_linked_to_its_test(claim: str) -> None:
    assert "[test](" in claim or claim.removeprefix("- ").startswith(ADMISSIONS)


@pytest.mark.parametrize("link", LINKS)
def test_every_link_leads_to_a_test_that_is_there(link: str) -> None:
    file, _, name = link.partition("#")

    functions = {n.name for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.FunctionDef)}
    assert name in functions or not name
    assert any(function.startswith("test_") for function in functions)


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [
        *project["project"]["dependencies"],
        *(d for ds in project["project"]["optional-dependencies"].values() for d in ds),
    ]
    wanted += [d for group in project["dependency-groups"].values() for d in group if isinstance(d, str)]
    names = {re.split(r"[\[<>=!; ]", d)[0].lower().replace("_", "-").replace(".", "-") for d in wanted}
    lines = [line.partition(";")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]

    assert all("==" in line for line in lines if line)
    pinned = {line.partition("==")[0].lower().replace("_", "-").replace(".", "-") for line in lines}
    assert names - pinned <= {"xgboost", "phasewatch"}, "xgboost is for macOS alone, where nothing is pinned"
