"""CPU time that other work took from a VM with a quota: four seconds, one reading a second."""

from __future__ import annotations

import numpy as np
import pytest

from phasewatch.bundle.contention import compute_quota_contention

S = 1e9


def contention(*, wait: list[float], used: list[float], quota: float = 0.5, throttled_s: float = 0.0) -> float:
    """Compute the contention of four seconds from what each of them waited and used, in seconds."""
    t_ns = np.arange(5) * S

    def count(per_second: list[float]) -> np.ndarray:
        return np.concatenate([[0.0], np.cumsum(per_second) * S])

    return compute_quota_contention(t_ns, count(wait), count(used), quota_cores=quota, throttled_s=throttled_s)


def test_vm_that_used_its_whole_quota_lost_nothing_although_it_waited() -> None:
    assert contention(wait=[0.5] * 4, used=[0.5] * 4) == 0.0


def test_waiting_for_the_quota_is_not_lost() -> None:
    assert contention(wait=[0.3] * 4, used=[0.2] * 4, throttled_s=1.2) == pytest.approx(0.0)


def test_waiting_without_throttling_while_quota_is_left_is_lost() -> None:
    assert contention(wait=[0.3] * 4, used=[0.2] * 4) == pytest.approx(0.3)


def test_no_more_is_lost_than_the_quota_had_left() -> None:
    assert contention(wait=[0.9] * 4, used=[0.4] * 4) == pytest.approx(0.1)


def test_quota_that_was_left_in_an_idle_second_does_not_count_for_a_busy_one() -> None:
    assert contention(wait=[0.0, 0.5, 0.0, 0.5], used=[0.0, 0.5, 0.0, 0.5]) == 0.0


def test_one_reading_says_nothing() -> None:
    one = np.zeros(1)

    assert np.isnan(compute_quota_contention(one, one, one, quota_cores=0.5, throttled_s=0.0))
