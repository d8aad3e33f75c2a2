"""The evidence of an alarm: channels that moved most against the VM's own quiet minutes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import CHANNEL_NAMES
from phasewatch.events.evidence import MAX_EVIDENCE, QuietReference
from phasewatch.features.normalise import HostBaseline
from phasewatch.types import WINDOW_BINS

CPU, WRITES = CHANNEL_NAMES.index("proc.cpu_user"), CHANNEL_NAMES.index("qmp.blk_wr_ops")


def bin_of(cpu: float, writes: float = 0.0, others: float = np.nan) -> NDArray[np.float32]:
    values = np.full(len(CHANNEL_NAMES), others, np.float32)
    values[CPU], values[WRITES] = cpu, writes
    return values


def watch_quietly(reference: QuietReference, windows: int, *, cpu: float = 0.1) -> None:
    for i in range(windows * WINDOW_BINS):
        reference.add(bin_of(cpu + 0.02 * (i % 2)), is_quiet=True)


def test_channel_that_moved_most_comes_first_with_its_usual_value() -> None:
    reference = QuietReference()
    watch_quietly(reference, 6)
    for _ in range(WINDOW_BINS):
        reference.add(bin_of(0.9, writes=50.0), is_quiet=False)

    first, second = reference.explain()

    assert (first.channel, first.value, first.usual, first.z) == (
        "qmp.blk_wr_ops",
        50.0,
        0.0,
        50.0,
    )  # scale: 1 a second
    assert second.channel == "proc.cpu_user"
    assert (second.value, second.usual) == (0.9, 0.11)
    assert second.z == 39.5  # (0.9 − 0.11) over the smallest scale of a channel in cores, 0.02


def test_channel_that_fell_has_a_negative_deviation() -> None:
    reference = QuietReference()
    watch_quietly(reference, 6, cpu=2.0)
    for _ in range(WINDOW_BINS):
        reference.add(bin_of(0.1), is_quiet=False)

    (evidence,) = reference.explain()

    assert evidence.z < -3


def test_there_is_no_evidence_without_half_a_minute_of_quiet_time() -> None:
    reference = QuietReference()
    watch_quietly(reference, 2)  # the newest quiet window does not count
    for _ in range(WINDOW_BINS):
        reference.add(bin_of(5.0), is_quiet=False)

    assert reference.explain() == ()


def test_time_with_an_alarm_is_not_quiet_time() -> None:
    reference = QuietReference()
    watch_quietly(reference, 6)
    for _ in range(20 * WINDOW_BINS):
        reference.add(bin_of(5.0), is_quiet=False)

    assert reference.explain()[0].usual == 0.11


def test_channels_that_the_model_does_not_read_are_no_evidence() -> None:
    reference = QuietReference(channels=["proc.cpu_user"])
    watch_quietly(reference, 6)
    for _ in range(WINDOW_BINS):
        reference.add(bin_of(0.9, writes=50.0), is_quiet=False)

    assert [e.channel for e in reference.explain()] == ["proc.cpu_user"]


def test_number_of_channels_is_bounded() -> None:
    reference = QuietReference()
    for _ in range(6 * WINDOW_BINS):
        reference.add(bin_of(0.0, others=0.0), is_quiet=True)
    for _ in range(WINDOW_BINS):
        reference.add(bin_of(1e9, others=1e9), is_quiet=False)

    assert len(reference.explain()) == MAX_EVIDENCE
    assert {e.z for e in reference.explain()} == {1000.0}


def test_baseline_replaces_the_quiet_minutes() -> None:
    baseline = HostBaseline(
        host_id="h", names=("proc.cpu_user",), median=np.array([0.5]), spread=np.array([0.1349]), bins=100
    )
    reference = QuietReference(baseline=baseline)
    for _ in range(WINDOW_BINS):
        reference.add(bin_of(1.5, writes=9.0), is_quiet=False)

    (evidence,) = reference.explain()

    assert (evidence.channel, evidence.usual, evidence.z) == ("proc.cpu_user", 0.5, 10.0)
