"""The soak page: new rows replace the old rows of their test, and hand-written text is kept."""

from __future__ import annotations

from tools import soak


def row(test: str, value: int) -> dict[str, object]:
    return {"table": "T", "test": test, "row": {"n": value}, "on": "today", "machine": "here"}


def test_new_rows_replace_the_old_rows_of_their_test() -> None:
    merged = soak.merge([row("a::x", 1), row("a::y", 2)], [row("a::x", 3)])

    assert [(r["test"], r["row"]["n"]) for r in merged] == [("a::x", 3), ("a::y", 2)]


def test_text_outside_the_marks_is_kept() -> None:
    once = soak.replace_tables("# Page\n\nWords.\n", soak.render([row("a::x", 1)]))
    twice = soak.replace_tables(once + "\nMore words.\n", soak.render([row("a::x", 2)]))

    assert twice.startswith("# Page\n\nWords.\n")
    assert twice.endswith("More words.\n")
    assert ("| 1 |" in twice, "| 2 |" in twice) == (False, True)


def test_page_shows_the_kept_rows() -> None:
    page = soak.PAGE.read_text(encoding="utf-8")

    assert soak.replace_tables(page, soak.render(soak.read_rows(soak.ROWS_PATH))) == page
