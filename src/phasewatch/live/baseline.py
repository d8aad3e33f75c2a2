"""Measure the baseline of a running VM while it is known clean, and read a baseline file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import CHANNELS
from phasewatch.errors import DataError
from phasewatch.features.normalise import HostBaseline, measure_baseline, parse_baseline
from phasewatch.live.discover import RunningVm
from phasewatch.live.session import WatchRequest, run_watch
from phasewatch.live.tracker import TrackerStep
from phasewatch.live.watcher import WatchCallbacks, WatchEndReason
from phasewatch.progress import NO_PROGRESS, Progress
from phasewatch.telemetry.base import AsyncClock
from phasewatch.types import BIN_NS

__all__ = ["measure_vm_baseline", "read_baseline_file"]

_MIN_BINS = 10 * 1_000_000_000 // BIN_NS  # ten seconds; `measure_baseline` skips a channel with fewer known bins
_CLOSING_DELAY_S = 2  # the last bins are closed one second after their end
_MAX_FILE_BYTES = 1 << 20


def measure_vm_baseline(
    machine: RunningVm,
    *,
    qmp: Path | None,
    minutes: float,
    progress: Progress = NO_PROGRESS,
    clock: AsyncClock | None = None,
) -> HostBaseline:
    """Watch a VM without a model, and compute the median and spread of each of its host-side channels.

    Args:
        machine: The VM, from `phasewatch.live.discover`.
        qmp: QMP socket that the user named; None tries the VM's own sockets.
        minutes: Duration.
        progress: Receives the seconds measured so far as task ``measure``.
        clock: Clock of the host; a test passes its own.

    Raises:
        DataError: If the VM ended first, or too little was measured.
        KeyboardInterrupt: If the measurement was interrupted: half of one must not pass for a whole one.
    """
    bins: list[NDArray[np.float32]] = []
    total_s = round(minutes * 60)

    def add_bin(step: TrackerStep) -> None:
        bins.append(step.bin.values)
        done_s = min(total_s, len(bins) * BIN_NS // 1_000_000_000)
        progress.update("measure", done_s, total_s, f"{done_s} of {total_s} s")

    request = WatchRequest(machine=machine, qmp=qmp, seconds=minutes * 60 + _CLOSING_DELAY_S)
    watched = run_watch(request, WatchCallbacks(on_step=add_bin), clock=clock).watched
    if watched.why is WatchEndReason.INTERRUPTED:
        raise KeyboardInterrupt
    if watched.why is not WatchEndReason.TIMEOUT or len(bins) < _MIN_BINS:
        measured_s = len(bins) * BIN_NS / 1e9
        raise DataError(
            f"{machine.name}: {watched.why} after {measured_s:g} s of {total_s} s, too short for a baseline; "
            "nothing was written: measure again"
        )
    columns = [i for i, channel in enumerate(CHANNELS) if channel.in_deployment]
    return measure_baseline(machine.host_id, [CHANNELS[i].full_name for i in columns], np.stack(bins)[:, columns])


def read_baseline_file(path: Path) -> HostBaseline:
    """Read a baseline file.

    Raises:
        DataError: If the file is absent, too large or malformed.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise DataError(f"{path}: cannot be read: {exc.strerror}; make it with `phasewatch baseline`") from exc
    if len(data) > _MAX_FILE_BYTES:
        raise DataError(f"{path}: more than {_MAX_FILE_BYTES:,} bytes, not a baseline file")
    return parse_baseline(data, file=str(path))
