"""The report in a real browser: one picture of each figure shows, nothing is requested, no script from data runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.factories.report_runs import HOSTILE, Recipe, make_run
from tests.requirements import need_chromium

from phasewatch.report.html import write_report

SMALL = Recipe(hosts=("a-host", "b-host", "c-host"), profiles=("benign", "cryptomine"), n_windows=12)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = need_chromium()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        words = "needs playwright: uv pip install --group browser"
        if os.environ.get("CI") == "true":
            pytest.fail(words)
        pytest.skip(words)
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield opened
        opened.close()


class OpenedReport:
    """An opened report with its console messages and network requests."""

    def __init__(self, browser: Any, path: Path, width: int, theme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.messages.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]", timeout=60_000)

    def count(self, selector: str) -> int:
        return int(self.page.locator(selector).count())


@pytest.mark.parametrize(
    ("width", "min_target_px"),
    [
        pytest.param(1200, 24, id="desktop"),
        pytest.param(768, 24, id="half a desktop"),
        pytest.param(380, 44, id="phone, with touch targets of 44 px"),
    ],
)
def test_page_draws_all_figures_without_requests_and_fits_the_width(
    browser: Any, tmp_path: Path, width: int, min_target_px: int
) -> None:
    path = write_report(make_run(tmp_path / "run", replace(SMALL, is_full=True)))

    opened = OpenedReport(browser, path, width)

    assert opened.messages == []
    assert opened.requests == [path.as_uri()]
    assert opened.count(".figure") == opened.count(".figure > svg:visible") >= 18
    assert opened.count(f".figure > .{'narrow' if width < 704 else 'wide'}-figure:visible") == opened.count(".figure")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    heights = opened.page.locator("nav a, summary").evaluate_all("e => e.map(x => x.getBoundingClientRect().height)")
    assert min(heights) >= min_target_px


def test_names_from_data_are_text_and_run_no_script(browser: Any, tmp_path: Path) -> None:
    recipe = replace(SMALL, hosts=(HOSTILE, "b", "c"), profiles=("benign", HOSTILE), sample=HOSTILE)
    path = write_report(make_run(tmp_path / "run", recipe))

    opened = OpenedReport(browser, path, 1200)

    assert opened.messages == []
    assert opened.requests == [path.as_uri()]
    assert opened.count("img") == 0
    assert HOSTILE in opened.page.inner_text("main")
    assert "</script><img" in opened.page.text_content("#figure-by-profile .wide-figure")


def test_page_follows_the_theme_and_prints_on_white(browser: Any, tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run", SMALL))
    colour = "getComputedStyle(document.body).backgroundColor"

    light, dark = (OpenedReport(browser, path, 900, theme).page for theme in ("light", "dark"))

    assert light.evaluate(colour) == "rgb(255, 255, 255)"
    assert dark.evaluate(colour) == "rgb(20, 23, 27)"
    dark.emulate_media(media="print")
    assert dark.evaluate(colour) == "rgb(255, 255, 255)"


def test_printed_figures_fit_one_sheet_and_folded_tables_open(browser: Any, tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run", SMALL))
    opened = OpenedReport(browser, path, 660)

    opened.page.emulate_media(media="print")
    opened.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    sizes = opened.page.evaluate(
        "[...document.querySelectorAll('.wide-figure')].map(s => [s.clientWidth, s.clientHeight])"
    )

    assert 0 < max(width for width, _ in sizes) <= 660
    assert max(height for _, height in sizes) <= 800
    assert opened.count("article:not(:has(.figure)) > details:not([open])") == 0
    opened.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert opened.count("article:not(:has(.figure)) > details:not([open])") > 0
    assert opened.messages == []


def test_navigation_stays_in_view(browser: Any, tmp_path: Path) -> None:
    opened = OpenedReport(browser, write_report(make_run(tmp_path / "run", SMALL)), 380)

    opened.page.emulate_media(reduced_motion="reduce")  # else the page scrolls for a while

    opened.page.click("nav a[href='#grounds']")

    assert 0 < opened.page.evaluate("document.querySelector('#grounds').getBoundingClientRect().top") < 200
    assert opened.page.evaluate("document.querySelector('nav').getBoundingClientRect().top") == 0


def test_a_column_sorts_by_number_and_the_table_is_saved_as_csv(browser: Any, tmp_path: Path) -> None:
    opened = OpenedReport(browser, write_report(make_run(tmp_path / "run", SMALL)), 1200)
    table = opened.page.locator("#block-inflation table")
    sizes = "t => [...t.tBodies[0].rows].map(r => r.cells[6].textContent)"

    table.locator("th .sort").nth(6).click()
    up = table.evaluate(sizes)
    table.locator("th .sort").nth(6).click()

    assert table.locator("th[aria-sort='descending']").count() == 1
    assert [n for n in table.evaluate(sizes) if n != "–"] == [n for n in up if n != "–"][::-1]
    with opened.page.expect_download() as download:
        opened.page.locator("#block-inflation .csv").click()
    lines = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
    assert download.value.suggested_filename == "inflation.csv"
    assert lines[0].startswith('"evaluated on","macro-F1","95 % interval"')
    assert len(lines) == 6
    assert opened.requests == [opened.page.url]
