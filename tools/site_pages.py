"""A hook of MkDocs: the site's pages lie at their paths in the repository, with those outside ``docs/``.

Links between pages are written for the repository, so ``../../SECURITY.md`` of a how-to page works in both. A linked
file that is no page (an example, a service unit) is copied to the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_DOCS = ROOT / "docs"
_OUTSIDE = ("*.md", "corpus/*/README.md")
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(?:#[^)\s]*)?\)")

_ITEM = re.compile(r"(-|\d+\.) ")


def on_files(files: Files, config: Any) -> Files:
    """Return the files of the site, named by their paths in the repository; the theme's keep their places."""
    ours = [file for file in files if file.abs_src_path and Path(file.abs_src_path).is_relative_to(_DOCS)]
    sources = {Path(str(file.abs_src_path)) for file in ours}
    sources |= {path for pattern in _OUTSIDE for path in ROOT.glob(pattern)}
    sources |= {linked for page in sources if page.suffix == ".md" for linked in _list_linked_files(page)}
    site = [file for file in files if file not in ours]
    for path in sorted(sources):
        site.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return Files(site)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page's text without its links to folders, and with lists as MkDocs needs them."""
    folder = (ROOT / page.file.src_uri).parent
    return separate_lists(_LINK.sub(lambda match: match[1] if (folder / match[2]).is_dir() else match[0], markdown))


def separate_lists(markdown: str) -> str:
    """Return a text whose lists Python-Markdown reads as CommonMark does.

    It wants an empty line between a paragraph and its list, and four spaces before the further lines of an item.
    """
    lines: list[str] = []
    before, is_code, is_numbered = "", False, False
    for line in markdown.splitlines():
        item = None if is_code else _ITEM.match(line)
        if item and before and not before[0].isspace() and not _ITEM.match(before):
            lines.append("")
        if item:
            is_numbered = item[1] != "-"
        elif line and not line[0].isspace():
            is_numbered = False
        lines.append(f" {line}" if is_numbered and line.startswith("   ") else line)
        if line.lstrip().startswith("```"):
            is_code = not is_code
        before = line
    return "\n".join(lines) + "\n"


def _list_linked_files(page: Path) -> list[Path]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    targets = [(page.parent / match[2]).resolve() for match in _LINK.finditer(text) if "://" not in match[2]]
    return [path for path in targets if path.is_file() and path.is_relative_to(ROOT)]
