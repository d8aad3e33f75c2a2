"""ECS lines: fields of the Elastic Common Schema with its types, whole lines on any disk."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.factories.alarms import S, life, raised

from phasewatch.alarms.config import EcsConfig
from phasewatch.alarms.delivery import RetryPolicy
from phasewatch.alarms.ecs import ECS_VERSION, EcsOutput, render_ecs_line
from phasewatch.alarms.life import AlarmChange

POLICY = RetryPolicy(first_pause_s=0.01, longest_pause_s=0.02, flush_s=0.5)

# Field types of ECS 8.11 for what is written; `phasewatch` holds the fields that ECS does not have.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "@timestamp": str,
    "message": str,
    "ecs.version": str,
    "event.kind": str,
    "event.category": list,
    "event.type": list,
    "event.action": str,
    "event.id": str,
    "event.module": str,
    "event.dataset": str,
    "event.provider": str,
    "event.severity": int,
    "event.created": str,
    "event.start": str,
    "event.end": str,
    "event.duration": int,
    "event.reason": str,
    "host.name": str,
    "host.id": str,
    "observer.hostname": str,
    "observer.product": str,
    "observer.type": str,
    "observer.vendor": str,
    "observer.version": str,
    "rule.name": str,
    "rule.category": str,
    "rule.ruleset": str,
    "rule.version": str,
}


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= flatten(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {prefix + name: inner}
    return flat


def write(path: Path | str, *changes: AlarmChange, lines: list[str] | None = None) -> EcsOutput:
    async def main() -> EcsOutput:
        write_line = None if lines is None else lines.append
        output = EcsOutput(EcsConfig(file=str(path)), host="hv1", write_line=write_line, policy=POLICY)
        for change in changes:
            output.put(change)
        await output.close()
        return output

    return asyncio.run(main())


def test_a_line_has_only_fields_of_the_schema_with_their_types() -> None:
    for change in life(caveat="contention"):
        line = render_ecs_line(change, host="hv1")
        flat = flatten(json.loads(line))

        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        own = {name for name in flat if name.startswith("phasewatch.")}
        assert {name for name in flat.keys() - own if not isinstance(flat[name], FIELDS[name])} == set()
        assert flat["ecs.version"] == ECS_VERSION


def test_the_vm_is_the_host_and_the_hypervisor_the_observer() -> None:
    first, last = life(host="web01-ab12")
    start, end = (json.loads(render_ecs_line(change, host="hv1")) for change in (first, last))

    assert (start["host"], start["observer"]["hostname"]) == ({"name": "web01", "id": "web01-ab12"}, "hv1")
    assert (start["event"]["kind"], end["event"]["kind"]) == ("alert", "event")
    assert (start["event"]["action"], end["event"]["action"]) == ("alarm-raised", "alarm-resolved")
    assert end["event"]["duration"] == 20 * S
    assert start["phasewatch"]["phase"]["probability"]["infecting"] == 0.8


@given(vm=st.text(max_size=100), note=st.text(max_size=100))
def test_any_text_gives_one_line_of_json(vm: str, note: str) -> None:
    change = raised()
    change = replace(change, note=note, alarm=replace(change.alarm, vm=vm))

    line = render_ecs_line(change, host="hv1")

    assert line.count(b"\n") == 1
    assert json.loads(line)["host"]["name"] == vm


def test_lines_are_appended_also_after_the_file_was_rotated(tmp_path: Path) -> None:
    path = tmp_path / "alarms.json"

    write(path, *life())
    path.rename(tmp_path / "alarms.json.1")
    output = write(path, *life())

    assert len((tmp_path / "alarms.json.1").read_text().splitlines()) == 2
    assert len(path.read_text().splitlines()) == 2
    assert (output.counters.sent, path.stat().st_mode & 0o777 & ~0o640) == (2, 0)


def test_lines_for_standard_output_are_handed_to_its_writer() -> None:
    lines: list[str] = []

    write("-", *life(), lines=lines)

    assert [json.loads(line)["event"]["action"] for line in lines] == ["alarm-raised", "alarm-resolved"]


def test_a_full_disk_leaves_whole_lines_and_counts_the_others(caplog: pytest.LogCaptureFixture) -> None:
    output = write("/dev/full", raised())  # a device, and no regular file: refused before it is written

    assert (output.counters.sent, output.counters.lost) == (0, 1)
    assert len(caplog.records) == 1


def test_half_of_a_line_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "alarms.json", os.write
    path.write_text("before\n")
    room = [100]

    def write_some(fd: int, data: bytes) -> int:
        if fd <= 2 or Path(f"/proc/self/fd/{fd}").readlink().name != "alarms.json":
            return real(fd, data)
        if not room[0]:
            raise OSError(28, "No space left on device")
        written = real(fd, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", write_some)

    output = write(path, raised())

    assert (output.counters.sent, output.counters.lost) == (0, 1)
    assert path.read_text() == "before\n"


def test_a_pipe_without_a_reader_blocks_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    assert write(tmp_path / "pipe", raised()).counters.lost == 1
