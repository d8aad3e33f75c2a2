"""The flow table and its plain reading agree on whatever frames hypothesis can think of."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracle.flows import ACK, FIN, RST, SYN, Passing, S, flow_reading

from phasewatch.telemetry.flow_table import FlowTable
from phasewatch.telemetry.headers import IpHeaders

GUEST = b"\x0a\x00\x02\x0f"
FLAGS = st.sampled_from([SYN, SYN, SYN | ACK, ACK, ACK, FIN | ACK, RST, RST | ACK])


@st.composite
def passings(draw: st.DrawFn) -> list[Passing]:
    frames, t_ns = [], draw(st.integers(0, 5)) * S
    for _ in range(draw(st.integers(0, 60))):
        t_ns += draw(st.sampled_from([0, S // 10, S // 2, S, 2 * S, 5 * S, 5 * S, 31 * S]))
        protocol = draw(st.sampled_from([6, 6, 17]))
        frames.append(
            Passing(
                t_ns=t_ns,
                outgoing=draw(st.sampled_from([True, True, False])),
                protocol=protocol,
                far=bytes((198, 18, 0, draw(st.integers(0, 1)))),
                port=draw(st.sampled_from([53, 443, 50_000])),
                near=draw(st.sampled_from([22, 40_000])),
                flags=draw(FLAGS) if protocol == 6 else 0,
                size=draw(st.integers(60, 1500)),
            )
        )
    return frames


@settings(max_examples=300, deadline=None)
@given(passings())
def test_any_frames_give_the_same_reading(frames: list[Passing]) -> None:
    end_ns = (frames[-1].t_ns if frames else 0) + 4 * S
    ticks = list(range(S // 4, end_ns + S // 2, S // 2))
    table, at = FlowTable(), 0
    for tick in ticks:
        while at < len(frames) and frames[at].t_ns <= tick:
            f = frames[at]
            ends = (GUEST, f.far, (f.near, f.port)) if f.outgoing else (f.far, GUEST, (f.port, f.near))
            table.add_frame(IpHeaders(f.protocol, *ends, f.flags), f.outgoing, f.size, f.t_ns)
            at += 1
        reading = table.pop_reading(tick)

    fast, slow = tuple(reading), flow_reading(frames, ticks)

    assert fast[:-1] == slow[:-1]
    assert abs(fast[-1] - slow[-1]) <= 1  # the mean and spread are summed in another order
