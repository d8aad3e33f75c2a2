"""A datasheet says in which sittings a corpus was recorded, on what, and how fast that was."""

from __future__ import annotations

from tools.datasheet_tables import EpisodeStart, group_recording_sessions, render_recording_sessions

OLD, NEW = (
    "phasewatch 0.1.0, guest image 0123",
    "phasewatch 0.1.0, guest image 0123, on AMD EPYC (family 23, model 1) at 1996 MHz",
)


def start(minute: float, boot_s: float | None = 4.0, host: str = "pc", recorder: str = OLD) -> EpisodeStart:
    return EpisodeStart(host_id=host, started_s=1_795_510_800 + 60 * minute, recorder=recorder, boot_s=boot_s)


def test_a_pause_or_another_processor_begins_a_sitting() -> None:
    found = group_recording_sessions([start(200), start(0), start(44), start(90), start(210, recorder=NEW)])

    assert [len(group) for group in found] == [2, 1, 1, 1]


def test_each_sitting_tells_its_processor_and_the_median_boot_of_each_host() -> None:
    head, rows = render_recording_sessions(
        [start(0, 4.0), start(1, 4.5), start(2, 9.0), start(3, None, "sim"), start(600, 7.0, recorder=NEW)],
        ["pc", "sim"],
    )

    assert head == ["from (UTC)", "episodes", "processor", "pc", "sim"]
    assert rows == [
        ["2026-11-24 09:00", "4", "not written down", "4.5", "·"],
        ["2026-11-24 19:00", "1", "AMD EPYC (family 23, model 1) at 1996 MHz", "7.0", "·"],
    ]
