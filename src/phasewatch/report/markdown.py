"""Render the report without figures: as Markdown for pull requests and repositories, or as JSON for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from phasewatch.report.layout import ReportBlock, ReportPage, ReportTable

__all__ = ["render_json", "render_markdown"]

_URL_PATTERN = re.compile(r"\b[a-z]+:(?=//)|\bwww\.", re.IGNORECASE)  # Markdown renders these as links
_MAX_TABLE_ROWS = 60  # in Markdown; the JSON holds all rows


def render_markdown(page: ReportPage) -> str:
    """Render the report as Markdown; strings from data are escaped and create no link, tag or table cell."""
    return "\n".join(_render_page(page)).rstrip() + "\n"


def render_json(page: ReportPage) -> str:
    """Render the report as one JSON document without figures; their numbers are in the tables."""
    return json.dumps({"result": _build_document(page)}, indent=1, ensure_ascii=True) + "\n"


def _render_page(page: ReportPage) -> Iterator[str]:
    claim = page.claim
    yield from (f"# {_escape_text(claim.words)}", "")
    if claim.scores:
        yield from (_escape_text(claim.scores), "")
    yield from (f"- {_escape_text(name)}: {_escape_text(value)}" for name, value in page.facts)
    yield ""
    if claim.line:
        yield from (f"> {_escape_text(claim.line)}", "")
    yield from (f"Origin: {_escape_text(page.origin)}.", "", _escape_text(claim.verdict), "")
    if claim.tiles:
        rows = tuple((t.name, t.value, t.interval, t.about) for t in claim.tiles)
        columns = ("score", "value", "95 % interval", "description")
        yield from _render_table(ReportTable(columns=columns, numeric=(False, True, False, False), rows=rows))
    yield from (f"- {_escape_text(notice)}" for notice in page.notices)
    for section in page.sections:
        yield from ("", f"## {_escape_text(section.title)}", "")
        if section.lead:
            yield from (_escape_text(section.lead), "")
        yield from (f"- {_escape_text(point)}" for point in section.points)
        for block in section.blocks:
            yield from _render_block(block)


def _render_block(block: ReportBlock) -> Iterator[str]:
    if block.key.startswith("ribbon"):
        return  # one episode window by window: useful as a figure only
    yield from ("", f"### {_escape_text(block.title)}", "")
    yield from (_escape_text(sentence) for sentence in block.sentences)
    if block.absent:
        yield f"*{_escape_text(block.absent)}*"
    if block.table:
        yield ""
        yield from _render_table(block.table)
    if block.command:
        yield from ("", f"Reproduce: `{block.command}`")


def _render_table(table: ReportTable) -> Iterator[str]:
    yield "| " + " | ".join(_render_cell(c) for c in table.columns) + " |"
    yield "|" + "|".join("---:" if numeric else "---" for numeric in table.numeric) + "|"
    for row in table.rows[:_MAX_TABLE_ROWS]:
        yield "| " + " | ".join(_render_cell(c) for c in row) + " |"
    if len(table.rows) > _MAX_TABLE_ROWS:
        yield from ("", f"… and {len(table.rows) - _MAX_TABLE_ROWS} more rows in the HTML report.")
    yield ""


def _escape_text(words: str) -> str:
    """Escape Markdown characters outside code spans."""
    parts = words.split("`")
    if len(parts) % 2 == 0:  # a stray backtick comes from data
        return _escape_markdown(words)
    return "".join(
        f"`{_replace_unprintable(part)}`" if i % 2 else _escape_markdown(part) for i, part in enumerate(parts)
    )


def _render_cell(words: str) -> str:
    return _escape_markdown(words)


def _escape_markdown(words: str) -> str:
    marked = "".join(f"\\{c}" if c in "\\`*_<>[]|#~" else c for c in _replace_unprintable(words))
    return _URL_PATTERN.sub(lambda match: match[0][:-1] + "\\" + match[0][-1], marked)


def _replace_unprintable(words: str) -> str:
    return "".join(c if c.isprintable() else " " for c in words)


def _build_document(page: ReportPage) -> dict[str, Any]:
    claim = page.claim
    return {
        "origin": page.origin,
        "claim": {
            "words": claim.words,
            "scores": claim.scores,
            "line": claim.line,
            "verdict": claim.verdict,
            "holds": claim.holds,
            "tiles": [
                {"name": t.name, "value": t.value, "interval": t.interval, "about": t.about} for t in claim.tiles
            ],
        },
        "facts": dict(page.facts),
        "notices": list(page.notices),
        "sections": [
            {
                "key": s.key,
                "title": s.title,
                "lead": s.lead,
                "points": list(s.points),
                "blocks": [_build_block(b) for b in s.blocks],
            }
            for s in page.sections
        ],
    }


def _build_block(block: ReportBlock) -> dict[str, Any]:
    table = block.table
    return {
        "key": block.key,
        "title": block.title,
        "sentences": list(block.sentences),
        "absent": block.absent,
        "command": block.command,
        "table": None if table is None else {"columns": list(table.columns), "rows": [list(row) for row in table.rows]},
    }
