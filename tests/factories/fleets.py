"""Events of a synthetic fleet, and a dashboard process that shows it."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Iterator

from phasewatch.channels import CHANNEL_NAMES
from phasewatch.dashboard import server
from phasewatch.dashboard.auth import AccessControl
from phasewatch.dashboard.intake import EventIntake
from phasewatch.events.schema import AlarmEvidence, EventEnvelope, PhaseEvent, TelemetryEvent

TOKEN = "a-token-for-tests-only"
_S = 1_000_000_000
_KINDS = ("web", "db", "mail", "build")


def vm_name(i: int) -> str:
    return f"{_KINDS[i % len(_KINDS)]}-{i // len(_KINDS) + 1:02d}"


def second_of_fleet(n: int, t_ns: int, start_ns: int) -> Iterator[EventEnvelope]:
    """Yield one second of events of `n` machines: every 17th has an infection alarm, every 11th an activity alarm."""
    second = (t_ns - start_ns) // _S
    for i in range(n):
        vm, host = vm_name(i), f"uuid-{i}"
        is_infected, is_active = i % 17 == 3 and second > 60, i % 11 == 5 and second > 90
        if i % 29 == 28 and second > 200:  # a machine that went silent
            continue
        load = 0.2 + 0.15 * math.sin(i + second / 20) + (0.6 if is_infected or is_active else 0.0)
        for k in range(2):
            row = tuple(
                None
                if name.startswith("guest.") or j % 7 == 6
                else round(abs(math.sin(j * i + second / (3 + j))) * load * 10, 4)
                for j, name in enumerate(CHANNEL_NAMES)
            )
            yield _wrap(
                TelemetryEvent(
                    vm=vm,
                    host=host,
                    origin="live",
                    t0_ns=t_ns + k * _S // 2,
                    bin_s=0.5,
                    channels=CHANNEL_NAMES,
                    values=(row,),
                    flags=(0,),
                ),
                t_ns,
            )
        if i % 31 == 30:  # a machine that no model fits
            continue
        p_bad = 0.9 if is_infected else 0.05 + 0.02 * (i % 5)
        p_active = 0.7 if is_active else 0.05
        rest = max(0.0, 1.0 - p_bad - p_active)
        is_new = second in (61, 91)
        yield _wrap(
            PhaseEvent(
                vm=vm,
                host=host,
                t_start_ns=t_ns - 9 * _S,
                t_end_ns=t_ns + _S,
                p=(rest * 0.7, rest * 0.1, min(p_bad, 1.0), min(p_active, 1.0), rest * 0.2),
                decision="infecting" if is_infected else "active" if is_active else "clean",
                alarm=is_infected,
                alarm_since_ns=start_ns + 61 * _S if is_infected else None,
                threshold=0.73,
                activity_alarm=is_active,
                activity_alarm_since_ns=start_ns + 91 * _S if is_active else None,
                activity_threshold=0.6,
                alarm_changes=("infection",) if is_infected and is_new else (),
                model="gbt",
                threat="realistic",
                latency_ms=12.0,
                **({"evidence": _EVIDENCE} if is_new and (is_infected or is_active) else {}),  # type: ignore[arg-type]
            ),
            t_ns,
        )


_EVIDENCE = (
    AlarmEvidence(channel="netflow.new_flows", value=38.2, usual=0.4, z=37.8),
    AlarmEvidence(channel="qmp.blk_wr_bytes", value=2.4e6, usual=3.1e4, z=21.5),
    AlarmEvidence(channel="proc.cpu_user", value=0.91, usual=0.06, z=14.2),
    AlarmEvidence(channel="proc.main_run", value=0.002, usual=0.05, z=-3.4),
)


def _wrap(data: TelemetryEvent | PhaseEvent, t_ns: int) -> EventEnvelope:
    return EventEnvelope(id=f"{data.vm}/{t_ns // _S}", t_wall_ns=t_ns, run="live", data=data)


def serve(n: int, past_s: int) -> None:
    """Serve a dashboard with `n` synthetic machines that were watched for `past_s` seconds already."""

    async def produce(intake: EventIntake) -> None:
        now_ns = time.time_ns()
        start_ns = now_ns - past_s * _S
        for t_ns in range(start_ns, now_ns, _S):
            for event in second_of_fleet(n, t_ns, start_ns):
                intake.publish(event)
            await asyncio.sleep(0)
        print("ready", flush=True)
        t_ns = now_ns
        while True:
            t_ns += _S
            await asyncio.sleep(max(0.0, (t_ns - time.time_ns()) / 1e9))
            for event in second_of_fleet(n, t_ns, start_ns):
                intake.publish(event)

    sock = server.bind_socket(0)
    print(f"http://127.0.0.1:{sock.getsockname()[1]}/?token={TOKEN}", flush=True)
    server.serve_dashboard(sock, server.make_intake(), AccessControl(token=TOKEN), title="fleet", producers=(produce,))


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
