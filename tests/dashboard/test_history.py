"""The history of a machine: three time spans, bounded, from telemetry and predictions."""

from __future__ import annotations

from typing import Any

import pytest
from tests.factories.dashboards import event

from phasewatch.dashboard.history import SPANS, MachineHistory, MachineKey, build_machine_key
from phasewatch.events.schema import EventData, EventEnvelope, PhaseEvent, TelemetryEvent

S = 1_000_000_000
START = 1_800_000_000 * S  # a multiple of every cell


def telemetry(at_s: float, *values: float | None, vm: str = "web", bins: int = 1) -> TelemetryEvent:
    names = ("proc.cpu_user", "proc.cpu_sys")[: len(values)]
    return TelemetryEvent(
        vm=vm,
        origin="live",
        t0_ns=START + round(at_s * S),
        bin_s=0.5,
        channels=names,
        values=(tuple(values),) * bins,
        flags=(0,) * bins,
        late_rows=3,
    )


def phase(at_s: int, decision: str = "clean", *, vm: str = "web", **more: Any) -> PhaseEvent:
    fields: dict[str, Any] = {"p": (0.5, 0.0, 0.5, 0.0, 0.0), "model": "gbt", "threat": "realistic"} | more
    return PhaseEvent(vm=vm, t_start_ns=START + at_s * S, t_end_ns=START + (at_s + 10) * S, decision=decision, **fields)


def add(history: MachineHistory, *data: EventData, now_ns: int = START, run: str = "demo") -> MachineKey:
    key = None
    for one in data:
        wrapped = event(one, run=run)
        key = build_machine_key(wrapped)
        assert key is not None
        history.add(key, wrapped, now_ns=now_ns)
    assert key is not None
    return key


def read(history: MachineHistory, key: MachineKey, span_s: int, after_ns: int = 0) -> Any:
    found = history.read(key, span_s=span_s, after_ns=after_ns)
    assert found is not None
    return found


def test_minute_has_every_bin_and_ten_minutes_have_means() -> None:
    history = MachineHistory()
    key = add(history, *(telemetry(i / 2, float(i), None) for i in range(10)))

    minute, ten_minutes = read(history, key, 60), read(history, key, 600)

    assert [row for _, row in minute["bins"]] == [[float(i)] for i in range(10)]
    assert [row for _, row in ten_minutes["bins"]] == [[2.0], [7.0]]  # means of 0 to 4 and of 5 to 9
    assert [t for t, _ in ten_minutes["bins"]] == [START / 1e6, START / 1e6 + 2500]
    assert minute["channels"] == ["proc.cpu_user"]  # the other one has no value
    assert minute["n_channels"] == 2
    assert minute["late_rows"] == 3


def test_mean_ignores_unknown_values() -> None:
    history = MachineHistory()
    key = add(history, telemetry(0, 1.0), telemetry(0.5, None), telemetry(1, 3.0))

    assert [row for _, row in read(history, key, 600)["bins"]] == [[2.0]]


def test_page_asks_only_for_what_is_new_and_gets_the_open_cell_again() -> None:
    history = MachineHistory()
    key = add(history, *(telemetry(i / 2, 1.0) for i in range(20)), phase(0), phase(1))

    found = read(history, key, 600, after_ns=START + 5 * S)

    assert [t for t, _ in found["bins"]] == [START / 1e6 + 5000, START / 1e6 + 7500]
    assert [row[0] for row in found["windows"]] == [START / 1e6 + 5000]  # the middle of both windows is after 5 s


@pytest.mark.parametrize("span", SPANS, ids=lambda span: f"{span.span_s} s")
def test_history_is_bounded_to_its_span(span: Any) -> None:
    history = MachineHistory()
    events = [telemetry(i * 60, 1.0, bins=120) for i in range(70)]
    key = add(history, *events, *(phase(i * 5) for i in range(900)))

    found = read(history, key, span.span_s)

    assert len(found["bins"]) == span.span_s * S // span.cell_ns
    assert found["bins"][-1][0] - found["bins"][0][0] < span.span_s * 1000
    assert len(found["windows"]) <= span.span_s * S // span.window_cell_ns


def test_cell_of_predictions_has_mean_probabilities_the_usual_phase_and_any_alarm() -> None:
    history = MachineHistory()
    key = add(
        history,
        phase(0, "clean", alarm=False, truth="clean"),
        phase(1, "infecting", alarm=True, truth="infecting", p=(0.1, 0.0, 0.9, 0.0, 0.0)),
        phase(2, "infecting", alarm=False, truth="infecting", p=(0.0, 0.0, 1.0, 0.0, 0.0)),
    )

    ((_, decision, truth, alarm, activity, p),) = read(history, key, 600)["windows"]

    assert (decision, truth) == (2, 2)
    assert (alarm, activity) == (True, None)
    assert p == [0.2, 0.0, 0.8, 0.0, 0.0]


def test_jump_back_is_a_new_recording() -> None:
    history = MachineHistory()
    key = add(history, telemetry(100, 1.0), phase(90), telemetry(100.5, 1.0))
    before = read(history, key, 60)["epoch"]

    add(history, telemetry(0, 5.0))

    found = read(history, key, 60)
    assert found["epoch"] != before
    assert [row for _, row in found["bins"]] == [[5.0]]
    assert found["windows"] == []


def test_machines_of_two_runs_and_of_two_vms_with_one_name_are_kept_apart() -> None:
    history = MachineHistory()
    replayed = add(history, telemetry(0, 1.0))
    watched = [
        build_machine_key(EventEnvelope(id="1", t_wall_ns=0, run="live", data=phase(0, host=host))) for host in "ab"
    ]

    assert len({replayed, *watched}) == 3


def test_silent_machine_is_forgotten_after_an_hour() -> None:
    history = MachineHistory()
    old = add(history, phase(0, vm="old"))
    add(history, phase(0, vm="new"), now_ns=START + 3601 * S)

    assert history.pop_forgotten() == [old]
    assert history.read(old, span_s=60) is None
    assert len(history) == 1


def test_number_of_machines_is_bounded() -> None:
    history = MachineHistory(max_machines=3)
    for i in range(5):
        add(history, phase(0, vm=f"vm-{i}"), now_ns=START + i)

    assert [key.vm for key in history.pop_forgotten()] == ["vm-0", "vm-1"]
