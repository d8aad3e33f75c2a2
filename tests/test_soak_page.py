"""The soak's page: new rows take the place of old ones, and what people wrote beside them stays."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", DOCS / "soak.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(test: str, value: int) -> dict[str, object]:
    return {"table": "T", "test": test, "row": {"n": value}, "on": "today", "machine": "here"}


def test_a_tests_new_rows_replace_its_old_ones_and_no_others(soak: ModuleType) -> None:
    merged = soak.merge([row("a::x", 1), row("a::y", 2)], [row("a::x", 3)])

    assert [(r["test"], r["row"]["n"]) for r in merged] == [("a::x", 3), ("a::y", 2)]


def test_what_stands_outside_the_marks_stays(soak: ModuleType) -> None:
    once = soak.place("# Page\n\nWords.\n", soak.render([row("a::x", 1)]))
    twice = soak.place(once + "\nMore words.\n", soak.render([row("a::x", 2)]))

    assert twice.startswith("# Page\n\nWords.\n")
    assert twice.endswith("More words.\n")
    assert ("| 1 |" in twice, "| 2 |" in twice) == (False, True)


def test_the_page_shows_the_rows_that_are_kept(soak: ModuleType) -> None:
    page = soak.PAGE.read_text(encoding="utf-8")

    assert soak.place(page, soak.render(soak.read(soak.KEPT))) == page
