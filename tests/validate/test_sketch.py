"""Near-copies: a recording that was altered a little has half of its sketch in common with the original."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np
import pytest
from tests.factories.bundles import episode, with_rows

from phasewatch.bundle.model import Episode, SourceRows
from phasewatch.types import SourceKind
from phasewatch.validate.verdict import SKETCH_SIZE, proc_sketch

WHOLE = episode((("clean", 60.0),), number=1)
FIELDS = WHOLE.rows[SourceKind.PROC].fields
RNG = np.random.default_rng(7)


def altered(fields: Collection[str], change: Callable[[np.ndarray], np.ndarray]) -> Episode:
    proc = WHOLE.rows[SourceKind.PROC]
    columns = tuple(change(c) if name in fields else c for name, c in zip(proc.fields, proc.columns, strict=True))
    return with_rows(WHOLE, replace(proc, columns=columns))


def kept(keep: Callable[[int], np.ndarray]) -> Episode:
    proc = WHOLE.rows[SourceKind.PROC]
    some = keep(len(proc))
    return with_rows(WHOLE, taken(proc, some))


def taken(proc: SourceRows, some: np.ndarray) -> SourceRows:
    return replace(
        proc, t_wall_ns=proc.t_wall_ns[some], t_mono_ns=proc.t_mono_ns[some], seq=proc.seq[some],
        columns=tuple(c[some] for c in proc.columns), present=proc.present[some],
    )  # fmt: skip


def are_near(a: Episode, b: Episode) -> bool:
    """Whether a split keeps them apart."""
    one, other = frozenset(proc_sketch(a)), frozenset(proc_sketch(b))
    return 2 * len(one & other) >= min(len(one), len(other)) > 0


NEAR = {
    "the same rows": WHOLE,
    "1 more on one counter": altered(["cpu_user_ns"], lambda c: c + 1),
    "1 more on each counter": altered(FIELDS, lambda c: c + 1),
    "as if QEMU had run for a day more": altered(FIELDS, lambda c: c + 86_400 * 10**9),
    "another offset from the middle on": altered(FIELDS, lambda c: c + 1_000 * (np.arange(len(c)) > 60)),
    "noise on one CPU time": altered(["vcpu_run_ns"], lambda c: c + RNG.integers(0, 3, len(c))),
    "noise on all that is no CPU time": altered(
        [f for f in FIELDS if not f.endswith("_ns")], lambda c: c + RNG.integers(0, 3, len(c))
    ),
    "each tenth row gone": kept(lambda n: np.arange(n) % 10 > 0),
    "the first quarter gone": kept(lambda n: np.arange(n) > n // 4),
    "rows in another order": kept(lambda n: np.arange(n)[::-1]),
}


@pytest.mark.parametrize("other", NEAR.values(), ids=NEAR)
def test_a_copy_that_was_altered_a_little_is_near(other: Episode) -> None:
    assert are_near(WHOLE, other)


def test_two_recordings_of_the_same_work_are_not_near() -> None:
    others = [episode((("clean", 60.0),), number=number) for number in range(2, 8)]

    assert not any(are_near(WHOLE, other) for other in others)
    assert all(len(proc_sketch(other)) == SKETCH_SIZE for other in others)


def unread(whole: Episode, fields: Collection[str]) -> Episode:
    proc = whole.rows[SourceKind.PROC]
    gone = np.array([name in fields for name in proc.fields])
    columns = tuple(np.zeros_like(c) if lost else c for c, lost in zip(proc.columns, gone.tolist(), strict=True))
    return with_rows(whole, replace(proc, columns=columns, present=proc.present & ~gone))


def test_where_no_cpu_time_of_a_thread_was_read_all_fields_together_tell() -> None:
    lost = ("vcpu_run_ns", "vcpu_wait_ns", "main_run_ns", "aux_run_ns")
    one, other = unread(WHOLE, lost), unread(altered(FIELDS, lambda c: c + 17), lost)

    assert are_near(one, other)
    assert not are_near(one, unread(episode((("clean", 60.0),), number=2), lost))


def test_an_episode_without_readings_of_proc_has_no_sketch() -> None:
    assert proc_sketch(with_rows(WHOLE, without=[SourceKind.PROC])) == ()
    assert proc_sketch(kept(lambda n: np.arange(n) < 2)) == ()
