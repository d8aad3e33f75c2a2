"""The progress of a sweep: rate, time left, and errors by code."""

from __future__ import annotations

import re
from pathlib import Path

from tests.factories.bundles import episode
from tests.factories.progress import RecordedProgress
from tests.factories.stores import put, put_bytes

from phasewatch.validate.sweep import sweep


def test_progress_has_rate_time_left_and_errors_by_code(tmp_path: Path) -> None:
    for number in range(1, 5):
        put(tmp_path / "store", episode(number=number))
    first, second, *_ = sorted((tmp_path / "store").glob("*/*.zst"))
    put_bytes(first, b"no bundle")
    put_bytes(second, b"")
    progress = RecordedProgress()

    sweep(tmp_path / "store", tmp_path / "run", workers=1, progress=progress)

    assert [update[:3] for update in progress.updates] == [("validate", n, 4) for n in range(1, 5)]
    assert re.fullmatch(r"[\d,]+/s, \d+ s left; 2 errored \(zstd-magic 1, compressed-size 1\)", progress.updates[-1][3])


def test_progress_without_errors_has_rate_and_time_left_only(tmp_path: Path) -> None:
    put(tmp_path / "store", episode(number=1))
    progress = RecordedProgress()

    sweep(tmp_path / "store", tmp_path / "run", workers=1, progress=progress)

    assert re.fullmatch(r"[\d,]+/s, \d+ s left", progress.updates[-1][3])
