"""Detect sources and channels without readings, once when they stop and once when they return."""

from __future__ import annotations

from typing import Any

from phasewatch.channels import CHANNELS, list_raw_fields
from phasewatch.live.silence import GUEST_SILENCE_TIMEOUT_NS, SILENCE_TIMEOUT_NS, SilenceDetector
from phasewatch.types import SourceKind

SECOND = 1_000_000_000


def row(source: SourceKind, at_ns: int, **missing: None) -> tuple[Any, ...]:
    """Return a reading of every field except the missing ones."""
    return (at_ns, at_ns, 0, *(None if spec.field in missing else 1 for spec in list_raw_fields(source)))


def empty(source: SourceKind, at_ns: int) -> tuple[Any, ...]:
    return (at_ns, at_ns, 0, *(None for _ in list_raw_fields(source)))


def test_a_silent_source_is_reported_once_and_once_when_it_returns() -> None:
    watch = SilenceDetector([SourceKind.PROC, SourceKind.QMP], (), 0)
    states = []
    for second in range(30):
        now_ns = second * SECOND
        watch.add_row(SourceKind.QMP, row(SourceKind.QMP, now_ns))
        watch.add_row(
            SourceKind.PROC, empty(SourceKind.PROC, now_ns) if 5 < second < 20 else row(SourceKind.PROC, now_ns)
        )
        states += [note.state for note in watch.find_changes(now_ns)]

    assert states == ["proc silent", "proc back"]


def test_a_single_silent_channel_is_reported() -> None:
    watch = SilenceDetector([SourceKind.QMP], (), 0)
    watch.add_row(SourceKind.QMP, row(SourceKind.QMP, SECOND))
    for second in (2, 3, 4, 5):
        watch.add_row(SourceKind.QMP, row(SourceKind.QMP, second * SECOND, vq_blk=None))

    (note,) = watch.find_changes(5 * SECOND)

    assert (note.state, note.channels) == ("qmp partly silent", ("qmp.vq_blk",))


def test_masked_channels_are_not_reported_as_silent() -> None:
    masked = [c.full_name for c in CHANNELS if c.source is SourceKind.QMP and c.full_name != "qmp.blk_rd_bytes"]
    watch = SilenceDetector([SourceKind.QMP], masked, 0)
    lone = {spec.field: None for spec in list_raw_fields(SourceKind.QMP) if spec.field != "blk_rd_bytes"}
    watch.add_row(SourceKind.QMP, row(SourceKind.QMP, 20 * SECOND, **lone))

    assert watch.find_changes(21 * SECOND) == []


def test_guest_fields_have_a_longer_timeout_that_stops_during_a_pause() -> None:
    masked = [c.full_name for c in CHANNELS if not c.full_name.startswith("qmp.bal_")]
    watch = SilenceDetector([SourceKind.QMP], masked, 0)

    assert watch.find_changes(SILENCE_TIMEOUT_NS + SECOND) == []
    watch.pause(GUEST_SILENCE_TIMEOUT_NS)
    assert watch.find_changes(GUEST_SILENCE_TIMEOUT_NS + SECOND) == []
    assert [note.is_whole for note in watch.find_changes(2 * GUEST_SILENCE_TIMEOUT_NS + SECOND)] == [True]
