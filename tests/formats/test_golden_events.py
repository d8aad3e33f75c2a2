"""Bytes of the six event types. A change needs a new format version, because old pages would misread new events."""

from __future__ import annotations

import pytest
from msgspec import structs

from phasewatch.events.schema import (
    AlarmEvidence,
    ConfusionEvent,
    EventData,
    EventEnvelope,
    PerfEvent,
    PhaseEvent,
    ProfileCell,
    ProfileTableEvent,
    ScoreEvent,
    ScoreRow,
    SplitProtocolScore,
    TelemetryEvent,
    parse_event,
    render_event,
)

STAMP = 1_795_510_800_000_000_000

GOLDEN: dict[str, tuple[EventData, str]] = {
    "telemetry": (
        TelemetryEvent(
            vm="web-1",
            host="pc",
            origin="live",
            t0_ns=STAMP,
            bin_s=0.5,
            channels=("proc.cpu_user", "qmp.jit_tb"),
            values=((0.25, None),),
            flags=(0,),
            masked=("qmp.jit_tb",),
            late_rows=1,
            lateness_s=0.5,
        ),
        '{"v":2,"type":"telemetry","id":"e-1","t_wall_ns":1795510800000000000,"run":"demo","data":{"vm":"web-1","host":"pc",'
        '"origin":"live","t0_ns":1795510800000000000,"bin_s":0.5,"channels":["proc.cpu_user","qmp.jit_tb"],'
        '"values":[[0.25,null]],"flags":[0],"masked":["qmp.jit_tb"],"late_rows":1,"lost_rows":0,"lateness_s":0.5}}',
    ),
    "phase": (
        PhaseEvent(
            vm="web-1",
            t_start_ns=STAMP,
            t_end_ns=STAMP + 10**10,
            p=(0.125, 0.125, 0.25, 0.5, 0.0),
            decision="active",
            alarm=True,
            alarm_since_ns=STAMP,
            threshold=0.5,
            activity_alarm=False,
            activity_threshold=0.75,
            alarm_changes=("infection",),
            model="gbt",
            threat="realistic",
            latency_ms=4.0,
        ),
        '{"v":2,"type":"phase","id":"e-1","t_wall_ns":1795510800000000000,"run":"demo","data":{"vm":"web-1","host":null,'
        '"t_start_ns":1795510800000000000,"t_end_ns":1795510810000000000,"p":[0.125,0.125,0.25,0.5,0.0],'
        '"decision":"active","truth":null,"alarm":true,"alarm_since_ns":1795510800000000000,"threshold":0.5,'
        '"activity_alarm":false,"activity_alarm_since_ns":null,"activity_threshold":0.75,"alarm_changes":["infection"],'
        '"model":"gbt","threat":"realistic","table":"raw","filter":"none","latency_ms":4.0,"caveat":null}}',
    ),
    "score": (
        ScoreEvent(
            metric="macro_f1",
            tested=5,
            registered=6,
            recipe="held_out_host",
            headline="macro-F1 0.50",
            inflation_of="gbt",
            rows=(
                ScoreRow(
                    model="gbt", threat="realistic", table="raw", agent="off", value=0.5, low=0.4, high=0.6, n_hosts=3
                ),
            ),
            inflation=(SplitProtocolScore(recipe="random_windows", value=0.75),),
            notes=("one machine",),
        ),
        '{"v":2,"type":"score","id":"e-1","t_wall_ns":1795510800000000000,"run":"demo","data":{"metric":"macro_f1","tested":5,'
        '"registered":6,"recipe":"held_out_host","rows":[{"model":"gbt","threat":"realistic","table":"raw","agent":"off","value":0.5,'
        '"low":0.4,"high":0.6,"why":null,"is_baseline":false,"p_holm":null,"seeds":1,"n_episodes":0,"n_sessions":0,'
        '"n_hosts":3}],"inflation":[{"recipe":"random_windows","value":0.75,"low":null,"high":null}],"inflation_of":"gbt",'
        '"headline":"macro-F1 0.50","notes":["one machine"]}}',
    ),
    "confusion": (
        ConfusionEvent(
            model="gbt",
            recipe="held_out_host",
            threat="realistic",
            table="raw",
            agent="off",
            labels=("clean", "active"),
            counts=((3.0, 1.0), (0.0, 2.0)),
            n_episodes=2,
            n_hosts=1,
        ),
        '{"v":2,"type":"confusion","id":"e-1","t_wall_ns":1795510800000000000,"run":"demo","data":{"model":"gbt",'
        '"recipe":"held_out_host","threat":"realistic","table":"raw","agent":"off","labels":["clean","active"],'
        '"counts":[[3.0,1.0],[0.0,2.0]],"n_episodes":2,"n_hosts":1}}',
    ),
    "perf": (
        PerfEvent(
            process="watch",
            vm="web-1",
            measured_s=10.0,
            windows=2,
            windows_per_s=0.2,
            latency_edges_ms=(1.0, 2.0),
            latency_counts=(0, 2, 0),
            p50_ms=1.5,
            p99_ms=1.5,
            rss_bytes=1_000_000,
            cpu_cores=0.125,
        ),
        '{"v":2,"type":"perf","id":"e-1","t_wall_ns":1795510800000000000,"run":"demo","data":{"process":"watch","vm":"web-1",'
        '"measured_s":10.0,"windows":2,"windows_per_s":0.2,"latency_edges_ms":[1.0,2.0],"latency_counts":[0,2,0],'
        '"p50_ms":1.5,"p99_ms":1.5,"rss_bytes":1000000,"cpu_cores":0.125,"late_ticks":0,"backlog":0,"about":null}}',
    ),
    "profile": (
        ProfileTableEvent(
            metric="macro_f1",
            recipe="held_out_host",
            threat="realistic",
            model="gbt",
            profiles=("benign",),
            hosts=("pc", "q35"),
            cells=((ProfileCell(value=0.5, n_windows=30, n_episodes=1), None),),
            untested_profiles=("exfil-drip",),
        ),
        '{"v":2,"type":"profile","id":"e-1","t_wall_ns":1795510800000000000,"run":"demo","data":{"metric":"macro_f1",'
        '"recipe":"held_out_host","threat":"realistic","model":"gbt","agent":null,"profiles":["benign"],"hosts":["pc","q35"],'
        '"cells":[[{"value":0.5,"low":null,"high":null,"why":null,"n_windows":30,"n_episodes":1},null]],'
        '"untested_profiles":["exfil-drip"]}}',
    ),
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_event_is_rendered_to_and_parsed_from_its_golden_line(kind: str) -> None:
    data, line = GOLDEN[kind]
    event = EventEnvelope(id="e-1", t_wall_ns=STAMP, run="demo", data=data)

    assert event.type == kind
    assert render_event(event).decode() == line
    assert parse_event(line.encode()) == event


def test_evidence_of_a_raised_alarm_is_the_last_field_of_its_event() -> None:
    data, line = GOLDEN["phase"]
    assert isinstance(data, PhaseEvent)
    evidence = (AlarmEvidence(channel="proc.cpu_user", value=0.75, usual=0.25, z=12.5),)
    event = EventEnvelope(id="e-1", t_wall_ns=STAMP, run="demo", data=structs.replace(data, evidence=evidence))

    rendered = render_event(event).decode()

    assert rendered == (
        f'{line[:-2]},"evidence":[{{"channel":"proc.cpu_user","value":0.75,"usual":0.25,"z":12.5}}]}}}}'
    )
    assert parse_event(rendered.encode()) == event
