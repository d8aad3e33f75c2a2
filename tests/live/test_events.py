"""Events: what is written is read again, what is malformed is refused in words, no name is a danger to a page."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.formats.test_golden_events import GOLDEN, STAMP

from phasewatch.errors import EventError
from phasewatch.events import schema
from phasewatch.events.schema import (
    MAX_EVENT_BYTES,
    EventEnvelope,
    TelemetryEvent,
    make_safe_name,
    parse_event,
    render_event,
)

HOSTILE = "</script><img src=x onerror=alert(1)>"


def changed(kind: str, **more: object) -> bytes:
    """A golden event with some of its data changed."""
    event = json.loads(GOLDEN[kind][1])
    event["data"] |= more
    return json.dumps(event).encode()


def enveloped(**more: object) -> bytes:
    return json.dumps(json.loads(GOLDEN["perf"][1]) | more).encode()


@given(st.text(max_size=200))
def test_a_safe_name_is_safe_and_stays_itself(text: str) -> None:
    name = make_safe_name(text)

    assert re.fullmatch(r"[A-Za-z0-9._/-]{1,80}", name)
    assert make_safe_name(name) == name


def test_names_that_differ_only_in_what_is_unsafe_stay_different() -> None:
    assert len({make_safe_name(t) for t in ("<b>", "(b)", "[b]", "", "x" * 81, "x" * 82)}) == 6


def test_a_hostile_name_is_replaced_wherever_it_stands() -> None:
    event = parse_event(changed("telemetry", vm=HOSTILE, channels=[HOSTILE, "proc.cpu_user"]))

    assert isinstance(event.data, TelemetryEvent)
    assert "<" not in render_event(event).decode()
    assert event.data.vm == make_safe_name(HOSTILE)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        pytest.param(b"", "truncated", id="nothing"),
        pytest.param(b"\xff\xfe", "malformed", id="no JSON"),
        pytest.param(b'{"v":2}', "missing required field `type`", id="no type"),
        pytest.param(enveloped(v=1), "version 1 is not supported; expected 2", id="another version"),
        pytest.param(
            enveloped(type="rumour"), "unknown type 'rumour'; expected one of telemetry, phase", id="unknown type"
        ),
        pytest.param(enveloped(extra=1), "unknown field `extra`", id="an unknown field"),
        pytest.param(enveloped(t_wall_ns=-1), "t_wall_ns", id="a stamp below zero"),
        pytest.param(enveloped(id="i" * 5000), "length <= 4096", id="a name without end"),
        pytest.param(changed("perf", rss_bytes=2**70), "rss_bytes", id="a count beyond 64 bits"),
        pytest.param(changed("perf", latency_counts=[1]), "1 counts for 2 edges", id="a histogram that does not fit"),
        pytest.param(changed("perf", latency_edges_ms=[2, 1]), "do not rise", id="edges that fall"),
        pytest.param(changed("telemetry", values=[[1.0]]), "a bin with 1 values for 2", id="a narrow bin"),
        pytest.param(changed("telemetry", flags=[]), "0 flags for 1 bins", id="flags lacking"),
        pytest.param(changed("telemetry", channels=["a", "a"]), "occurs twice", id="a channel twice"),
        pytest.param(changed("telemetry", values=[["1", 2]]), "values", id="text for a number"),
        pytest.param(changed("phase", p=[1, 0]), "length 5", id="two probabilities"),
        pytest.param(changed("phase", p=[2, 0, 0, 0, 0]), "<= 1.0", id="a probability above one"),
        pytest.param(changed("phase", decision="asleep"), "unknown phase 'asleep'", id="no such phase"),
        pytest.param(changed("phase", t_end_ns=0), "ends before it starts", id="a window backwards"),
        pytest.param(changed("confusion", counts=[[1]]), "not 2 by 2", id="no square"),
        pytest.param(changed("profile", cells=[]), "0 rows for 1 profiles", id="rows lacking"),
        pytest.param(changed("score", headline="w" * 601), "length <= 600", id="words without end"),
        pytest.param(b'{"v":2,"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "event:", id="a deep nest"),
        pytest.param(b" " * (MAX_EVENT_BYTES + 1), "262,145 bytes, at most 262,144", id="a huge one"),
    ],
)
def test_what_is_no_event_is_refused_in_words(line: bytes, words: str) -> None:
    with pytest.raises(EventError, match=re.escape(words)):
        parse_event(line)


@given(st.binary(max_size=300))
def test_noise_is_refused_and_nothing_else_happens(noise: bytes) -> None:
    with pytest.raises(EventError):
        parse_event(noise)


@given(st.sampled_from(sorted(GOLDEN)), st.data())
def test_a_damaged_event_is_read_or_refused(kind: str, data: st.DataObject) -> None:
    line = bytearray(GOLDEN[kind][1].encode())
    for _ in range(data.draw(st.integers(1, 4))):
        line[data.draw(st.integers(0, len(line) - 1))] = data.draw(st.integers(0, 255))
    try:
        event = parse_event(bytes(line))
    except EventError:
        return

    assert parse_event(render_event(event)) == event


def test_what_is_too_large_is_not_written_either() -> None:
    names = tuple(f"channel-{i}" for i in range(256))
    bins = tuple(tuple(1 / 3 for _ in names) for _ in range(240))
    data = TelemetryEvent(
        vm="a", origin="live", t0_ns=STAMP, bin_s=0.5, channels=names, values=bins, flags=(0,) * len(bins)
    )

    with pytest.raises(EventError, match="send fewer bins"):
        render_event(EventEnvelope(id="1", t_wall_ns=STAMP, run="live", data=data))


def test_every_type_has_a_golden_event() -> None:
    assert set(GOLDEN) == set(schema.EVENT_TYPES)
