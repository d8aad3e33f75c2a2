"""Write the tables of docs/soak.md from the rows that the soak tests recorded: `python -m tools.soak ROWS.jsonl`.

The new rows of a test replace its old ones; the tables of other tests stay. All rows are kept in docs/soak.jsonl, so
`python -m tools.soak` without an argument renders the tables again. Text outside the two marks is kept.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
ROWS_PATH, PAGE = DOCS / "soak.jsonl", DOCS / "soak.md"
BEGIN, END = "<!-- begin: written by tools/soak.py, do not edit -->\n", "<!-- end -->\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read rows, one JSON object per line; a missing file has none."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def add_provenance(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with today's date and this machine."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return [{**row, "on": datetime.now(UTC).date().isoformat(), "machine": machine} for row in rows]


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return all rows, sorted by table and test; new rows replace the old rows of their test."""
    fresh = {row["test"] for row in new}
    kept = [row for row in old if row["test"] not in fresh]
    return sorted([*kept, *new], key=lambda row: (row["table"], row["test"]))


def render(rows: list[dict[str, Any]]) -> str:
    """Render one Markdown table per title, with the columns that its rows have."""
    parts = []
    for title in dict.fromkeys(row["table"] for row in rows):
        own = [row for row in rows if row["table"] == title]
        columns = list(dict.fromkeys(name for row in own for name in row["row"]))
        lines = [columns, ["---"] * len(columns), *([str(row["row"].get(name, "")) for name in columns] for row in own)]
        tests = ", ".join(dict.fromkeys(f"`{row['test'].partition('::')[0]}`" for row in own))
        measured = "; ".join(dict.fromkeys(f"{row['on']}, {row['machine']}" for row in own))
        parts.append(f"## {title}\n\n{tests}; {measured}.\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(parts)


def replace_tables(page: str, tables: str) -> str:
    """Return the page with the tables between the marks; without marks they are appended."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before.rstrip()}\n\n{BEGIN}\n{tables}\n{END}{after}"


def main() -> None:
    """Merge the rows of the given file, and write the page."""
    rows = read_rows(ROWS_PATH)
    if len(sys.argv) > 1:
        rows = merge(rows, add_provenance(read_rows(Path(sys.argv[1]))))
        ROWS_PATH.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    PAGE.write_text(replace_tables(PAGE.read_text(encoding="utf-8"), render(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
