"""The page in a real browser: six scenes await, come alive, grow old and say so; nothing hostile runs, nothing flickers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tests.factories.dashboards import Running, dashboard
from tests.formats.test_golden_events import GOLDEN
from tests.report.test_browser import FLAGS
from tests.requirements import need_chromium

from phasewatch.channels import CHANNELS
from phasewatch.events.schema import (
    ConfusionEvent,
    EventData,
    PhaseEvent,
    ProfileCell,
    ProfileTableEvent,
    ScoreEvent,
    ScoreRow,
    TelemetryEvent,
)

HOSTILE = "</script><img src=x onerror=alert(1)>"
KINDS = ("telemetry", "phase", "score", "confusion", "perf", "profile")
NOW_NS = 1_795_510_800_000_000_000


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


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with dashboard(tmp_path) as found:
        yield found


class Opened:
    """A dashboard that was opened, and everything that it said or asked for."""

    def __init__(self, browser: Any, address: str, width: int = 1280) -> None:
        self.page = browser.new_page()
        self.page.set_viewport_size({"width": width, "height": 900})
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address, timeout=120_000)

    def wait(self, words: str, timeout_s: float = 30) -> None:
        """Wait until an expression of the page is true; playwright's own way needs `eval`, which the page forbids."""
        until = time.monotonic() + timeout_s
        while not self.page.evaluate(words):
            assert time.monotonic() < until, f"never came true: {words}\n{self.said}\n{self.page.inner_text('body')}"
            self.page.wait_for_timeout(50)

    def wait_states(self, state: str, count: int = 6) -> None:
        self.wait(f"document.querySelectorAll('.scene[data-state=\"{state}\"]').length === {count}")

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def drawn(self) -> int:
        return int(self.page.locator(".plot .main-svg:first-child").count())


def telemetry(vm: str = "web-1", start: int = 0, bins: int = 20, **more: Any) -> TelemetryEvent:
    names = tuple(c.full_name for c in CHANNELS)
    rows = tuple(tuple((i * 7 + start + j) % 11 / 10 if i % 9 else None for i in range(46)) for j in range(bins))
    made = {"host": "pc", "origin": "live", **more}
    return TelemetryEvent(
        vm=vm, t0_ns=NOW_NS + start * 500_000_000, bin_s=0.5, channels=names, values=rows, flags=(0,) * bins, **made
    )


def phase(vm: str = "web-1", at: int = 0, decision: str = "clean", **more: Any) -> PhaseEvent:
    made: dict[str, Any] = {"model": "gbt", "threat": "realistic", "truth": "clean", **more}
    return PhaseEvent(
        vm=vm, t_start_ns=NOW_NS + at * 5 * 10**9, t_end_ns=NOW_NS + at * 5 * 10**9 + 10**10, p=(0.6, 0.1, 0.1, 0.1, 0.1),
        decision=decision, **made,
    )  # fmt: skip


def everything() -> tuple[EventData, ...]:
    return (telemetry(), *(phase(at=i) for i in range(6)), *(GOLDEN[k][0] for k in KINDS[2:]))


def test_six_scenes_await_then_all_are_live_and_nothing_is_said_or_fetched_from_elsewhere(
    browser: Any, running: Running
) -> None:
    opened = Opened(browser, running.start)

    opened.wait_states("awaiting")
    for kind in KINDS:
        assert f"awaiting {kind}" in opened.text(f".scene[data-type={kind}]")
    assert "token" not in opened.page.url
    running.send(*everything())
    opened.wait_states("live")
    opened.wait("document.querySelectorAll('.plot .main-svg').length >= 14")

    assert opened.said == []
    assert {url.split("/")[2] for url in opened.asked} == {f"127.0.0.1:{running.port}"}
    assert "web-1" in opened.text("#machines")
    assert "Untested: exfil-drip." in opened.text("#facts-profile")
    assert "macro-F1 0.50" in opened.text("#notes-score")
    assert opened.page.locator("#banner").is_hidden()


@pytest.mark.parametrize(
    ("width", "finger"),
    [
        pytest.param(1280, 24, id="a screen"),
        pytest.param(768, 24, id="half a screen"),
        pytest.param(380, 44, id="a phone, where a thumb must hit each button"),
    ],
)
def test_the_page_fits_any_width(browser: Any, running: Running, width: int, finger: int) -> None:
    running.send(*everything())
    opened = Opened(browser, running.start, width)
    opened.wait_states("stale")  # what happened before one looked is as old as its stamp says
    opened.wait("document.querySelectorAll('.plot .main-svg').length >= 14")

    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    sides = "e => e.map(x => x.getBoundingClientRect()).map(r => Math.min(r.width, r.height))"
    assert min(opened.page.locator(".tools button, .machine, select").evaluate_all(sides)) >= finger
    assert opened.said == []


@pytest.mark.parametrize("width", [1280, 768, 380])
def test_no_word_of_a_machine_or_under_the_leaderboard_is_cut(browser: Any, running: Running, width: int) -> None:
    headline = (
        "macro-F1 of phase, unseen host, realistic, transformer: 0.47 [0.41, 0.53]; 3 states 0.65 [0.59, 0.72]; "
        "elapsed time alone 0.20 (47 episodes, 6 hosts, 6 of 6 profiles tested, 1 seed)"
    )
    split = "; ".join(f"held out {way}: 0.47 [0.41, 0.53]" for way in ("windows", "episodes", "host", "sample", "both"))
    score = msgspec.structs.replace(GOLDEN["score"][0], headline=headline, notes=(split,))
    alarmed = {"decision": "dormant", "truth": "infecting", "alarm": True, "alarm_since_ns": NOW_NS}
    running.send(*(telemetry(vm=f"vm-{i}", origin="recorded") for i in range(4)))
    running.send(*(phase(vm=f"vm-{i}", **alarmed) for i in range(4)), score)
    opened = Opened(browser, running.start, width)
    opened.wait("document.querySelectorAll('#notes-score li').length >= 2")
    opened.wait("document.querySelectorAll('.machine .pill').length === 4")

    cut = "e => e.some(x => x.scrollWidth > x.clientWidth + 1 || x.scrollHeight > x.clientHeight + 1)"
    assert not opened.page.locator(".machine .sub").evaluate_all(cut)
    assert not opened.page.locator("#notes-score").evaluate_all(cut)


def test_a_gap_stays_one_phases_have_names_and_a_reason_is_said_once(browser: Any, running: Running) -> None:
    rows = tuple(ScoreRow(model=m, threat="oracle", table="raw", value=0.5, n_episodes=5, why="too few") for m in "ab")
    opened = Opened(browser, running.start)
    opened.wait("document.querySelector('#link').dataset.state === 'live'")
    running.send(
        telemetry(), telemetry(start=40), *(phase(at=i, decision="active") for i in range(6)),
        msgspec.structs.replace(GOLDEN["score"][0], rows=rows),
    )  # fmt: skip
    opened.wait("document.querySelectorAll('#plot-line path.js-line').length === 2")
    opened.wait("document.querySelectorAll('#plot-phase .annotation-text').length === 2")

    assert opened.page.locator("#plot-line .js-fill").count() == 0
    assert opened.page.locator("#plot-phase .annotation-text").all_text_contents() == ["● active", "○ clean"]
    assert opened.text("#notes-score").endswith("a · oracle, b · oracle: 5 episodes, too few")
    assert opened.said == []


def test_hostile_strings_are_text_and_run_nothing(browser: Any, running: Running) -> None:
    rows = (ScoreRow(model=HOSTILE, threat=HOSTILE, table="raw", value=0.5, why=HOSTILE),)
    hostile: tuple[EventData, ...] = (
        telemetry(vm=HOSTILE, host=HOSTILE),
        phase(vm=HOSTILE, model=HOSTILE, caveat=HOSTILE),
        ScoreEvent(metric=HOSTILE, tested=1, registered=2, recipe=HOSTILE, rows=rows, headline=HOSTILE, notes=(HOSTILE,)),
        ConfusionEvent(model=HOSTILE, recipe="r", threat="t", table="raw", labels=(HOSTILE, "b"), counts=((1, 2), (3, 4))),
        GOLDEN["perf"][0],
        ProfileTableEvent(
            metric=HOSTILE, recipe="r", threat="t", model=HOSTILE, profiles=(HOSTILE,), hosts=(HOSTILE,),
            cells=((ProfileCell(value=0.5, why=HOSTILE),),), untested_profiles=(HOSTILE,),
        ),
    )  # fmt: skip
    opened = Opened(browser, running.start)
    running.send(*hostile)
    opened.wait_states("live")
    opened.wait("document.querySelectorAll('.plot .main-svg').length >= 14")

    assert opened.said == []
    assert opened.page.locator("img").count() == 1  # the page's own mark
    assert HOSTILE in opened.text("#notes-score")
    assert HOSTILE in opened.text("#facts-phase")
    assert "<" not in opened.text("#machines")


def test_names_that_come_past_the_hub_s_door_are_made_safe_too(browser: Any, running: Running) -> None:
    line = json.loads(GOLDEN["confusion"][1])
    line["data"]["labels"] = ["<b>bold</b>", "<a href='javascript:alert(1)'>x</a>"]
    opened = Opened(browser, running.start)

    assert running.post(json.dumps(line).encode()).status_code == 202
    opened.wait("document.querySelector('#plot-confusion .main-svg')")

    assert opened.page.locator("#plot-confusion a, #plot-confusion b").count() == 0
    assert opened.said == []


def test_a_scene_grows_old_and_says_since_when(browser: Any, running: Running) -> None:
    opened = Opened(browser, running.start)
    running.send(telemetry(), phase())
    opened.wait("document.querySelector('[data-type=telemetry]').dataset.state === 'live'")

    opened.wait("document.querySelector('[data-type=telemetry]').dataset.state === 'stale'")

    assert "stale since " in opened.text("[data-type=telemetry] .state")
    opened.wait("document.querySelector('.machine').classList.contains('stale')")
    assert "silent" in opened.text("#alarms")
    running.send(telemetry(start=20))
    opened.wait("document.querySelector('[data-type=telemetry]').dataset.state === 'live'")


def test_a_decision_that_grew_old_is_no_all_clear_though_telemetry_goes_on(browser: Any, running: Running) -> None:
    opened = Opened(browser, running.start)
    running.send(telemetry(), phase(alarm=False, threshold=0.5))
    opened.wait("document.querySelector('#alarm-words').textContent === 'No alarm on 1 of 1 machine.'")

    for second in range(16):  # a watch of which nothing that the model reads is known, or whose windows begin anew
        running.send(telemetry(start=20 + 2 * second, bins=2))
        opened.page.wait_for_timeout(1000)

    assert opened.text("#alarm-words") == "Nothing is known of any machine now. 1 not judged."
    assert "not judged since" in opened.text(".machine")
    running.send(phase(at=3, alarm=True, alarm_since_ns=NOW_NS, threshold=0.5))
    opened.wait("document.querySelector('#alarms').dataset.state === 'alarm'")


def test_a_dead_dashboard_is_a_banner_and_its_successor_a_gap(browser: Any, tmp_path: Path) -> None:
    with dashboard(tmp_path) as first:
        opened = Opened(browser, first.start)
        opened.wait("document.querySelector('#link').dataset.state === 'live'")  # later events are news
        first.send(*everything())
        opened.wait_states("live")
    opened.wait("document.querySelector('#banner').dataset.kind === 'lost'")

    assert "What you see is old." in opened.text("#banner")
    opened.page.set_viewport_size({"width": 380, "height": 700})
    opened.page.evaluate("scrollTo(0, 600)")
    opened.wait("document.elementFromPoint(40, 12)?.id === 'banner'")  # on a phone too nothing lies over it
    opened.page.set_viewport_size({"width": 1280, "height": 900})
    assert opened.page.locator('.scene[data-state="live"]').count() == 0
    with dashboard(tmp_path, port=first.port) as second:
        opened.wait("document.querySelector('#banner').dataset.kind === 'gap'")
        assert "Gap: the dashboard was started anew" in opened.text("#banner")
        second.send(*everything())
        opened.wait_states("live")
        opened.page.click("#banner button")
        opened.wait("document.querySelector('#banner').hidden")
    assert not [words for words in opened.said if "ERR_CONNECTION" not in words and "ERR_INCOMPLETE" not in words]


def test_several_machines_one_is_shown_and_an_alarm_is_never_hidden(browser: Any, running: Running) -> None:
    opened = Opened(browser, running.start)
    running.send(telemetry("web-1"), phase("web-1", alarm=False, threshold=0.5))
    running.send(telemetry("db-1"), phase("db-1", decision="active", alarm=True, alarm_since_ns=NOW_NS, threshold=0.5))
    opened.wait("document.querySelectorAll('.machine').length === 2")
    opened.wait("document.querySelector('#alarms').dataset.state === 'alarm'")

    assert "Alarm: db-1 active since" in opened.text("#alarms")
    assert opened.text("[data-type=phase] .of") == "web-1"
    opened.page.keyboard.press("a")
    opened.wait("document.querySelector('[data-type=phase] .of').textContent === 'db-1'")
    opened.page.keyboard.press("1")
    opened.wait("document.querySelector('[data-type=phase] .of').textContent === 'web-1'")
    opened.page.keyboard.press("j")
    opened.wait("document.querySelector('[data-type=phase] .of').textContent === 'db-1'")
    assert opened.page.title().startswith("▲")


def test_many_tabs_share_one_stream_and_the_others_go_on_when_its_tab_is_closed(browser: Any, running: Running) -> None:
    """A browser allows six connections to a host: the seventh tab would never be answered."""
    with browser.new_context() as context:
        tabs = [Opened(context, running.start) for _ in range(6)]
        running.send(telemetry("web-1"), phase("web-1"))
        for tab in tabs:
            tab.wait("document.querySelectorAll('.machine').length === 1")
            tab.wait("document.querySelector('#link').dataset.state === 'live'")
        wait_for_viewers(running, 1)
        late = Opened(context, running.address)
        late.wait("document.querySelectorAll('.machine').length === 1")

        for closed in (0, 1):  # the first tab, then one of the others: whichever keeps the stream then
            tabs.pop(0).page.close()
            running.send(telemetry(f"db-{closed}", start=20))
            for tab in (*tabs, late):
                tab.wait(f"document.querySelectorAll('.machine').length === {closed + 2}")
                assert tab.page.locator("#banner").is_hidden()
        assert [words for tab in (*tabs, late) for words in tab.said] == []


def wait_for_viewers(running: Running, count: int) -> None:
    until = time.monotonic() + 30
    while (found := httpx.get(running.address + "healthz", trust_env=False).json()["viewers"]) != count:
        assert time.monotonic() < until, f"{found} viewers"
        time.sleep(0.1)


def test_keys_turn_channels_freeze_the_pictures_and_open_the_help(browser: Any, running: Running) -> None:
    opened = Opened(browser, running.start)
    running.send(telemetry())
    opened.wait("document.querySelector('#channel').value === 'proc.vcpu_run'")

    opened.page.keyboard.press("]")
    opened.wait("document.querySelector('#channel').value !== 'proc.vcpu_run'")
    opened.page.keyboard.press("p")
    opened.wait("document.querySelector('#banner').dataset.kind === 'paused'")
    opened.page.keyboard.press("p")
    opened.page.keyboard.press("?")
    opened.wait("document.querySelector('#help').open")
    opened.page.keyboard.press("Escape")
    opened.wait("!document.querySelector('#help').open")
    theme = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    opened.page.keyboard.press("t")
    opened.wait(f"getComputedStyle(document.body).backgroundColor !== '{theme}'")
    assert opened.said == []


def test_a_stream_of_events_is_drawn_without_flicker(browser: Any, running: Running) -> None:
    """Pictures are updated in place: no drawing is taken away and none changes its height."""
    opened = Opened(browser, running.start)
    running.send(*everything())
    opened.wait_states("live")
    opened.wait("document.querySelectorAll('.plot .main-svg').length >= 14")
    opened.page.evaluate(
        "window.lost = 0; window.moved = 0; const tall = document.body.scrollHeight;"
        "for (const p of document.querySelectorAll('.plot')) new MutationObserver((all) => { for (const m of all)"
        " for (const n of m.removedNodes) if (n.classList?.contains('plot-container')) window.lost += 1; }).observe(p, {childList: true});"
        "new ResizeObserver(() => { if (document.body.scrollHeight !== tall) window.moved += 1; }).observe(document.body);"
    )
    before = opened.page.evaluate("document.querySelector('#plot-line .scatterlayer path.js-line').getAttribute('d')")
    for i in range(1, 9):
        running.send(telemetry(start=20 * i), phase(at=5 + i), GOLDEN["perf"][0])
        time.sleep(0.3)
    opened.wait(
        f"document.querySelector('#plot-line .scatterlayer path.js-line').getAttribute('d') !== {json.dumps(before)}"
    )

    assert opened.page.evaluate("[window.lost, window.moved]") == [0, 0]
    assert opened.said == []


def test_who_is_not_let_in_is_told_where_to_go(browser: Any, running: Running) -> None:
    page = browser.new_page()
    page.goto(running.address)

    assert "open the address that `phasewatch dashboard` printed" in page.inner_text("body")
