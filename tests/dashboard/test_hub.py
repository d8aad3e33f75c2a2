"""The hub: viewers read one bounded log in order, and lost events are reported."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from tests.factories.dashboards import event
from tests.formats.test_golden_events import GOLDEN

from phasewatch.dashboard.hub import HEARTBEAT_S, EventHub, HubLimits, HubViewer
from phasewatch.errors import BusyError
from phasewatch.events.schema import TelemetryEvent, parse_event


class Clock:
    """A clock that the test advances."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def hub_of(limits: HubLimits = HubLimits(), clock: Clock | None = None) -> EventHub:
    return EventHub(boot="aa", now_ns=lambda: 7, monotonic=clock or Clock(), limits=limits)


def telemetry(vm: str, i: int = 0) -> TelemetryEvent:
    return TelemetryEvent(
        vm=vm, origin="live", t0_ns=i, bin_s=0.5, channels=("proc.cpu_user",), values=((float(i),),), flags=(0,)
    )


async def read(stream: AsyncIterator[bytes], until: int) -> list[tuple[str, str, dict[str, object]]]:
    """Read (kind, id, data) until the event with the number `until`, or the end of the stream."""
    found = []
    async for part in stream:
        for frame in part.decode().split("\n\n"):
            lines = dict(line.partition(": ")[::2] for line in frame.splitlines())
            if "event" in lines:
                found.append((lines["event"], lines.get("id", ""), json.loads(lines["data"])))
        if found and found[-1][1].startswith(f"aa.{until}."):
            break
    return found


def seen_by(hub: EventHub, last_id: str | None, until: int) -> list[tuple[str, str, dict[str, object]]]:
    return asyncio.run(read(hub.stream(hub.join(last_id)), until))


def test_viewer_gets_hello_and_every_event_in_order() -> None:
    async def go() -> list[tuple[str, str, dict[str, object]]]:
        hub = hub_of()
        hub.publish(event(telemetry("a", 1)))
        reading = asyncio.create_task(read(hub.stream(hub.join(None)), 3))
        await asyncio.sleep(0)
        hub.publish(event(telemetry("a", 2)))
        hub.publish(event(GOLDEN["score"][0]))
        return await reading

    found = asyncio.run(go())

    assert [(kind, number) for kind, number, _ in found] == [
        ("hello", ""),
        ("telemetry", "aa.1.0"),
        ("telemetry", "aa.2.0"),
        ("score", "aa.3.0"),
    ]
    assert found[0][2] == {"t_wall_ns": 7, "number": 1}
    assert found[1][2]["type"] == "telemetry"


def test_reconnecting_viewer_continues_after_its_last_event() -> None:
    hub = hub_of()
    for i in range(5):
        hub.publish(event(telemetry("a", i)))

    assert [number for _, number, _ in seen_by(hub, "aa.3.0", 5)] == ["", "aa.4.0", "aa.5.0"]


def test_viewer_that_missed_events_gets_a_gap_with_their_number() -> None:
    hub = hub_of(HubLimits(events=3, retained_scenes=0))
    for i in range(10):
        hub.publish(event(telemetry("a", i)))

    found = seen_by(hub, "aa.2.0", 10)

    assert [kind for kind, _, _ in found] == ["hello", "gap", *["telemetry"] * 3]
    assert found[1][2]["missed"] == 5


@pytest.mark.parametrize("last_id", ["bb.3", "aa.99", "aa.-1", "aa.", "nonsense", "aa.1e3", "aa." + "9" * 400])
def test_event_id_of_another_hub_gives_a_gap_of_unknown_size(last_id: str) -> None:
    hub = hub_of()
    hub.publish(event(telemetry("a")))

    found = seen_by(hub, last_id, 1)

    assert [kind for kind, _, _ in found] == ["hello", "gap", "telemetry"]
    assert found[1][2]["missed"] is None


def test_new_viewer_gets_the_newest_event_of_every_scene() -> None:
    hub = hub_of(HubLimits(events=2))
    for kind in ("score", "profile"):
        hub.publish(event(GOLDEN[kind][0]))
    hub.publish(event(telemetry("b", 1)))
    for i in range(5):
        hub.publish(event(telemetry("a", i)))

    found = seen_by(hub, None, 8)

    assert [(kind, number) for kind, number, _ in found] == [
        ("hello", ""),
        ("score", "aa.1.0"),
        ("profile", "aa.2.0"),
        ("telemetry", "aa.3.0"),
        ("telemetry", "aa.7.0"),
        ("telemetry", "aa.8.0"),
    ]


def test_viewer_that_is_too_slow_is_dropped_with_a_message() -> None:
    async def go() -> list[tuple[str, str, dict[str, object]]]:
        hub = hub_of(HubLimits(events=4))
        stream = hub.stream(hub.join(None))
        await anext(stream)  # hello, then the viewer stalls
        for i in range(10):
            hub.publish(event(telemetry("a", i)))
        return await read(stream, 99)

    found = asyncio.run(go())

    assert [(kind, data["missed"]) for kind, _, data in found] == [("dropped", 6)]


def test_log_is_bounded_in_bytes_and_scenes() -> None:
    hub = hub_of(HubLimits(log_bytes=2000, retained_scenes=3))
    for i in range(100):
        hub.publish(event(telemetry(f"vm-{i}")))

    found = seen_by(hub, None, 100)

    assert sum(len(json.dumps(data)) for _, _, data in found) < 4000
    assert found[-1][1] == "aa.100.0"


def test_part_is_bounded_but_has_at_least_one_event() -> None:
    async def go() -> list[int]:
        hub = hub_of(HubLimits(part_bytes=10))
        for i in range(3):
            hub.publish(event(telemetry("a", i)))
        viewer = HubViewer(seen=0)
        sizes = []
        async for part in hub.stream(viewer):
            sizes.append(part.count(b"event: telemetry"))
            if viewer.seen == 3:
                break
        return sizes

    assert asyncio.run(go()) == [0, 1, 1, 1]


def test_viewers_beyond_the_limit_are_refused_until_one_leaves() -> None:
    async def go() -> int:
        hub = hub_of(HubLimits(viewers=1))
        stream = hub.stream(hub.join(None))
        await anext(stream)
        with pytest.raises(BusyError, match="1 viewers"):
            hub.join(None)
        await stream.aclose()  # type: ignore[attr-defined]
        hub.join(None)
        return hub.viewers

    assert asyncio.run(go()) == 0


def test_outside_producers_are_rate_limited() -> None:
    clock = Clock()
    hub = hub_of(HubLimits(rate_per_s=10, burst=20), clock)

    assert hub.admit(20) == 0.0
    assert hub.admit(5) == pytest.approx(0.5)
    clock.now_s += 0.5
    assert hub.admit(5) == 0.0
    clock.now_s += 1000
    assert hub.admit(21) > 0


def test_hub_without_events_sends_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phasewatch.dashboard.hub.HEARTBEAT_S", 0.01)

    async def go() -> bytes:
        hub = hub_of()
        stream = hub.stream(hub.join(None))
        await anext(stream)
        return await anext(stream)

    assert asyncio.run(go()) == b'event: beat\ndata: {"t_wall_ns":7,"number":0}\n\n'


def test_viewer_counts_from_join_and_not_from_its_first_read() -> None:
    hub = hub_of(HubLimits(viewers=2))
    first, _ = hub.join(None), hub.join(None)
    with pytest.raises(BusyError, match="2 viewers"):
        hub.join(None)

    hub.leave(first)
    hub.leave(first)

    hub.join(None)
    with pytest.raises(BusyError):
        hub.join(None)


def test_state_has_the_newest_event_of_every_scene_and_messages_of_the_dashboard() -> None:
    hub = hub_of()
    for i in range(3):
        hub.publish(event(telemetry("a", i)))
    hub.publish_note("seen", {"vm": "a"}, scene=("a",))
    hub.publish_note("seen", {"vm": "a", "again": True}, scene=("a",))
    hub.publish_note("alarm", {"id": 1})  # without a scene: only for those that follow the stream

    newest_id, lines = hub.snapshot()

    assert newest_id == "aa.6"
    assert [kind for kind, _, _ in lines] == ["telemetry", "seen"]
    assert json.loads(lines[0][2])["data"]["t0_ns"] == 2
    assert json.loads(lines[1][2]) == {"t_wall_ns": 7, "vm": "a", "again": True}


def test_scenes_are_bounded_in_bytes_and_can_be_forgotten() -> None:
    hub = hub_of(HubLimits(retained_bytes=1000))
    for i in range(50):
        hub.publish_note("seen", {"vm": f"vm-{i}"}, scene=(f"vm-{i}",))

    before = [json.loads(line)["vm"] for _, _, line in hub.snapshot()[1]]
    hub.forget([("seen", "vm-49"), ("seen", "never")])
    after = [json.loads(line)["vm"] for _, _, line in hub.snapshot()[1]]

    assert 2 < len(before) < 20
    assert before[-1] == "vm-49"
    assert after == before[:-1]


def test_time_of_arrival_is_beside_the_event_and_not_in_it() -> None:
    hub = EventHub(boot="aa", now_ns=lambda: 5_000_000_000, monotonic=Clock())
    sent = event(telemetry("a"))  # its own time is that of the producer
    hub.publish(sent)

    [(_, received_ms, line)] = hub.snapshot()[1]
    _, streamed_id, streamed = seen_by(hub, None, 1)[1]

    assert received_ms == 5000
    assert streamed_id == "aa.1.5000"
    assert parse_event(line) == parse_event(json.dumps(streamed).encode()) == sent


def test_viewer_gets_heartbeats_while_events_continue() -> None:
    clock = Clock()

    async def go() -> list[tuple[str, str, dict[str, object]]]:
        hub = hub_of(clock=clock)
        hub.publish(event(telemetry("a")))
        reading = asyncio.create_task(read(hub.stream(hub.join(None)), 3))
        for i in range(2):
            await asyncio.sleep(0)
            clock.now_s += HEARTBEAT_S
            hub.publish(event(telemetry("a", i)))
        return await reading

    assert "beat" in [kind for kind, _, _ in asyncio.run(go())]
