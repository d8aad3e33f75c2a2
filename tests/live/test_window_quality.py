"""The quality of a window: incomplete sources and CPU contention."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import CHANNELS
from phasewatch.live.watcher import WindowQuality
from phasewatch.types import SourceKind

NAMES = [c.full_name for c in CHANNELS]


def bins(*, wait: float = 0.0, missing: tuple[str, ...] = ()) -> NDArray[np.float32]:
    values = np.zeros(len(NAMES), np.float32)
    values[NAMES.index("proc.vcpu_wait")] = wait
    for name in missing:
        values[NAMES.index(name)] = np.nan
    return values


def test_incomplete_sources_of_the_model_are_found() -> None:
    quality = WindowQuality(("proc.vcpu_run", "qmp.vq_blk"))
    for i in range(20):
        quality.add(bins(missing=("qmp.vq_blk", "netflow.out_pkts") if i < 3 else ()), began=False)

    assert quality.find_incomplete_sources() == (SourceKind.QMP,)


def test_contention_changes_after_eleven_windows_one_each_second() -> None:
    quality = WindowQuality(())
    told = []
    for wait in (0.0, *[0.3] * 10, 0.0, *[0.3] * 12, *[0.0] * 11):
        for _ in range(20):
            quality.add(bins(wait=wait), began=False)
        told.append((quality.update_contention(), quality.is_contended))

    assert [i for i, (changed, _) in enumerate(told) if changed] == [22, 34]
    assert told[22][1]
    assert not told[34][1]


def test_unknown_wait_times_are_no_contention() -> None:
    quality = WindowQuality(())
    quality.add(bins(missing=("proc.vcpu_wait",)), began=True)

    assert not quality.has_cpu_contention


def test_a_new_sequence_discards_earlier_bins() -> None:
    quality = WindowQuality(())
    quality.add(bins(wait=9.0), began=False)
    quality.add(bins(), began=True)

    assert quality.wait_cores == 0.0
