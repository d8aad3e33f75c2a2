"""While a sweep runs it says how fast it is, how long it will take yet, and what went wrong and why."""

from __future__ import annotations

from pathlib import Path

from tests.factories.bundles import episode
from tests.factories.stores import put, put_bytes

from phasewatch.validate.sweep import SweepTally, sweep


def test_it_tells_rate_time_left_and_errors_by_reason(tmp_path: Path) -> None:
    for number in range(1, 5):
        put(tmp_path / "store", episode(number=number))
    first, second, *_ = sorted((tmp_path / "store").glob("*/*.zst"))
    put_bytes(first, b"no bundle")
    put_bytes(second, b"")
    verdicts = sweep(tmp_path / "store", tmp_path / "run", workers=1).verdicts
    tally = SweepTally(began_s=100.0)
    for verdict in verdicts:
        tally.add(verdict)

    said = tally.render_status(total=804, now_s=102.0)

    assert said == "2/s, 7 min left; 2 errored (zstd-magic 1, compressed-size 1)"


def test_nothing_wrong_is_not_mentioned() -> None:
    assert SweepTally(began_s=0.0).render_status(total=10, now_s=1.0) == "0/s, 0 s left"
