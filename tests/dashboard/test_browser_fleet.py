"""Many machines in a real browser: order, filter, keys, alarm history, replay labels, contrast, and what it costs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from tests.dashboard.test_browser import (
    HOSTILE,
    NOW_NS,
    FakeWatcher,
    OpenedDashboard,
    browser,
    chromium,
    phase,
    running,
    telemetry,
)
from tests.factories.dashboards import Running, event

from phasewatch.events.schema import AlarmEvidence, EventData, PhaseEvent, render_event

__all__ = ["browser", "chromium", "running"]  # fixtures

S = 1_000_000_000
# Names in the list of machines, from the top.
NAMES = (
    "[...document.querySelectorAll('.machine')].sort((a, b) => a.ariaPosInSet - b.ariaPosInSet)"
    ".map(r => r.querySelector('.vm').textContent)"
)
BAD = (0.05, 0.05, 0.8, 0.05, 0.05)


def send_live(running: Running, *data: EventData) -> None:
    """Send events as a watcher does: only the machines of the run `live` can be acknowledged."""
    answer = running.post(*(render_event(event(d, number=i, run="live")) for i, d in enumerate(data)))
    assert answer.status_code == 202, answer.text


def quiet(i: int, at: int = 0) -> PhaseEvent:
    return phase(f"vm-{i:03d}", at=at, alarm=False, activity_alarm=False, threshold=0.5)


def infected(vm: str, at: int = 0, **more: Any) -> PhaseEvent:
    fields = {"alarm": True, "alarm_since_ns": NOW_NS, "threshold": 0.5, "p": BAD, "decision": "infecting"}
    return phase(vm, at=at, **(fields | more))


@pytest.mark.parametrize("count", [64, 500])
def test_list_shows_the_most_urgent_machines_first_and_draws_only_what_is_visible(
    browser: Any, running: Running, count: int
) -> None:
    turns = itertools.count()

    def send() -> None:
        at = next(turns)
        send_live(
            running,
            *(quiet(i, at) for i in range(count - 3)),
            phase("z-busy", at=at, activity_alarm=True, activity_alarm_since_ns=NOW_NS, alarm=False, threshold=0.5),
            infected("z-ill", at),
            phase("a-unknown", at=at, alarm=None),
        )

    send()
    opened = OpenedDashboard(browser, running.start)
    first = json.dumps(["z-ill", "z-busy", "a-unknown", "vm-000", "vm-001"])
    opened.wait(f"JSON.stringify({NAMES}.slice(0, 5)) === JSON.stringify({first})", send)
    opened.wait("document.querySelector('.machine[data-state=fine]')", send)

    assert opened.text("#count-machines") == str(count)
    assert opened.page.locator(".machine").count() < 40
    opened.page.keyboard.press("1")
    last = f"vm-{count - 4:03d}"

    def select_last() -> None:
        send()
        opened.page.focus("#machines")
        opened.page.keyboard.press("End")

    select_last()
    opened.wait(f"document.querySelector('#h-machine').textContent === '{last}'", select_last)
    opened.wait(f"document.querySelector('.machine[aria-selected=true]').ariaPosInSet === '{count}'", send)
    active = opened.page.get_attribute("#machines", "aria-activedescendant")
    assert opened.page.locator(f"#{active} .vm").text_content() == last
    assert opened.messages == []


def test_machines_are_listed_before_plotly_is_loaded(browser: Any, running: Running) -> None:
    send_live(running, *(quiet(i) for i in range(64)))
    page = browser.new_page()
    page.route("**/plotly.min.js", lambda route: None)  # never answered
    page.goto(running.start, wait_until="commit")

    page.wait_for_selector(".machine", timeout=60_000)

    assert page.locator(".machine").count() > 5


def test_plotly_is_loaded_after_the_first_list(browser: Any, running: Running) -> None:
    send_live(running, *(quiet(i) for i in range(64)))
    page = browser.new_page()
    asked: list[Any] = []
    page.route("**/state.json", lambda route: asked.append(route))  # answered below
    with page.expect_request("**/state.json", timeout=120_000):
        page.goto(running.start)
    loads_plotly = "[...document.scripts].some(s => s.src.endsWith('/plotly.min.js'))"

    page.locator("#link-words", has_text="nnected").wait_for(timeout=120_000)  # the page draws
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))")
    assert not page.evaluate(loads_plotly)

    for route in asked:
        route.continue_()
    page.wait_for_selector(".machine", timeout=120_000)
    page.wait_for_selector("script[src='/plotly.min.js']", state="attached", timeout=120_000)


def test_activity_alarm_that_is_silenced_is_not_called_open(browser: Any, running: Running) -> None:
    opened = OpenedDashboard(browser, running.start)
    turns = itertools.count()
    raised = {"activity_alarm": True, "activity_alarm_since_ns": NOW_NS, "alarm": False, "threshold": 0.5}

    def send() -> None:
        send_live(running, phase("web-1", at=next(turns), **raised, alarm_changes=("activity",)))

    opened.wait("(document.querySelector('#alarms').dataset.reasons || '') === 'activity'", send)
    alarm = httpx.get(running.address + "state.json", cookies=running.cookies(), trust_env=False).json()["alarms"][0]
    change = {"id": alarm["id"], "silence_minutes": 60}
    access = {"Authorization": f"Bearer {running.token}"}
    answer = httpx.post(running.address + "alarms", json=change, headers=access, trust_env=False, timeout=60)
    assert answer.status_code == 200, answer.text

    opened.wait("document.querySelector('#alarms').dataset.reasons === 'handled'", send)
    assert opened.page.get_attribute("#alarms", "data-state") == "doubt"


def test_filter_finds_machines_by_name_and_keys_select_them(browser: Any, running: Running) -> None:
    send_live(running, *(quiet(i) for i in range(30)))
    opened = OpenedDashboard(browser, running.start)
    opened.wait("document.querySelector('.machine')")

    opened.page.keyboard.press("/")
    opened.page.keyboard.type("VM-02")
    opened.wait("document.querySelector('#filter-count').textContent === '10 of 30'")
    opened.page.keyboard.press("Enter")
    opened.wait("document.querySelector('#h-machine').textContent === 'vm-020'")
    opened.page.keyboard.press("ArrowDown")
    opened.wait("document.querySelector('#h-machine').textContent === 'vm-021'")
    opened.page.keyboard.press("/")
    opened.page.keyboard.press("Escape")
    opened.wait("document.querySelectorAll('.machine').length > 12")


def evidence(channel: str = "proc.cpu_user") -> tuple[AlarmEvidence, ...]:
    return (AlarmEvidence(channel=channel, value=0.9, usual=0.1, z=20.0),)


def test_alarm_is_acknowledged_and_silenced_on_the_page_with_the_token(browser: Any, running: Running) -> None:
    opened = OpenedDashboard(browser, running.start)
    send_live(running, infected("web-1", evidence=evidence()))
    opened.wait("document.querySelector('#head-acts button')")
    assert "proc.cpu_user" in opened.text("#evidence")

    opened.page.click("#head-acts button >> nth=0")
    opened.page.fill("#act-note", HOSTILE)
    opened.page.fill("#act-by", HOSTILE)
    opened.page.fill("#act-token", "not-the-token-of-this-page")
    opened.page.click("#act-send")
    opened.wait("document.querySelector('#act-error').textContent === 'Wrong token.'")
    opened.page.fill("#act-token", running.token)
    opened.page.click("#act-send")
    opened.wait("document.querySelector('.machine').dataset.state === 'acknowledged'")
    opened.wait("document.querySelector('#alarms').dataset.state === 'doubt'")
    assert "handled" in opened.reasons()

    opened.page.click("#head-acts button")  # silence; the token is known now
    opened.page.fill("#act-note", HOSTILE)
    opened.page.click("#act-send")
    opened.wait("!document.querySelector('#act').open")
    opened.show("alarms")
    opened.wait("document.querySelector('#history tbody tr')")
    assert opened.text("#history td[data-name=Notes]").count(HOSTILE) == 3
    send_live(running, phase("web-1", at=2, alarm=False, threshold=0.5))
    opened.wait("document.querySelector('#history tbody tr').dataset.state === 'resolved'")
    assert "ended" in opened.text("#history td[data-name=Lasted]")
    assert opened.page.locator("img").count() == 1
    assert [m for m in opened.messages if "401" not in m] == []  # Chromium logs the refused request


def test_a_reloaded_page_has_the_alarm_history(browser: Any, running: Running) -> None:
    send_live(running, infected("web-1", evidence=evidence("proc.cpu_sys")))
    send_live(running, phase("web-1", at=2, alarm=False, threshold=0.5))
    opened = OpenedDashboard(browser, running.start)
    opened.wait("document.querySelector('#count-alarms').textContent === '1'")

    opened.show("alarms")

    opened.wait("document.querySelector('#history tbody tr')")
    assert opened.page.get_attribute("#history tbody tr", "data-state") == "resolved"
    assert "proc.cpu_sys" in opened.text("#history")


@pytest.mark.parametrize(
    ("origins", "mode", "title"),
    [
        pytest.param(("live",), "live", "phasewatch", id="watched"),
        pytest.param(("recorded",), "replay", "replay · phasewatch", id="replayed"),
        pytest.param(("simulated",), "replay", "replay · phasewatch", id="simulated"),
        pytest.param(("recorded", "live"), "both", "live and replay · phasewatch", id="both"),
    ],
)
def test_replay_is_never_called_live(
    browser: Any, running: Running, origins: tuple[str, ...], mode: str, title: str
) -> None:
    opened = OpenedDashboard(browser, running.start)

    def make_events(turn: int) -> Iterator[EventData]:
        for i, origin in enumerate(origins):
            yield telemetry(f"{origin}-{i}", start=20 * turn, origin=origin)
            yield phase(f"{origin}-{i}", at=2 * turn, alarm=False, threshold=0.5)

    watcher = FakeWatcher(running, make_events)
    watcher()
    opened.wait(f"document.querySelectorAll('.machine').length === {len(origins)}")
    opened.wait(f"document.querySelector('#mode').dataset.mode === '{mode}'")

    assert opened.page.title().startswith(title)
    badges = {row: opened.page.locator(".machine", has_text=row).locator(".badge").text_content() for row in origins}
    assert badges == {origin: "" if origin == "live" else "replay" for origin in origins}
    if mode == "replay":
        opened.wait("document.querySelector('[data-type=phase] .state').textContent === 'replay'", watcher)
        assert "replay" in opened.text("#head")
        assert "live" not in opened.text("main").lower().replace("alive", "")


def test_watched_machine_and_replay_with_one_name_are_two(browser: Any, running: Running) -> None:
    running.send(telemetry("pc", origin="recorded"), phase("pc"))
    send_live(running, telemetry("pc", host="uuid-1"), phase("pc", host="uuid-1"))
    send_live(running, telemetry("pc", host="uuid-2"), phase("pc", host="uuid-2"))

    opened = OpenedDashboard(browser, running.start)

    opened.wait("document.querySelectorAll('.machine').length === 3")


def test_time_span_shows_more_with_less_detail(browser: Any, running: Running) -> None:
    names = ("proc.vcpu_run",)
    for i in range(10):  # ten minutes of half-second bins
        bins = tuple((float(i * 120 + j),) for j in range(120))
        running.send(msgspec.structs.replace(telemetry(start=i * 120, bins=120), channels=names, values=bins))
    running.send(*(phase(at=i) for i in range(118)))
    opened = OpenedDashboard(browser, running.start)
    opened.wait("document.querySelector('#plot-line .main-svg')")
    drawn = "document.querySelector('#plot-line').data[0].x.length"

    opened.wait(f"{drawn} === 240")
    opened.page.keyboard.press("z")
    opened.wait("document.querySelector('.spans [aria-checked=true]').dataset.span === '3600'")
    opened.wait(f"{drawn} === 20")
    opened.page.click("text=1 min")
    opened.wait(f"{drawn} === 120")
    ends = "[...document.querySelectorAll('#plot-phase, #plot-line')].map(p => p.layout.xaxis.range.join())"
    opened.wait(f"new Set({ends}).size === 1")  # one time axis for both figures


# Yields the texts with a contrast below 4.5, with the opacity of all ancestors.
CONTRASTS = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (c) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((v, i) => v * a + under[i] * (1 - a));
  const ground = (e) => {
    const chain = [];
    for (let n = e; n; n = n.parentElement) chain.push(rgba(getComputedStyle(n).backgroundColor));
    return chain.reverse().reduce((under, c) => over(c, under), [255, 255, 255]);
  };
  const light = (c) => c.map((v) => v / 255).map((v) => (v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const poor = [];
  for (const e of document.querySelectorAll('body *:not(svg *):not(script):not(style)')) {
    const texts = [...e.childNodes].filter((n) => n.nodeType === 3);
    const words = texts.map((n) => n.data.trim()).join(' ').trim();
    if (!words || !e.checkVisibility()) continue;
    let opacity = 1;
    for (let n = e; n; n = n.parentElement) opacity *= Number(getComputedStyle(n).opacity);
    const under = ground(e), [r, g, b, a] = rgba(getComputedStyle(e).color);
    const [x, y] = [light(over([r, g, b, a * opacity], under)), light(under)].sort((p, q) => q - p);
    const ratio = (x + .05) / (y + .05);
    if (ratio < 4.5) poor.push(`${e.className || e.tagName} ${words.slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return poor;
}"""


@pytest.fixture
def every_state(running: Running) -> Running:
    """A dashboard with a machine in each state."""
    busy = {"activity_alarm": True, "activity_alarm_since_ns": NOW_NS, "alarm": False, "threshold": 0.5}
    send_live(running, telemetry("ill", host="1"), infected("ill", host="1", evidence=evidence()))
    send_live(running, phase("busy", **busy), quiet(1), phase("unknown", alarm=None), infected("seen"))
    running.send(telemetry("pc", origin="recorded"), infected("pc", truth="clean"))
    return running


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_in_both_themes(browser: Any, every_state: Running, scheme: str) -> None:
    with browser.new_context(color_scheme=scheme) as context:
        opened = OpenedDashboard(context, every_state.start)
        opened.wait("document.querySelectorAll('.machine').length === 6")
        opened.wait("document.querySelector('#plot-line .main-svg')")

        for view in ("machines", "alarms"):
            opened.show(view)
            opened.page.wait_for_timeout(400)
            assert opened.page.evaluate(CONTRASTS) == []
        opened.page.keyboard.press("?")
        assert opened.page.evaluate(CONTRASTS) == []


def test_controls_have_roles_and_names(browser: Any, every_state: Running) -> None:
    opened = OpenedDashboard(browser, every_state.start)
    opened.wait("document.querySelectorAll('.machine').length === 6")

    page = opened.page
    assert page.get_by_role("listbox", name="Machines, most urgent first").count() == 1
    assert page.get_by_role("option", name="ill: infection alarm, ").count() == 1
    assert page.get_by_role("option", name="pc, replay: ").count() == 1
    assert page.get_by_role("tab", name="Alarms").count() == 1
    assert page.get_by_role("radio", name="10 min").get_attribute("aria-checked") == "true"
    assert page.get_by_role("searchbox", name="Filter").count() == 1
    is_unnamed = "(x) => x.checkVisibility() && !(x.ariaLabel || x.textContent.trim() || x.labels?.length)"
    unnamed = f"e => e.filter({is_unnamed}).map((x) => x.outerHTML)"
    assert page.locator("button, input, select").evaluate_all(unnamed) == []
