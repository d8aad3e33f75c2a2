"""Measure a running VM while it is known clean, and read what was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from phasewatch.channels import CHANNELS
from phasewatch.errors import DataError
from phasewatch.features.normalise import HostBaseline, measure_baseline, parse_baseline
from phasewatch.live.discover import RunningVm
from phasewatch.live.session import WatchRequest, run_watch
from phasewatch.live.tracker import TrackerStep
from phasewatch.live.watcher import ENDED_BY_INTERRUPT, ENDED_BY_TIMEOUT
from phasewatch.telemetry.base import AsyncClock
from phasewatch.types import BIN_NS

MIN_BASELINE_BINS = (
    10 * 1_000_000_000 // BIN_NS
)  # ten seconds; `measure_baseline` gives no number to a channel with fewer
MAX_BASELINE_BYTES = 1 << 20


def measure_vm_baseline(
    machine: RunningVm,
    *,
    qmp: Path | None,
    minutes: float,
    say: Callable[[str], None],
    tell: Callable[[int, int], None],
    clock: AsyncClock | None = None,
) -> HostBaseline:
    """Watch a machine without a model, and give the median and spread of its host channels.

    Args:
        machine: From `find`.
        qmp: A socket that the user named.
        minutes: How long.
        say: Takes lines for people.
        tell: Takes seconds measured, and of how many.
        clock: The host's, unless a test hands in another.

    Raises:
        DataError: If the machine ended first, or there was too little to measure.
        KeyboardInterrupt: If it was interrupted: half a measure would pass for a whole one.
    """
    bins: list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = []
    total_s = round(minutes * 60)

    def take(step: TrackerStep) -> None:
        bins.append(step.bin.values)
        tell(min(total_s, len(bins) * BIN_NS // 1_000_000_000), total_s)

    # Two seconds more: the last bins are closed one second after their end.
    report = run_watch(
        WatchRequest(machine=machine, qmp=qmp, seconds=minutes * 60 + 2), lambda event, news: None, say, clock=clock, on_step=take
    )  # fmt: skip
    if report.watched.why == ENDED_BY_INTERRUPT:
        raise KeyboardInterrupt
    if report.watched.why != ENDED_BY_TIMEOUT or len(bins) < MIN_BASELINE_BINS:
        raise DataError(
            f"{machine.name}: {report.watched.why} after {len(bins) / 2:g} s of {total_s} s, too short to measure what is "
            "usual; measure again, nothing was written"
        )
    host = [i for i, channel in enumerate(CHANNELS) if channel.in_deployment]
    return measure_baseline(machine.host_id, [CHANNELS[i].full_name for i in host], np.stack(bins)[:, host])


def read_baseline_file(path: Path) -> HostBaseline:
    """Read a file of `phasewatch baseline`.

    Raises:
        DataError: If it is absent, too large, or none.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BASELINE_BYTES + 1)
    except OSError as exc:
        raise DataError(f"{path}: cannot be read: {exc.strerror}; make it with `phasewatch baseline`") from exc
    if len(data) > MAX_BASELINE_BYTES:
        raise DataError(f"{path}: more than {MAX_BASELINE_BYTES:,} bytes, not a commissioning file")
    return parse_baseline(data, file=str(path))
