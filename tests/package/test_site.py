"""The documentation builds as a site without a warning, and the site asks no other host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("material", reason="the dependency group `docs` is not installed")

ROOT = Path(__file__).parents[2]
# What a browser loads by itself; a link that a reader may follow is no request.
_LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?([^\"'\s>]+)|<link\b[^>]*\bhref=[\"']?([^\"'\s>]+)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


def test_the_site_has_the_readme_and_every_how_to_page(site: Path) -> None:
    pages = {f"docs/how-to/{page.stem}.html" for page in (ROOT / "docs" / "how-to").glob("*.md")}

    assert {name for name in {*pages, "index.html", "SECURITY.html"} if not (site / name).is_file()} == set()


def test_a_page_loads_files_of_the_site_only(site: Path) -> None:
    loaded = [
        (page, match[1] or match[2])
        for page in site.rglob("*.html")
        for match in _LOADED.finditer(page.read_text(encoding="utf-8"))
    ]

    assert len(loaded) > 100
    assert [(str(page), target) for page, target in loaded if "://" in target or target.startswith("//")] == []
    missing = [
        (str(page), target)
        for page, target in loaded
        if page.name != "404.html"  # its paths begin at the host's root
        and not target.startswith(("#", "data:"))
        and not (page.parent / re.split("[?#]", target)[0]).exists()
    ]
    assert missing == []


def test_no_style_sheet_asks_a_font_host(site: Path) -> None:
    sheets = list(site.rglob("*.css"))

    assert sheets
    assert [str(sheet) for sheet in sheets if re.search(r"url\([\"']?(?:https?:)?//", sheet.read_text("utf-8"))] == []


def test_a_list_after_a_paragraph_is_a_list(site: Path) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in site.rglob("*.html"))

    assert text.count("<li>") > 500
    assert re.findall(r"<p>[^<]*(?:<(?!/p)[^<]*)*\n- .*", text) == []


def test_the_steps_of_a_page_are_one_numbered_list(site: Path) -> None:
    page = (site / "docs" / "how-to" / "alarms.html").read_text(encoding="utf-8")

    assert page.count("<ol>") == 1
