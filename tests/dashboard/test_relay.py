"""Watcher process of the dashboard: its lines become events, its failure an error, and it ends with the page."""

from __future__ import annotations

import asyncio
import sys

import pytest
from tests.dashboard.test_hub import hub_of
from tests.formats.test_golden_events import GOLDEN

from phasewatch.dashboard.history import MachineKey
from phasewatch.dashboard.intake import EventIntake
from phasewatch.dashboard.server import relay_watcher
from phasewatch.errors import MachineError


def intake_of() -> EventIntake:
    return EventIntake(hub_of(), now_ns=lambda: 7)


def program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_event_lines_are_published_and_other_lines_skipped() -> None:
    async def go() -> dict[str, object] | None:
        intake = intake_of()
        lines = [GOLDEN["telemetry"][1], "no event", GOLDEN["phase"][1], '{"result": {}}']
        await relay_watcher(program(f"print({chr(10).join(lines)!r})"), intake, "web-1")
        return intake.history.read(MachineKey(run="demo", vm="web-1", host=""), span_s=60)

    history = asyncio.run(go())

    assert history is not None
    assert (len(history["bins"]), len(history["windows"])) == (1, 1)  # type: ignore[arg-type]


def test_failure_is_an_error_with_the_last_line_of_stderr() -> None:
    lines = ["looking", "error: web-1: no such machine"]
    fails = f"import sys; print(*{lines!r}, sep='\\n', file=sys.stderr); sys.exit(5)"

    with pytest.raises(MachineError, match=r"^web-1: .* 5: web-1: no such machine$"):
        asyncio.run(relay_watcher(program(fails), intake_of(), "web-1"))


def test_watcher_ends_with_the_task() -> None:
    async def go() -> bool:
        intake = intake_of()
        text = f"print({GOLDEN['phase'][1]!r}, flush=True); import time; time.sleep(600)"
        task = asyncio.create_task(relay_watcher(program(text), intake, "web-1"))
        while intake.hub.number == 0:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return True

    assert asyncio.run(asyncio.wait_for(go(), 60))
