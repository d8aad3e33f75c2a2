"""The dashboard in a real browser: states of the scenes, overall status, reconnection, escaping and drawing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count
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
    EventEnvelope,
    PhaseEvent,
    ProfileCell,
    ProfileTableEvent,
    ScoreEvent,
    ScoreRow,
    TelemetryEvent,
    render_event,
)

HOSTILE = "</script><img src=x onerror=alert(1)>"
KINDS = ("telemetry", "phase", "score", "confusion", "perf", "profile")
NOW_NS = 1_795_510_800_000_000_000
TIMEOUT_S = 120.0  # for a machine that is very slow; a test that passes does not wait for it
RESEND_S = 1.0
FIGURES = "document.querySelectorAll('.plot .main-svg').length"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
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
def browser(chromium: Any) -> Iterator[Any]:
    """The browser, whose pages are closed after the test: an open page asks for its dashboard again and again."""
    yield chromium
    for context in chromium.contexts:
        context.close()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with dashboard(tmp_path) as found:
        yield found


class OpenedDashboard:
    """An opened dashboard with its console messages and network requests."""

    def __init__(self, browser: Any, address: str, width: int = 1280) -> None:
        self.page = browser.new_page()
        self.page.set_viewport_size({"width": width, "height": 900})
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.messages.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address, timeout=120_000)
        self.wait("document.querySelector('#link').dataset.state === 'live'")

    def wait(self, expression: str, resend: Callable[[], None] | None = None) -> None:
        """Wait until an expression is true; playwright's own wait needs `eval`, which the page forbids.

        Args:
            expression: JavaScript.
            resend: Called about once a second meanwhile, for what is true only of new data: a slow machine shows the
                first events when they are no longer new.
        """
        until = time.monotonic() + TIMEOUT_S
        due = time.monotonic() + RESEND_S
        while not self.page.evaluate(expression):
            assert time.monotonic() < until, f"timed out: {expression}\n{self.messages}\n{self.page.inner_text('body')}"
            if resend is not None and time.monotonic() >= due:
                resend()
                due = time.monotonic() + RESEND_S
            self.page.wait_for_timeout(50)

    def wait_states(self, state: str, resend: Callable[[], None] | None = None) -> None:
        self.wait(f"document.querySelectorAll('.scene[data-state=\"{state}\"]').length === 6", resend)

    def wait_status(self, state: str, reasons: set[str], resend: Callable[[], None]) -> None:
        """Wait for an overall status with exactly these reasons, in any order."""
        wanted = json.dumps(sorted(reasons))
        found = "(document.querySelector('#alarms').dataset.reasons || '').split(' ').filter(Boolean).sort()"
        is_state = f"document.querySelector('#alarms').dataset.state === '{state}'"
        self.wait(f"{is_state} && JSON.stringify({found}) === JSON.stringify({wanted})", resend)

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def reasons(self) -> set[str]:
        """Return the codes why the overall status is not all-clear."""
        return set((self.page.get_attribute("#alarms", "data-reasons") or "").split())

    def show(self, view: str) -> None:
        self.page.click(f"#tab-{view}")

    def names(self) -> list[str]:
        """Return the names in the list of machines, from the top."""
        rows = (
            "rows => rows.sort((a, b) => a.ariaPosInSet - b.ariaPosInSet).map(r => r.querySelector('.vm').textContent)"
        )
        return list(self.page.locator(".machine").evaluate_all(rows))


def telemetry(vm: str = "web-1", start: int = 0, bins: int = 20, **more: Any) -> TelemetryEvent:
    names = tuple(c.full_name for c in CHANNELS)
    rows = tuple(
        tuple((i * 7 + start + j) % 11 / 10 if i % 9 else None for i in range(len(names))) for j in range(bins)
    )
    fields = {"host": "pc", "origin": "live", **more}
    return TelemetryEvent(
        vm=vm, t0_ns=NOW_NS + start * 500_000_000, bin_s=0.5, channels=names, values=rows, flags=(0,) * bins, **fields
    )


def phase(vm: str = "web-1", at: int = 0, decision: str = "clean", **more: Any) -> PhaseEvent:
    fields: dict[str, Any] = {"p": (0.6, 0.1, 0.1, 0.1, 0.1), "model": "gbt", "threat": "realistic", "truth": "clean"}
    return PhaseEvent(
        vm=vm,
        t_start_ns=NOW_NS + at * 5 * 10**9,
        t_end_ns=NOW_NS + at * 5 * 10**9 + 10**10,
        decision=decision,
        **(fields | more),
    )


def quiet(vm: str = "web-1", at: int = 0, **more: Any) -> PhaseEvent:
    return phase(vm, at, **({"alarm": False, "threshold": 0.5} | more))


def everything(turn: int = 0) -> tuple[EventData, ...]:
    """Return an event of each type; the next turn continues the time of the one before."""
    return (telemetry(start=20 * turn), *(phase(at=2 * turn + i) for i in range(2)), *(GOLDEN[k][0] for k in KINDS[2:]))


class FakeWatcher:
    """Sends the events of the next turn with each call, as a watcher does all the time."""

    def __init__(self, running: Running, make_events: Callable[[int], Iterable[EventData]] = everything) -> None:
        self._running, self._make_events = running, make_events
        self._turn = 0

    def __call__(self) -> None:
        self._running.send(*self._make_events(self._turn))
        self._turn += 1


def test_scenes_become_live_without_console_messages_or_foreign_requests(browser: Any, running: Running) -> None:
    opened = OpenedDashboard(browser, running.start)

    opened.wait_states("awaiting")
    for kind in ("telemetry", "phase", "perf"):
        assert opened.page.locator(f".scene[data-type={kind}] .empty").is_visible()
    assert "token" not in opened.page.url
    opened.wait_states("live", FakeWatcher(running))
    opened.wait(f"{FIGURES} >= 8")
    opened.show("scores")
    opened.wait(f"{FIGURES} >= 14")

    assert opened.messages == []
    assert {url.split("/")[2] for url in opened.requests} == {f"127.0.0.1:{running.port}"}
    assert "web-1" in opened.text("#machines")
    assert "Untested: exfil-drip." in opened.text("#facts-profile")
    assert "macro-F1 0.50" in opened.text("#notes-score")
    assert opened.page.locator("#banner").is_hidden()


@pytest.mark.parametrize(
    ("width", "min_target_px"),
    [
        pytest.param(1280, 24, id="desktop"),
        pytest.param(768, 24, id="half a desktop"),
        pytest.param(380, 44, id="phone, with touch targets of 44 px"),
    ],
)
def test_page_fits_any_width(browser: Any, running: Running, width: int, min_target_px: int) -> None:
    running.send(*everything())
    opened = OpenedDashboard(browser, running.start, width)
    opened.wait(f"{FIGURES} >= 8")

    sides = "e => e.map(x => x.getBoundingClientRect()).map(r => Math.min(r.width, r.height))"
    targets = ".tools button, .machine, #channel, #filter, .spans button, [role=tab]:not([hidden])"
    assert min(opened.page.locator(targets).evaluate_all(sides)) >= min_target_px
    for view in ("alarms", "scores", "machines"):
        opened.show(view)
        opened.page.wait_for_timeout(300)
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.messages == []


@pytest.mark.parametrize("width", [1280, 768, 380])
def test_text_of_the_leaderboard_is_not_clipped(browser: Any, running: Running, width: int) -> None:
    headline = (
        "macro-F1 of phase, unseen host, realistic, transformer: 0.47 [0.41, 0.53]; 3 states 0.65 [0.59, 0.72]; "
        "elapsed time alone 0.20 (47 episodes, 6 hosts, 6 of 6 profiles tested, 1 seed)"
    )
    split = "; ".join(f"held out {way}: 0.47 [0.41, 0.53]" for way in ("windows", "episodes", "host", "sample", "both"))
    score = msgspec.structs.replace(GOLDEN["score"][0], headline=headline, notes=(split,))
    alarmed = {"decision": "dormant", "truth": "infecting", "alarm": True, "alarm_since_ns": NOW_NS}
    running.send(*(telemetry(vm=f"vm-{i}", origin="recorded") for i in range(4)))
    running.send(*(phase(vm=f"vm-{i}", **alarmed) for i in range(4)), score)
    opened = OpenedDashboard(browser, running.start, width)
    opened.wait("document.querySelectorAll('.machine[data-state=infection]').length === 4")
    opened.wait("document.querySelectorAll('#history tbody tr').length === 0")
    opened.show("scores")
    opened.wait("document.querySelectorAll('#notes-score li').length >= 2")

    cut = "e => e.some(x => x.scrollWidth > x.clientWidth + 1 || x.scrollHeight > x.clientHeight + 1)"
    assert not opened.page.locator("#notes-score").evaluate_all(cut)


def test_gap_is_visible_and_phases_and_reasons_are_labelled(browser: Any, running: Running) -> None:
    rows = tuple(ScoreRow(model=m, threat="oracle", table="raw", value=0.5, n_episodes=5, why="too few") for m in "ab")
    opened = OpenedDashboard(browser, running.start)
    running.send(
        telemetry(),
        telemetry(start=40),
        *(phase(at=i, decision="active") for i in range(6)),
        msgspec.structs.replace(GOLDEN["score"][0], rows=rows),
    )
    opened.wait("document.querySelectorAll('#plot-line path.js-line').length === 2")
    opened.wait("document.querySelectorAll('#plot-phase .annotation-text').length === 2")

    assert opened.page.locator("#plot-line .js-fill").count() == 0
    assert opened.page.locator("#plot-phase .annotation-text").all_text_contents() == ["● active", "○ clean"]
    opened.show("scores")
    opened.wait("document.querySelectorAll('#notes-score li').length")
    assert opened.text("#notes-score").endswith("a · oracle, b · oracle: 5 episodes, too few")
    assert opened.messages == []


def test_strings_from_events_are_text_and_run_no_script(browser: Any, running: Running) -> None:
    rows = (ScoreRow(model=HOSTILE, threat=HOSTILE, table="raw", value=0.5, why=HOSTILE),)
    scores: tuple[EventData, ...] = (
        ScoreEvent(
            metric=HOSTILE, tested=1, registered=2, recipe=HOSTILE, rows=rows, headline=HOSTILE, notes=(HOSTILE,)
        ),
        ConfusionEvent(
            model=HOSTILE, recipe="r", threat="t", table="raw", labels=(HOSTILE, "b"), counts=((1, 2), (3, 4))
        ),
        GOLDEN["perf"][0],
        ProfileTableEvent(
            metric=HOSTILE,
            recipe="r",
            threat="t",
            model=HOSTILE,
            profiles=(HOSTILE,),
            hosts=(HOSTILE,),
            cells=((ProfileCell(value=0.5, why=HOSTILE),),),
            untested_profiles=(HOSTILE,),
        ),
    )

    def make_events(turn: int) -> tuple[EventData, ...]:
        prediction = phase(vm=HOSTILE, at=2 * turn, model=HOSTILE, caveat=HOSTILE)
        return (telemetry(vm=HOSTILE, host=HOSTILE, start=20 * turn), prediction, *scores)

    opened = OpenedDashboard(browser, running.start)
    opened.wait_states("live", FakeWatcher(running, make_events))
    opened.wait(f"{FIGURES} >= 8")
    assert HOSTILE in opened.text("#facts-phase")
    assert "<" not in opened.text("#machines")
    opened.show("scores")
    opened.wait(f"{FIGURES} >= 14")

    assert opened.messages == []
    assert opened.page.locator("img").count() == 1  # the icon of the page
    assert HOSTILE in opened.text("#notes-score")


def test_unsafe_names_from_outside_producers_are_replaced(browser: Any, running: Running) -> None:
    line = json.loads(GOLDEN["confusion"][1])
    line["data"]["labels"] = ["<b>bold</b>", "<a href='javascript:alert(1)'>x</a>"]
    opened = OpenedDashboard(browser, running.start)

    assert running.post(json.dumps(line).encode()).status_code == 202
    opened.wait("!document.querySelector('#tab-scores').hidden")
    opened.show("scores")
    opened.wait("document.querySelector('#plot-confusion .main-svg')")

    assert opened.page.locator("#plot-confusion a, #plot-confusion b").count() == 0
    assert opened.messages == []


def test_prediction_from_a_clock_that_is_ahead_becomes_stale_on_a_page_that_is_opened_later(
    browser: Any, running: Running
) -> None:
    ahead = EventEnvelope(id="1", t_wall_ns=time.time_ns() + 86_400 * 10**9, run="live", data=quiet())
    assert running.post(render_event(ahead)).status_code == 202

    opened = OpenedDashboard(browser, running.start)

    opened.wait("document.querySelector('[data-type=phase]').dataset.state === 'stale'")
    opened.wait("document.querySelector('#alarms').dataset.state === 'doubt'")
    assert opened.reasons() == {"silent"}


def test_scene_without_new_events_becomes_stale(browser: Any, running: Running) -> None:
    opened = OpenedDashboard(browser, running.start)
    watcher = FakeWatcher(running, lambda turn: (telemetry(start=20 * turn), phase(at=2 * turn)))
    opened.wait("document.querySelector('[data-type=telemetry]').dataset.state === 'live'", watcher)

    opened.wait("document.querySelector('[data-type=telemetry]').dataset.state === 'stale'")

    assert "stale since " in opened.text("[data-type=telemetry] .state")
    opened.wait("document.querySelector('.machine').classList.contains('stale')")
    opened.wait("document.querySelector('#alarms').dataset.reasons === 'silent'")
    opened.wait("document.querySelector('[data-type=telemetry]').dataset.state === 'live'", watcher)


def test_old_prediction_is_no_all_clear_while_telemetry_continues(browser: Any, running: Running) -> None:
    opened = OpenedDashboard(browser, running.start)
    turns = count()  # the machine's time goes on over both watchers
    both = FakeWatcher(running, lambda _: (telemetry(start=2 * (turn := next(turns)), bins=2), quiet(at=turn)))
    opened.wait_status("calm", set(), both)

    # Telemetry without the model's channels, or windows that start again.
    alone = FakeWatcher(running, lambda _: (telemetry(start=2 * next(turns), bins=2),))
    opened.wait_status("doubt", {"no-prediction"}, alone)

    opened.wait("document.querySelector('.machine').textContent.includes('no prediction since')", alone)
    running.send(phase(at=next(turns), alarm=True, alarm_since_ns=NOW_NS, threshold=0.5))
    opened.wait("document.querySelector('#alarms').dataset.state === 'alarm'")


@pytest.mark.parametrize(
    ("origin", "event", "state", "reasons"),
    [
        pytest.param("live", {}, "calm", set(), id="live and clean"),
        pytest.param("live", {"decision": "active"}, "doubt", {"not-clean"}, id="live and active below the threshold"),
        pytest.param("live", {"p": (0.4, 0.1, 0.2, 0.2, 0.1)}, "doubt", {"not-clean"}, id="live and hardly clean"),
        pytest.param("live", {"alarm": None}, "doubt", {"no-threshold"}, id="model without an alarm threshold"),
        pytest.param("recorded", {}, "calm", set(), id="replay predicted correctly"),
        pytest.param("recorded", {"truth": "active"}, "doubt", {"wrong"}, id="replay predicted wrongly"),
        pytest.param("recorded", {"truth": None}, "doubt", {"truth-unknown"}, id="replay without labels"),
    ],
)
def test_status_is_all_clear_only_if_every_prediction_is_clean_and_correct(
    browser: Any, running: Running, origin: str, event: dict[str, Any], state: str, reasons: set[str]
) -> None:
    opened = OpenedDashboard(browser, running.start)

    def make_events(turn: int) -> tuple[EventData, ...]:
        sent = (telemetry(vm, start=20 * turn, origin=origin) for vm in ("vm-1", "vm-2"))
        return (*sent, quiet("vm-1", at=2 * turn), quiet("vm-2", at=2 * turn, **event))

    opened.wait_status(state, reasons, FakeWatcher(running, make_events))

    assert opened.page.locator(".machine").count() == 2


def test_lost_connection_shows_a_banner_and_a_restart_shows_a_gap(browser: Any, tmp_path: Path) -> None:
    with dashboard(tmp_path) as first:
        opened = OpenedDashboard(browser, first.start)
        opened.wait_states("live", FakeWatcher(first))
    opened.wait("document.querySelector('#banner').dataset.kind === 'lost'")

    assert "The data below is old." in opened.text("#banner")
    opened.page.set_viewport_size({"width": 380, "height": 700})
    opened.page.evaluate("scrollTo(0, 600)")
    opened.wait("document.elementFromPoint(40, 12)?.id === 'banner'")  # nothing covers it on a phone either
    opened.page.set_viewport_size({"width": 1280, "height": 900})
    assert opened.page.locator('.scene[data-state="live"]').count() == 0
    with dashboard(tmp_path, port=first.port) as second:
        opened.wait("document.querySelector('#banner').dataset.kind === 'gap'")
        assert "Gap: the dashboard was restarted" in opened.text("#banner")
        opened.wait("document.querySelectorAll('.machine').length === 0")  # the state was read again
        opened.wait_states("live", FakeWatcher(second))
        opened.page.click("#banner button")
        opened.wait("document.querySelector('#banner').hidden")
    assert not [m for m in opened.messages if "ERR_CONNECTION" not in m and "ERR_INCOMPLETE" not in m]


def test_alarm_of_another_machine_is_always_visible(browser: Any, running: Running) -> None:
    opened = OpenedDashboard(browser, running.start)
    running.send(telemetry("web-1"), phase("web-1", alarm=False, threshold=0.5))
    opened.wait("document.querySelector('[data-type=phase] .of').textContent === 'web-1'")
    running.send(telemetry("db-1"), phase("db-1", decision="active", alarm=True, alarm_since_ns=NOW_NS, threshold=0.5))
    opened.wait("document.querySelectorAll('.machine').length === 2")
    opened.wait("document.querySelector('#alarms').dataset.state === 'alarm'")

    assert "Infection alarm: db-1 since" in opened.text("#alarms")
    assert opened.text("[data-type=phase] .of") == "web-1"
    opened.page.keyboard.press("a")
    opened.wait("document.querySelector('[data-type=phase] .of').textContent === 'db-1'")
    opened.page.keyboard.press("2")
    opened.wait("document.querySelector('[data-type=phase] .of').textContent === 'web-1'")
    opened.page.keyboard.press("k")
    opened.wait("document.querySelector('[data-type=phase] .of').textContent === 'db-1'")
    assert opened.names() == ["db-1", "web-1"]  # what needs attention comes first
    assert opened.page.title().startswith("▲")


def test_tabs_share_one_stream_and_survive_closing_its_tab(browser: Any, running: Running) -> None:
    """Seven tabs work, although a browser allows six connections per host."""
    with browser.new_context() as context:
        tabs = [OpenedDashboard(context, running.start) for _ in range(6)]
        running.send(telemetry("web-1"), phase("web-1"))
        for tab in tabs:
            tab.wait("document.querySelectorAll('.machine').length === 1")
            tab.wait("document.querySelector('#link').dataset.state === 'live'")
        wait_for_viewers(running, 1)
        late = OpenedDashboard(context, running.address)
        late.wait("document.querySelectorAll('.machine').length === 1")

        for closed in (0, 1):  # the first tab, which has the stream, then its successor
            tabs.pop(0).page.close()
            running.send(telemetry(f"db-{closed}", start=20))
            for tab in (*tabs, late):
                tab.wait(f"document.querySelectorAll('.machine').length === {closed + 2}")
                tab.wait("document.querySelector('#banner').hidden")
        assert [words for tab in (*tabs, late) for words in tab.messages] == []


def wait_for_viewers(running: Running, count: int) -> None:
    until = time.monotonic() + TIMEOUT_S
    while (found := httpx.get(running.address + "healthz", trust_env=False).json()["viewers"]) != count:
        assert time.monotonic() < until, f"{found} viewers"
        time.sleep(0.1)


def test_keys_select_channels_pause_and_open_the_help(browser: Any, running: Running) -> None:
    opened = OpenedDashboard(browser, running.start)
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
    assert opened.messages == []


def test_figures_are_updated_in_place(browser: Any, running: Running) -> None:
    """No figure is removed, and the height of the page does not change."""
    opened = OpenedDashboard(browser, running.start)
    watcher = FakeWatcher(running)
    opened.wait_states("live", watcher)
    opened.wait(f"{FIGURES} >= 8")
    opened.page.evaluate(
        "window.lost = 0; window.moved = 0; const tall = document.body.scrollHeight;"
        "for (const p of document.querySelectorAll('.plot')) new MutationObserver((all) => { for (const m of all)"
        " for (const n of m.removedNodes) if (n.classList?.contains('plot-container')) window.lost += 1; })"
        ".observe(p, {childList: true});"
        "new ResizeObserver(() => { if (document.body.scrollHeight !== tall) window.moved += 1; })"
        ".observe(document.body);"
    )
    path = "document.querySelector('#plot-line .scatterlayer path.js-line').getAttribute('d')"
    for _ in range(8):
        watcher()
        drawn = opened.page.evaluate(path)
        opened.wait(f"{path} !== {json.dumps(drawn)}", watcher)

    assert opened.page.evaluate("[window.lost, window.moved]") == [0, 0]
    assert opened.messages == []


def test_visitor_without_the_cookie_gets_instructions(browser: Any, running: Running) -> None:
    page = browser.new_page()
    page.goto(running.address)

    assert "open the address that `phasewatch dashboard` printed" in page.inner_text("body")
