"""Set the tables of docs/soak.md from the rows that the soak's tests handed over: `python -m tools.soak ROWS.jsonl`.

A test's new rows take the place of its old ones; tables that were not run again keep theirs. The rows stand in
docs/soak.jsonl, so that the tables can be set again from them: `python -m tools.soak` alone does that. What stands on
the page outside the two marks is left alone.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

KEPT, PAGE = Path(__file__).parents[1] / "docs" / "soak.jsonl", Path(__file__).parents[1] / "docs" / "soak.md"
BEGIN, END = "<!-- begin: set by tools/soak.py, do not edit -->\n", "<!-- end -->\n"


def read(path: Path) -> list[dict[str, Any]]:
    """Read rows, one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def stamped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say of new rows when and on what they were made."""
    where = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return [{**row, "on": datetime.now(UTC).date().isoformat(), "machine": where} for row in rows]


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put a test's new rows in place of its old ones; in order of table and test."""
    fresh = {row["test"] for row in new}
    kept = [row for row in old if row["test"] not in fresh]
    return sorted([*kept, *new], key=lambda row: (row["table"], row["test"]))


def render(rows: list[dict[str, Any]]) -> str:
    """Set a table a title, over the columns that its rows have."""
    parts = []
    for title in dict.fromkeys(row["table"] for row in rows):
        own = [row for row in rows if row["table"] == title]
        columns = list(dict.fromkeys(name for row in own for name in row["row"]))
        lines = [columns, ["---"] * len(columns), *([str(row["row"].get(name, "")) for name in columns] for row in own)]
        tests = ", ".join(dict.fromkeys(f"`{row['test'].partition('::')[0]}`" for row in own))
        when = ", ".join(dict.fromkeys(f"{row['on']}, {row['machine']}" for row in own))
        parts.append(f"## {title}\n\n{tests}; {when}.\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(parts)


def place(page: str, tables: str) -> str:
    """Put the tables between the marks; where there are none yet, at the page's end."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before.rstrip()}\n\n{BEGIN}\n{tables}\n{END}{after}"


def main() -> None:
    """Merge the rows of the file that is named, and write the page."""
    rows = read(KEPT)
    if len(sys.argv) > 1:
        rows = merge(rows, stamped(read(Path(sys.argv[1]))))
        KEPT.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    PAGE.write_text(place(PAGE.read_text(encoding="utf-8"), render(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
